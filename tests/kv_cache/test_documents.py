"""Tests of hooklens.kv_cache.documents: a cache knows the documents of its columns, whatever is made of it."""

import copy

import pytest
import torch

from hooklens import HookedKeyValueCache
from hooklens.errors import CacheError
from hooklens.kv_cache.documents import ColumnDocuments
from tests.annotations import unchecked
from tests.kv_cache.test_cache import CFG, append_noise, fill
from tests.model.networks import make_config, make_model, random_tokens

IDS = torch.tensor([[4, 4, 4, 0, 0], [7, 7, 9, 9, 9]])


def fill_documents(*, restarts: bool = True) -> HookedKeyValueCache:
    plain = fill()
    return HookedKeyValueCache(
        plain.entries, plain.previous_attention_mask, document_ids=IDS, restarts_positions=restarts
    )


@pytest.mark.parametrize("restarts", [True, False])
@pytest.mark.parametrize(
    ("derive", "expected"),
    [
        (lambda cache: cache.clone(), IDS),
        (copy.copy, IDS),
        (lambda cache: cache.crop(4), IDS[:, :4]),
        (lambda cache: cache.select([1, 0, 1]), IDS[[1, 0, 1]]),
        (lambda cache: cache.select(slice(1, None)), IDS[1:]),
        (lambda cache: cache.select(1).expand(3), IDS[[1, 1, 1]]),
        (lambda cache: cache.to(dtype=torch.bfloat16), IDS),
        (lambda cache: cache.to("cpu", torch.float64).freeze(), IDS),
        (lambda cache: cache.clone().freeze().unfreeze(), IDS),
        (lambda cache: cache.crop(0), None),
    ],
)
def test_caches_made_of_others_have_their_documents(derive, expected, restarts):
    made = derive(fill_documents(restarts=restarts))
    assert made.restarts_positions is restarts
    if expected is None:
        assert made.document_ids is None
    else:
        assert made.document_ids.dtype == torch.int64
        assert torch.equal(made.document_ids, expected)


@pytest.mark.parametrize("restarts", [True, False])
def test_documents_are_saved(tmp_path, restarts):
    cache = fill_documents(restarts=restarts)
    cache.save(tmp_path / "cache")
    loaded = HookedKeyValueCache.load(tmp_path / "cache")
    assert torch.equal(loaded.document_ids, IDS)
    assert loaded.restarts_positions is restarts
    fill().save(tmp_path / "plain")
    loaded = HookedKeyValueCache.load(tmp_path / "plain")
    assert loaded.document_ids is None
    assert loaded.restarts_positions


def test_what_is_appended_belongs_to_the_last_document():
    cache = fill_documents()
    part = cache.crop(4)
    append_noise(cache, 2)
    assert cache.document_ids.tolist() == [[4, 4, 4, 0, 0, 0, 0], [7, 7, 9, 9, 9, 9, 9]]
    assert torch.equal(part.document_ids, IDS[:, :4])
    cache.roll_back(3)
    assert torch.equal(cache.document_ids, IDS[:, :3])
    cache.roll_back(0)
    assert cache.document_ids is None
    append_noise(cache, 2)
    assert cache.document_ids is None


def test_a_frozen_cache_keeps_its_documents():
    cache = fill_documents().freeze()
    mask = cache.append_attention_mask(torch.ones(2, 1, dtype=torch.bool), documents=ColumnDocuments(IDS, True))
    assert mask.shape == (2, 6)
    assert torch.equal(cache.document_ids, IDS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_documents_of_a_call_under_inference_mode_serve_later_ones(mode):
    model, ids = make_model("capped"), random_tokens(2, 8)
    with mode():
        cache = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=model.dtype)
        model(ids[:, :5], past_kv_cache=cache, document_borders=3)
    assert not cache.document_ids.is_inference()
    cache.freeze()
    model(ids[:, 5:], past_kv_cache=cache, document_borders=1, return_type="loss").backward()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_a_call_that_fails_half_way_leaves_the_documents():
    model, ids = make_model("rotary"), random_tokens(1, 6)
    cache = model.prefill(ids[:, :4], document_borders=2).unfreeze()

    def fail(tensor, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.run_with_hooks(
            ids[:, 4:], past_kv_cache=cache, document_borders=0, fwd_hooks=[("blocks.1.hook_resid_post", fail)]
        )
    assert cache.document_ids.tolist() == [[0, 0, 1, 1]]
    cache.check_consistent()


def test_the_length_that_a_row_goes_on_from():
    # The first row's first two columns are padding.
    assert fill().continued_lengths.tolist() == [3, 5]
    assert fill_documents().continued_lengths.tolist() == [2, 3]
    assert fill_documents(restarts=False).continued_lengths.tolist() == [3, 5]


@pytest.mark.parametrize(
    "given", [IDS[:1], IDS[:, :4], IDS.float(), IDS.int(), IDS[0], [[0] * 5] * 2, "ids", IDS.bool()]
)
def test_documents_of_other_columns_are_refused(given):
    cache = fill()
    with unchecked(), pytest.raises(CacheError, match=r"document_ids are .*expected torch.int64 \[2, 5\]"):
        HookedKeyValueCache(cache.entries, cache.previous_attention_mask, document_ids=given)
    for wrong in (IDS[:, :1], IDS, IDS[0]):
        with unchecked(), pytest.raises(CacheError, match=r"document ids are .*expected \[2, 6\]"):
            cache.append_attention_mask(
                torch.ones(2, 1, dtype=torch.bool), documents=ColumnDocuments(wrong, restarts_positions=True)
            )


def test_a_network_that_is_not_causal_has_no_cache():
    """A new token changes what all earlier ones give."""
    cfg = make_config(causal=False)
    model, ids = make_model(cfg), random_tokens(1, 4)
    causal = HookedKeyValueCache.init_cache(CFG)
    for call in (
        lambda: HookedKeyValueCache.init_cache(cfg),
        lambda: model.prefill(ids),
        lambda: model(ids, past_kv_cache=causal),
        lambda: model.run_with_cache(ids, past_kv_cache=causal.freeze()),
    ):
        with pytest.raises(CacheError, match=r"not causal \(cfg.causal=False\).*without a key-value cache"):
            call()
