"""Tests of hooklens.hooks.edits against indexing by hand, one row and one position at a time."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import HookPoint, edits
from hooklens.axes import find_site
from hooklens.errors import EditError
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens

SIZES = {"batch": 3, "pos": 5, "query": 5, "key": 6, "head": 4, "kv_head": 2, "d_model": 7, "d_head": 3, "one": 1}
NAMES = ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_q", "blocks.0.attn.hook_k", "blocks.0.attn.hook_pattern"]


def make_tensor(name, *, seed=0):
    shape = [SIZES[axis] for axis in find_site(name).axes]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_point(name):
    point = HookPoint(find_site(name))
    point.name = name
    return point


def make_tokens(padding, n_past=0, *, by_column=False):
    """Rows with so much padding on the left (negative: on the right), after `n_past` cached tokens.

    Without padding the positions of all rows may be told in plain numbers, too, as calls without a mask do.
    """
    assert not (by_column and any(padding))
    n = SIZES["pos"]
    index = torch.full((len(padding), n), -1)
    for row, pad in enumerate(padding):
        real = range(max(pad, 0), n + min(pad, 0))
        index[row, list(real)] = n_past + torch.arange(len(real))
    return SimpleNamespace(
        token_index=index, n_tokens=index.amax(1) + 1, phase="prefill", columns=None, n_run=n, length=n_past + n,
        positions_by_column=range(n_past, n_past + n) if by_column else None,
    )  # fmt: skip


def wanted_cells(edit, name, tokens):
    """(row, column, head) of everything an edit should touch, and nothing else."""
    axes = find_site(name).axes
    n_heads = next((SIZES[axis] for axis in axes if axis in ("head", "kv_head")), 1)
    every = lambda n: list(range(n))  # noqa: E731

    def pick(chosen, n):
        if chosen is None:
            return every(n)
        if isinstance(chosen, slice):
            return every(n)[chosen]
        return [every(n)[i] for i in ([chosen] if isinstance(chosen, int) else chosen)]

    for row in pick(edit.rows, SIZES["batch"]):
        positions = pick(edit.pos, int(tokens.n_tokens[row]))
        for column in range(SIZES["pos"]):
            if int(tokens.token_index[row, column]) in positions:
                for head in pick(edit.head, n_heads):
                    yield row, column, head


def cell(tensor, name, row, column, head):
    """A view of one head at one column of one row."""
    axes = find_site(name).axes
    if "query" in axes:
        return tensor[row, head, column]
    return tensor[row, column, head] if {"head", "kv_head"} & set(axes) else tensor[row, column]


_rows = st.none() | st.integers(-3, 2) | st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
_pos = st.none() | st.integers(-2, 1) | st.lists(st.integers(0, 1), min_size=1, unique=True) | st.builds(
    slice, st.none() | st.integers(-5, 4), st.none() | st.integers(-5, 5), st.none() | st.sampled_from([-2, -1, 1, 2])
)  # fmt: skip
_padding = st.just([0, 0, 0]) | st.lists(st.integers(-3, 3), min_size=3, max_size=3)


@settings(max_examples=150)
@given(
    name=st.sampled_from(NAMES),
    kind=st.sampled_from(
        ["Zero", "Scale", "Add", "Replace", "Custom", "Project", "Interchange", "SetComponents"]
    ),
    rows=_rows, pos=_pos, head=st.none() | st.integers(-2, 1) | st.just([1, 0]), padding=_padding,
    by_column=st.booleans(),
)  # fmt: skip
def test_what_is_touched_and_what_is_not(name, kind, rows, pos, head, padding, by_column):
    if "hook_resid" in name:
        head = None
    if rows is None and pos is None and head is None:
        rows = [0, 1, 2]
    vector = torch.linspace(1, 2, make_tensor(name).shape[-1], dtype=torch.float64)
    at = {"rows": rows, "pos": pos, "head": head}
    edit, change = {
        "Zero": (edits.Zero(name, **at), lambda x: 0 * x),
        "Scale": (edits.Scale(name, -1.5, **at), lambda x: -1.5 * x),
        "Add": (edits.Add(name, vector, **at), lambda x: x + vector),
        "Replace": (edits.Replace(name, 2.5, **at), lambda x: 0 * x + 2.5),
        "Custom": (edits.Custom(name, lambda region: region**2, **at), lambda x: x**2),
        "Project": (edits.Project(name, vector, **at), lambda x: x - vector * (x @ vector) / (vector @ vector)),
        "Interchange": (
            edits.Interchange(name, (vector / vector.norm())[None], 2 * vector, **at),
            lambda x: x + 2 * vector - vector * (x @ vector) / (vector @ vector),
        ),
        "SetComponents": (
            edits.SetComponents(name, vector, 3.0, **at),
            lambda x: x + vector * (3.0 - x @ vector) / (vector @ vector),
        ),
    }[kind]
    tokens, tensor = make_tokens(padding, by_column=by_column and not any(padding)), make_tensor(name)
    expected, before = tensor.clone(), tensor.clone()
    touched = list(wanted_cells(edit, name, tokens))
    for where in touched:
        cell(expected, name, *where).copy_(change(cell(tensor, name, *where)))
    edited = edit.apply(tensor, make_point(name), tokens)
    assert torch.equal(tensor, before), "an edit works out of place"
    if not touched:
        assert edited is None
        return
    # 1e-12: a projection through QR rounds otherwise than the one by hand.
    torch.testing.assert_close(edited, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=100)
@given(
    name=st.sampled_from(NAMES), rows=_rows, pos=_pos, head=st.none() | st.integers(0, 1) | st.just([1, 0]),
    with_batch=st.booleans(),
)  # fmt: skip
def test_a_value_has_the_shape_of_what_indexing_gives(name, rows, pos, head, with_batch):
    """Values at the pattern were read as [rows, pos, head, key], transposed without a word where sizes agree.

    And a slice of positions wanted a value with all positions.
    """
    if "hook_resid" in name:
        head = None
    axes, tensor, clean = find_site(name).axes, make_tensor(name), make_tensor(name, seed=1)
    index = {
        "batch": [rows] if isinstance(rows, int) else rows,
        "pos": pos,
        "query": pos,
        "head": head,
        "kv_head": head,
    }
    value, expected = clean, tensor.clone()
    cells = list(wanted_cells(edits.Zero(name, rows=rows, pos=pos, head=head), name, make_tokens([0, 0, 0])))
    # An int drops its axis, last axes first so that the numbers of the others stay.
    for axis in reversed(range(len(axes))):
        chosen = index.get(axes[axis])
        if isinstance(chosen, int):
            value = value.select(axis, chosen)
        elif isinstance(chosen, slice):
            value = value.index_select(axis, torch.tensor(range(value.shape[axis])[chosen], dtype=torch.long))
        elif chosen is not None:
            value = value.index_select(axis, torch.tensor(chosen) % value.shape[axis])
    if not with_batch:
        value = value[0]
        first = range(SIZES["batch"])[index["batch"][0]] if index["batch"] else 0
        clean = clean[first].expand_as(clean)
    for where in cells:
        cell(expected, name, *where).copy_(cell(clean, name, *where))
    edit = edits.Replace(name, value, rows=rows, pos=pos, head=head)
    for tokens in (None, make_tokens([0, 0, 0]), make_tokens([0, 0, 0], by_column=True)):
        edited = edit.apply(tensor, make_point(name), tokens)
        assert torch.equal(tensor if edited is None else edited, expected)


def test_values_are_laid_over_rows_with_padding():
    name, tokens = "blocks.0.hook_resid_pre", make_tokens([2, 0, -1])
    tensor, value = make_tensor(name), make_tensor(name, seed=1)
    at_last = edits.Replace(name, value[:, 0], pos=-1).apply(tensor, make_point(name), tokens)
    for row, column in ((0, 4), (1, 4), (2, 3)):
        assert torch.equal(at_last[row, column], value[row, 0])
    two = edits.Replace(name, value[:, :2], pos=[1, -1]).apply(tensor, make_point(name), tokens)
    for row, column, slot in ((0, 3, 0), (0, 4, 1), (1, 1, 0), (2, 1, 0), (2, 3, 1)):
        assert torch.equal(two[row, column], value[row, slot])
    first_two = edits.Replace(name, value[:, :2], pos=slice(0, 2)).apply(tensor, make_point(name), tokens)
    for row, start in enumerate((2, 0, 0)):
        assert torch.equal(first_two[row, start : start + 2], value[row, :2])
    # As many positions in every row is what a value needs; of all columns the selected ones are read.
    real = edits.Replace(name, value, pos=slice(None)).apply(tensor, make_point(name), tokens)
    assert torch.equal(real, torch.where((tokens.token_index >= 0)[..., None], value, tensor))
    with pytest.raises(EditError, match=r"the value has shape \[3, 2, 7\]; expected \[3, 5, 7\] or \[5, 7\]"):
        edits.Replace(name, value[:, :2], pos=slice(None)).apply(tensor, make_point(name), tokens)


def test_positions_are_absolute_with_a_cache():
    name, tokens = "blocks.0.hook_resid_pre", make_tokens([0, 1, 2], n_past=10)
    tensor = make_tensor(name)
    zeroed = edits.Zero(name, pos=11).apply(tensor, make_point(name), tokens)
    assert [int((zeroed[row] == 0).all(-1).nonzero()) for row in range(3)] == [1, 2, 3]
    assert edits.Zero(name, pos=3).apply(tensor, make_point(name), tokens) is None
    assert edits.Zero(name, pos=slice(0, 10)).apply(tensor, make_point(name), tokens) is None
    value = make_tensor(name, seed=1)[:, :4]
    edited = edits.Replace(name, value, pos=slice(8, 12)).apply(tensor, make_point(name), tokens)
    assert torch.equal(edited[1, 1:3], value[1, 2:])
    assert torch.equal(edited[:, 3:][0], tensor[:, 3:][0])


@pytest.mark.parametrize("by_column", [True, False])
def test_positions_are_absolute_with_a_cache_in_rows_without_padding(by_column):
    name, tokens = "blocks.0.hook_resid_pre", make_tokens([0, 0, 0], n_past=10, by_column=by_column)
    tensor, value = make_tensor(name), make_tensor(name, seed=1)[:, :4]
    for pos, columns in ((11, [1]), (-1, [4]), ([13, 10], [0, 3]), (slice(9, None, 2), [1, 3]), ([12, 2], [2])):
        zeroed = edits.Zero(name, pos=pos).apply(tensor, make_point(name), make_decoding(tokens))
        assert [(zeroed[row] == 0).all(-1).nonzero()[:, 0].tolist() for row in range(3)] == [columns] * 3
    assert edits.Zero(name, pos=3).apply(tensor, make_point(name), make_decoding(tokens)) is None
    assert edits.Zero(name, pos=slice(0, 10)).apply(tensor, make_point(name), tokens) is None
    edited = edits.Replace(name, value, pos=slice(8, 12)).apply(tensor, make_point(name), tokens)
    assert torch.equal(edited[:, :2], value[:, 2:])
    assert torch.equal(edited[:, 2:], tensor[:, 2:])


def make_decoding(tokens):
    return SimpleNamespace(**{**vars(tokens), "phase": "decode"})


@pytest.mark.parametrize("by_column", [True, False])
def test_a_token_named_twice_is_refused(by_column):
    """By two numbers that mean one token; which of two values it gets would be chance."""
    tokens = make_tokens([0, 0, 0], by_column=by_column)
    with pytest.raises(EditError, match=r"pos.*\(1, -4\) names .*; name (it|each entry) once"):
        edits.Zero("x", pos=[1, -4]).apply(make_tensor(NAMES[0]), make_point(NAMES[0]), tokens)


def test_phases():
    name, tensor = "blocks.0.hook_resid_pre", make_tensor("blocks.0.hook_resid_pre")
    for when, acts in (("all", (True, True)), ("prefill", (True, False)), ("decode", (False, True))):
        for phase, expected in zip(("prefill", "decode"), acts, strict=True):
            tokens = SimpleNamespace(**{**vars(make_tokens([0, 0, 0])), "phase": phase})
            edited = edits.Zero(name, when=when).apply(tensor, make_point(name), tokens)
            assert (edited is not None) is expected
    with unchecked(), pytest.raises(EditError, match=r"Zero\('x'\): when is 'never'; expected 'all', 'prefill' or"):
        edits.Zero("x", when="never")


@pytest.mark.parametrize("name", NAMES[:2])
def test_mean_is_over_the_tokens_selected(name):
    tokens, tensor = make_tokens([2, 0, -1]), make_tensor(name)
    real = tokens.token_index >= 0
    edited = edits.Mean(name, pos=slice(None)).apply(tensor, make_point(name), tokens)
    torch.testing.assert_close(edited[real], tensor[real].mean(0).expand_as(tensor[real]))
    assert torch.equal(edited[~real], tensor[~real])
    whole = edits.Mean(name).apply(tensor, make_point(name), make_tokens([0, 0, 0]))
    torch.testing.assert_close(whole, tensor.mean((0, 1)).expand_as(tensor))


@pytest.mark.parametrize("name", NAMES)
def test_mean_leaves_padding_out_without_being_asked(name):
    """With pos, head and rows left out the padding columns counted in the mean and were overwritten by it."""
    tokens, tensor = make_tokens([2, 0, -1]), make_tensor(name)
    edited = edits.Mean(name).apply(tensor, make_point(name), tokens)
    places = [(row, column) for row, column in (tokens.token_index >= 0).nonzero().tolist()]
    heads = next((SIZES[axis] for axis in find_site(name).axes if axis in ("head", "kv_head")), 1)
    expected = tensor.clone()
    for head in range(heads):
        mean = torch.stack([cell(tensor, name, *place, head) for place in places]).mean(0)
        for place in places:
            cell(expected, name, *place, head).copy_(mean)
    torch.testing.assert_close(edited, expected)
    changed = tensor.clone()
    for row, column in (tokens.token_index < 0).nonzero().tolist():
        for head in range(heads):
            cell(changed, name, row, column, head).fill_(1e6)
    again = edits.Mean(name).apply(changed, make_point(name), tokens)
    for place in places:
        assert torch.equal(cell(again, name, *place, 0), cell(edited, name, *place, 0))


def test_mean_in_a_run_does_not_depend_on_padding():
    model, tokens = make_model("rotary"), random_tokens(1, 4)
    edit = edits.Mean("blocks.0.hook_resid_post")
    padded = torch.cat([random_tokens(1, 2, seed=5), tokens], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    alone = model.run_with_hooks(tokens, edits=[edit])
    # Float64; attention over two more masked columns rounds differently.
    torch.testing.assert_close(
        model.run_with_hooks(padded, attention_mask=mask, edits=[edit])[:, 2:], alone, rtol=0, atol=1e-10
    )


def test_mean_at_a_point_outside_the_grammar_is_over_its_first_axis():
    tensor = torch.randn(3, 5)
    found = edits.Mean("x").apply(tensor, make_point("toy.hook_hidden"), make_tokens([2, 0, -1]))
    torch.testing.assert_close(found, tensor.mean(0).expand_as(tensor))


def test_mean_of_a_pattern_is_over_rows_and_queries():
    tensor = make_tensor(NAMES[3])
    whole = edits.Mean(NAMES[3]).apply(tensor, make_point(NAMES[3]), None)
    torch.testing.assert_close(whole, tensor.mean((0, 2), keepdim=True).expand_as(tensor))


@given(k=st.integers(1, 3), keep=st.booleans(), seed=st.integers(0, 99))
def test_project(k, keep, seed):
    name = NAMES[0]
    directions = torch.randn(k, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    tensor = make_tensor(name)
    out = edits.Project(name, directions, keep=keep).apply(tensor, make_point(name), None)
    inside = tensor @ torch.linalg.pinv(directions) @ directions
    # 1e-9: pinv and the orthonormal basis round differently, the more the closer the directions lie together.
    torch.testing.assert_close(out, inside if keep else tensor - inside, rtol=1e-9, atol=1e-9)


def project(tensor, directions, **keywords):
    return edits.Project(NAMES[0], directions, **keywords).apply(tensor, make_point(NAMES[0]), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_project_of_dependent_and_zero_directions_is_that_of_their_span(dtype, keep):
    """QR filled the basis up to as many columns as there were directions, with ones outside of the span."""
    tensor = make_tensor(NAMES[0])
    first, second = torch.randn(2, 7, dtype=torch.float64).to(dtype)
    span = torch.stack([first, second])
    expected = project(tensor, span, keep=keep)
    zero = torch.zeros(7, dtype=dtype)
    for directions in (
        torch.stack([first, second, first]),
        torch.stack([first, -2 * first, second, zero]),
        torch.stack([zero, second, first, first, second]),
    ):
        torch.testing.assert_close(project(tensor, directions, keep=keep), expected, rtol=0, atol=1e-12)
    # A sum is rounded to the dtype, half a unit relative to itself, and so is the span.
    summed = torch.stack([first, second, first + second])
    torch.testing.assert_close(project(tensor, summed, keep=keep), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert torch.linalg.matrix_rank(project(torch.eye(7).double()[None], summed, keep=True)[0], atol=1e-6) == 2


def test_project_of_zeros_alone_removes_nothing():
    tensor = make_tensor(NAMES[0])
    for zeros in (torch.zeros(7), torch.zeros(3, 7), torch.zeros(0, 7)):
        assert torch.equal(project(tensor, zeros), tensor)
        assert torch.equal(project(tensor, zeros, keep=True), torch.zeros_like(tensor))


def test_project_does_not_depend_on_lengths():
    """Next to a direction a million times as long a short one must not pass for rounding."""
    tensor = make_tensor(NAMES[0])
    directions = torch.randn(3, 7, dtype=torch.float64)
    scales = torch.tensor([1e-300, 1.0, 1e300], dtype=torch.float64)[:, None]
    torch.testing.assert_close(project(tensor, directions * scales), project(tensor, directions), rtol=0, atol=1e-12)
    assert torch.equal(project(tensor, torch.eye(7).long()[:2])[..., :2], torch.zeros(3, 5, 2).double())
    torch.testing.assert_close(
        project(tensor, (directions.float() * 1e-38)[:1]), project(tensor, directions[:1]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_project_in_half_precision_is_rounded_once(dtype, keep):
    """Basis and product were rounded to the activation's dtype first, so a part of the span was left."""
    tensor = (make_tensor(NAMES[0]) * 10).to(dtype)
    directions = torch.randn(2, 7)
    exact = project(tensor.double(), directions, keep=keep)
    found = project(tensor, directions, keep=keep)
    assert found.dtype == dtype
    # float32 arithmetic on entries of size 10 may move an entry over a rounding border: half a unit, and its error.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4
    assert ((found.double() - exact).abs() <= bound).all()


