"""Everything at once: random networks, padding, caches, edits, hooks, captures, gradients and threads, drawn together.

Each case is run by the engine and by the plain network of `reference.py`, which knows rows one at a time and nothing of
padding, caches, masks and threads. Bounds, relative to the largest number of what is compared (or 1):

- float64: 1e-9. Both sum in float64 in different orders; the networks are 1 to 3 layers of width 6, with norms that
  enlarge differences by no more than 1 / sqrt(eps) = 300.
- float32 and bfloat16: 2000 and 60 times the dtype's epsilon, for as many roundings in a row and the same enlargement.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.axes import layer_of
from tests.annotations import unchecked
from tests.combinations.cases import MIXTURE, Case, draw_case
from tests.combinations.reference import Outcome, Reference, Value, as_field, gradients
from tests.combinations.running import Ran, Runner, busy_thread, weighted_logits
from tests.model.networks import make_model

BOUNDS = {torch.float64: 1e-9, torch.float32: 2000 * 2**-23, torch.bfloat16: 60 * 2**-8}


SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(deadline=None, max_examples=120, suppress_health_check=SUPPRESSED)
@given(draw_case())
def test_what_is_used_together_gives_what_the_plain_network_gives(case: Case) -> None:
    check_case(case)


@pytest.mark.slow
@settings(deadline=None, max_examples=600, suppress_health_check=SUPPRESSED)
@given(draw_case())
def test_in_more_cases_what_is_used_together_gives_what_the_plain_network_gives(case: Case) -> None:
    check_case(case)


def check_case(case: Case) -> None:
    with unchecked():
        model = make_model(case.cfg, dtype=case.dtype, seed=case.seed)
        reference = Reference(model)
        runner = Runner(case, model)
        with busy_thread(model, is_busy=case.threaded):
            ran = runner.run()
        expected = run_reference(case, reference, runner)
        for one in ran:
            _check_call(case, reference, runner, one, expected)
        if case.gradient is not None:
            _check_gradients(case, model, reference, runner, ran[0], expected)
        _check_watching(case, runner, ran)
        _check_rows(case, model, runner)


def run_reference(case: Case, reference: Reference, runner: Runner) -> list[Outcome]:
    plain = []
    for number in runner.numbers:
        plain += [hook.as_plain(runner.running[number]) for hook in case.hooks]
        plain += [edit.as_plain(runner.running[number], case.dtype) for edit in runner.edits_of(number)]
    given_tokens = runner.running[case.n_given].before
    with torch.set_grad_enabled(case.gradient is not None):
        return reference.run(
            runner.rows, positions=case.positions(), n_frozen=given_tokens, documents=case.documents(), edits=plain
        )


def assert_close(found: Tensor, expected: Tensor, bound: float, what: str) -> None:
    expected = expected.detach().double()
    assert found.shape == expected.shape, what
    allowed = bound * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
    difference = (found.double() - expected).abs()
    assert bool((difference <= allowed).all()), f"{what}: {float(difference.max())} > {allowed}"


def _check_call(case: Case, reference: Reference, runner: Runner, ran: Ran, expected: list[Outcome]) -> None:
    if ran.logits is not None:
        for row, column, position, _ in weighted_logits(case, runner, ran.number):
            assert_close(
                ran.logits[row, column], expected[row].logits[position], BOUNDS[case.dtype], f"logits, row {row}"
            )
    activations = {name for name in ran.captured if not name.endswith("_grad")}
    assert activations == set(case.names)
    bound = _bound_of_captures(case)
    for name in activations:
        compare_point(
            case, reference, runner, ran, name, ran.captured[name], [row.values[name] for row in expected], bound
        )


def _bound_of_captures(case: Case) -> float:
    bound = BOUNDS[case.dtype]
    return bound if case.kept_dtype is None else max(bound, 4 * torch.finfo(case.kept_dtype).eps)


def compare_point(
    case: Case,
    reference: Reference,
    runner: Runner,
    ran: Ran,
    name: str,
    found: Tensor,
    values: list[Value],
    bound: float,
    *,
    is_gradient: bool = False,
) -> None:
    """Compare what was captured with the values of every row's tokens."""
    call = runner.running[ran.number]
    kept = _kept_columns(case, call, name)
    largest = max((float(v.detach().abs().max()) for v in _flatten(values) if v.numel()), default=0.0)
    bound *= max(1.0, largest)
    for row in range(case.n_rows):
        for column, position in kept[row]:
            if "key" not in case.cfg.description.points[name].axes:
                value = values[row]
                assert isinstance(value, Tensor)
                assert_close(found[row, column], value[position], bound, f"{name}, row {row}, position {position}")
                continue
            layer = layer_of(name)
            assert layer is not None
            positions = case.positions()
            seen = reference.sees(
                layer, row, range(len(runner.rows[row])) if positions is None else positions[row], position
            )
            keys = [_key_columns(case, ran.number, row)[key] for key in seen]
            for head, queries in enumerate(values[row]):
                entries = found[row, head, column]
                what = f"{name}, row {row}, head {head}, position {position}"
                assert_close(entries[keys], queries[position], bound, what)
                hidden = torch.ones(len(entries), dtype=torch.bool)
                hidden[keys] = False
                if is_gradient:
                    assert bool(entries.isfinite().all()), what
                else:
                    nothing = -math.inf if name.endswith("scores") else 0.0
                    assert bool((entries[hidden] == nothing).all()), what
    if is_gradient:
        assert bool(found.isfinite().all()), f"{name}: gradients at padding"
    elif not name.endswith("scores"):
        assert not bool(found.isnan().any()), f"{name}: padding"


