"""One check on one model as a test case, and the exceptions that are declared for it."""

import unittest
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, UnsupportedModelError
from hooklens.verification.conformance.checks import GROUPS_OF
from hooklens.verification.conformance.declarations import GROUP as DECLARATIONS
from hooklens.verification.conformance.declarations import declaration_stages
from hooklens.verification.report import CheckResult
from hooklens.verification.stages import RUNS, Stage
from hooklens.verification.subject import FIRING, Subject, describe_limits

Model = HookedCausalLM | str | Path
Source = Model | Callable[[], Model]
"""A model, a checkpoint, or a function that makes one when it is needed."""

Verdict = Literal["passed", "excepted", "failed", "not applicable"]

_SHOWN = 10


class ConformanceError(HookLensError, AssertionError):
    """A model does not conform, or is declared not to where it does."""


@dataclass(frozen=True, kw_only=True)
class Exemption:
    """A check that is known to fail, and why.

    It must fail: a declared exception that passes is an error, so that none outlives its reason.

    Attributes:
        check: the check's name, one of `conformance.CHECKS`.
        reason: why it fails.
        subjects: which of the check's subjects fail, hook points mostly, as a pattern (`"blocks.*.mlp.*"`); the others
            have to pass.
        models: for which models, as a pattern of their names.
    """

    check: str
    reason: str
    subjects: str = "*"
    models: str = "*"

    def __str__(self) -> str:
        return f"{self.check!r} at {self.subjects!r} ({self.reason})"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the checks of a suite are made with, as `verify` takes it."""

    logits: bool
    gradients: bool
    dtypes: tuple[torch.dtype, ...]
    n_tokens: int
    seed: int


class Bench:
    """The model that is checked at the moment: one at a time is in memory."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._name: str | None = None
        self._stages: dict[str, list[Stage]] = {}
        self._done: dict[str, list[CheckResult]] = {}
        self._why_not: dict[str, str] = {}
        self._limits = ""

    @torch.no_grad()
    def results(self, name: str, source: Source, check: str) -> tuple[list[CheckResult], str]:
        """The results of a check on a model, and why there are none, where that is known.

        A group of checks is run once; an error that ends a stage of it counts against all that the stage checks.
        """
        if self._name != name:
            self._open(name, source)
        found, reasons = [], []
        for group in GROUPS_OF[check]:
            if group not in self._done:
                self._done[group] = self._run(group)
            found += [result for result in self._done[group] if _counts(result, check)]
            reasons += [self._why_not[group]] if group in self._why_not else []
        return found, "; ".join(reasons) or self._limits

    def _open(self, name: str, source: Source) -> None:
        self._name, self._stages, self._done, self._why_not = None, {}, {}, {}
        model = source if isinstance(source, HookedCausalLM | str | Path) else source()
        options = self.options
        subject = Subject.open(model, n_tokens=options.n_tokens, seed=options.seed)
        fired, sound, _ = subject.check_firing()
        self._done[FIRING] = fired
        self._limits = "; ".join(describe_limits(sound.probe))
        self._stages = {
            **subject.outer_stages(None, options.dtypes, logits=options.logits),
            DECLARATIONS: declaration_stages(subject.probe),
            **sound.inner_stages(gradients=options.gradients),
        }
        self._name = name

    def _run(self, group: str) -> list[CheckResult]:
        results: list[CheckResult] = []
        for _, run in self._stages[group]:
            try:
                results += run()
            except UnsupportedModelError as error:
                self._why_not[group] = f"no transformers architecture holds this network ({error})"
        return results


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Outcome:
    """What came of a case.

    Attributes:
        model: the model's name.
        check: the check's.
        verdict: `"passed"`, `"excepted"` (it fails where exceptions say so, and nowhere else), `"failed"`, or
            `"not applicable"`, where the model has nothing to check.
        n_results: subjects of the check.
        message: what failed, why it may, or why there is nothing to check.
    """

    model: str
    check: str
    verdict: Verdict
    n_results: int
    message: str = ""

    def __repr__(self) -> str:
        return f"{self.verdict}  {self.model}: {self.check}" + (f". {self.message}" if self.message else "")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Case:
    """A check on a model.

    Attributes:
        model: the model's name.
        check: the check's.
        exemptions: the exceptions declared for it.
    """

    model: str
    check: str
    exemptions: tuple[Exemption, ...]
    source: Source = field(repr=False)
    bench: Bench = field(repr=False)

    def __repr__(self) -> str:
        return f"{self.model}: {self.check}"

    def run(self) -> None:
        """Make the check.

        Raises:
            ConformanceError: it fails where no exception is declared, or passes where one is.
            unittest.SkipTest: the model has nothing to check; test runners take it for a skipped test.
        """
        outcome = self.outcome()
        if outcome.verdict == "failed":
            raise ConformanceError(outcome.message)
        if outcome.verdict == "not applicable":
            raise unittest.SkipTest(outcome.message)

    def outcome(self) -> Outcome:
        """Make the check, and tell what came of it."""
        results, why_not = self.bench.results(self.model, self.source, self.check)
        failures = [result for result in results if not result.passed]
        problems = [str(one) for one in failures if not any(_matches(each, one) for each in self.exemptions)]
        if len(problems) > _SHOWN:
            problems = [*problems[:_SHOWN], f"and {len(problems) - _SHOWN} more"]
        for exemption in self.exemptions:
            if not any(_matches(exemption, one) for one in failures):
                found = "passes" if results else "has nothing to check here"
                problems.append(f"the exception {exemption} is declared, but the check {found}; take it out")
        verdict: Verdict = (
            "failed" if problems else "excepted" if failures else "passed" if results else "not applicable"
        )
        message = "\n".join(problems)
        if verdict == "excepted":
            message = "; ".join(exemption.reason for exemption in self.exemptions)
        elif verdict == "not applicable":
            message = why_not or "this model has nothing for the check"
        elif problems:
            message = f"{self}: {len(failures)} of {len(results)} results failed\n{message}"
        return Outcome(model=self.model, check=self.check, verdict=verdict, n_results=len(results), message=message)


def _counts(result: CheckResult, check: str) -> bool:
    """Whether a result of a check's group is one of the check."""
    if result.check != RUNS:
        return result.check == check
    # A stage of one check has its name.
    return result.subject == check or result.subject not in GROUPS_OF


def _matches(exemption: Exemption, result: CheckResult) -> bool:
    return fnmatchcase(result.subject, exemption.subjects)


def exemptions_for(exemptions: Sequence[Exemption], model: str, check: str) -> tuple[Exemption, ...]:
    """Those of a model and a check."""
    return tuple(one for one in exemptions if one.check == check and fnmatchcase(model, one.models))
