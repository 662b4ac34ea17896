import pytest
import torch

from hooklens.errors import InputError
from hooklens.patching import SweepInterruptedError
from hooklens.patching.runs.progress import keep_partial_result
from tests.annotations import unchecked


def count(values, *, stop_at):
    with keep_partial_result("counting", "numbers", values, values.clone, progress=True) as bar:
        for place in range(len(values)):
            if place == stop_at:
                raise ValueError("no more")
            values[place] = place
            bar.update(1)


def test_what_was_measured_comes_with_the_error(capsys):
    message = r"counting stopped after 2 of 4 values \(ValueError: no more\)"
    with unchecked(), pytest.raises(SweepInterruptedError, match=message) as caught:
        count(torch.full((4,), torch.nan), stop_at=2)
    assert caught.value.result[:2].tolist() == [0.0, 1.0]
    assert isinstance(caught.value.__cause__, ValueError)
    assert "numbers" in capsys.readouterr().err


def test_input_that_is_refused_at_the_start_is_refused_as_ever():
    """A metric without a gradient came as an interrupted experiment with no values."""
    values = torch.full((2,), torch.nan)
    with (
        unchecked(),
        pytest.raises(InputError, match="nothing to count"),
        keep_partial_result("counting", "numbers", values, values.clone, progress=False),
    ):
        raise InputError("nothing to count")


def test_nothing_is_shown_unless_asked(capsys):
    values = torch.zeros(1)
    with unchecked(), keep_partial_result("counting", "numbers", values, values.clone, progress=False) as bar:
        bar.update(1)
    assert capsys.readouterr().err == ""
