"""Which caches and models may be put together."""

import pytest
import torch

from hooklens.activation_cache import ActivationCache
from hooklens.analysis import attribution, connect_cache, lens
from hooklens.analysis.reading.connection import find_real_positions
from hooklens.errors import CacheError, InputError, TransformError
from tests.model.networks import make_config, make_model, random_tokens


def test_a_cache_from_a_file_gets_its_weights_back(tmp_path):
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 3))
    cache.save(tmp_path / "cache")
    connected = connect_cache(ActivationCache.load(tmp_path / "cache"), model)
    assert connected.stack_head_results().equal(cache.stack_head_results())
    weights = connected.weights
    assert weights is not None
    assert weights["embed.W_E"].data_ptr() == model.W_E.data_ptr()


def test_differently_processed_weights_are_refused_with_both_records():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 3))
    processed = model.process_weights(fold_ln=True, center_unembed=True)
    for use in (
        connect_cache,
        lambda c, m: lens.logit_lens(m, c),
        lambda c, m: attribution.attribute_to_heads(m, c, 1),
    ):
        with pytest.raises(
            TransformError,
            match=r"the cache \(first\) and the model \(second\) .* no processing against fold_ln \+ center_unembed",
        ):
            use(cache, processed)


def test_another_models_cache_is_refused_with_what_differs():
    _, cache = make_model(make_config(n_heads=2)).run_with_cache(random_tokens(1, 3))
    with pytest.raises(CacheError, match="n_heads is 2 in the cache and 4 in the model; n_kv_heads is 2 in"):
        connect_cache(cache, make_model(make_config()))


def test_which_captured_positions_are_tokens():
    """Positions that `pos_slice` kept in another order were matched with the padding of other columns."""
    model = make_model("rotary")
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0]])
    for pos_slice, columns in ((slice(None, None, -1), [3, 2, 1, 0]), ([0, 2], [0, 2]), (0, [0]), (None, [0, 1, 2, 3])):
        _, cache = model.run_with_cache(random_tokens(3, 4), attention_mask=mask, pos_slice=pos_slice)
        assert find_real_positions(cache, len(columns)).tolist() == mask[:, columns].bool().tolist()
    _, cache = model.run_with_cache(random_tokens(3, 4), pos_slice=0)
    assert find_real_positions(cache, 1) is None


def test_positions_of_a_run_without_tokens():
    model = make_model("rotary")
    stream, mask = torch.zeros(1, 4, model.cfg.d_model, dtype=torch.float64), torch.tensor([[0, 1, 1, 1]])
    _, cache = model.run_with_cache(stream, start_at_layer=1, attention_mask=mask, pos_slice=0)
    with pytest.raises(InputError, match=r"holds 1 positions of a run with padding, and which of them .* not known"):
        find_real_positions(cache, 1)
