"""The suite: every check on every model, as parameters of a test or as a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hooklens.arguments import is_function, read_dtype, read_flag, read_int, read_seed, refusal, require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Listing, Summary
from hooklens.errors import InputError, suggest_names
from hooklens.optional import import_package
from hooklens.progress import progress_bar
from hooklens.verification.conformance.cases import Bench, Case, Exemption, Options, Outcome, Source, exemptions_for
from hooklens.verification.conformance.checks import CHECKS
from hooklens.verification.gradients import ALONE, GRADIENT
from hooklens.verification.reference import LOGITS

if TYPE_CHECKING:
    import pandas

Exceptions = Mapping[str, str] | Sequence[Exemption]
"""Reasons by the name of the check that fails, or exemptions that say more."""

Test = TypeVar("Test", bound=Callable[..., object])

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_SHOWN = 100


@dataclass(frozen=True, eq=False, repr=False)
class ConformanceReport(Displayed):
    """What came of a suite.

    Attributes:
        outcomes: one for each model and check.
    """

    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and something was checked."""
        return not self.failures and any(one.verdict != "not applicable" for one in self.outcomes)

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """What failed."""
        return tuple(one for one in self.outcomes if one.verdict == "failed")

    def _summary(self) -> Summary:
        counts = dict.fromkeys(("passed", "excepted", "failed", "not applicable"), 0)
        for one in self.outcomes:
            counts[one.verdict] += 1
        return Summary(
            title="ConformanceReport: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()),
            listing=Listing(
                columns=("model", "check that failed", "found"),
                rows=[(one.model, one.check, one.message.splitlines()[-1]) for one in self.failures[:_SHOWN]],
                what="failures",
                n_rows=len(self.failures),
            ),
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per model and check: model, check, verdict, results, message."""
        rows = [(one.model, one.check, one.verdict, one.n_results, one.message) for one in self.outcomes]
        columns = ["model", "check", "verdict", "results", "message"]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=columns)
        return table


def list_cases(
    *,
    models: Mapping[str, Source],
    exceptions: Exceptions = (),
    checks: Sequence[str] | None = None,
    logits: bool = True,
    gradients: bool = True,
    dtypes: Sequence[torch.dtype] = _DTYPES,
    n_tokens: int = 20,
    seed: int = 0,
) -> tuple[Case, ...]:
    """The cases of a suite, model by model; nothing is loaded before a case runs.

    Args:
        models: by name, a model, a checkpoint (as `verify` takes it), or a function that gives one when it is needed.
            `of_part` and `of_family` make such mappings.
        exceptions: checks that are known to fail, with the reason. Such a check must fail.
        checks: which checks; None: all of `CHECKS`.
        logits: compare logits with transformers.
        gradients: check gradients.
        dtypes: in which to compare logits.
        n_tokens: length of the longest row of the random input.
        seed: of the input and all directions.

    Raises:
        InputError: no models, something that is none, or exceptions or checks of unknown names.
    """
    named = _read_models(models)
    options = Options(
        logits=read_flag(logits, what="logits"),
        gradients=read_flag(gradients, what="gradients"),
        dtypes=tuple(read_dtype(dtype, what="dtypes") for dtype in dtypes),
        n_tokens=read_int(n_tokens, what="n_tokens", least=4),
        seed=read_seed(seed, what="seed"),
    )
    left_out = {*(() if logits else (LOGITS,)), *(() if gradients else (GRADIENT, ALONE))}
    chosen = _read_checks([one for one in CHECKS if one not in left_out] if checks is None else checks, "checks")
    exemptions = _read_exceptions(exceptions, list(named), chosen)
    bench = Bench(options)
    return tuple(
        Case(model=name, check=check, exemptions=exemptions_for(exemptions, name, check), source=source, bench=bench)
        for name, source in named.items()
        for check in chosen
    )


def parametrize(
    *,
    models: Mapping[str, Source],
    exceptions: Exceptions = (),
    checks: Sequence[str] | None = None,
    logits: bool = True,
    gradients: bool = True,
    dtypes: Sequence[torch.dtype] = _DTYPES,
    n_tokens: int = 20,
    seed: int = 0,
) -> Callable[[Test], Test]:
    """The suite as a pytest decorator: one test for each model and check, handed in as `case`.

    Args:
        models, exceptions, checks, logits, gradients, dtypes, n_tokens, seed: as for `list_cases`.

    Raises:
        InputError: as for `list_cases`, when the test is collected.
        MissingDependencyError: pytest is not installed.

    Example:
        >>> @conformance.parametrize(models={"mine": "path/to/checkpoint"})
        ... def test_conformance(case):
        ...     case.run()
    """
    pytest = import_package("pytest")
    cases = list_cases(
        models=models,
        exceptions=exceptions,
        checks=checks,
        logits=logits,
        gradients=gradients,
        dtypes=dtypes,
        n_tokens=n_tokens,
        seed=seed,
    )
    decorator: Callable[[Test], Test] = pytest.mark.parametrize(
        "case", [pytest.param(case, id=str(case)) for case in cases]
    )
    return decorator


def run(
    *,
    models: Mapping[str, Source],
    exceptions: Exceptions = (),
    checks: Sequence[str] | None = None,
    logits: bool = True,
    gradients: bool = True,
    dtypes: Sequence[torch.dtype] = _DTYPES,
    n_tokens: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> ConformanceReport:
    """The suite without pytest.

    Args:
        models, exceptions, checks, logits, gradients, dtypes, n_tokens, seed: as for `list_cases`.
        progress: show a progress bar.

    Raises:
        InputError: as for `list_cases`.
    """
    read_flag(progress, what="progress")
    cases = list_cases(
        models=models,
        exceptions=exceptions,
        checks=checks,
        logits=logits,
        gradients=gradients,
        dtypes=dtypes,
        n_tokens=n_tokens,
        seed=seed,
    )
    with progress_bar("conformance", cases, unit="case", progress=progress) as bar:
        return ConformanceReport(tuple(case.outcome() for case in bar))


def _read_models(given: object) -> dict[str, Source]:
    expected = "models, checkpoints, or functions that give one, by name"
    models: Mapping[Any, Any] = require(given, kind=Mapping, what="models", expected=expected)
    if not models:
        raise refusal(given, "models", f"at least one of {expected}")
    for name, source in models.items():
        if not isinstance(name, str) or not name:
            raise refusal(name, "models: a name", "a text that is not empty")
        if not isinstance(source, HookedCausalLM | str | Path) and not is_function(source):
            raise refusal(source, f"models[{name!r}]", "a model, a checkpoint's name or path, or a function")
    return dict(models)


def _read_checks(given: Sequence[str], what: str) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else list(given)
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        hint = suggest_names(unknown[0], list(CHECKS)) if isinstance(unknown[0], str) else ""
        raise InputError(f"{what}: there is no check {unknown[0]!r}.{hint} conformance.CHECKS lists them")
    if not names:
        raise InputError(f"{what} is empty; expected names of checks, see conformance.CHECKS")
    return tuple(dict.fromkeys(names))


def _read_exceptions(given: object, models: list[str], checks: tuple[str, ...]) -> tuple[Exemption, ...]:
    if isinstance(given, Mapping):
        given = [Exemption(check=check, reason=reason) for check, reason in given.items()]
    expected = "reasons by the name of the check, or a list of conformance.Exemption"
    found: Sequence[Any] = require(given, kind=(list, tuple), what="exceptions", expected=expected)
    for one in found:
        exemption: Exemption = require(one, kind=Exemption, what="exceptions: an entry", expected=expected)
        if not isinstance(exemption.reason, str) or not exemption.reason:
            raise InputError(f"exceptions: the reason for {exemption.check!r} is {show(exemption.reason)}; say why")
        _read_checks([exemption.check], "exceptions")
        if exemption.check not in checks:
            raise InputError(f"exceptions: {exemption.check!r} is not among the checks that are made")
        if not any(fnmatchcase(model, exemption.models) for model in models):
            raise InputError(f"exceptions: no model fits {exemption.models!r}; there are {models}")
    return tuple(found)
