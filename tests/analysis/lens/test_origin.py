"""Which models are one, and which are not."""

import pytest
import torch

from hooklens.analysis.lens.origin import Origin
from hooklens.errors import InputError, TransformError
from tests.model.networks import ALL_CONFIGS, make_model


def check(origin, model):
    origin.check(model, what="this lens", remedy="another way")


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_the_same_weights_in_another_precision_are_the_same(network):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    model, single, brain, half = (make_model(network, dtype=torch.float32).to(dtype) for dtype in (dtypes[0], *dtypes))
    origin = Origin.of(model)
    for copy in (single, brain, half):
        check(origin, copy)
        check(Origin.of(copy), model)
        check(Origin.of(copy), brain)


def test_a_small_step_of_training_makes_another_model():
    model = make_model("rotary", dtype=torch.float32)
    origin = Origin.of(model)
    tuned = make_model("rotary", dtype=torch.float32)
    with torch.no_grad():
        tuned.blocks[1].mlp.out_proj.weight.mul_(1.0001)
    with pytest.raises(InputError, match=r"this lens was fitted on other weights: of \d+ entries.*or another way"):
        check(origin, tuned)


def test_entries_are_of_all_rows_and_columns():
    """A step that divides the width would stay in one column."""
    model = make_model("rotary", dtype=torch.float32)
    origin = Origin.of(model)
    for place in ((slice(None), slice(4, 8)), (slice(12, 20), slice(None))):
        other = make_model("rotary", dtype=torch.float32)
        with torch.no_grad():
            other.embed.table.weight[place].add_(0.5)
        with pytest.raises(InputError, match="other weights"):
            check(origin, other)


def test_weights_that_were_processed_are_a_model_of_their_own():
    model = make_model("learned, tied", dtype=torch.float32)
    folded = model.process_weights(fold_ln=True, fold_value_biases=True)
    check(Origin.of(folded), model.process_weights(fold_ln=True, fold_value_biases=True))
    with pytest.raises(TransformError, match=r"this lens \(first\) and the model \(second\) do not belong together"):
        check(Origin.of(folded), model)
