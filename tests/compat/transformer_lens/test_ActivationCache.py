"""2.x's cache: names, axes, and decompositions against their definitions, written out with activations and weights."""

import functools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooklens.compat.transformer_lens import ActivationCache, HookedTransformer
from hooklens.compat.transformer_lens.utils import Slice
from tests.compat.transformer_lens.models import NETWORKS, build, tokens

HEADS = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
# Sums of float64 in another order.
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-9)


@functools.cache
def model_of(name: str) -> HookedTransformer:
    return build(name)


def run(name: str = "gpt2", rows: int = 2) -> ActivationCache:
    with torch.no_grad():
        cache: ActivationCache = model_of(name).run_with_cache(tokens(rows))[1]
    return cache


def normed(name: str, x: Tensor, scale: Tensor) -> Tensor:
    """What 2.x takes a norm for: centred, if it centres, over a scale, without weight and bias."""
    return (x if name == "llama" else x - x.mean(-1, keepdim=True)) / scale


def test_keys() -> None:
    cache = run()
    for key, name in [
        ("embed", "hook_embed"), ("k1a", "blocks.1.attn.hook_k"), ("k1", "blocks.1.attn.hook_k"),
        (("k", 1, "a"), "blocks.1.attn.hook_k"), (("post", 1, "m"), "blocks.1.mlp.hook_post"),
        (("resid_pre", -1), "blocks.1.hook_resid_pre"), (("embed", None), "hook_embed"), (("embed",), "hook_embed"),
        (("attn", 0), "blocks.0.attn.hook_pattern"), (("scale", 1, "ln1"), "blocks.1.ln1.hook_scale"),
        (("scale",), "ln_final.hook_scale"), ("normalized", "ln_final.hook_normalized"),
        ("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out"),
    ]:  # fmt: skip
        assert cache[key] is cache.cache_dict[name], key
    for missing in ["nonsense", ("k", 5), "k5", ("resid_pre", -3)]:
        with pytest.raises(KeyError):
            cache[missing]


def test_is_a_mapping_of_its_dictionary() -> None:
    cache = run()
    held = cache.cache_dict
    assert (list(cache), list(cache.keys()), len(cache)) == (list(held), list(held), len(held))
    assert all(one is other for one, other in zip(cache.values(), held.values(), strict=True))
    assert all(held[name] is tensor for name, tensor in cache.items())
    assert "hook_embed" in cache
    assert "embed" not in cache
    assert repr(cache) == f"ActivationCache with keys {list(held)}"
    assert (cache.has_embed, cache.has_pos_embed, cache.has_batch_dim) == (True, True, True)
    assert not run("llama").has_pos_embed
    held["mine"] = torch.ones(2)
    assert cache["mine"] is held["mine"]


def test_the_batch_axis_goes_in_place(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(AssertionError, match="more than one row"):
        run().remove_batch_dim()
    cache = run(rows=1)
    before = dict(cache.cache_dict)
    assert cache.remove_batch_dim() is cache
    assert not cache.has_batch_dim
    assert all(torch.equal(cache[name], tensor[0]) for name, tensor in before.items())
    with caplog.at_level(logging.WARNING):
        cache.remove_batch_dim()
    assert "already" in caplog.text
    assert cache["resid_pre", 0].shape == (7, 16)


def test_rows() -> None:
    cache = run()
    for rows, n_axes in [(1, 2), ([1], 3), ((0, 1), 3), (Slice(-1), 2), (None, 3)]:
        some = cache.apply_slice_to_batch_dim(rows)
        expected = (rows if isinstance(rows, Slice) else Slice(rows)).apply(cache["z", 0])
        assert torch.equal(some["z", 0], expected)
        assert some.has_batch_dim == (n_axes == 3)
        assert some["resid_pre", 0].ndim == n_axes
    assert cache.has_batch_dim
    with pytest.raises(AssertionError):
        cache.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)