def test_project_in_float32_takes_directions_of_any_dtype():
    tensor, direction = make_tensor(NAMES[0]).float(), torch.tensor([1.0, 2, 3, 4, 5, 6, 7])
    expected = (
        tensor - torch.outer(tensor.flatten(0, 1) @ direction, direction).view(3, 5, 7) / direction.square().sum()
    )
    for dtype in (torch.float64, torch.float32, torch.float16, torch.int64):
        found = project(tensor, direction.to(dtype))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("keep", [True, False])
def test_project_has_the_gradients_of_the_projection(keep):
    """To the activation and to the directions, for orthogonal ones (equal singular values), too."""
    tensor = make_tensor(NAMES[0])
    orthogonal = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q.T
    for rows in (torch.randn(3, 7, dtype=torch.float64), orthogonal, torch.eye(7).double()[:2], orthogonal[:1]):
        x, directions = tensor.clone().requires_grad_(), rows.clone().requires_grad_()
        inside = x @ torch.linalg.pinv(directions) @ directions
        expected = torch.autograd.grad((inside if keep else x - inside).pow(3).sum(), (x, directions))
        found = torch.autograd.grad(project(x, directions, keep=keep).pow(3).sum(), (x, directions))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    for rows in (torch.zeros(2, 7), torch.ones(3, 7), torch.cat([torch.eye(7)[:2], torch.ones(2, 7)])):
        x, directions = tensor.clone().requires_grad_(), rows.double().requires_grad_()
        project(x, directions, keep=keep).pow(3).sum().backward()
        assert x.grad.isfinite().all()
        assert directions.grad is None or directions.grad.isfinite().all()


