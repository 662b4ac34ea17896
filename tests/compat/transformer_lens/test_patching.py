"""2.x's patching functions: every value is that of one plain run of the model with the entries set by a hook."""

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from hooklens.compat.transformer_lens import HookedTransformer, patching, utils
from tests.compat.transformer_lens.models import NETWORKS, build, tokens
from tests.slow_cases import slow_but

ALL = slice(None)
HEADS = [("out", "z"), ("q", "q"), ("k", "k"), ("v", "v")]
# The name, the activation, its index axes, and the place that an index without the layer names.
KINDS: list[tuple[str, str, str, Callable[..., Any]]] = [
    *((word, word, "pos", lambda pos: (ALL, pos)) for word in ("resid_pre", "resid_mid", "attn_out", "mlp_out")),
    *((f"attn_head_{name}_by_pos", word, "pos head", lambda pos, head: (ALL, pos, head)) for name, word in HEADS),
    *((f"attn_head_{name}_all_pos", word, "head", lambda head: (ALL, ALL, head)) for name, word in HEADS),
    ("attn_head_pattern_all_pos", "pattern", "head", lambda head: (ALL, head)),
    ("attn_head_pattern_by_pos", "pattern", "head pos", lambda head, pos: (ALL, head, pos)),
    ("attn_head_pattern_dest_src_pos", "pattern", "head pos pos", lambda head, dest, src: (ALL, head, dest, src)),
]  # fmt: skip
CORRUPTED = tokens(2, 4)
CLEAN = CORRUPTED.roll(1, dims=1)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 1].mean() - logits[:, 0, 0].mean()


def by_hook(model: HookedTransformer, cache: Any, name: str, place: tuple[Any, ...]) -> Tensor:
    def patch(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[place] = cache[name][place]
        return activation

    with torch.no_grad():
        return metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, patch)]))