def test_moves_and_casts(caplog: pytest.LogCaptureFixture) -> None:
    cache = run()
    assert cache.to(torch.float32) is cache
    assert cache["z", 0].dtype == torch.float32
    assert model_of("gpt2").W_E.dtype == torch.float64
    was = torch.is_grad_enabled()
    try:
        with caplog.at_level(logging.WARNING):
            cache.toggle_autodiff(mode=False)
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(was)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pos", [None, -1, (1, 5), [0, 3], "Slice"])
def test_streams_and_outputs(name: str, pos: Any) -> None:
    cache = run(name)
    pos = Slice(2) if pos == "Slice" else pos
    at = pos if isinstance(pos, Slice) else Slice(pos)

    def stack(names: list[str]) -> Tensor:
        return torch.stack([at.apply(cache[one], dim=-2) for one in names])

    scale = at.apply(cache["ln_final.hook_scale"], dim=-2)
    streams = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    found, labels = cache.accumulated_resid(pos_slice=pos, return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    assert torch.equal(found, stack(streams))
    # One scale for all rows.
    close(cache.accumulated_resid(-1, apply_ln=True, pos_slice=pos), normed(name, stack(streams), scale))
    if name not in ("attn_only", "neox"):
        _, labels = cache.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)
        assert labels == ["0_pre", "0_mid", "1_pre", "1_mid"]

    embeds = ["embed"] if name in ("llama", "neox") else ["embed", "pos_embed"]
    modes = {"attn": ["attn_out"], "mlp": ["mlp_out"], "all": ["attn_out", "mlp_out"]}
    for mode, words in modes.items():
        written = [word for word in words if name != "attn_only" or word == "attn_out"]
        outputs = [f"{layer}_{word}" for layer in range(2) for word in written]
        expected = stack([f"hook_{one}" for one in embeds] + [f"blocks.{one[0]}.hook_{one[2:]}" for one in outputs])
        found, labels = cache.decompose_resid(mode=mode, pos_slice=pos, return_labels=True)
        assert labels == embeds + outputs
        assert torch.equal(found, expected)
        close(cache.decompose_resid(mode=mode, apply_ln=True, pos_slice=pos), normed(name, expected, scale))
    whole = at.apply(cache["resid_post", 1], dim=-2)
    close(cache.decompose_resid(pos_slice=pos).sum(0), whole)
    full, labels = cache.get_full_resid_decomposition(expand_neurons=False, pos_slice=pos, return_labels=True)
    close(full.sum(0), whole)
    outputs = [] if name == "attn_only" else ["0_mlp_out", "1_mlp_out"]
    assert labels == [*HEADS, *outputs, *embeds, "bias"]


def test_a_cache_without_embeddings_is_taken_apart_without_them() -> None:
    cache = run()
    some = ActivationCache({name: cache[name] for name in cache if "embed" not in name}, cache.model)
    assert not some.has_embed
    _, labels = some.decompose_resid(1, return_labels=True)
    assert labels == ["0_attn_out", "0_mlp_out"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "attn_only"])
def test_heads(name: str) -> None:
    cache, model = run(name), model_of(name)
    results = torch.stack([cache["z", layer][..., None, :] @ model.W_O[layer] for layer in range(2)])[..., 0, :]
    assert "blocks.0.attn.hook_result" not in cache
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == HEADS
    close(stack, results.permute(0, 3, 1, 2, 4).flatten(0, 1))
    # They stay in the cache.
    close(cache["result", 1], results[1])
    one, labels = cache.stack_head_results(1, incl_remainder=True, pos_slice=-1, return_labels=True)
    assert labels == [*HEADS[:4], "remainder"]
    close(one[:4], stack[:4, :, -1])
    close(one.sum(0), cache["resid_post", 0][:, -1])
    close(cache.stack_head_results(apply_ln=True), normed(name, stack, cache["scale", None]))
    none, labels = cache.stack_head_results(0, return_labels=True, pos_slice=-1)
    assert (none.shape, labels) == ((0, 2, 16), [])


def test_computing_results_writes_them_once(caplog: pytest.LogCaptureFixture) -> None:
    cache = run()
    assert cache.compute_head_results() is None
    attn_out = cache["result", 0].sum(-2) + cache.model.b_O[0]
    close(attn_out, cache["attn_out", 0])
    held = cache["result", 0]
    with caplog.at_level(logging.WARNING):
        cache.compute_head_results()
    assert "already" in caplog.text
    assert cache["result", 0] is held


