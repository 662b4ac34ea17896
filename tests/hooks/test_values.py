"""Tests of hooklens.hooks.values on edits: equal where they do the same, hashed alike, printed as the call."""

import copy
import functools
import pickle
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import edits
from hooklens.hooks.values import TensorValue, is_same_value


def double(region):
    return 2 * region


def negate(region):
    return -region


DTYPES = [torch.float32, torch.float64, torch.bfloat16]
_tensors = st.builds(
    lambda shape, dtype, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 2), max_size=3), st.sampled_from(DTYPES), st.integers(0, 3),
)  # fmt: skip
_numbers = st.lists(st.integers(-1, 1), min_size=1, max_size=2, unique=True)
_indices = st.none() | st.integers(-2, 1) | _numbers | st.builds(
    slice, st.none() | st.integers(0, 1), st.none() | st.integers(0, 1)
)  # fmt: skip
_names = st.sampled_from(["z", "k", ["z", "k"], ("z", 1), double])
_where = st.fixed_dictionaries(
    {"pos": _indices, "rows": _indices, "when": st.sampled_from(["all", "decode"])},
    optional={"head": _indices, "query_head": st.none()},
)


_BUILT = ("Replace", "Add", "Scale", "Zero", "Mean", "Project", "Interchange")


@st.composite
def _recipes(draw):
    name, where = draw(_names), draw(_where)
    kind = draw(st.sampled_from(["Replace", "Add", "Scale", "Zero", "Mean", "Project", "Interchange", "Custom"]))
    values = {
        "Replace": _tensors | st.integers(0, 1),
        "Add": _tensors | st.integers(0, 1),
        "Scale": st.sampled_from([0.5, 1, 2.0]),
        "Project": _tensors,
        "Custom": st.sampled_from([double, negate, torch.neg]),
    }
    own = [draw(values[kind])] if kind in values else []
    if kind == "Interchange":
        own = [draw(_tensors), draw(_tensors | st.integers(0, 1))]
        where |= draw(st.just({}) | st.builds(lambda shares: {"shares": shares}, _tensors))
    if kind == "Project" and draw(st.booleans()):
        where["keep"] = draw(st.booleans())
    return kind, name, own, where


def make(recipe):
    """The edit of a recipe; not drawn itself, because the check of its arguments uses random numbers of its own."""
    kind, name, own, where = recipe
    return getattr(edits, kind)(name, *own, **where)


def plain(value):
    """A field as plain Python, so that `==` compares it: tensors as dtype, shape and entries."""
    if isinstance(value, torch.Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), value.flatten().tolist()
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


def as_plain(edit):
    return type(edit), [plain(getattr(edit, field.name)) for field in fields(edit)]


@settings(max_examples=500)
@given(one=_recipes(), other=_recipes())
def test_equal_where_class_and_fields_are(one, other):
    one, other = make(one), make(other)
    assert (one == other) is (as_plain(one) == as_plain(other))
    assert (one != other) is not (one == other)
    if one == other:
        assert hash(one) == hash(other)


@settings(max_examples=200)
@given(recipe=_recipes(), data=st.data())
def test_copies_are_equal_and_a_changed_field_is_not(recipe, data):
    edit = make(recipe)
    for twin in (copy.copy(edit), copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
        assert twin == edit
        assert hash(twin) == hash(edit)
        assert repr(twin) == repr(edit)
    tensors = [getattr(edit, field.name) for field in fields(edit)]
    tensors = [value for value in tensors if isinstance(value, torch.Tensor) and value.numel()]
    twin, before = copy.deepcopy(edit), hash(edit)
    for tensor in tensors:
        tensor.flatten()[data.draw(st.integers(0, tensor.numel() - 1))] += 1
        assert twin != edit
        assert hash(edit) == before, "an edit stays where it is in a set when its tensor is written to"


class _Named(dict):
    """Names in a printed edit: tensors and functions become ones that only print as they did."""

    def __missing__(self, name):
        return {"double": double, "negate": negate, "neg": torch.neg}[name]


class _Prints:
    def __class_getitem__(cls, parts):
        parts = parts if isinstance(parts, tuple) else (parts,)
        dtypes = [part for part in parts if isinstance(part, torch.dtype)]
        return torch.zeros([part for part in parts if isinstance(part, int)], dtype=dtypes[0] if dtypes else None)


@settings(max_examples=300)
@given(recipe=_recipes())
def test_the_printed_form_is_a_call_that_makes_the_edit(recipe):
    """Evaluated it gives the same edit, but for the entries of tensors."""
    edit = make(recipe)
    scope = _Named({kind: getattr(edits, kind) for kind in _BUILT})
    scope |= {"Custom": edits.Custom, "Tensor": _Prints, "slice": slice}
    scope |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    printed = repr(edit)
    made = eval(printed.replace("Tensor[]", "Tensor[()]").replace("'", '"'), scope)
    assert repr(made) == printed
    for field in fields(edit):
        one, other = getattr(made, field.name), getattr(edit, field.name)
        if isinstance(other, torch.Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
        else:
            assert is_same_value(one, other)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (edits.Zero("z"), "Zero('z')"),
        (edits.Zero("k", query_head=[1, 2], pos=slice(2)), "Zero('k', pos=slice(None, 2, None), query_head=[1, 2])"),
        (edits.Replace("resid_pre", torch.zeros(4, 8), pos=-1), "Replace('resid_pre', Tensor[4, 8], pos=-1)"),
        (edits.Add(("z", 3), torch.zeros(8).bfloat16()), "Add(('z', 3), Tensor[8, bfloat16])"),
        (edits.Add("z", torch.zeros(2, device="meta")), "Add('z', Tensor[2, meta])"),
        (edits.Add("z", torch.tensor(1.0)), "Add('z', Tensor[])"),
        (edits.Scale(["z", "k"], 0.5, rows=0, when="decode"), "Scale(['z', 'k'], 0.5, rows=0, when='decode')"),
        (edits.Project("z", torch.zeros(8), keep=True), "Project('z', Tensor[8], keep=True)"),
        (edits.Project("z", torch.zeros(8), keep=False), "Project('z', Tensor[8])"),
        (
            edits.Interchange("z", torch.eye(2), torch.zeros(2), torch.ones(2), pos=-1),
            "Interchange('z', Tensor[2, 2], Tensor[2], pos=-1, shares=Tensor[2])",
        ),
        (edits.Custom("z", double, head=2), "Custom('z', double, head=2)"),
        (edits.Custom(str.isidentifier, lambda t: t), "Custom(isidentifier, <lambda>)"),
        (edits.Custom("z", functools.partial(torch.clamp, max=1)), "Custom('z', partial)"),
        (edits.Custom("z", torch.nn.ReLU()), "Custom('z', ReLU)"),
        (edits.Mean(("z",), pos=range(3)), "Mean(('z',), pos=range(0, 3))"),
    ],
    ids=str,
)  # fmt: skip
def test_printed_forms(edit, text):
    assert repr(edit) == text


