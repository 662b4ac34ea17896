"""Adapters merged on load, held against PEFT: against its merged model, and against the one with the adapter apart."""

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from hooklens import HookedCausalLM
from hooklens.adapters import open_adapter, open_checkpoint
from hooklens.adapters.lora import merged as merging
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import load_reference
from tests.adapters.lora.made import IDS, Pair, adapt, load_adapted, make_pair, save_adapter, save_base
from tests.checkpoints import edit_config, load_apart

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fused heads": ("gpt_neox", {"target_modules": "all-linear"}),
    "renamed unembedding": ("gpt_neox", {"target_modules": ["embed_in", "lm_head", "embed_out", "dense"]}),
    "grouped heads, rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"v_proj": 9, "layers.0.mlp.down_proj": 1},
        },
    ),
    "modules saved whole": ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm", "up_proj"]}),
    "DoRA": ("llama", {"target_modules": ["q_proj", "o_proj", "gate_proj", "embed_tokens"], "use_dora": True}),
    "fused groups": ("falcon", {"target_modules": "all-linear"}),
    "fused groups, DoRA, biases": ("falcon", {"target_modules": "all-linear", "use_dora": True, "bias": "all"}),
    "[in, out], all biases": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "all"}),
    "[in, out], DoRA": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "bias": "lora_only"}),
    "[in, out], learned positions": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wpe"]}),
    "bias of its own": ("gpt_neox", {"target_modules": ["query_key_value", "dense"], "lora_bias": True}),
    "fused gate": ("phi3", {"target_modules": "all-linear"}),
    "experts by module": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "experts and router": ("qwen3_moe", {"target_modules": [], "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "one tensor of experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "square experts": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}
TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "unembedding": {"target_modules": ["lm_head"]},
    "embedding, DoRA": {"target_modules": ["embed_tokens"], "use_dora": True},
    "embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "unembedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert (found - expected).abs().max().item() < tolerance


@pytest.fixture(autouse=True)
def _in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of some thousand entries are merged in blocks of several, as those of real models are."""
    monkeypatch.setattr(merging, "_MOST_AT_ONCE", 300)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    model, lora = CASES[case]
    pair = make_pair(tmp_path, model, **lora)
    apart = load_adapted(pair, torch.float32)
    ours = logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter))
    assert_near(ours, logits_of(apart), 1e-5)
    assert_near(ours, logits_of(load_adapted(pair, torch.float32).merge_and_unload()), 1e-5)
    assert (ours - logits_of(HookedCausalLM.from_pretrained(pair.base))).abs().max() > 0.1
    # float64 leaves rounding no room to hide a difference. Weights are compared, since transformers computes norms in
    # float32 whatever the dtype.
    exact = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter, dtype=torch.float64).named_weights()
    theirs = HookedCausalLM.from_hf(apart.double().merge_and_unload()).named_weights()
    assert exact.keys() == theirs.keys()
    for name, weight in exact.items():
        assert_near(weight, theirs[name], 1e-13)


@pytest.mark.parametrize("case", TIED)
def test_what_is_tied_parts_where_an_adapter_changes_one_side(case: str, tmp_path: Path) -> None:
    """PEFT, once it merges, changes the one tensor of both, and computes something else than was trained."""
    pair = make_pair(tmp_path, "llama tied", **TIED[case])
    expected = logits_of(load_adapted(pair, torch.float32))
    ours = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)
    assert not ours.cfg.tied_unembed
    assert_near(logits_of(ours), expected, 1e-5)
    ours.save_pretrained(tmp_path / "merged")
    assert_near(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, 1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"]},
    ],
    ids=["both", "both whole", "neither"],
)
def test_what_an_adapter_changes_alike_stays_tied(lora: dict[str, Any], tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama tied", **lora)
    ours = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)
    assert ours.cfg.tied_unembed
    assert_near(logits_of(ours), logits_of(load_adapted(pair, torch.float32)), 1e-5)


def test_the_embedding_alone_under_the_unembeddings_name(tmp_path: Path) -> None:
    """Some writers keep a tied tensor under the name of the unembedding."""
    pair = make_pair(tmp_path, "llama tied", target_modules=["embed_tokens"])
    expected = logits_of(load_adapted(pair, torch.float32))
    state = load_apart(pair.base / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, pair.base / "model.safetensors")
    assert_near(logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)), expected, 1e-5)


def test_a_base_without_the_unembedding_beside_its_layers(tmp_path: Path) -> None:
    """Saved from the base model alone, names lack a prefix that the adapter's have."""
    pair = make_pair(tmp_path, "llama tied", target_modules=["q_proj", "embed_tokens"])
    expected = logits_of(load_adapted(pair, torch.float32))
    state = {name.removeprefix("model."): one for name, one in load_apart(pair.base / "model.safetensors").items()}
    save_file(state, pair.base / "model.safetensors")
    assert_near(logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)), expected, 1e-5)


