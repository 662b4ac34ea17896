import pytest
import torch

import hooklens as hl
from hooklens.errors import InputError
from hooklens.viz.patterns.reading import read_patterns
from tests.annotations import unchecked
from tests.browser.pages import causal

TEXT = "When Mary and John went to the store"


def read(given, layer=None, *, tokens=None, row=0, heads=None):
    return read_patterns(given, layer, tokens=tokens, row=row, heads=heads)


@pytest.fixture(scope="module")
def model():
    return hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")


def test_all_layers_of_a_cache(model):
    _, cache = model.run_with_cache(TEXT)
    tokens = model.to_str_tokens(TEXT)
    found = read(cache, tokens=tokens)
    n = len(tokens)
    assert found.heads == tuple((layer, head) for layer in range(4) for head in range(4))
    torch.testing.assert_close(found.values.unflatten(0, (4, 4))[2], cache["pattern", 2][0], rtol=0, atol=0)
    assert (found.queries, found.keys) == (tuple(tokens), tuple(tokens))
    assert found.row_lengths == tuple(range(1, n + 1))
    # Without texts a token is its id.
    assert read(cache, [3]).keys == tuple(map(str, model.to_tokens(TEXT)[0].tolist()))
    chosen = read(cache, [3, 1], heads=[2])
    assert chosen.heads == ((3, 2), (1, 2))
    torch.testing.assert_close(chosen.values[1], cache["pattern", 1][0, 2], rtol=0, atol=0)
    assert read(cache.remove_batch_dim(), 1).values.equal(read(cache, 1).values)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(model, side):
    """A padded row is as if it were alone."""
    _, cache = model.run_with_cache([TEXT, "When Mary"], padding_side=side)
    _, alone = model.run_with_cache("When Mary")
    padded = read(cache, 2, row=1, tokens=model.to_str_tokens("When Mary"))
    assert padded.keys == tuple(model.to_str_tokens("When Mary"))
    # Rows in a batch agree with single ones to float32's rounding.
    torch.testing.assert_close(padded.values, alone["pattern", 2][0], atol=1e-5, rtol=0)


def test_a_cached_prefix_has_keys_without_queries(model):
    prefix, suffix = "When Mary and", " John went"
    past = model.prefill(prefix)
    _, cache = model.run_with_cache(suffix, past_kv_cache=past, prepend_bos=False)
    tokens = model.to_str_tokens(suffix, prepend_bos=False)
    n_past = len(past)
    found = read(cache, 0, tokens=tokens)
    assert found.keys == (*[""] * n_past, *tokens)
    assert found.queries == tuple(tokens)
    assert found.query(0) == (n_past, tokens[0])
    assert found.row_lengths == tuple(n_past + 1 + place for place in range(len(tokens)))
    every = [*model.to_str_tokens(prefix), *tokens]
    assert read(cache, 0, tokens=every).keys == tuple(every)


def test_captured_positions_are_the_queries(model):
    _, cache = model.run_with_cache(TEXT, pos_slice=[2, 5])
    found = read(cache, 1, tokens=model.to_str_tokens(TEXT))
    assert [found.query(place)[0] for place in (0, 1)] == [2, 5]
    assert found.row_lengths == (3, 6)


def test_patterns_that_are_not_causal_are_whole():
    found = read(torch.full((2, 3, 3), 1 / 3))
    assert found.row_lengths == (3, 3, 3)
    # The rows that no token may see are NaN, and say nothing of later keys.
    masked = causal(1, 4, 4)
    masked[0, 0] = torch.nan
    assert read(masked).row_lengths == (1, 2, 3, 4)


def test_a_window_keeps_the_first_queries_and_their_keys():
    found = read(causal(2, 20, 30)).window(8)
    assert found.values.shape == (2, 8, 8)
    assert (found.query(0)[0], found.query(7)[0], found.key(7)[0]) == (10, 17, 17)
    torch.testing.assert_close(found.values, causal(2, 20, 30)[:, :8, 10:18], rtol=0, atol=0)
    assert found.row_lengths == (1, 2, 3, 4, 5, 6, 7, 8)


def test_what_is_not_there_is_refused(model):
    _, cache = model.run_with_cache(TEXT, names_filter="blocks.1.attn.hook_pattern")
    with pytest.raises(hl.errors.CacheError, match=r"blocks\.0\.attn\.hook_pattern"):
        read(cache, 0)
    with pytest.raises(InputError, match=r"no pattern of layer 5; found those of layers \[0\]"):
        read({"blocks.0.attn.hook_pattern": causal(1, 2, 3, 3)}, 5)
    with pytest.raises(InputError, match="the cache holds no pattern; capture some"):
        read({"blocks.0.hook_resid_pre": torch.zeros(1, 2, 3)})
    with pytest.raises(InputError, match="row is 4; the patterns have 1 rows"):
        read(cache, 1, row=4)
    with pytest.raises(InputError, match=r"heads are \[9\]; expected some of 0 to 3"):
        read(cache, 1, heads=[9])
    with pytest.raises(InputError, match="2 tokens are given; expected 9: one for each key"):
        read(cache, 1, tokens=["a", "b"])
    with pytest.raises(InputError, match="tokens are a text"), unchecked():
        read(cache, 1, tokens=TEXT)
    with pytest.raises(InputError, match="the values run from -3 to 5; expected attention from 0 to 1"):
        read(torch.tensor([[[-3.0, 5.0], [0.0, 0.0]]]))
    with pytest.raises(InputError, match=r"the patterns have the shape \[3, 3\]"):
        read(torch.zeros(3, 3))
    with pytest.raises(InputError, match="3 layers are named, and the patterns are those of 2"):
        read(causal(2, 1, 3, 3), [0, 1, 2])
    with pytest.raises(InputError, match="4 queries look at 3 keys"):
        read(torch.zeros(1, 4, 3))


def test_queries_that_nothing_places_are_refused(model):
    """A pattern of some queries of the run; that they are its last ones would be a guess."""
    _, whole = model.run_with_cache(TEXT)
    name = "blocks.3.attn.hook_pattern"
    cut = hl.ActivationCache({name: whole[name][:, :, 4:6]}, cfg=model.cfg, tokens=whole.tokens)
    with pytest.raises(InputError, match="2 queries of the 9 captured positions, and the cache does not say which"):
        read(cut, 3)