def test_listings_of_the_same_numbers_are_the_same():
    chosen = [edits.Zero("z", pos=[0, 1]), edits.Zero("z", pos=(0, 1)), edits.Zero("z", pos=range(2))]
    assert len(set(chosen)) == 1
    assert edits.Zero("z", pos=[0, 1]) != edits.Zero("z", pos=[1, 0])
    assert edits.Zero("z", pos=[0]) != edits.Zero("z", pos=0)
    assert is_same_value(np.array([0, 1]), [0, 1])
    assert not is_same_value(np.array([0, 1]), [0, 1, 2])


def test_kinds_and_numbers_are_not_mixed_up():
    assert edits.Replace("z", 0.0) != edits.Add("z", 0.0)
    assert edits.Replace("z", torch.tensor(0.0)) != edits.Replace("z", 0.0)
    assert edits.Zero("z") != "Zero('z')"
    assert edits.Scale("z", float("nan")) != edits.Scale("z", 1.0)
    one = edits.Scale("z", float("nan"))
    assert one == one  # noqa: PLR0124


def test_tensors_without_entries_are_equal_when_they_are_one():
    value = torch.zeros(2, device="meta")
    assert edits.Add("z", value) == edits.Add("z", value)
    assert edits.Add("z", value) != edits.Add("z", torch.zeros(2, device="meta"))
    assert edits.Add("z", value) != edits.Add("z", torch.zeros(2))


def test_functions_are_equal_when_they_are_one():
    class Unhashable:
        __hash__ = None

        def __call__(self, region):
            return region

    function = Unhashable()
    assert edits.Custom("z", function) == edits.Custom("z", function)
    assert hash(edits.Custom("z", function)) == hash(edits.Custom("z", function))
    assert edits.Custom("z", function) != edits.Custom("z", Unhashable())
    assert edits.Custom("z", lambda t: t) != edits.Custom("z", lambda t: t)
    model = torch.nn.Linear(2, 2)
    assert edits.Custom("z", model.forward) == edits.Custom("z", model.forward)


@pytest.mark.parametrize("options", [{}, {"eq": False}, {"repr": False}])
def test_kinds_of_ones_own_are_values_too(options):
    """A dataclass compares tuples of its fields, which fails for tensors, and prints all of them."""

    @dataclass(frozen=True, **options)
    class Shift(edits.Edit):
        by: torch.Tensor
        times: int = 1

        def compute(self, region, region_axes, selection):
            return region + self.times * self.by

    one, other = Shift("z", torch.ones(2), pos=1), Shift("z", torch.ones(2), pos=1)
    assert one == other
    assert len({one, other, Shift("z", torch.zeros(2), pos=1)}) == 2
    assert repr(one) == "Shift('z', Tensor[2], pos=1)"
    assert repr(Shift("z", torch.ones(2), times=3)) == "Shift('z', Tensor[2], times=3)"


def test_a_class_keeps_methods_of_its_own():
    @dataclass(frozen=True)
    class Silent(TensorValue):
        x: int

        def __repr__(self):
            return "silent"

    assert repr(Silent(1)) == "silent"
    assert Silent(1) == Silent(1)
