import einops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.weights.layout import empty_weight, is_stored_layout, logical_view, stored_view, to_stored_layout

# The table of the module docstring, written out as einops patterns: logical -> stored.
PATTERNS = {
    "attn.W_Q": "n d h -> (n h) d",
    "attn.W_K": "n d h -> (n h) d",
    "attn.W_V": "n d h -> (n h) d",
    "attn.W_O": "n h d -> d (n h)",
    "mlp.W_in": "d m -> m d",
    "mlp.W_gate": "d m -> m d",
    "mlp.W_out": "m d -> d m",
    "unembed.W_U": "d v -> v d",
    "embed.W_E": "v d -> v d",
    "pos_embed.W_pos": "p d -> p d",
    "attn.b_Q": "n h -> n h",
    "ln1.w": "d -> d",
}
names = st.sampled_from(sorted(PATTERNS))


@st.composite
def named_weights(draw):
    name = draw(names)
    n_axes = len(PATTERNS[name].partition(" ->")[0].split())
    shape = draw(st.lists(st.integers(1, 4), min_size=n_axes, max_size=n_axes))
    return name, torch.randn(shape)


@given(named_weights())
def test_stored_view_is_the_table(named):
    name, weight = named
    torch.testing.assert_close(stored_view(name, weight), einops.rearrange(weight, PATTERNS[name]), rtol=0, atol=0)


@given(named_weights())
def test_logical_view_inverts_stored_view_without_a_copy(named):
    name, weight = named
    stored = einops.rearrange(weight, PATTERNS[name]).clone(memory_format=torch.contiguous_format)
    logical = logical_view(name, stored, n_heads=weight.shape[0])
    assert torch.equal(logical, weight)
    assert logical.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    assert is_stored_layout(name, logical)


@given(named_weights())
def test_to_stored_layout_keeps_values_and_gives_a_contiguous_matrix(named):
    name, weight = named
    laid_out = to_stored_layout(name, weight)
    assert torch.equal(laid_out, weight)
    assert is_stored_layout(name, laid_out)
    stored = stored_view(name, laid_out)
    assert stored.is_contiguous()
    assert stored.untyped_storage().data_ptr() == laid_out.untyped_storage().data_ptr()
    assert to_stored_layout(name, laid_out) is laid_out


@given(named_weights())
def test_empty_weight_has_the_shape_and_the_strides(named):
    name, weight = named
    empty = empty_weight(f"blocks.3.{name}", weight.shape, "cpu", torch.float64)
    assert empty.shape == weight.shape
    assert empty.dtype == torch.float64
    assert is_stored_layout(name, empty)


def test_a_contiguous_logical_weight_is_not_in_stored_layout():
    assert not is_stored_layout("W_Q", torch.randn(2, 3, 4))
    assert not is_stored_layout("W_U", torch.randn(3, 4))


def test_a_linear_map_through_the_stored_view_is_the_logical_one():
    x, W_O = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    through_view = torch.nn.functional.linear(x.flatten(1), stored_view("W_O", W_O))
    torch.testing.assert_close(through_view, torch.einsum("pnh,nhd->pd", x, W_O))


def test_layout_works_on_meta_tensors():
    weight = to_stored_layout("W_K", torch.empty(2, 3, 4, device="meta"))
    assert weight.device.type == "meta"
    assert is_stored_layout("W_K", weight)


@pytest.mark.parametrize("n_heads", [None, 4])
def test_head_weights_need_a_number_of_heads_that_divides_the_rows(n_heads):
    with pytest.raises(InputError, match=rf"blocks.0.attn.W_Q: axis 0 .* \(6, 5\).* = 6; .*got n_heads={n_heads}"):
        logical_view("blocks.0.attn.W_Q", torch.randn(6, 5), n_heads=n_heads)
