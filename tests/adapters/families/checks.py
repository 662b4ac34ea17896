"""What every family of checkpoints must show, on tiny models of transformers with random parameters.

`save` writes one; `check` compares what HookLens makes of the folder with transformers, in everything that a family
decides: logits, dtypes, padding, caches, generation, and the way back to disk. `verify_folder` is `hooklens.verify`.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hooklens
from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint
from hooklens.adapters.choice import find_family
from hooklens.adapters.families import load_families
from hooklens.config import HookedConfig
from hooklens.verification.conformance.models import attention_of, write_tiny_checkpoint
from hooklens.verification.reference import float64_by_default, routes, typical_error
from tests.annotations import unchecked

D_VOCAB = 97
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-9}
LENGTHS = (11, 19, 14)
N_ROWS_IN_BFLOAT16 = 8

_attention_of_kind: dict[tuple[type, bool], str] = {}


def save(folder: Path, model_type: str, *, seed: int = 0, spread: float = 0.2, **config: Any) -> Path:
    """Write a tiny model of a family, every parameter random: norm weights around 1, all others around 0.

    Args:
        folder: where to.
        model_type: the family's name in transformers.
        seed: of the parameters.
        spread: standard deviation of what is around 0.
        config: the rest of `config.json`.
    """
    write_tiny_checkpoint(folder, {"model_type": model_type, **config}, seed=seed, spread=spread)
    return folder


def load_reference(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' model in a dtype, experts computed one by one: the grouped product refuses float64."""
    config = AutoConfig.from_pretrained(folder)
    options = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    # `attention_of` builds a model to find out, and the answer is the class's, but for a cap.
    kind = type(config), getattr(config, "attn_logit_softcapping", None) is not None
    if kind not in _attention_of_kind:
        _attention_of_kind[kind] = attention_of(config)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=_attention_of_kind[kind], **options
    )
    return model.eval()


def cases(variants: Iterable[str]) -> list[Any]:
    """Variants of a family, and whether each is held against transformers as a whole (see `check`).

    The first is by default, the others among the long tests.
    """
    first, *others = variants
    briefly = [pytest.param(name, False, id=f"{name}, briefly") for name in others]
    return [
        pytest.param(first, True, id=first),
        *briefly,
        *(pytest.param(name, True, id=name, marks=pytest.mark.long) for name in others),
    ]


def check(
    folder: Path,
    *,
    whole: bool = True,
    float64: float | None = TOLERANCE[torch.float64],
    generates: bool = True,
    counts_padding: bool = False,
) -> HookedCausalLM:
    """Hold a family's folder against transformers in everything that a family decides; give the model.

    Args:
        folder: the checkpoint.
        whole: False leaves out what another variant of the family shows as well once the network is the right one:
            bfloat16, float32 where float64 is compared, generation, and models of transformers that are taken over,
            given, or loaded from what is saved.
        float64: how near float64 logits come, as a share of their standard deviation; None: the reference cannot run
            in float64. Where transformers computes parts in float32 whatever the dtype, 1e-5.
        generates: whether transformers' own cached generation is right, so that it can be compared with.
        counts_padding: whether something in transformers counts padding on the left as positions, whatever positions
            are given: then padded rows are compared with the same rows alone.
    """
    with unchecked():
        model = HookedCausalLM.from_pretrained(folder)
        reference = load_reference(folder, torch.float32)
        if whole or float64 is None:
            check_logits(model, reference, TOLERANCE[torch.float32], counts_padding=counts_padding)
        check_saving(model, folder)
        check_written_config(model, reference, folder)
        check_caches(model)
        if whole:
            check_other_models(model, reference, folder / "saved")
            check_bfloat16(folder)
            if generates:
                check_generation(model, reference)
        if float64 is not None:
            exact = HookedCausalLM.from_pretrained(folder, dtype=torch.float64)
            # From here on the reference is float64.
            with float64_by_default():
                check_logits(exact, reference.double(), float64, counts_padding=counts_padding)
    return model


def batch(side: str) -> tuple[Tensor, Tensor]:
    """Rows of several lengths, padded on a side: ids and mask."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(LENGTHS):
        place = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[row, place] = torch.randint(D_VOCAB, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


@torch.no_grad()
def check_logits(
    model: HookedCausalLM, reference: PreTrainedModel, tolerance: float, *, counts_padding: bool = False
) -> None:
    """Rows alone and padded on both sides, at their real positions."""
    scale: Tensor | None = None
    for side in ("right", "left"):
        ids, mask = batch(side)
        ours = model(ids, attention_mask=mask)
        for row, length in enumerate(LENGTHS):
            alone = ids[row, mask[row].bool()][None]
            expected = reference(alone, use_cache=False).logits[0]
            scale = expected.std() if scale is None else scale
            for found in (model(alone)[0], ours[row, mask[row].bool()]):
                error = (found - expected).abs().max() / scale.clamp(min=1.0)
                assert found.shape == (length, expected.shape[-1])
                assert error <= tolerance, f"{side}, row {row}: {error}"
        if counts_padding and side == "left":
            continue
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        theirs = reference(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        # Some mask with the lowest float64 before a softmax in float32: padding is no number then, and spreads.
        if theirs.dtype == torch.float64 and theirs[mask.bool()].isnan().any():
            continue
        error = (ours - theirs)[mask.bool()].abs().max() / scale.clamp(min=1.0)
        assert error <= tolerance, f"{side}-padded batch: {error}"


@torch.no_grad()
def check_bfloat16(folder: Path) -> None:
    """The error against float64 is at most 1.2 times transformers', as `hooklens.verify` measures it."""
    ids = torch.randint(D_VOCAB, (N_ROWS_IN_BFLOAT16, 16), generator=torch.Generator().manual_seed(2))
    reference = load_reference(folder, torch.bfloat16)
    model = HookedCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = model(ids).double()
    theirs = reference(ids, use_cache=False).logits.double()
    with float64_by_default():
        exact = reference.double()(ids, use_cache=False).logits
    error = typical_error(ours, exact, routes=routes(model))
    allowed = 1.2 * typical_error(theirs, exact, routes=routes(model))
    assert error <= allowed, f"{error} against {allowed}"


