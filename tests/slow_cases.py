"""Which cases of a test run by default, where many are of the same kind: the others are marked slow."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """Cases as parameters of a test, in their order, of which all are slow but the ones named here.

    Those should show whatever the others show: each value of each parameter, and each couple that shares code.
    """
    every = list(cases)
    unknown = [case for case in default if case not in every]
    assert not unknown, f"no cases of this test: {unknown}"
    return [_parameter(case, is_slow=case not in default) for case in every]


def _parameter(case: Any, *, is_slow: bool) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[pytest.mark.slow] if is_slow else [])
