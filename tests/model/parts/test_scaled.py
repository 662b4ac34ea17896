"""`ScaledLinear`: numbers of few bits times scales, against the formula, entry by entry."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from hooklens.model.parts import scaled
from hooklens.model.parts.quantised import UnevenLinear, compute_dtype, dense_weight, set_compute_dtype
from hooklens.model.parts.scaled import KINDS, ScaledLinear

_E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
D_OUT, D_IN = 6, 8


def make(kind, *, zeros=False, shuffled=False, seed=0):
    """A map, and its weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randint(256, (D_OUT, D_IN // 2 if kind in ("uint4", "e2m1") else D_IN), generator=generator)
    if kind.startswith("float8"):
        entries = torch.randn(D_OUT, D_IN, generator=generator).to(getattr(torch, kind)).view(torch.uint8)
    entries = entries.to(torch.int8 if kind == "int8" else torch.uint8)
    scales = (torch.rand(D_OUT, 2, generator=generator) + 0.5).half()
    points = torch.randint(16, (D_OUT, 2), generator=generator, dtype=torch.uint8) if zeros else None
    groups = torch.randint(2, (D_IN,), generator=generator) if shuffled else None
    linear = ScaledLinear(kind, entries, scales, D_IN, zeros=points, groups=groups)
    weight = torch.empty(D_OUT, D_IN, dtype=torch.float64)
    for i in range(D_OUT):
        for j in range(D_IN):
            group = j // 4 if groups is None else int(groups[j])
            number = _number(kind, entries[i], j) - (0 if points is None else int(points[i, group]))
            weight[i, j] = number * float(scales[i, group])
    return linear, weight


def _number(kind, row, j):
    if kind in ("uint4", "e2m1"):
        half = int(row[j // 2]) >> 4 * (j % 2) & 15
        return half if kind == "uint4" else _E2M1[half]
    return float(row.view(getattr(torch, kind))[j]) if kind.startswith("float8") else int(row[j])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_weight(monkeypatch, kind, zeros, shuffled) -> None:
    linear, weight = make(kind, zeros=zeros, shuffled=shuffled)
    # One rounding, that of the product to float32; of fp8 numbers less zeros one more.
    torch.testing.assert_close(linear.dequantise().double(), weight, rtol=2**-23, atol=2**-22)
    assert torch.equal(linear.dequantise(torch.bfloat16), linear.dequantise().bfloat16())
    whole = linear.dequantise()
    # A few rows at a time, the last ones fewer.
    monkeypatch.setattr(scaled, "_AT_ONCE", 4 * D_IN)
    assert torch.equal(linear.dequantise(), whole)


def test_it_is_the_linear_map_of_its_weight() -> None:
    linear, _ = make("uint4", zeros=True)
    weight, x = linear.dequantise(), torch.randn(2, 3, D_IN, generator=torch.Generator().manual_seed(1))
    linear.bias = torch.nn.Parameter(torch.arange(float(D_OUT)))
    expected = torch.nn.functional.linear(x, weight) + linear.bias
    assert torch.equal(linear(x), expected)
    asking = x.clone().requires_grad_()
    assert torch.equal(linear(asking), expected)
    assert dense_weight(linear).equal(weight)


@pytest.mark.parametrize("linear", [make("int8")[0], UnevenLinear(D_IN, D_OUT)], ids=["scaled", "uneven"])
def test_the_input_is_named_as_that_of_the_plain_map(linear) -> None:
    """It was `x`, so what called an `nn.Linear` as `map(input=...)` failed with a quantised map in its place."""
    x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(input=x), linear(x))


def test_derivatives() -> None:
    """Those of the plain map: first and second, forward, of rows apart, and of the bias."""
    linear, _ = make("uint4", zeros=True)
    set_compute_dtype(linear, torch.float64)
    linear.bias = torch.nn.Parameter(torch.ones(D_OUT, dtype=torch.float64))
    x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, x)
    assert torch.autograd.gradgradcheck(lambda x: linear(x) ** 2, x)
    weight = linear.dequantise()

    def of_rows(run):
        return torch.func.vmap(torch.func.grad(lambda row: (run(row) ** 3).sum()))(x.detach())

    def forward(run):
        return torch.func.jvp(torch.func.grad(lambda x: (run(x) ** 3).sum()), (x.detach(),), (torch.ones_like(x),))[1]

    def plain(x):
        return torch.nn.functional.linear(x, weight, linear.bias)

    for derive in (of_rows, forward):
        torch.testing.assert_close(derive(linear), derive(plain), rtol=1e-12, atol=1e-12)
    [found] = torch.autograd.grad((linear(x) ** 2).sum(), linear.bias)
    torch.testing.assert_close(found, torch.autograd.grad((plain(x) ** 2).sum(), linear.bias)[0])


def test_no_weight_waits_for_the_way_back(monkeypatch) -> None:
    """Each map's dequantised weight would stay in memory from its call to the gradient: the whole model, dense."""
    linear, _ = make("uint4")
    made = []
    dequantise = ScaledLinear.dequantise

    def watch(self, dtype=None):
        weight = dequantise(self, dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(ScaledLinear, "dequantise", watch)
    out = linear(torch.randn(3, D_IN, requires_grad=True))
    gc.collect()
    assert [one() for one in made] == [None]
    out.sum().backward()
    assert len(made) == 2


@pytest.mark.parametrize("kind", ["uint4", "float8_e4m3fn"])
def test_casts_leave_what_is_stored(kind) -> None:
    """Rounded scales would be another weight, and float8 numbers cast to the network's dtype no longer small."""
    linear, _ = make(kind)
    linear.scales = linear.scales.float() + 1e-3
    weight = linear.dequantise()
    for cast in (
        copy.deepcopy(linear).to(torch.bfloat16),
        copy.deepcopy(linear).half(),
        copy.deepcopy(linear).double(),
    ):
        assert (cast.scales.dtype, cast.weight.dtype) == (torch.float32, torch.uint8)
        assert torch.equal(cast.dequantise(torch.float32), weight)
    assert linear.to("meta").scales.is_meta


def test_copies_and_the_dtype_that_is_computed_in() -> None:
    linear, _ = make("int8", zeros=True, shuffled=True)
    set_compute_dtype(linear, torch.bfloat16)
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert compute_dtype(copied) == torch.bfloat16
        assert torch.equal(copied(torch.ones(2, D_IN).bfloat16()), linear(torch.ones(2, D_IN).bfloat16()))
    assert "kind=int8, group=in any order" in repr(linear)
    assert "kind=uint4, group=4" in repr(make("uint4")[0])
