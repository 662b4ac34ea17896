"""The verification as a suite for other packages: families and parts of their own run it on themselves.

`parametrize` makes pytest tests of it, one for each model and check; `run` a report. `of_part` and `of_family` give
tiny models to run it on. A check that is known to fail is declared with its reason, and must fail.
"""

from hooklens.verification.conformance.cases import Case, ConformanceError, Exemption, Outcome
from hooklens.verification.conformance.checks import CHECKS
from hooklens.verification.conformance.models import of_family, of_part
from hooklens.verification.conformance.suite import ConformanceReport, list_cases, parametrize, run

__all__ = [
    "CHECKS",
    "Case",
    "ConformanceError",
    "ConformanceReport",
    "Exemption",
    "Outcome",
    "list_cases",
    "of_family",
    "of_part",
    "parametrize",
    "run",
]
