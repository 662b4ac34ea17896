"""Long experiments: a progress bar, and what was measured when they stop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.patching.errors import SweepInterruptedError


@contextmanager
def keep_partial_result(
    what: str, unit: str, values: Tensor, result: Callable[[], Any], *, progress: bool
) -> Iterator[Any]:
    """Run an experiment that fills in values, NaN before.

    Args:
        what: what an error calls the experiment.
        unit: what the progress bar counts.
        values: the values, filled in place.
        result: makes the result of the values so far.
        progress: show a progress bar.

    Yields:
        The bar, to update by how many values were filled in.

    Raises:
        SweepInterruptedError: the experiment was stopped or failed; it holds the result so far. Input refused before
            anything was measured is refused as ever.
    """
    n_known = int((~values.isnan()).sum())
    bar = import_package("tqdm").tqdm(total=values.numel(), desc=unit, disable=not progress)
    try:
        yield bar
    except (Exception, KeyboardInterrupt) as error:
        n_measured = int((~values.isnan()).sum())
        if n_measured == n_known and isinstance(error, InputError):
            raise
        raise SweepInterruptedError(
            f"{what} stopped after {n_measured} of {values.numel()} values ({type(error).__name__}: {error}); they are "
            "in this error's .result, the others are NaN",
            result(),
        ) from error
    finally:
        bar.close()
