import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.adapters.rules import Constant, Copy, DiskShapes, FusedQKV, RowPieces, parameters_beside
from hooklens.config import HookedConfig, NoPositions
from hooklens.errors import UnsupportedModelError

NAMES = ("b.{i}.W_Q", "b.{i}.W_K", "b.{i}.W_V")

ONE_LAYER = HookedConfig(d_model=4, n_heads=2, d_vocab=7, n_layers=1, n_ctx=8, positions=NoPositions())


@st.composite
def configs(draw) -> HookedConfig:
    n_kv_heads, group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return HookedConfig(
        d_model=draw(st.integers(1, 6)),
        n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        d_head=draw(st.integers(1, 5)),
        d_vocab=7,
        n_layers=1,
        n_ctx=8,
        positions=NoPositions(),
    )


def fused(cfg: HookedConfig, *, weight: bool) -> torch.Tensor:
    rows = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_head
    shape = (rows, cfg.d_model) if weight else (rows,)
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


@given(configs(), st.sampled_from(["grouped", "blocked"]), st.booleans())
def test_fused_qkv_is_a_permutation_with_its_own_inverse(cfg, order, weight) -> None:
    rule, tensor = FusedQKV("qkv", NAMES, order=order), fused(cfg, weight=weight)
    parts = rule.load(tensor, cfg)
    entries = torch.cat([part.flatten() for part in parts])
    assert torch.equal(entries.sort().values, tensor.flatten())
    assert torch.equal(rule.save(parts, cfg), tensor)


@given(configs())
def test_grouped_rows_by_brute_force(cfg) -> None:
    """Rows are (kv_head, [q ... q, k, v], d_head); query head h belongs to group h // group."""
    tensor, group = fused(cfg, weight=True), cfg.n_heads // cfg.n_kv_heads
    query, key, value = FusedQKV("qkv", NAMES, order="grouped").load(tensor, cfg)
    row = 0
    for kv_head in range(cfg.n_kv_heads):
        for slot in range(group + 2):
            for entry in range(cfg.d_head):
                if slot < group:
                    found = query[kv_head * group + slot, :, entry]
                else:
                    found = (key if slot == group else value)[kv_head, :, entry]
                assert torch.equal(found, tensor[row])
                row += 1


@given(configs())
def test_blocked_rows_by_brute_force(cfg) -> None:
    tensor = fused(cfg, weight=True)
    heads = [head for part in FusedQKV("qkv", NAMES, order="blocked").load(tensor, cfg) for head in part]
    rows = [head[:, entry] for head in heads for entry in range(cfg.d_head)]
    assert torch.equal(torch.stack(rows), tensor)


@given(configs(), st.sampled_from(["grouped", "blocked"]))
def test_fused_parts_are_views_whose_heads_lie_as_linear_weights_do(cfg, order) -> None:
    """But for queries of which several stand together in a group; those are in one piece."""
    tensor = fused(cfg, weight=True)
    is_shared = order == "grouped" and cfg.n_heads > cfg.n_kv_heads
    for name, part in zip("QKV", FusedQKV("qkv", NAMES, order=order).load(tensor, cfg), strict=True):
        assert all(head.T.is_contiguous() for head in part)
        if is_shared and name == "Q" and cfg.n_kv_heads > 1:
            assert part.permute(0, 2, 1).is_contiguous()
        else:
            assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("pattern", "shape", "logical"),
    [
        (None, (6,), (6,)),
        ("f m -> m f", (10, 6), (6, 10)),
        ("(n h) m -> n m h", (8, 6), (4, 6, 2)),
        ("m (n h) -> n h m", (6, 8), (4, 2, 6)),
        ("(n h) -> n h", (8,), (4, 2)),
    ],
)
def test_copy_is_a_view_both_ways(pattern, shape, logical) -> None:
    cfg = HookedConfig(
        d_model=6, n_heads=4, d_head=2, d_mlp=10, d_vocab=7, n_layers=1, n_ctx=8, positions=NoPositions()
    )
    rule, tensor = Copy("hub", "b.{i}.ours", pattern), torch.randn(shape)
    (loaded,) = rule.load(tensor, cfg)
    saved = rule.save((loaded,), cfg)
    assert loaded.shape == logical
    assert torch.equal(saved, tensor)
    assert loaded.data_ptr() == saved.data_ptr() == tensor.data_ptr()
    assert saved.is_contiguous()
    assert DiskShapes({"b.3.ours": logical}, cfg).of(rule, 3) == shape


@pytest.mark.parametrize("value", [0.5, -1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constant_is_the_number_or_refused(value, dtype) -> None:
    """Also after a trip through a narrower dtype, where that holds it."""
    rule, cfg = Constant("c.{i}", value, beside="b.{i}.w"), ONE_LAYER
    assert rule.ours == ()
    assert parameters_beside(rule) == ("b.{i}.w",)
    written = rule.save((), cfg)
    assert written.shape == ()
    assert written.item() == pytest.approx(value)
    if not (value == -1e-6 and dtype == torch.float16):  # A number below what float16 tells apart.
        assert rule.load(written.to(dtype), cfg) == ()
    with pytest.raises(UnsupportedModelError, match=f"expected {value}"):
        rule.load(torch.tensor(1.1 * value), cfg)


SIZES = {"one": 2, "two": 3, "three": 1}


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("is_weight", [True, False])
def test_pieces_of_rows_by_brute_force(heads, is_weight) -> None:
    """Pieces in another order than on disk, put together in one parameter, and for each head anew."""
    made_of = (("b.{i}.W", ("three", "one")), ("b.{i}.V", ("two",)))
    rule = RowPieces("rows", made_of, ("one", "two", "three"), lambda cfg: SIZES, heads=heads)
    n_heads = ONE_LAYER.n_heads if heads else 1
    tensor = torch.arange(float(n_heads * 6 * (5 if is_weight else 1)))
    tensor = tensor.view(n_heads * 6, 5) if is_weight else tensor
    whole, rest = rule.load(tensor, ONE_LAYER)
    assert rule.ours == ("b.{i}.W", "b.{i}.V")
    for head in range(n_heads):
        for parameter, rows in ((whole, (5, 0, 1)), (rest, (2, 3, 4))):
            of_head = parameter[head] if heads else parameter
            assert of_head.shape == ((5, 3) if is_weight else (3,))
            for place, row in enumerate(rows):
                assert torch.equal(of_head[..., place], tensor[head * 6 + row])
    assert torch.equal(rule.save((whole, rest), ONE_LAYER), tensor)
    # As an nn.Linear has them.
    assert all(one.movedim(-1, int(heads)).is_contiguous() for one in (whole, rest))