@pytest.mark.parametrize("name", ["gpt2", "llama", "solu"])
def test_neurons(name: str) -> None:
    cache, model = run(name), model_of(name)
    n_neurons = model.cfg.d_mlp
    each = torch.stack([cache["post", layer, "mlp"][..., None] * model.W_out[layer] for layer in range(2)])
    close(cache.get_neuron_results(1), each[1])
    close(cache.get_neuron_results(1, neuron_slice=[3, 5], pos_slice=-1), each[1][:, -1, [3, 5]])
    close(cache.get_neuron_results(0, 4, (1, 3)), each[0][:, 1:3, 4])
    stack, labels = cache.stack_neuron_results(-1, return_labels=True)
    assert labels == [f"L{layer}N{neuron}" for layer in range(2) for neuron in range(n_neurons)]
    close(stack, each.permute(0, 3, 1, 2, 4).flatten(0, 1))
    some, labels = cache.stack_neuron_results(
        1, pos_slice=Slice(2), neuron_slice=(2, 4), return_labels=True, incl_remainder=True
    )
    assert labels == ["L0N2", "L0N3", "remainder"]
    close(some.sum(0), cache["resid_post", 0][:, 2])
    close(
        cache.stack_neuron_results(None, neuron_slice=[1], apply_ln=True),
        normed(name, each[..., 1, :], cache["scale", None]),
    )
    assert cache.stack_neuron_results(0).shape == (0, 2, 7, 16)
    full, labels = cache.get_full_resid_decomposition(1, pos_slice=-1, apply_ln=True, return_labels=True)
    assert labels[:5] == [*HEADS[:4], "L0N0"]
    close(full.sum(0), normed(name, cache["resid_pre", 1], cache["scale", 1, "ln1"])[:, -1])


def test_one_activation_of_every_layer() -> None:
    cache = run()
    close(cache.stack_activation("z"), torch.stack([cache["z", 0], cache["z", 1]]))
    assert cache.stack_activation("pattern", 1).shape == (1, 2, 4, 7, 7)
    close(
        cache.stack_activation("scale", None, "ln2"), torch.stack([cache["scale", 0, "ln2"], cache["scale", 1, "ln2"]])
    )
    with pytest.raises(KeyError):
        cache.stack_activation("nonsense")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_norms_are_taken_for_folded(name: str) -> None:
    """Weights and biases of the norms are left out, and stacks have any number of leading axes."""
    cache = run(name)
    stack = torch.stack([cache["resid_pre", 0], cache["attn_out", 0], cache["mlp_out", 0]])
    for layer, mlp_input, scale in [
        (None, False, "ln_final"), (-1, False, "ln_final"), (2, True, "ln_final"), (1, False, "blocks.1.ln1"),
        (0, True, "blocks.0.ln2"),
    ]:  # fmt: skip
        expected = normed(name, stack, cache[f"{scale}.hook_scale"])
        close(cache.apply_ln_to_stack(stack, layer, mlp_input), expected)
        close(cache.apply_ln_to_stack(stack[1], layer, mlp_input), expected[1])
        close(cache.apply_ln_to_stack(stack[None], layer, mlp_input), expected[None])
        close(cache.apply_ln_to_stack(stack[:, :, -1], layer, mlp_input, pos_slice=-1), expected[:, :, -1])
        close(cache.apply_ln_to_stack(stack, layer, mlp_input, batch_slice=1), expected[:, 1])
        close(cache.apply_ln_to_stack(stack[:, 1], layer, mlp_input, None, [1], has_batch_dim=False)[0], expected[0, 1])
        some = cache.apply_ln_to_stack(stack[:, :, [0, 3]], layer, mlp_input, [0, 3], (1, 2))
        close(some, expected[:, 1:2, [0, 3]])
    # The option of 2.18 for the end of the stream: each vector through the true norm.
    last = torch.stack([cache["resid_post", 0], cache["resid_post", 1]])
    close(cache.apply_ln_to_stack(last, recompute_ln=True)[1], cache.model.ln_final(cache["resid_post", 1]))