def assert_equals_runs(model: HookedTransformer, cache: Any, kind: Any, values: Tensor) -> None:
    _, word, axes, place = kind
    heads = (model.cfg.n_key_value_heads or 4) if word in "kv" else 4
    assert values.shape == (2, *({"pos": 4, "head": heads}[axis] for axis in axes.split()))
    assert values.dtype == torch.get_default_dtype()
    every = torch.cartesian_prod(*(torch.arange(size) for size in values.shape)).tolist()
    for index in every[:: max(1, len(every) // 5)]:
        expected = by_hook(model, cache, utils.get_act_name(word, index[0]), place(*index[1:]))
        # 1e-5: the values are of the default dtype.
        torch.testing.assert_close(values[tuple(index)].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(NETWORKS, ["gpt2", "llama", "attn_only"]))
def test_ready_made_functions(name: str) -> None:
    model = build(name)
    _, cache = model.run_with_cache(CLEAN)
    absent = {"resid_mid", "mlp_out"} if name == "attn_only" else {"resid_mid"} if name == "neox" else set()
    for kind in KINDS:
        function = getattr(patching, f"get_act_patch_{kind[0]}")
        if kind[1] in absent:
            with pytest.raises(KeyError):
                function(model, CORRUPTED, cache, metric)
        else:
            assert_equals_runs(model, cache, kind, function(model, CORRUPTED, cache, metric))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_every_forms_stack(name: str) -> None:
    model = build(name)
    _, cache = model.run_with_cache(CLEAN)
    given = (model, CORRUPTED, cache)
    words = ("out", "q", "k", "v", "pattern")
    block = patching.get_act_patch_block_every(*given, metric=metric)
    for row, word in enumerate(("resid_pre", "attn_out", "mlp_out")):
        torch.testing.assert_close(block[row], getattr(patching, f"get_act_patch_{word}")(*given, metric))
    heads = patching.get_act_patch_attn_head_all_pos_every(*given, metric)
    by_pos = patching.get_act_patch_attn_head_by_pos_every(*given, metric)
    assert heads.shape == (5, 2, 4)
    assert by_pos.shape == (5, 2, 4, 4)
    for row, word in enumerate(words):
        one = getattr(patching, f"get_act_patch_attn_head_{word}_all_pos")(*given, metric)
        torch.testing.assert_close(heads[row, :, : one.shape[-1]], one)
        assert not heads[row, :, one.shape[-1] :].any()
        one = getattr(patching, f"get_act_patch_attn_head_{word}_by_pos")(*given, metric)
        one = one.transpose(1, 2) if word == "pattern" else one
        torch.testing.assert_close(by_pos[row, ..., : one.shape[-1]], one)


def test_ready_made_functions_take_the_options_of_the_generic_one() -> None:
    """As `functools.partial`s of it they do."""
    model = build()
    _, cache = model.run_with_cache(CLEAN)
    given: dict[str, Any] = {
        "model": model, "corrupted_tokens": CORRUPTED, "clean_cache": cache, "patching_metric": metric,
    }  # fmt: skip
    values, table = patching.get_act_patch_resid_pre(**given, return_index_df=True)
    assert list(table.columns) == ["layer", "pos"]
    assert table.to_numpy().tolist() == [[layer, pos] for layer in range(2) for pos in range(4)]
    chosen = pd.DataFrame({"layer": [1, 0], "pos": [3, 2]})
    some = patching.get_act_patch_resid_pre(**given, index_axis_names=None, index_df=chosen)
    torch.testing.assert_close(some, values[[1, 0], [3, 2]])
    with pytest.raises(AssertionError):
        patching.get_act_patch_resid_pre(**given, index_df=chosen)
    with pytest.raises(AssertionError):
        patching.generic_activation_patch(
            **given, patch_setter=patching.layer_pos_patch_setter, activation_name="resid_pre"
        )


def test_a_setter_of_ones_own_runs_index_by_index() -> None:
    model = build()
    _, cache = model.run_with_cache(CLEAN)
    seen = []

    def setter(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
        seen.append(list(index))
        return patching.layer_head_vector_patch_setter(corrupted, index, clean)

    values = patching.generic_activation_patch(model, CORRUPTED, cache, metric, setter, "z", ("layer", "head"))
    assert seen == [[layer, head] for layer in range(2) for head in range(4)]
    torch.testing.assert_close(
        values, patching.get_act_patch_attn_head_out_all_pos(model, CORRUPTED, cache.cache_dict, metric)
    )


def test_hooks_of_the_model_act_in_every_run() -> None:
    """A sweep cannot be run with hooks attached; code of 2.x ablates a head for good, and patches then."""
    model = build()
    _, cache = model.run_with_cache(CLEAN)
    kind = KINDS[0]
    plain = patching.get_act_patch_resid_pre(model, CORRUPTED, cache, metric)
    model.add_perma_hook("blocks.1.hook_resid_pre", lambda activation, hook: activation * 0.5)
    values = patching.get_act_patch_resid_pre(model, CORRUPTED, cache, metric)
    assert_equals_runs(model, cache, kind, values)
    assert not torch.allclose(values, plain)
    model.reset_hooks(including_permanent=True)
    torch.testing.assert_close(patching.get_act_patch_resid_pre(model, CORRUPTED, cache, metric), plain)


def test_a_model_in_training_mode_is_patched() -> None:
    model = build()
    _, cache = model.run_with_cache(CLEAN)
    model.train()
    assert_equals_runs(model, cache, KINDS[0], patching.get_act_patch_resid_pre(model, CORRUPTED, cache, metric))


def test_a_clean_run_may_be_longer_or_have_one_row() -> None:
    """The positions that the corrupted run has are patched, and one row goes into all, as torch broadcasts."""
    model = build()
    longer = torch.cat([CLEAN, tokens(2, 3)], 1)
    _, cache = model.run_with_cache(longer)
    # In a causal model the longer run has the same activations where both have positions.
    _, shorter = model.run_with_cache(CLEAN)
    values = patching.get_act_patch_attn_out(model, CORRUPTED, cache, metric)
    torch.testing.assert_close(values, patching.get_act_patch_attn_out(model, CORRUPTED, shorter, metric))
    _, single = model.run_with_cache(CLEAN[:1])
    _, twice = model.run_with_cache(CLEAN[:1].expand(2, -1))
    values = patching.get_act_patch_attn_out(model, CORRUPTED, single, metric)
    torch.testing.assert_close(values, patching.get_act_patch_attn_out(model, CORRUPTED, twice, metric))


def test_no_mask_is_guessed_from_pad_tokens() -> None:
    """HookLens takes a run of pad tokens at a row's end for padding; 2.x takes them for tokens."""
    model = HookedTransformer.from_pretrained("bundled:tiny-gpt-neox")
    pad = model.tokenizer.pad_token_id
    corrupted = torch.tensor([[5, 6, 7, pad, pad]])
    clean = torch.tensor([[8, 6, 9, 4, 3]])
    _, cache = model.run_with_cache(clean)

    def last(logits: Tensor) -> Tensor:
        return logits[0, -1, 11]

    values = patching.get_act_patch_resid_pre(model, corrupted, cache, last)
    # The whole stream of the clean run gives its output.
    torch.testing.assert_close(values[0, 4], by_position(model, corrupted, cache, 4)[0, -1, 11], rtol=0, atol=1e-4)
    assert (values[:, 4] - model(corrupted)[0, -1, 11]).abs().max() > 1e-3


def by_position(model: HookedTransformer, corrupted: Tensor, cache: Any, pos: int) -> Tensor:
    def patch(activation: Tensor, hook: Any) -> Tensor:
        return torch.cat([activation[:, :pos], cache[hook.name][:, pos : pos + 1], activation[:, pos + 1 :]], 1)

    return model.run_with_hooks(corrupted, fwd_hooks=[("blocks.0.hook_resid_pre", patch)]).detach()
