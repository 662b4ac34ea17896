import numpy as np
import pytest

from hooklens.errors import InputError
from hooklens.patching.runs.options import RunOptions
from tests.annotations import unchecked
from tests.model.networks import make_model


def test_options_are_read_once():
    model = make_model("bare")
    assert RunOptions.read(model) == RunOptions()
    read = RunOptions.read(model, batch_size=np.int64(4), direction="noise", progress=np.bool_(False))
    assert (type(read.batch_size), read.batch_size, read.direction, read.progress) == (int, 4, "noise", False)


def test_all_that_is_wrong_is_named():
    """`progress="no"` counted as yes."""
    model = make_model("bare")
    with unchecked(), pytest.raises(InputError) as caught:
        RunOptions.read(model, batch_size=True, direction="both", progress="no", allow_training=1)
    for name in (
        "batch_size is True",
        "expected 'auto' or a number of rows",
        "direction is 'both'",
        "progress is 'no'",
        "allow_training is 1",
    ):
        assert name in str(caught.value)
    model.train()
    with pytest.raises(InputError, match=r"training mode; call model\.eval\(\)"):
        RunOptions.read(model)
    assert RunOptions.read(model, allow_training=True).allow_training