def _flatten(values: list[Value]) -> list[Tensor]:
    return [v for value in values for v in ([value] if isinstance(value, Tensor) else [q for h in value for q in h])]


def _kept_columns(case: Case, call, name: str) -> list[list[tuple[int, int]]]:
    """Pairs of a column of the captured tensor and the position it holds, by row."""
    if call.chosen is not None and name.startswith("unembed."):
        return [list(enumerate(chosen)) for chosen in call.chosen]
    pairs = [
        list(zip(columns, range(a, b), strict=True))
        for columns, a, b in zip(call.columns, call.before, call.lengths, strict=True)
    ]
    if case.pos_slice is None:
        return pairs
    wanted = [case.pos_slice] if isinstance(case.pos_slice, int) else case.pos_slice
    return [[(wanted.index(column), position) for column, position in row if column in wanted] for row in pairs]


def _key_columns(case: Case, number: int, row: int) -> list[int]:
    """The column of every token of a row among past + new ones."""
    columns, start = [], 0
    for part in case.parts[: number + 1]:
        mask = part.mask[0 if len(part.mask) == 1 else row]
        columns += [start + column for column, is_token in enumerate(mask) if is_token]
        start += part.width
    return columns


def _check_gradients(
    case: Case, model: HookedCausalLM, reference: Reference, runner: Runner, ran: Ran, expected: list[Outcome]
) -> None:
    loss = _mean_loss(case, runner, expected) if case.gradient == "loss" else _own_loss(case, runner, ran, expected)
    assert ran.loss is not None
    assert_close(ran.loss, loss, BOUNDS[case.dtype], "loss")
    bound = _bound_of_captures(case)
    if not loss.requires_grad:
        # One token a row, each predicted by what the prefix has computed before.
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        assert not any(tensor.any() for name, tensor in ran.captured.items() if name.endswith("_grad"))
        return
    for name in case.names:
        values = [gradients(loss, row.values[name]) for row in expected]
        # Blocks and hooks cannot know that a backward pass is over, so what it did not reach has no entry there.
        found = ran.captured.get(f"{name}_grad", torch.zeros(()).expand_as(ran.captured[name]))
        compare_point(case, reference, runner, ran, name, found, values, bound, is_gradient=True)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(loss, list(reference.weights.values()), allow_unused=True)
    for (name, weight), gradient in zip(reference.weights.items(), wanted, strict=True):
        found = parameters[case.cfg.description.weights[name].parameter].grad
        found = torch.zeros_like(weight) if found is None else as_field(name, found, weight.shape)
        filled = torch.zeros_like(weight) if gradient is None else gradient
        assert_close(found, filled, BOUNDS[case.dtype], f"gradient of {name}")


def _own_loss(case: Case, runner: Runner, ran: Ran, expected: list[Outcome]) -> Tensor:
    terms = [
        expected[row].logits[position] @ weight
        for row, _, position, weight in weighted_logits(case, runner, ran.number)
    ]
    return torch.stack(terms).sum() if terms else sum(row.logits.sum() for row in expected) * 0.0


def _mean_loss(case: Case, runner: Runner, expected: list[Outcome]) -> Tensor:
    """The mean over all tokens that follow one, which for the first after a prefix is the prefix's last."""
    call, losses, documents = runner.running[-1], [], case.documents()
    for row, tokens in enumerate(runner.rows):
        for position in range(max(1, call.before[row]), call.lengths[row]):
            if documents is not None and documents[row][position] != documents[row][position - 1]:
                continue
            logits = expected[row].logits[position - 1]
            if position == call.before[row]:
                logits = logits.detach()
            losses.append(logits.exp().sum().log() - logits[tokens[position]])
    return torch.stack(losses).mean()


def _check_watching(case: Case, runner: Runner, ran: list[Ran]) -> None:
    """P1: captures leave the logits as they are, bit for bit; frozen prefixes, too.

    Captured gradients pass through what is only watched else, which may round differently.
    """
    unwatched = runner.run(watches=False)
    for one, other in zip(ran, unwatched, strict=True):
        assert other.logits is not None
        if one.logits is None:
            continue
        for row, column, _, _ in weighted_logits(case, runner, one.number):
            if case.gradient is None:
                assert torch.equal(one.logits[row, column], other.logits[row, column])
            else:
                assert_close(one.logits[row, column], other.logits[row, column], BOUNDS[case.dtype], "watched logits")


def _check_rows(case: Case, model: HookedCausalLM, runner: Runner) -> None:
    """Other tokens in one row change nothing in another, bit for bit.

    With a mixture of experts, up to rounding: an expert's tokens, from whatever rows, are one matrix product, and how
    many there are decides how it sums.
    """
    mixed = any(block.mlp == MIXTURE for block in case.cfg.blocks)
    mixes = any(edit.kind == "Mean" and (edit.rows is None or not isinstance(edit.rows, int)) for edit in case.edits)
    if case.n_rows == 1 or mixes:
        return
    altered = case.seed % case.n_rows
    other = Runner(case, model, altered=[altered]).run(watches=False)
    for one, changed in zip(runner.run(watches=False), other, strict=True):
        assert one.logits is not None
        assert changed.logits is not None
        for row, column, _, _ in weighted_logits(case, runner, one.number):
            if row != altered and mixed:
                assert_close(one.logits[row, column], changed.logits[row, column], BOUNDS[case.dtype], "other rows")
            elif row != altered:
                assert torch.equal(one.logits[row, column], changed.logits[row, column])
