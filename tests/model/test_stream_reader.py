import gc
import weakref

import pytest
import torch

from hooklens.model.stream_reader import StreamReader
from tests.model.networks import ALL_CONFIGS, make_model, random_tokens


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_it_reads_the_last_stream_as_the_model_does(network):
    model = make_model(network)
    ids = random_tokens(2, 5)
    stream = model(ids, stop_at_layer=model.cfg.n_layers)
    found = StreamReader(model).read(stream)
    # The same operations in the same order.
    torch.testing.assert_close(found, model(ids).log_softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", ["grouped", "learned, tied"])
def test_it_lets_go_of_the_blocks(network):
    model = make_model(network)
    block, reader = weakref.ref(model.block_list()[0]), StreamReader(model)
    stream = torch.randn(3, model.cfg.d_model, dtype=model.dtype)
    before = reader.read(stream)
    del model
    gc.collect()
    assert block() is None
    assert torch.equal(reader.read(stream), before)
