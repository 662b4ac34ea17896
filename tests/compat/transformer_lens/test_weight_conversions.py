"""Converted weights, loaded into a network of 2.x's config, compute what the model they are of computes."""

import importlib
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from hooklens import HookedCausalLM
from hooklens.compat.transformer_lens import HookedTransformer, HookedTransformerConfig
from hooklens.compat.transformer_lens.loading_from_pretrained import fill_missing_keys
from hooklens.compat.transformer_lens.pretrained import weight_conversions
from tests.adapters.formats import test_early_layouts as early
from tests.adapters.formats import test_nanogpt as nanogpt
from tests.adapters.formats.test_transformer_lens import CONFIG, make_state

IDS = torch.arange(3, 11)[None]
SMALL: dict[str, Any] = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 12,
}  # fmt: skip
GPT2 = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=4)
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2,
    "neox": GPTNeoXConfig(**SMALL, rotary_pct=0.5),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=4),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2),
}
ALL = [
    "apertus", "bert", "bloom", "coder", "gemma", "gpt2", "gpt_oss", "gptj", "hubert", "llama", "mingpt", "mistral",
    "mixtral", "nanogpt", "neel_solu_old", "neo", "neox", "opt", "phi", "phi3", "qwen", "qwen2", "qwen3", "t5",
]  # fmt: skip


def make(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.3, 0.3)
    return model


def run(state: dict[str, Any], cfg: HookedTransformerConfig) -> torch.Tensor:
    """As 2.x loads them: into a fresh model, what is missing is the model's own."""
    model = HookedTransformer(cfg, move_to_device=False)
    model.load_state_dict(fill_missing_keys(model, dict(state)))
    with torch.no_grad():
        return model(IDS)


def config_of(model: HookedCausalLM) -> HookedTransformerConfig:
    cfg = model.cfg.replace(embed_scale=None, embed_scale_rounded=False)
    return HookedTransformerConfig.from_hooked_config(cfg, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_transformers_models(name: str) -> None:
    hf_model = make(CONFIGS[name])
    cfg = config_of(HookedCausalLM.from_hf(hf_model))
    state = getattr(weight_conversions, f"convert_{name}_weights")(hf_model, cfg)
    with torch.no_grad():
        # float32, with logits of some tens.
        torch.testing.assert_close(run(state, cfg), hf_model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not [one for one in state if one.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos"))]


def test_names_and_shapes_are_those_of_2x() -> None:
    hf_model = make(GPT2)
    state = weight_conversions.convert_gpt2_weights(hf_model, config_of(HookedCausalLM.from_hf(hf_model)))
    of_block = [
        *(f"{norm}.{one}" for norm in ("ln1", "ln2") for one in "wb"),
        *(f"attn.{letter}_{one}" for letter in "Wb" for one in "QKVO"),
        *(f"mlp.{letter}_{one}" for letter in "Wb" for one in ("in", "out")),
    ]
    outer = ["embed.W_E", "pos_embed.W_pos", "ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U"]
    assert set(state) == {*outer, *(f"blocks.{layer}.{one}" for layer in (0, 1) for one in of_block)}
    attn = hf_model.transformer.h[1].attn
    heads = attn.c_attn.weight[:, 16:32].unflatten(1, (4, 4)).transpose(0, 1)
    assert torch.equal(state["blocks.1.attn.W_K"], heads)
    assert torch.equal(state["blocks.1.attn.W_O"], attn.c_proj.weight.unflatten(0, (4, 4)))


def test_keys_that_heads_share_have_names_of_their_own() -> None:
    hf_model = make(CONFIGS["llama"])
    state = weight_conversions.convert_llama_weights(hf_model, config_of(HookedCausalLM.from_hf(hf_model)))
    assert state["blocks.0.attn._W_K"].shape == (2, 16, 4)
    assert not state["blocks.0.attn._b_V"].any()
    assert "blocks.0.attn.W_K" not in state


def test_as_many_layers_and_positions_as_the_config_has() -> None:
    hf_model = make(GPT2)
    cfg = config_of(HookedCausalLM.from_hf(hf_model))
    cfg.n_layers, cfg.n_ctx = 1, 5
    state = weight_conversions.convert_gpt2_weights(hf_model, cfg)
    assert state["pos_embed.W_pos"].shape == (5, 16)
    assert not [name for name in state if name.startswith("blocks.1.")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_state_dict_of_nanogpt(bias: bool, prefix: str) -> None:
    reference = nanogpt.build(bias=bias)
    words = {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 4, "n_heads": 4, "d_vocab": 31, "act_fn": "gelu"}
    cfg = HookedTransformerConfig(**words, device="cpu")
    given = nanogpt.state_of(reference, bias=bias, prefix=prefix)
    names = list(given)
    state = weight_conversions.convert_nanogpt_weights(given, cfg)
    assert list(given) == names, "2.x renames the entries of what it is given"
    assert {"blocks.1.ln2.b", "blocks.0.attn.b_Q", "ln_final.b"} <= state.keys()
    with torch.no_grad():
        torch.testing.assert_close(run(state, cfg), reference(IDS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("convert", ["mingpt", "neel_solu_old"])
def test_state_dicts_of_early_layouts(convert: str) -> None:
    state = make_state(CONFIG)
    before = early.to_mingpt(state, 2) if convert == "mingpt" else early.to_first_solu(state, 2)
    cfg = HookedTransformerConfig(
        **{"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 4, "n_heads": 4, "d_vocab": 31}, act_fn="relu"
    )
    found = getattr(weight_conversions, f"convert_{convert}_weights")(before, cfg)
    same = [name for name in found if name in state]
    assert len(same) > 20
    assert not [name for name in same if not torch.equal(found[name], state[name])]


def test_all_names_can_be_imported_from_their_modules() -> None:
    for name in ALL:
        module = importlib.import_module(
            f"hooklens.compat.transformer_lens.pretrained.weight_conversions.{'openai' if name == 'gpt_oss' else name}"
        )
        assert callable(getattr(module, f"convert_{name}_weights"))


@pytest.mark.parametrize("name", ["bert", "hubert", "t5"])
def test_encoders_are_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match="decoders only"):
        getattr(weight_conversions, f"convert_{name}_weights")(None, None)
