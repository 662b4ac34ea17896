import unittest

import pytest

from hooklens import HookedCausalLM, HookedConfig, NoPositions
from hooklens.verification import conformance
from hooklens.verification.conformance.cases import Bench, Case, Exemption, Options
from hooklens.verification.report import CheckResult
from hooklens.verification.stages import RUNS
from tests.annotations import unchecked
from tests.verification.conformance.parts import only


class Found:
    """A bench that has found something already."""

    def __init__(self, **by_subject):
        self.by_subject = by_subject

    def results(self, name, source, check):
        results = [
            CheckResult(check=check, subject=subject, measured=float(not passed), bound=0.0)
            for subject, passed in self.by_subject.items()
        ]
        return results, "there is nothing"


def make_case(exemptions=(), **by_subject):
    with unchecked():
        return Case(
            model="mine", check="fires once", exemptions=tuple(exemptions), source="x", bench=Found(**by_subject)
        )


def exempt(subjects="*"):
    return Exemption(check="fires once", reason="that is how it is", subjects=subjects)


@pytest.mark.parametrize(
    ("exemptions", "found", "verdict"),
    [
        ([], {"a": True, "b": True}, "passed"),
        ([], {"a": True, "b": False}, "failed"),
        ([], {}, "not applicable"),
        ([exempt()], {"a": True, "b": False}, "excepted"),
        ([exempt("b*")], {"a": True, "b1": False, "b2": False}, "excepted"),
        ([exempt("b*")], {"a": False, "b1": False}, "failed"),
        ([exempt("b*")], {"a": True, "b1": True}, "failed"),
        ([exempt("a"), exempt("b")], {"a": False, "b": False}, "excepted"),
        ([exempt("a"), exempt("b")], {"a": False, "b": True}, "failed"),
        ([exempt()], {}, "failed"),
    ],
)
def test_verdicts(exemptions, found, verdict):
    case = make_case(exemptions, **found)
    outcome = case.outcome()
    assert outcome.verdict == verdict
    assert outcome.n_results == len(found)
    assert repr(outcome).startswith(f"{verdict}  mine: fires once")
    if verdict == "failed":
        with pytest.raises(conformance.ConformanceError, match="mine: fires once"):
            case.run()
    elif verdict == "not applicable":
        with pytest.raises(unittest.SkipTest, match="there is nothing"):
            case.run()
    else:
        case.run()


def test_what_failures_say():
    message = make_case(a=False, b=True).outcome().message
    assert message == "mine: fires once: 1 of 2 results failed\nFAILED  fires once, a: 1, expected <= 0"
    outlived = make_case([exempt("b")], a=True, b=True).outcome().message
    assert outlived.endswith(
        "the exception 'fires once' at 'b' (that is how it is) is declared, but the check passes; take it out"
    )
    nothing = make_case([exempt("b")]).outcome().message
    assert "has nothing to check here; take it out" in nothing
    many = make_case(**{f"p{number}": False for number in range(25)}).outcome().message
    assert len(many.splitlines()) == 12
    assert many.endswith("and 15 more")
    assert make_case([exempt()], a=False).outcome().message == "that is how it is"


OPTIONS = Options(logits=False, gradients=False, dtypes=(), n_tokens=8, seed=0)


def test_groups_run_once_and_one_model_is_held(monkeypatch):
    opened, ran = [], []
    run = Bench._run
    monkeypatch.setattr(Bench, "_run", lambda self, group: ran.append((self._name, group)) or run(self, group))
    bench = Bench(OPTIONS)

    def source(name):
        def make():
            opened.append(name)
            cfg = HookedConfig(d_model=8, n_layers=1, n_heads=2, d_vocab=11, n_ctx=16, positions=NoPositions())
            return HookedCausalLM(cfg)

        return make

    checks = ("writing back in place", "an edit changes the logits", "fires once", "writing back in place")
    with unchecked():
        for name in ("one", "other"):
            for check in checks:
                results, _ = bench.results(name, source(name), check)
                assert {result.check for result in results} == {check}
                assert all(result.passed for result in results)
    assert opened == ["one", "other"]
    assert ran == [("one", "hook points"), ("other", "hook points")]


@pytest.mark.parametrize(
    ("kind", "check", "text"),
    [
        ("mute", "fires once", r"blocks.0.mlp.hook_post: 0, expected == 1"),
        ("spare", "every weight takes part in the logits", r"blocks.0.mlp.W_spare.*no gradient reaches it"),
        ("secret", "a model made anew of its weights is the same", "state_dict"),
    ],
)
def test_faults_of_parts_are_found(kind, check, text):
    (case,) = conformance.list_cases(models=only(kind), checks=[check], n_tokens=8)
    with unchecked(), pytest.raises(conformance.ConformanceError, match=text):
        case.run()


def test_an_error_in_a_check_is_a_failure_of_it(monkeypatch):
    (case,) = conformance.list_cases(models=only("squares for tests"), checks=["writing back in place"], n_tokens=8)

    def fail(probe, name):
        raise ZeroDivisionError("no way")

    monkeypatch.setattr("hooklens.verification.stages.check_writing_back", fail)
    with unchecked():
        outcome = case.outcome()
    assert outcome.verdict == "failed"
    assert f"FAILED  {RUNS}" in outcome.message
    assert "ZeroDivisionError: no way" in outcome.message


def test_a_part_that_cannot_run_is_an_error_of_every_check():
    for case in conformance.list_cases(models=only("broken"), checks=["fires once", "declared axes"], n_tokens=8):
        with unchecked(), pytest.raises(ZeroDivisionError, match="no way"):
            case.run()
