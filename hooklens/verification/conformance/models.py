"""Models to run the suite on: tiny networks around a part, and tiny checkpoints of a family."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hooklens.arguments import read_one_of, read_seed, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig, NormConfig, PartConfig, RotaryPositions
from hooklens.errors import InputError
from hooklens.model.parts.part import find_part
from hooklens.optional import import_package

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Place = Literal["attn", "mlp"]

# Fresh weights are small, and many of them 0 or 1: that would hide what is done with them.
_SPREAD = 0.3


def of_part(
    part: PartConfig, *, place: Place = "mlp", cfg: HookedConfig | None = None, seed: int = 0
) -> dict[str, Callable[[], HookedCausalLM]]:
    """Small networks around a part of one's own, every weight random, for `models=` of the suite.

    Args:
        part: what the config asks for the part by; the module that defines it has been imported.
        place: where it stands.
        cfg: the network around it; None: two layers with an RMSNorm, rotary positions and grouped queries.
        seed: draws the weights.

    Returns:
        Functions that make the networks: blocks in sequence; in parallel; one with the part in the second layer only;
        and one where nothing else stands in the blocks.

    Raises:
        InputError: no part, or no place for one.
        ConfigError: no part of the kind is known there.
    """
    require(part, kind=PartConfig, what="of_part: part", expected="a PartConfig")
    read_one_of(place, what="of_part: place", options=("attn", "mlp"))
    read_seed(seed, what="of_part: seed")
    base = _make_config() if cfg is None else require(
        cfg, kind=HookedConfig, what="of_part: cfg", expected="a HookedConfig or None"
    )  # fmt: skip
    find_part(f"blocks.{{i}}.{place}", part)
    other = "mlp" if place == "attn" else "attn"
    layouts: dict[str, dict[str, Any]] = {
        "in sequence": {place: part, "wiring": "sequential"},
        "in parallel": {place: part, "wiring": "parallel"},
        "in the last layer": {place: (*[getattr(base.block(0), place)] * (base.n_layers - 1), part)},
        "alone": {place: part, other: None},
    }
    if base.n_layers < 2:
        del layouts["in the last layer"]
    return {
        f"{part.kind} {layout}": partial(_draw_model, base.replace(**changes), seed)
        for layout, changes in layouts.items()
    }


def _make_config() -> HookedConfig:
    return HookedConfig(
        d_model=16,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_head=4,
        d_mlp=24,
        d_vocab=31,
        n_ctx=32,
        norm=NormConfig(kind="rms", eps=1e-6, bias=False),
        positions=RotaryPositions(dim=4),
    )


@torch.no_grad()
def _draw_model(cfg: HookedConfig, seed: int) -> HookedCausalLM:
    with torch.random.fork_rng(devices=[]):
        model = HookedCausalLM(cfg)
    model.initialize(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(_SPREAD * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def of_family(
    configs: Mapping[str, Mapping[str, Any]], *, seed: int = 0, spread: float = 0.2
) -> dict[str, Callable[[], Path]]:
    """Tiny checkpoints of a family, every parameter random, for `models=` of the suite.

    Each is a folder that transformers writes, in a temporary directory that goes with the function.

    Args:
        configs: by name, the contents of a `config.json` with its `model_type`; sizes should be tiny. What a family's
            checkpoints can have should be in one of them.
        seed: draws the parameters.
        spread: standard deviation of what is around 0.

    Raises:
        InputError: no configurations, or one without `model_type`.
        MissingDependencyError: transformers is not installed.
    """
    expected = "the contents of a config.json by name"
    found: Mapping[str, Any] = require(configs, kind=Mapping, what="of_family: configs", expected=expected)
    if not found:
        raise InputError(f"of_family: configs is empty; expected {expected}")
    for name, config in found.items():
        if not isinstance(config, Mapping) or "model_type" not in config:
            raise InputError(f"of_family: {name!r} has no 'model_type'; expected {expected}")
    read_seed(seed, what="of_family: seed")
    return {str(name): _TinyCheckpoint(dict(config), seed, spread) for name, config in found.items()}


class _TinyCheckpoint:
    """Writes a checkpoint when it is first asked for, and keeps its folder as long as itself."""

    def __init__(self, config: dict[str, Any], seed: int, spread: float) -> None:
        self._config, self._seed, self._spread = config, seed, spread
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="hooklens-conformance-")
            write_tiny_checkpoint(Path(self._folder.name), self._config, seed=self._seed, spread=self._spread)
        return Path(self._folder.name)


@torch.no_grad()
def write_tiny_checkpoint(folder: Path, config: Mapping[str, Any], *, seed: int = 0, spread: float = 0.2) -> None:
    """Write a model of transformers, every parameter random: norm weights around 1, all others around 0.

    Args:
        folder: where to.
        config: the contents of its `config.json`.
        seed: of the parameters.
        spread: standard deviation of what is around 0.
    """
    transformers = import_package("transformers")
    made = transformers.AutoConfig.for_model(**config)
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention_of(made))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_weight = name.endswith("weight") and parameter.mean() > 0.5
        parameter.copy_(1 + 0.3 * noise if is_norm_weight else spread * noise)
    for name, buffer in model.named_buffers():
        # Corrections of routers are buffers that are saved.
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(spread * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder)


def attention_of(config: "PretrainedConfig") -> str:
    """`"sdpa"`, or `"eager"` for families that transformers has no other attention for.

    Nor has it one for scores with a soft cap: versions before 5.21 take `sdpa` all the same, and leave the cap out.
    """
    transformers = import_package("transformers")
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    for attention in ("eager",) if is_capped else ("sdpa", "eager"):
        try:
            with torch.device("meta"):
                transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        except (ValueError, ImportError):
            continue
        return attention
    raise InputError(f"transformers has no attention for {type(config).__name__}")
