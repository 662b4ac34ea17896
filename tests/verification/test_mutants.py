"""`verify` notices every fault of a long list, each put into one function of the engine's own code."""

import pytest
import torch

from hooklens.verification import CheckResult
from hooklens.verification.probe import make_probe
from hooklens.verification.stages import hook_point_stages
from tests.annotations import unchecked
from tests.verification.mutants import EQUIVALENT, MUTANTS
from tests.verification.mutation import Mutant, put_in
from tests.verification.networks import build, verify_points


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.target}: {mutant.fault}")
def test_every_fault_is_noticed(mutant: Mutant) -> None:
    """Of 31 such faults 15 passed: points that showed twice their value or reversed heads, edits that missed the skip
    connection, the last head or all heads but the first, cached positions off by one, a merge without log-sums, rotary
    wrong past position 32, `logits_at=-1` reading -2.
    """
    assert find_failure(mutant) is not None, f"verify passes although {mutant.fault}"


@pytest.mark.parametrize(("mutant", "reason"), EQUIVALENT, ids=lambda value: getattr(value, "fault", ""))
def test_what_changes_nothing_passes(mutant: Mutant, reason: str) -> None:
    assert reason
    assert find_failure(mutant) is None


def test_the_list_is_long_and_without_doubles() -> None:
    assert len(MUTANTS) >= 100
    assert len({(mutant.target, mutant.changes) for mutant in MUTANTS}) == len(MUTANTS)


def test_the_report_of_verify_has_what_the_list_is_checked_by() -> None:
    """The list is run through the checks one after another; `verify` makes the same ones, and says what it found."""
    mutant = next(mutant for mutant in MUTANTS if mutant.fault == "hook_scale shows twice its value")
    with put_in(mutant):
        report = verify_points(build(mutant.network), layers=[0])

    failed = {result.subject: result for result in report.by_check()["shown tensors are what their sources make"]}
    message = failed["blocks.0.ln1.hook_scale, one batch"].message
    assert not report.passed
    assert message.startswith("shows ")
    assert "where its sources make" in message
    assert "batch 0, pos" in message


def test_a_mutant_that_no_longer_applies_fails_loudly() -> None:
    stale = Mutant("nothing", "model.activations:_gelu_quick", (("no such text", "x"),))
    with pytest.raises(AssertionError, match="the mutant 'nothing' no longer applies"), put_in(stale):
        pass
    missing = Mutant("nothing", "model.mlp:no_such_function", (("a", "b"),))
    with pytest.raises(AttributeError), put_in(missing):
        pass


def test_a_mutant_is_taken_out_again() -> None:
    model, tokens = build(), torch.arange(6)[None]
    before = model(tokens)
    with put_in(next(mutant for mutant in MUTANTS if mutant.fault == "heads are taken in reverse")):
        assert not torch.equal(model(tokens), before)
    assert torch.equal(model(tokens), before)


def find_failure(mutant: Mutant) -> CheckResult | None:
    """The first check that fails, looked for where it is expected first."""
    with put_in(mutant), unchecked(), torch.no_grad():
        stages = hook_point_stages(make_probe(build(mutant.network)))
        for _, run in sorted(stages, key=lambda stage: not stage[0].startswith(mutant.stage)):
            for result in run():
                if not result.passed:
                    return result
    return None
