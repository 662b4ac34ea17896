"""The run-time check of annotations that tests/conftest.py puts on every function of the package."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
from beartype import BeartypeConf, beartype

# An int is a float here as it is for mypy (PEP 484's numeric tower).
check_calls = beartype(conf=BeartypeConf(is_pep484_tower=True))


@contextmanager
def unchecked() -> Iterator[None]:
    """Calls as users make them, whose mistakes the package itself has to find."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
