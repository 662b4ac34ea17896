"""A translated name as a value, and which library's name a text is taken for."""

import copy
import pickle
from typing import Any

import pytest
import torch

from hooklens import HookedCausalLM, HookedConfig, NoPositions
from hooklens.compat import translate
from hooklens.compat.names import NOTATIONS, Translation
from hooklens.errors import HookNameError, UnsupportedModelError
from tests.annotations import unchecked


@pytest.fixture(scope="module")
def model() -> HookedCausalLM:
    return HookedCausalLM.from_pretrained("bundled:tiny-llama")


def test_a_translation_is_used_like_a_name(model: HookedCausalLM) -> None:
    translation = translate("model.layers[1].mlp.down_proj.input", model.cfg)
    ids = torch.tensor([[5, 6, 7]])
    _, cache = model.run_with_cache(ids, names_filter=[translation])
    assert list(cache) == ["blocks.1.mlp.hook_post"]
    assert cache[translation] is cache["blocks.1.mlp.hook_post"]
    zeroed = model.run_with_hooks(ids, fwd_hooks=[(translation, lambda x, hook: torch.zeros_like(x))])
    plain = model.run_with_hooks(ids, fwd_hooks=[("blocks.1.mlp.hook_post", lambda x, hook: torch.zeros_like(x))])
    assert torch.equal(zeroed, plain)


def test_a_translation_keeps_what_it_tells() -> None:
    made = Translation("hook_embed", given="wte.output", notation="transformers", note="a", edit="b")
    for again in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == "hook_embed"
        assert type(again.name) is str
        assert (again.given, again.notation, again.note, again.edit) == ("wte.output", "transformers", "a", "b")
    assert repr(made) == ("Translation('hook_embed', given='wte.output', notation='transformers', note='a', edit='b')")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("model.layers[0].output", "blocks.0.hook_resid_post"),
        ("model.layers[0].output[0]", "blocks.0.hook_resid_post"),
        ("model.layers[-1].inputs[0][0]", "blocks.{last}.hook_resid_pre"),
        ("model.layers.0", "blocks.0.hook_resid_post"),
        ("layers.0.mlp.up_proj", "blocks.0.mlp.hook_pre_linear"),
        ("model.model.layers[0].self_attn.output[0]", "blocks.0.hook_attn_out"),
        ("llm.model.norm.output", "unembed.hook_in"),
        ("model.output.last_hidden_state", "unembed.hook_in"),
        ("lm_head", "unembed.hook_out"),
        ("output.hidden_states[0]", "blocks.0.hook_resid_pre"),
        ("hidden_states[-1]", "unembed.hook_in"),
        ("attentions[-1]", "blocks.{last}.attn.hook_pattern"),
        ("unembed.hook_in", "unembed.hook_in"),
    ],
)
def test_spellings(model: HookedCausalLM, given: str, name: str) -> None:
    assert translate(given, model.cfg) == name.replace("{last}", str(model.cfg.n_layers - 1))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("model.layers[0].input_layernorm.output", r"blocks.0.ln1.hook_normalized stands before these"),
        ("model.layers[0].mlp.output[0]", r"leave \[0\] out"),
        ("model.layers[0].self_attn.output[2]", r"leave \[2\] out"),
        ("model.layers[0].mlp.inputs", "ask for .input"),
        ("model.layers[0].mlp.act_fn.output", "the activated gate"),
        (
            "model.layers[0].mlp.dropout.output",
            "what holds weights in 'model.layers.0.mlp': 'model.layers.0.mlp.up_proj'",
        ),
        ("model.layers[99].output", "the llama family has no module 'model.layers.99'"),
        ("model.layers[-99].output", "the llama family has no module 'model.layers.-"),
        ("transformer.h[0].output", "the llama family has no module 'transformer.h.0'"),
        ("model.layers[0].output.logits", "logits is no part of what this module gives"),
        ("hidden_states", "say which, as in"),
        ("hidden_states[99]", "has .* entries, 0 to"),
        ("what is this?", "the form of no known name"),
        ("resid_pre", "exists once per block|no module 'resid_pre'"),
    ],
)
def test_what_is_refused_says_why(model: HookedCausalLM, given: str, told: str) -> None:
    with pytest.raises(HookNameError, match=told):
        translate(given, model.cfg)


def test_the_last_hidden_state_tells_of_the_norm(model: HookedCausalLM) -> None:
    last = translate("hidden_states[-1]", model.cfg)
    assert last.note.startswith("behind the final norm")
    assert f"blocks.{model.cfg.n_layers - 1}.hook_resid_post" in last.note


def test_a_network_of_no_family_has_no_module_paths() -> None:
    cfg = HookedConfig(
        d_model=16, n_layers=2, n_heads=4, d_vocab=11, n_ctx=8, positions=NoPositions(), act_fn="solu_ln", causal=False
    )
    assert translate("blocks.0.hook_resid_pre", cfg) == "blocks.0.hook_resid_pre"
    with pytest.raises(UnsupportedModelError, match="no family can express"):
        translate("model.layers[0].output", cfg)


@pytest.mark.parametrize("given", [None, 3, b"x", ("k",) * 0, [("k", 1)]])
def test_what_is_no_name_is_refused(model: HookedCausalLM, given: Any) -> None:
    with unchecked(), pytest.raises(HookNameError, match=r"^name is "):
        translate(given, model.cfg)


def test_arguments_are_read(model: HookedCausalLM) -> None:
    with unchecked(), pytest.raises(HookNameError, match=r"^cfg is "):
        translate("hook_embed", model)  # type: ignore[arg-type]
    with pytest.raises(HookNameError, match=f"notation is 'nnsight', expected '{NOTATIONS[0]}'"):
        translate("hook_embed", model.cfg, notation="nnsight")


def test_a_shorthand_is_no_module_path(model: HookedCausalLM) -> None:
    """The notation was not heeded."""
    assert translate(("k", 1), model.cfg) == "blocks.1.attn.hook_k"
    with pytest.raises(HookNameError, match=r"\(transformers\) has no hook point here: a tuple is a shorthand"):
        translate(("k", 1), model.cfg, notation="transformers")
