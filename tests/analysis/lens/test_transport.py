"""A transport of somebody's own."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hooklens.analysis.lens import Transport, logit_lens, read_streams
from hooklens.analysis.lens.origin import Origin
from hooklens.errors import InputError
from tests.model.networks import make_config, make_model, random_tokens


@dataclass(frozen=True, kw_only=True)
class Scaled(Transport):
    """Streams by layer times a number; `0` gives something of another shape."""

    factor: float

    def apply(self, stream, layer):
        return self.factor * (layer + 1) * stream if self.factor else stream[..., :2]

    @property
    def d_model(self) -> int:
        return 12


@pytest.fixture(scope="module")
def model():
    # Without a final norm a factor is not taken out again.
    return make_model(make_config(final_norm=None))


def test_it_carries_its_layers_alone(model):
    own = Scaled(layers=(1,), origin=Origin.of(model), factor=0.5)
    _, cache = model.run_with_cache(random_tokens(1, 3))
    readings = dict(read_streams(model, cache, transport=own))
    assert list(readings) == ["1_pre", "final_post"]
    logits: Tensor = cache["resid_pre", 1] @ model.W_U
    assert_close(readings["1_pre"], logits.log_softmax(-1))
    assert logit_lens(model, cache, transport=own).stream.tolist() == ["1_pre", "final_post"]


def test_what_is_no_stream_is_refused(model):
    own = Scaled(layers=(0,), origin=Origin.of(model), factor=0.0)
    _, cache = model.run_with_cache(random_tokens(1, 3))
    with pytest.raises(InputError, match=r"Scaled.apply gave \[1, 1, 2\] for the stream of layer 0; expected a tensor"):
        logit_lens(model, cache, transport=own)


def test_assumed_of_a_model_of_other_sizes(model):
    own = Scaled(layers=(3,), origin=Origin.of(model), factor=1.0)
    with pytest.raises(InputError, match="carries streams of width 12 from layers up to 3; the model has d_model=12"):
        own.assume(model)
    assert torch.equal(own.origin.sample, Origin.of(model).sample)
