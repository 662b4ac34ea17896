"""Tests of hooklens.weights.layout against einops, for every layout that a part can declare."""

from itertools import permutations

import einops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.weights.layout import (
    can_be_held,
    hold,
    lay_out,
    logical_view,
    parse_stored,
    stored_view,
    to_stored,
    view_to_hold,
)
from tests.model.networks import ALL_CONFIGS

LETTERS = ("a", "b", "c", "d")


@st.composite
def layouts(draw):
    """Logical axes, their sizes, and the stored axes as text: a permutation, neighbours in brackets or not."""
    n_axes = draw(st.integers(1, 4))
    axes = list(LETTERS[:n_axes])
    sizes = draw(st.lists(st.integers(1, 4), min_size=n_axes, max_size=n_axes))
    order = draw(st.permutations(axes))
    starts_group = [True, *draw(st.lists(st.booleans(), min_size=n_axes - 1, max_size=n_axes - 1))]
    groups = []
    for axis, starts in zip(order, starts_group, strict=True):
        if starts:
            groups.append([axis])
        else:
            groups[-1].append(axis)
    return axes, sizes, " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)


def pattern(axes, stored):
    return f"{' '.join(axes)} -> {stored}"


def strided(shape, seed):
    """Random numbers whose axes lie in memory in any order."""
    orders = list(permutations(range(len(shape))))
    order = orders[seed % len(orders)]
    memory = torch.randn([shape[axis] for axis in order])
    return memory.permute([order.index(axis) for axis in range(len(shape))])


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("d_model", (("d_model",),)),
        ("d_vocab d_model", (("d_vocab",), ("d_model",))),
        ("(head d_head) d_model", (("head", "d_head"), ("d_model",))),
        ("d_model (head d_head)", (("d_model",), ("head", "d_head"))),
        ("( a b )(c d)", (("a", "b"), ("c", "d"))),
        ("a (b c d)", (("a",), ("b", "c", "d"))),
    ],
)
def test_parse_stored(text, layout):
    assert parse_stored(text) == layout


@given(layouts())
def test_parsing_is_undone_by_writing(drawn):
    _, _, text = drawn
    groups = parse_stored(text)
    assert " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups) == text


@given(drawn=layouts(), seed=st.integers(0, 23))
def test_stored_view_is_einops(drawn, seed):
    axes, sizes, text = drawn
    weight = strided(sizes, seed)
    stored = stored_view(weight, parse_stored(text), axes)
    assert torch.equal(stored, einops.rearrange(weight, pattern(axes, text)))


@given(drawn=layouts(), seed=st.integers(0, 23))
def test_logical_view_inverts_stored_view_without_a_copy_whatever_the_strides(drawn, seed):
    axes, sizes, text = drawn
    layout = parse_stored(text)
    weight = strided(sizes, seed)
    contiguous = einops.rearrange(weight, pattern(axes, text)).clone(memory_format=torch.contiguous_format)
    spread = strided(contiguous.shape, seed)
    for stored in (contiguous, spread):
        logical = logical_view(stored, layout, axes, sizes)
        assert logical.shape == weight.shape
        assert logical.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
        assert torch.equal(einops.rearrange(logical, pattern(axes, text)), stored)
    assert torch.equal(logical_view(contiguous, layout, axes, sizes), weight)
    # A weight that already is a view of stored memory is brought back without a copy.
    back = stored_view(logical_view(contiguous, layout, axes, sizes), layout, axes)
    assert back.untyped_storage().data_ptr() == contiguous.untyped_storage().data_ptr()
    assert back.is_contiguous()


@given(drawn=layouts(), seed=st.integers(0, 23))
def test_lay_out_keeps_values_and_gives_contiguous_stored_memory(drawn, seed):
    axes, sizes, text = drawn
    layout, weight = parse_stored(text), strided(sizes, seed)
    laid_out = lay_out(weight, layout, axes)
    assert torch.equal(laid_out, weight)
    stored = stored_view(laid_out, layout, axes)
    assert stored.is_contiguous()
    assert stored.untyped_storage().data_ptr() == laid_out.untyped_storage().data_ptr()
    assert lay_out(laid_out, layout, axes) is laid_out