def test_experts_one_by_one_as_adapters_of_older_transformers_name_them(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral")
    folder = save_adapter(tmp_path / "adapter", adapt(load_reference(base, torch.float32), target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(5)
    state = load_apart(folder / "adapter_model.safetensors")
    for layer in range(2):
        for expert in range(4):
            for name, (d_out, d_in) in {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}.items():
                path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                state[f"{path}.lora_A.weight"] = 0.2 * torch.randn(4, d_in, generator=generator)
                state[f"{path}.lora_B.weight"] = 0.2 * torch.randn(d_out, 4, generator=generator)
    save_file(state, folder / "adapter_model.safetensors")
    config = (folder / "adapter_config.json").read_text(encoding="utf-8")
    targets = config.replace('"q_proj"', '"q_proj", "w1", "w2", "w3"')
    (folder / "adapter_config.json").write_text(targets, encoding="utf-8")
    ours = logits_of(HookedCausalLM.from_pretrained(base, adapter=folder))
    assert_near(ours, logits_of(load_adapted(Pair(base, folder), torch.float32)), 1e-5)


def set_version(pair: Pair, version: str | None) -> None:
    path = pair.adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "peft_version": version}))


def test_a_version_that_is_none_is_refused(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["q_proj"])
    set_version(pair, "newest")
    with pytest.raises(UnsupportedModelError, match=r"peft_version='newest': expected a version"):
        HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)


def test_in_memory_the_peft_that_is_there_says_how_experts_lie(tmp_path: Path) -> None:
    """It goes on with the version in the file, and computes in its own way."""
    pair = make_pair(tmp_path, "qwen3_moe", target_modules=[], target_parameters=EXPERTS[:1])
    set_version(pair, "0.18.0")
    live = load_adapted(pair, torch.float32)
    assert_near(logits_of(HookedCausalLM.from_hf(live)), logits_of(live), 1e-5)


@pytest.mark.parametrize("version", [None, "0.18.0", "0.18.1.dev0"])
def test_square_experts_as_peft_before_0_19_writes_them(version: str | None, tmp_path: Path) -> None:
    """Such files have the right shapes either way, and were read as those of later versions, so transposed."""
    pair = make_pair(tmp_path, "qwen3_moe", target_modules=[], target_parameters=EXPERTS[:1])
    set_version(pair, version)
    changes = load_file(pair.adapter / "adapter_model.safetensors")
    model = load_reference(pair.base, torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj"):
                place = f"base_model.model.{name.removesuffix('.gate_up_proj')}."
                A = changes[f"{place}lora_A.weight"].double().reshape(4, 4, 32)
                B = changes[f"{place}lora_B.weight"].double().reshape(32, 4, 4)
                # As ParamWrapper.get_delta_weight of 0.18 has it; the scale is 6 / 4.
                parameter.add_(torch.einsum("ore,eri->eio", B, A) * 1.5)
    expected = HookedCausalLM.from_hf(model).named_weights()
    ours = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter, dtype=torch.float64).named_weights()
    for name, weight in ours.items():
        assert_near(weight, expected[name], 1e-13)


def test_several_adapters_are_added_one_after_the_other(tmp_path: Path) -> None:
    """With DoRA the order would count, did each not measure lengths on the base with its own change alone."""
    base = save_base(tmp_path / "base", "llama")
    model = adapt(load_reference(base, torch.float32), name="one", target_modules=["q_proj", "up_proj"], use_dora=True)
    model = adapt(model, name="two", seed=2, target_modules=["q_proj", "v_proj"], r=3)
    model = adapt(model, name="three", seed=3, target_modules=["q_proj"], use_dora=True)
    save_adapter(tmp_path, model)
    names = ["one", "two", "three"]
    merged = model.merge_and_unload(adapter_names=names)
    ours = HookedCausalLM.from_pretrained(base, adapter=[tmp_path / name for name in names])
    assert_near(logits_of(ours), logits_of(merged), 1e-5)


def test_several_adapters_with_the_same_tensor_whole_are_refused(tmp_path: Path) -> None:
    first = make_pair(tmp_path / "1", "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    second = adapt(
        load_reference(first.base, torch.float32), seed=9, target_modules=["v_proj"], modules_to_save=["lm_head"]
    )
    other = save_adapter(tmp_path / "2", second)
    with pytest.raises(UnsupportedModelError, match=r"several hold 'lm_head\.weight' whole, .* merge one of them"):
        HookedCausalLM.from_pretrained(first.base, adapter=[first.adapter, other])
    # The same twice is no contradiction.
    HookedCausalLM.from_pretrained(first.base, adapter=[first.adapter, first.adapter])