def check_saving(model: HookedCausalLM, folder: Path) -> None:
    """What is saved has the same tensors bit for bit and the same network."""
    saved = folder / "saved"
    model.save_pretrained(saved)
    before, after = load_file(folder / "model.safetensors"), load_file(saved / "model.safetensors")
    weights = {name: tensor for name, tensor in before.items() if not is_weightless(folder, name)}
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) and weights[name].dtype == after[name].dtype for name in weights)
    assert open_checkpoint(saved).cfg == model.cfg


@torch.no_grad()
def check_written_config(model: HookedCausalLM, reference: PreTrainedModel, folder: Path) -> None:
    """A config that nobody wrote: the network's own, in this family's words. With the weights it is the network."""
    family = find_family(json.loads((folder / "config.json").read_text()), load_families(), where="here")
    config = family.write_config(model.cfg.replace(origin=None))
    assert family.read_config(config, where="here") == model.cfg
    rebuilt = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    rebuilt.load_state_dict(reference.state_dict())
    ids = batch("right")[0][:1]
    check_near(rebuilt(ids).logits, reference(ids).logits)


@torch.no_grad()
def check_other_models(model: HookedCausalLM, reference: PreTrainedModel, saved: Path) -> None:
    """What transformers loads from a saved folder, is given, or gives has the same logits."""
    ids = batch("right")[0][:1]
    expected = reference(ids).logits
    check_near(load_reference(saved, torch.float32)(ids).logits, expected)
    taken_over = HookedCausalLM.from_hf(reference)
    assert taken_over.cfg == model.cfg
    theirs, ours = taken_over.state_dict(), model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    check_near(taken_over(ids), expected)
    # transformers may run experts another way here than for the reference.
    check_near(model.to_hf()(ids).logits, expected)


def check_near(found: Tensor, expected: Tensor) -> None:
    """float32 logits of equal tensors, which may lie otherwise in memory, so that products sum in another order."""
    error = (found - expected).abs().max() / expected.std().clamp(min=1.0)
    assert error <= TOLERANCE[torch.float32], error


def is_weightless(folder: Path, name: str) -> bool:
    """Whether the family says that a tensor of its files holds no weight."""
    config = json.loads((folder / "config.json").read_text())
    return find_family(config, load_families(), where="here").is_weightless(name)


@torch.no_grad()
def check_caches(model: HookedCausalLM) -> None:
    """A frozen prefix and steps one by one give what the whole row gives."""
    if model.depends_on_length(max(LENGTHS)):
        return
    ids = batch("right")[0][1:2]
    whole = model(ids)[0]
    frozen = model.prefill(ids[:, :9])
    after = model(ids[:, 9:], past_kv_cache=frozen)[0]
    grown = model.prefill(ids[:, :9]).unfreeze()
    steps = [model(ids[:, i : i + 1], past_kv_cache=grown)[0] for i in range(9, ids.shape[1])]
    for found in (after, torch.cat(steps)):
        error = (found - whole[9:]).abs().max() / whole.std().clamp(min=1.0)
        assert error <= TOLERANCE[torch.float32], error


@torch.no_grad()
def check_generation(model: HookedCausalLM, reference: PreTrainedModel) -> None:
    """Greedy continuations, cached, are transformers'."""
    ids = batch("right")[0][1:2, :12]
    theirs = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = model.generate(ids, max_new_tokens=10, do_sample=False, stop_at_eos=False, verbose=False)
    assert torch.equal(ours, theirs)


def check_reading(folder: Path) -> HookedCausalLM:
    """What HookLens reads out of a `config.json`, edited by hand say, is what transformers reads; give the model."""
    with unchecked():
        model = HookedCausalLM.from_pretrained(folder, dtype=torch.float32)
        check_logits(model, load_reference(folder, torch.float32), TOLERANCE[torch.float32])
    return model


def verify_folder(folder: Path) -> None:
    """`hooklens.verify` of the folder; for tests marked `slow`."""
    with unchecked():
        report = hooklens.verify(folder, progress=False)
    assert report.passed, str(report)


def read_config(config: Mapping[str, Any]) -> HookedConfig:
    """The network that the contents of a `config.json` describe; a key that is not known is a warning."""
    return find_family(config, load_families(), where="here").read_config(config, where="here")


def read_published(config: Mapping[str, Any], n_parameters: int) -> None:
    """A published `config.json`: every key is known, and the network has the published number of parameters.

    Args:
        config: its contents.
        n_parameters: tied ones counted once.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfg = read_config(config)
    shapes = {name: weight.shape for name, weight in cfg.description.weights.items()}
    if cfg.tied_unembed:
        del shapes["unembed.W_U"]
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == n_parameters


def check_defaults(model_type: str, **sizes: Any) -> None:
    """A config that is silent but of sizes means what transformers takes it for, written out in full.

    Args:
        model_type: the family's name in transformers.
        sizes: the keys that a config must have.
    """
    silent = {"model_type": model_type, **sizes}
    assert read_config(silent) == read_config(AutoConfig.for_model(**silent).to_dict())