def test_project_onto_no_tensor_is_refused():
    with unchecked(), pytest.raises(EditError, match="directions are a list; expected a tensor of real numbers"):
        project(make_tensor(NAMES[0]), [1.0] * 7)


def test_project_follows_directions_that_are_changed_in_place():
    tensor, directions = make_tensor(NAMES[0]), torch.eye(7)[:1].clone()
    edit = edits.Project(NAMES[0], directions)
    edit.apply(tensor, make_point(NAMES[0]), None)
    directions.copy_(torch.eye(7)[3:4])
    assert torch.equal(edit.apply(tensor, make_point(NAMES[0]), None)[..., 3], torch.zeros(3, 5).double())


def make_basis(k, seed=0):
    drawn = torch.randn(7, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.T


@given(k=st.integers(1, 7), shared=st.booleans(), seed=st.integers(0, 99))
def test_interchange(k, shared, seed):
    """Coordinates in a whole basis are exchanged one by one."""
    rotation = make_basis(7, seed)
    shares = torch.linspace(0, 1, k, dtype=torch.float64) if shared else None
    tensor, source = make_tensor(NAMES[0]), make_tensor(NAMES[0]).flip(0)
    coordinates, others = tensor @ rotation.T, source @ rotation.T
    for i in range(k):
        share = 1.0 if shares is None else shares[i]
        coordinates[..., i] = (1 - share) * coordinates[..., i] + share * others[..., i]
    out = edits.Interchange(NAMES[0], rotation[:k], source, shares).apply(tensor, make_point(NAMES[0]), None)
    # 1e-12: rotating there and back rounds.
    torch.testing.assert_close(out, coordinates @ rotation, rtol=1e-12, atol=1e-12)


def test_interchange_with_the_activation_itself_changes_nothing():
    tensor = make_tensor(NAMES[0]).float() * 1e3
    out = edits.Interchange(NAMES[0], make_basis(4), tensor).apply(tensor, make_point(NAMES[0]), None)
    assert torch.equal(out, tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_interchange_in_half_precision_is_rounded_once(dtype):
    tensor, source = make_tensor(NAMES[0]).to(dtype), make_tensor(NAMES[0]).flip(0).to(dtype)
    basis = make_basis(3).to(dtype)
    out = edits.Interchange(NAMES[0], basis, source).apply(tensor, make_point(NAMES[0]), None)
    wide, rows = tensor.double(), basis.double()
    expected = (wide + (source.double() - wide) @ rows.T @ rows).to(dtype)
    # float32 sums may fall on the other side of a rounding border than float64 ones, which is one step of the dtype.
    torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert (out == expected).float().mean() > 0.98


def test_interchanges_in_orthogonal_subspaces_do_not_touch_each_other():
    rotation, tensor = make_basis(7), make_tensor(NAMES[0])
    sources = tensor.flip(0), tensor.flip(1)
    both = [edits.Interchange(NAMES[0], rotation[i : i + 3], sources[i // 3]) for i in (0, 3)]
    orders = [first.apply(tensor, make_point(NAMES[0]), None) for first in both]
    ways = [second.apply(done, make_point(NAMES[0]), None) for second, done in zip(both[::-1], orders, strict=True)]
    torch.testing.assert_close(*ways, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ways[0] @ rotation[:3].T, sources[0] @ rotation[:3].T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ways[0] @ rotation[3:6].T, sources[1] @ rotation[3:6].T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ways[0] @ rotation[6:].T, tensor @ rotation[6:].T, rtol=1e-12, atol=1e-12)


def test_interchange_has_gradients_to_basis_and_shares():
    tensor, source = make_tensor(NAMES[0]), make_tensor(NAMES[0]).flip(0)
    start = make_basis(2).requires_grad_()
    shares = torch.tensor([0.3, 0.9], dtype=torch.float64, requires_grad=True)

    def run(basis, shares):
        rows = torch.linalg.qr(basis.T).Q.T
        return edits.Interchange(NAMES[0], rows, source, shares).apply(tensor, make_point(NAMES[0]), None)

    assert torch.autograd.gradcheck(run, (start, shares))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (edits.Replace("x", torch.zeros(3, 7)), r"expected \[3, 5, 7\] or \[5, 7\]"),
        (edits.Replace("x", torch.zeros(1, 5, 7)), r"the value has shape \[1, 5, 7\]; expected \[3, 5, 7\]"),
        (edits.Replace("x", torch.zeros(2, 7), pos=0), r"expected \[3, 7\] or \[7\] .*a vector \[7\], or a number"),
        (edits.Replace("x", torch.zeros(3, 1, 7), pos=0), r"the value has shape \[3, 1, 7\]"),
        (
            edits.Add("x", torch.zeros(7, dtype=torch.float64)),
            r"the value is torch.float64 on cpu, the activation torc",
        ),
        (edits.Add("x", torch.zeros(7, device="meta")), r"the value is torch.float32 on meta.*convert the value first"),
        (
            edits.Zero("x", pos=5),
            r"edit Zero\('blocks.0.hook_resid_pre'\): position 5 is outside row 0, which has 5 tok",
        ),
        (edits.Zero("x", pos=[0, -6]), r"position -6 is outside row 0"),
        (edits.Zero("x", rows=[1, 3]), r"rows: \[3\] out of range; there are 3 rows, 0 to 2"),
        (edits.Zero("x", rows=3), r"rows: 3 out of range; there are 3 rows, 0 to 2"),
        (edits.Zero("x", head=0), r"head=0, but its axes are \['batch', 'pos', 'd_model'\], without heads"),
        (edits.Project("x", torch.zeros(6)), r"directions have shape \[6\]; expected \[7\] or \[k, 7\]"),
        (edits.Project("x", torch.zeros(1, 1, 7)), r"directions have shape \[1, 1, 7\]"),
        (edits.Project("x", torch.tensor(1.0)), r"directions have shape \[\]"),
        (
            edits.Project("x", torch.tensor([[1.0] * 7, [float("nan")] * 7, [0.0] * 6 + [float("inf")]])),
            r"directions \[1, 2\] hold NaN or infinity; expected finite numbers",
        ),
        (edits.Project("x", torch.ones(7, dtype=torch.bool)), r"directions are torch.bool; expected a tensor of real"),
        (edits.Interchange("x", torch.eye(7)[0], 0.0), r"basis is torch.float32 \[7\]; expected a tensor \[k, 7\] of"),
        (edits.Interchange("x", torch.eye(6), 0.0), r"basis is torch.float32 \[6, 6\]; expected a tensor \[k, 7\]"),
        (edits.Interchange("x", torch.eye(7).long(), 0.0), r"basis is torch.int64 \[7, 7\]"),
        (
            edits.Interchange("x", torch.eye(7)[:2] * 1.001, 0.0),
            r"not orthonormal \(products are off by up to 2.0e-03\)",
        ),
        (edits.Interchange("x", torch.full((1, 7), torch.nan), 0.0), r"rows of basis are not orthonormal"),
        (
            edits.Interchange("x", torch.eye(7), 0.0, torch.ones(6)),
            r"shares are \[6\]; expected a tensor \[7\], one for",
        ),
        (edits.Interchange("x", torch.eye(7), torch.zeros(4)), r"the value has shape \[4\]"),
        (edits.Custom("x", lambda t: t[:1]), r"fn returned shape \[1, 5, 7\], torch.float32; expected .*'d_model'"),
        (edits.Custom("x", lambda t: t.double(), pos=0), r"fn returned shape \[3, 7\], torch.float64; expected"),
        (edits.Custom("x", lambda t: 3), r"fn returned a int; expected"),
    ],
)
def test_refusals(edit, text):
    tensor = make_tensor(NAMES[0]).float()
    with unchecked(), pytest.raises(EditError, match=text):
        edit.apply(tensor, make_point(NAMES[0]), None)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (([1.0] * 7, 0.0), r"basis is a list; expected a tensor \[k, 7\]"),
        ((torch.eye(7), 0.0, 0.5), r"shares are a float; expected a tensor \[7\]"),
    ],
)
def test_interchange_in_something_that_is_no_tensor_is_refused(values, text):
    with unchecked(), pytest.raises(EditError, match=text):
        edits.Interchange("x", *values).apply(make_tensor(NAMES[0]), make_point(NAMES[0]), None)


def test_heads_out_of_range():
    for name, word, text in (
        (NAMES[1], "head", r"head: 9 out of range; there are 4 heads, 0 to 3$"),
        (NAMES[1], "query_head", r"query_head: 9 out of range; there are 4 query heads, 0 to 3$"),
        (NAMES[2], "head", r"head: 9 out of range; there are 2 key-value heads, 0 to 1; where query heads share "
         r"these, query_head= chooses a query head$"),
        ("blocks.0.attn.hook_rot_k", "head", r"there are 2 key-value heads, 0 to 1$"),
    ):  # fmt: skip
        with pytest.raises(EditError, match=text):
            edits.Zero(name, **{word: 9}).apply(make_tensor(name), make_point(name), None)


def test_a_position_outside_a_padded_row_names_the_row():
    with pytest.raises(EditError, match=r"position 4 is outside row 1, which has 3 tokens"):
        edits.Zero("x", pos=4).apply(make_tensor(NAMES[0]), make_point(NAMES[0]), make_tokens([0, 2, 0]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pos", [0, -1, slice(1, 3), [0, 2]])
@pytest.mark.parametrize("network", ["rotary", "alibi", "learned, tied"])
def test_in_a_model_padded_rows_are_edited_as_single_ones(network, pos, side):
    model = make_model(network)
    rows = [random_tokens(1, n, seed=n)[0] for n in (5, 3)]
    ids, mask = pad_rows(rows, side)
    chosen = [edits.Scale("blocks.0.hook_resid_post", 3.0, pos=pos), edits.Zero("pattern1", pos=pos, head=1)]
    batched = model.run_with_hooks(ids, attention_mask=mask, edits=chosen)
    for row, tokens in enumerate(rows):
        alone = model.run_with_hooks(tokens, edits=chosen)[0]
        # 1e-10: other shapes, other order of float64 sums.
        torch.testing.assert_close(batched[row][mask[row].bool()], alone, rtol=1e-10, atol=1e-10)
        assert (alone - model(tokens)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("logits_at", [-1, [0, 2], slice(1, 3)])
@pytest.mark.parametrize("pos", [0, -1, [1, 2]])
@pytest.mark.parametrize("point", ["unembed.hook_in", "unembed.hook_out"])
def test_where_only_some_positions_are_computed_the_others_have_nothing_to_edit(point, pos, logits_at):
    model, ids = make_model("rotary"), random_tokens(2, 4)
    chosen = [edits.Scale(point, 3.0, pos=pos)]
    whole = model.run_with_hooks(ids, edits=chosen)
    expected = whole[:, [-1]] if logits_at == -1 else whole[:, logits_at]
    # 1e-12: other shapes, other order of float64 sums.
    torch.testing.assert_close(
        model.run_with_hooks(ids, edits=chosen, logits_at=logits_at), expected, rtol=1e-12, atol=1e-12
    )


class TestQueryHeads:
    """Where edits of query heads act; what they do there is in tests/model/attention/test_per_head.py."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("blocks.0.attn.hook_k", ["blocks.0.attn.hook_k_per_head"]),
            ("k", ["blocks.0.attn.hook_k_per_head", "blocks.1.attn.hook_k_per_head"]),
            (("v", -1), ["blocks.1.attn.hook_v_per_head"]),
            ("blocks.1.attn.hook_[kqv]", [f"blocks.1.attn.hook_{word}" for word in ("q", "k_per_head", "v_per_head")]),
            ("blocks.0.attn.hook_v*", ["blocks.0.attn.hook_v_per_head"]),
            (["z0", "k0"], ["blocks.0.attn.hook_k_per_head", "blocks.0.attn.hook_z"]),
            (lambda name: name.endswith("0.attn.hook_v"), ["blocks.0.attn.hook_v_per_head"]),
            ("pattern0", ["blocks.0.attn.hook_pattern"]),
        ],
    )
    def test_shared_heads_are_edited_at_their_copies(self, name, expected):
        points = make_model("grouped").find_edit_points(edits.Zero(name, query_head=0))
        assert sorted(points) == sorted(expected)
        assert all(point.name == name for name, point in points.items())

    @pytest.mark.parametrize("name", ["k", "blocks.1.attn.hook_[kv]", "rot_k", "k_input", "z"])
    def test_without_groups_they_are_heads(self, name):
        model, tokens = make_model("rotary"), random_tokens(2, 4)
        by_query_head = model.run_with_hooks(tokens, edits=[edits.Scale(name, 3.0, query_head=1, pos=2)])
        by_head = model.run_with_hooks(tokens, edits=[edits.Scale(name, 3.0, head=1, pos=2)])
        assert torch.equal(by_query_head, by_head)
        assert not torch.equal(by_head, model(tokens))

    @pytest.mark.parametrize("name", ["q", "rot_q", "z", "pattern", "result"])
    def test_where_a_tensor_has_query_heads_they_are_heads(self, name):
        model, tokens = make_model("grouped"), random_tokens(2, 4)
        at = {"rows": 1, "pos": -1}
        by_query_head = model.run_with_hooks(tokens, edits=[edits.Scale(name, 3.0, query_head=[1, 2], **at)])
        by_head = model.run_with_hooks(tokens, edits=[edits.Scale(name, 3.0, head=[1, 2], **at)])
        assert torch.equal(by_query_head, by_head)

    def test_other_points_are_refused_before_the_run(self):
        model = make_model("grouped")
        text = (
            r"edit Zero\('blocks.0.\*'\): query_head, but there are no query heads at 'blocks.0.hook_resid_pre', .* "
            r"and \d+ more; of keys and values that query heads share, .* can be edited at hook_k and hook_v"
        )
        with pytest.raises(EditError, match=text):
            model.run_with_hooks(random_tokens(1, 3), edits=[edits.Zero("blocks.0.*", query_head=0)])
        for name in ("rot_k", "k_input", "resid_post"):
            with pytest.raises(EditError, match=rf"no query heads at 'blocks.0.*hook_{name}'"):
                model.add_edit(edits.Zero(name, query_head=0))
        with pytest.raises(EditError, match=r"no query heads at 'unembed.hook_in'"):
            make_model("rotary").add_edit(edits.Zero("unembed.hook_in", query_head=0))
        assert not any(point.listening for point in model.hook_points().values())

    def test_head_and_query_head_are_one_too_many(self):
        with pytest.raises(EditError, match=r"Zero\('k'\): head=0 and query_head=\[1\] both choose heads; give one"):
            edits.Zero("k", head=0, query_head=[1])


def test_edits_are_values():
    edit = edits.Zero("z", head=1)
    with pytest.raises(AttributeError):
        edit.head = 2
    assert edit in [edits.Zero("z", head=1)]
    assert len({edit, edits.Zero("z", head=1), edits.Zero("z", query_head=1), edits.Mean("z", head=1)}) == 3


@settings(max_examples=60)
@given(
    k=st.integers(1, 4), seed=st.integers(0, 99), as_number=st.booleans(), has_writers=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_components_are_set_by_the_least_change_or_along_writers(k, seed, as_number, has_writers, dtype):
    generator = torch.Generator().manual_seed(seed)
    readers, writers = (torch.randn(k, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    values = 1.5 if as_number else torch.randn(k, generator=generator, dtype=torch.float64)
    tensor = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).to(dtype)
    edit = edits.SetComponents(NAMES[0], readers, values, writers=writers if has_writers else None)
    out = edit.apply(tensor, make_point(NAMES[0]), None)
    assert out.dtype == dtype
    along = writers if has_writers else torch.linalg.pinv(readers).T
    expected = tensor.double() + (values - tensor.double() @ readers.T) @ along
    # Computed in float32 at least, from well-conditioned to nearly dependent readers, and rounded once.
    scale = float(torch.linalg.cond(readers)) * 10
    eps = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=eps * scale, atol=eps * scale)
    if not has_writers:
        # The least change: it lies in the readers' span.
        inside = (expected - tensor.double()) @ torch.linalg.pinv(readers) @ readers
        torch.testing.assert_close(inside, expected - tensor.double(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (edits.SetComponents("x", torch.zeros(6), 1.0), r"readers have shape \[6\]; expected \[7\] or \[k, 7\]"),
        (edits.SetComponents("x", torch.zeros(7), 1.0), r"the 1 readers depend on each other"),
        (edits.SetComponents("x", torch.ones(2, 7), 1.0), r"the 2 readers depend on each other.* or give writers"),
        (edits.SetComponents("x", torch.ones(7, dtype=torch.bool), 1.0), r"readers are torch.bool; expected a tensor"),
        (edits.SetComponents("x", torch.full((7,), torch.nan), 1.0), r"readers hold NaN or infinity"),
        (edits.SetComponents("x", torch.ones(7), torch.zeros(2)), r"values are torch.float32 \[2\]; expected .* \[1\]"),
        (edits.SetComponents("x", torch.ones(7), torch.tensor(torch.inf)), r"values hold NaN or infinity"),
        (edits.SetComponents("x", torch.ones(7), 1.0, writers=torch.ones(2, 7)), r"2 writers for 1 readers"),
        (edits.SetComponents("x", torch.ones(7), 1.0, writers=torch.ones(8)), r"writers have shape \[8\]"),
    ],
)
def test_components_that_cannot_be_set(edit, text):
    with pytest.raises(EditError, match=text):
        edit.apply(torch.zeros(2, 3, 7), make_point(NAMES[0]), None)