def test_without_norms_stacks_stay() -> None:
    model = build(normalization_type=None)
    cache = model.run_with_cache(tokens())[1]
    stack = cache.decompose_resid()
    assert cache.apply_ln_to_stack(stack) is stack
    close(cache.logit_attrs(stack, 3).sum(0), cache["resid_post", -1] @ model.W_U[:, 3])


ONE_PER_ROW = torch.tensor([3, 9])
ONE_EACH = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("wrong", [None, 1])
def test_logit_attributions(wrong: int | None) -> None:
    """The products of what `apply_ln_to_stack` gives and the tokens' directions, broadcast from the right."""
    cache = run()
    stack, W_U = cache.decompose_resid(), cache.model.W_U

    def attrs(vectors: Tensor, ids: Any, **more: Any) -> Tensor:
        incorrect = None if wrong is None else torch.full_like(ids, 1) if isinstance(ids, Tensor) else wrong
        return cache.logit_attrs(vectors, ids, incorrect, **more)

    directions = W_U.T if wrong is None else W_U.T - W_U[:, wrong]
    every = normed("gpt2", stack, cache["scale", None]) @ directions.T
    close(attrs(stack, 5), every[..., 5])
    close(attrs(stack, torch.tensor(5)), every[..., 5])
    close(attrs(stack[2], 5), every[2, ..., 5])
    close(attrs(stack[None], 5), every[None, ..., 5])
    close(attrs(stack, ONE_EACH), every.gather(-1, ONE_EACH.expand(6, -1, -1)[..., None])[..., 0])
    per_row = torch.stack([every[:, 0, -1, 3], every[:, 1, -1, 9]], 1)
    close(attrs(stack[:, :, -1], ONE_PER_ROW, pos_slice=-1), per_row)
    close(attrs(stack[:, :, -1], 9, pos_slice=-1, batch_slice=-1), per_row[:, 1])
    close(attrs(stack[:, 1, -1], 9, pos_slice=-1, batch_slice=1, has_batch_dim=False), per_row[:, 1])
    # One per position, in all rows.
    close(attrs(stack, torch.arange(7)), torch.stack([every[:, :, pos, pos] for pos in range(7)], -1))


def test_logit_attributions_of_text_and_of_a_cache_without_rows() -> None:
    model = HookedTransformer.from_pretrained("bundled:tiny-gpt-neox")
    _, cache = model.run_with_cache("the cat sat on the mat", remove_batch_dim=True)
    text = model.to_string([7])
    stack = cache.decompose_resid(pos_slice=-1)
    logits = model("the cat sat on the mat")[0, -1]
    # 1e-3: float32 sums. Weights are folded, so that the components sum to the logit without its bias.
    found = cache.logit_attrs(stack, text, pos_slice=-1).sum(0)
    torch.testing.assert_close(found, logits[7] - model.b_U[7], rtol=0, atol=1e-3)
    other = cache.logit_attrs(stack, text, 9, pos_slice=-1).sum(0)
    torch.testing.assert_close(other, (logits - model.b_U)[7] - (logits - model.b_U)[9], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="same shape"):
        cache.logit_attrs(stack, 7, torch.tensor([8]), pos_slice=-1)
    # There, a row that is asked of a cache without rows is taken of another axis.
    with pytest.raises(AssertionError, match="no batch axis"):
        cache.logit_attrs(stack, 7, pos_slice=-1, batch_slice=0)


def test_choices_of_positions_are_2x_s() -> None:
    cache = run()
    stream = cache["resid_pre", 0]
    for given, expected in [
        ((1, 6, 2), stream[:, 1:6:2]), ([4, 1], stream[:, [4, 1]]), (torch.tensor([0, 2]), stream[:, [0, 2]]),
        (np.array([5]), stream[:, [5]]), (Slice((None, 3)), stream[:, :3]), (3, stream[:, 3]),
    ]:  # fmt: skip
        assert torch.equal(cache.accumulated_resid(0, pos_slice=given)[0], expected)