def test_bfloat16_is_rounded_once_as_peft_rounds(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules="all-linear")
    theirs = HookedCausalLM.from_hf(load_adapted(pair, torch.bfloat16).merge_and_unload())
    load_reference(pair.base, torch.bfloat16).save_pretrained(pair.base)
    ours = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)
    assert ours.dtype == torch.bfloat16
    assert all(torch.equal(weight, theirs.named_weights()[name]) for name, weight in ours.named_weights().items())
    # In a wider dtype nothing of the change is lost.
    wide = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter, dtype="float32")
    assert_near(logits_of(wide), logits_of(load_adapted(pair, torch.float32)), 1e-5)


def test_what_is_saved_is_a_plain_model(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt_neox", target_modules="all-linear")
    HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter).save_pretrained(tmp_path / "merged")
    merged = load_adapted(pair, torch.float32).merge_and_unload()
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert saved.keys() == load_file(pair.base / "model.safetensors").keys()
    assert_near(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(merged), 1e-5)


def test_some_layers_and_another_length(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt2", target_modules=["c_attn", "c_fc", "wpe"])
    whole = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)
    some = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter, layers=[1], n_ctx=20)
    for name, weight in some.named_weights().items():
        theirs = whole.named_weights()[name.replace("blocks.0.", "blocks.1.")]
        assert torch.equal(weight, theirs[:20] if name == "pos_embed.W_pos" else theirs), name


def test_quantised_projections_are_those_of_the_merged_model(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pair = make_pair(tmp_path, "llama", target_modules="all-linear")
    HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter).save_pretrained(tmp_path / "merged")
    ours = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter, quantize="int8")
    assert torch.equal(logits_of(ours), logits_of(HookedCausalLM.from_pretrained(tmp_path / "merged", quantize="int8")))


def test_what_is_merged_cannot_stay_as_it_was_quantised(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["q_proj"])
    with pytest.raises(UnsupportedModelError, match=r"quantize='keep'.* rounded again; leave quantize out"):
        HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter, quantize="keep")


def test_the_change_of_one_tensor_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, "qwen3_moe", target_modules=["q_proj", "v_proj"], target_parameters=EXPERTS)
    made: list[weakref.ref[torch.Tensor]] = []
    found = merging.lora_delta

    def watched(*given: Any) -> torch.Tensor:
        assert not [one for one in made if one() is not None]
        delta = found(*given)
        made.append(weakref.ref(delta))
        return delta

    monkeypatch.setattr(merging, "lora_delta", watched)
    monkeypatch.setattr(merging, "_MOST_AT_ONCE", 2**18)
    for _ in open_checkpoint(pair.base, adapters=[open_adapter(pair.adapter)]).tensors():
        pass
    # Of each layer two projections, and of each expert two maps, of which one is two tensors on disk.
    assert len(made) == 2 * (2 + 4 * 3)


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    ],
    ids=["LoRA", "DoRA", "[in, out], DoRA"],
)
def test_no_map_is_in_memory_in_the_dtype_that_it_is_merged_in(
    model: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    """Loading a model in bfloat16 took more than twice its size: what its maps were on the way, in float32."""
    pair = make_pair(tmp_path, model, **lora)
    state = {name: one.bfloat16() for name, one in load_apart(pair.base / "model.safetensors").items()}
    save_file(state, pair.base / "model.safetensors")
    checkpoint = open_checkpoint(pair.base, adapters=[open_adapter(pair.adapter)], dtype=torch.bfloat16)
    sizes = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32 and not out.is_meta:
                sizes.append(out.numel())
            return out

    with Watching():
        assert {tensor.dtype for _, tensor in checkpoint.tensors()} == {torch.bfloat16}
    assert 200 < max(sizes) <= merging._MOST_AT_ONCE
    assert len(sizes) > 100


def test_merging_needs_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, "llama", target_modules=["q_proj"])
    expected = logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert torch.equal(logits_of(HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)), expected)


def quantise_rows(folder: Path) -> None:
    """Give the projections of a base 8 bits and a scale for each row, as bitsandbytes stores them."""
    state = load_apart(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("proj.weight")]:
        scale = state[name].abs().amax(dim=1)
        state[name.removesuffix("weight") + "SCB"] = scale
        state[name] = (state[name] * 127 / scale[:, None]).round().to(torch.int8)
    save_file(state, folder / "model.safetensors")
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def test_a_quantised_base_is_merged_dequantised(tmp_path: Path) -> None:
    """As QLoRA's are: the change is added to what the entries stand for, and not rounded to few bits again."""
    pair = make_pair(tmp_path, "llama", target_modules="all-linear")
    quantise_rows(pair.base)
    plain = HookedCausalLM.from_pretrained(pair.base)
    plain.save_pretrained(tmp_path / "plain" / "base")
    ours = HookedCausalLM.from_pretrained(pair.base, adapter=pair.adapter)
    expected = HookedCausalLM.from_pretrained(tmp_path / "plain" / "base", adapter=pair.adapter, dtype=ours.dtype)
    assert torch.equal(logits_of(ours), logits_of(expected))
    assert not torch.allclose(logits_of(ours), logits_of(plain))