def test_a_contiguous_logical_weight_is_laid_out_anew():
    for weight, axes, text in (
        (torch.randn(2, 3, 4), "head d_model d_head", "(head d_head) d_model"),
        (torch.randn(3, 4), "d_model d_vocab", "d_vocab d_model"),
    ):
        layout = parse_stored(text)
        laid_out = lay_out(weight, layout, axes.split())
        assert laid_out.data_ptr() != weight.data_ptr()
        assert stored_view(laid_out, layout, axes.split()).is_contiguous()


# What README and the design promise, written out: a map is stored `[out, in]`, as nn.Linear and checkpoints have it.
PATTERNS = {
    "attn.W_Q": "n d h -> (n h) d",
    "attn.W_K": "n d h -> (n h) d",
    "attn.W_V": "n d h -> (n h) d",
    "attn.W_O": "n h d -> d (n h)",
    "attn.W_DQ": "d l -> l d",
    "attn.W_DKV": "d l -> l d",
    "attn.W_KR": "d r -> r d",
    "attn.W_UQ": "n l h -> (n h) l",
    "attn.W_UK": "n l h -> (n h) l",
    "attn.W_UV": "n l h -> (n h) l",
    "mlp.W_in": "d m -> m d",
    "mlp.W_gate": "d m -> m d",
    "mlp.W_out": "m d -> d m",
    "unembed.W_U": "d v -> v d",
    "embed.W_E": "v d -> v d",
    "pos_embed.W_pos": "p d -> p d",
    "attn.b_Q": "n h -> (n h)",
    "attn.b_K": "n h -> (n h)",
    "attn.b_V": "n h -> (n h)",
}


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_every_weight_of_a_network_is_stored_as_written_out(network):
    for weight in ALL_CONFIGS[network].description.weights.values():
        tensor = torch.randn(weight.shape)
        stored = stored_view(tensor, weight.stored, weight.axes)
        assert stored.shape == weight.stored_shape, weight.name
        written = PATTERNS.get(".".join(weight.name.split(".")[-2:]))
        if written is None:
            assert len(weight.axes) == 1, weight.name
            assert torch.equal(stored, tensor)
        else:
            assert torch.equal(stored, einops.rearrange(tensor, written)), weight.name


def test_a_linear_map_through_the_stored_view_is_the_logical_one():
    x, W_O = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    stored = stored_view(W_O, parse_stored("d_model (head d_head)"), ["head", "d_head", "d_model"])
    through_view = torch.nn.functional.linear(x.flatten(1), stored)
    torch.testing.assert_close(through_view, torch.einsum("pnh,nhd->pd", x, W_O))


def test_layout_works_on_meta_tensors():
    layout, axes = parse_stored("(head d_head) d_model"), ["head", "d_model", "d_head"]
    weight = lay_out(torch.empty(2, 3, 4, device="meta"), layout, axes)
    assert weight.device.type == "meta"
    assert weight.shape == (2, 3, 4)
    assert stored_view(weight, layout, axes).is_contiguous()


def test_sizes_that_do_not_divide_the_stored_axis_are_refused():
    """Callers compare the stored shape with the declared one first; here nothing is cut off in silence."""
    with pytest.raises(RuntimeError, match="unflatten"):
        logical_view(torch.randn(6, 5), parse_stored("(head d_head) d_model"), ["head", "d_model", "d_head"], (4, 5, 1))


# What rules of checkpoints make: whole matrices the other way round, columns and every other column of larger ones,
# stacks of them, rows of each group.
LYING = {
    "turned": lambda t: t[0].T,
    "columns": lambda t: t[0, :, 5:18].T,
    "every other column": lambda t: t[0, :, ::2].T,
    "turned in a stack": lambda t: t.mT,
    "columns in a stack": lambda t: t[..., 3:].mT,
    "stacks of stacks": lambda t: t.unflatten(0, (2, 2)).mT,
    "rows of each": lambda t: t[:, 2:7],
    "every other row": lambda t: t[:, ::2],
    "one column": lambda t: t[..., :1].mT,
    "a vector": lambda t: t[0, :, 0],
    "reversed order": lambda t: t.permute(2, 1, 0),
    "none": lambda t: t[:0].mT,
    "contiguous": lambda t: t,
}


# Whose entries fill their memory, with rows or columns in one piece each.
HELD = {"turned", "turned in a stack", "stacks of stacks", "none", "contiguous"}


@pytest.mark.parametrize("lying", LYING)
def test_what_can_be_held_as_it_lies(lying):
    given = LYING[lying](torch.randn(4, 17, 22))
    assert can_be_held(given) == (lying in HELD)


@pytest.mark.parametrize("lying", LYING)
def test_a_copy_keeps_the_order_of_entries_where_a_matrix_product_reads_it(lying):
    given = LYING[lying](torch.randint(0, 200, (4, 17, 22)).float())
    axes = [f"a{i}" for i in range(given.ndim)]
    made = hold(given, tuple((axis,) for axis in axes), axes)
    assert torch.equal(made, given)
    assert can_be_held(made)
    assert (made.data_ptr() == given.data_ptr()) == (lying in HELD)
    if lying not in {"reversed order", "every other column", "one column", "a vector"}:
        assert (made.stride(-1) == 1) == (given.stride(-1) == 1)
    assert lying != "every other column" or made.stride() == (1, 11)


def test_hold_is_differentiable():
    weight = torch.randn(30, 40, requires_grad=True)
    (hold(weight[:, :20].T, (("a",), ("b",)), ["a", "b"]) * 2).sum().backward()
    assert torch.equal(weight.grad, torch.cat([torch.full((30, 20), 2.0), torch.zeros(30, 20)], 1))


@pytest.mark.parametrize("lying", LYING)
def test_fused_optimizers_change_what_is_held_and_nothing_else(lying):
    """Held as it lies, a part of a larger tensor is trained wrong in silence, and its neighbours with it."""
    whole = torch.randn(4, 17, 22)
    given = LYING[lying](whole)
    axes = [f"a{i}" for i in range(given.ndim)]
    parameter = torch.nn.Parameter(hold(given, tuple((axis,) for axis in axes), axes))
    plain = torch.nn.Parameter(given.clone(memory_format=torch.contiguous_format))
    before, is_own = whole.clone(), parameter.data_ptr() != given.data_ptr()
    for one, options in ((parameter, {"fused": True}), (plain, {"foreach": False})):
        optimizer = torch.optim.AdamW([one], lr=0.1, **options)
        for _ in range(2):
            optimizer.zero_grad()
            (one * torch.linspace(-1, 1, one.numel()).view(one.shape)).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(parameter, plain)
    assert torch.equal(whole, before) == (is_own or not given.numel())


@given(layouts(), st.integers(0, 23))
def test_to_stored_is_the_stored_view_made_contiguous(drawn, seed):
    axes, sizes, text = drawn
    weight = strided(sizes, seed)
    layout = parse_stored(text)
    found = to_stored(weight, layout, axes)
    assert found.is_contiguous()
    assert torch.equal(found, stored_view(weight, layout, axes))
    logical = logical_view(found, layout, axes, sizes)
    assert to_stored(logical, layout, axes).data_ptr() == found.data_ptr()


@given(layouts(), st.integers(0, 23))
def test_hold_is_the_stored_view_as_a_parameter_can_hold_it(drawn, seed):
    axes, sizes, text = drawn
    weight = strided(sizes, seed)
    layout = parse_stored(text)
    found = hold(weight, layout, axes)
    assert can_be_held(found)
    assert torch.equal(found, stored_view(weight, layout, axes))
    assert (view_to_hold(weight, layout, axes) is None) == (found.data_ptr() != weight.data_ptr())
    logical = logical_view(found, layout, axes, sizes)
    assert hold(logical, layout, axes).data_ptr() == found.data_ptr()
