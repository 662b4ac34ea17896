"""Tests of hooklens.model.plan.documents: a packed row gives what its documents give alone, and what is refused."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import HookedCausalLM, HookedKeyValueCache, documents
from hooklens.config import (
    AlibiPositions,
    LearnedPositions,
    NoPositions,
    RotaryPositions,
    RotaryScaling,
)
from hooklens.errors import CacheError, InputError
from hooklens.hooks.edits import Add
from tests.annotations import unchecked
from tests.checkpoints import build_variant
from tests.model.networks import CONFIGS, N_CTX, make_config, make_model, pad_rows, random_tokens
from tests.model.test_no_synchronisation import no_looks

# The same sums in another order: a handful of layers of width 12.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}
DYNAMIC = RotaryScaling(kind="dynamic", factor=2.0, original_n_ctx=4)
OF_LAYER = st.sampled_from(
    [
        NoPositions(),
        AlibiPositions(),
        RotaryPositions(dim=4),
        RotaryPositions(dim=6, layout="interleaved"),
        RotaryPositions(dim=6, scaling=DYNAMIC),
    ]
)


def draw_tokens(lengths, seed):
    return [random_tokens(1, n, seed=100 * seed + i)[0] for i, n in enumerate(lengths)]


def join(rows):
    """Documents of each row one after another, padded on the right, and the id of each column."""
    ids, mask = pad_rows([torch.cat(row) for row in rows], "right")
    of_each, _ = pad_rows([torch.cat([torch.full_like(d, 3 * i) for i, d in enumerate(row)]) for row in rows], "right")
    return ids, of_each.masked_fill(mask == 0, -1)


@given(
    lengths=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    positions=OF_LAYER | st.just(LearnedPositions(offset=2)) | st.tuples(OF_LAYER, OF_LAYER),
    windows=st.none() | st.tuples(st.sampled_from([None, 1, 2, 4]), st.sampled_from([None, 3])),
    wiring=st.sampled_from(["sequential", "parallel"]),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    attn_softcap=st.sampled_from([None, 4.0]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def compare_packed(lengths, positions, windows, wiring, n_kv_heads, attn_softcap, causal, dtype, seed):
    has_bias = AlibiPositions() in (positions if isinstance(positions, tuple) else (positions,))
    cfg = make_config(
        positions=positions, windows=windows, wiring=wiring, n_kv_heads=n_kv_heads, attn_softcap=attn_softcap,
        causal=causal or has_bias,
    )  # fmt: skip
    model = make_model(cfg, dtype=dtype, seed=seed)
    rows = [draw_tokens(row, seed + i) for i, row in enumerate(lengths)]
    ids, of_each = join(rows)
    logits = model(ids, document_ids=of_each)
    of_packed = torch.autograd.grad(logits[of_each >= 0].square().sum(), list(model.parameters()))
    alone = [torch.cat([model(document[None])[0] for document in row]) for row in rows]
    of_alone = torch.autograd.grad(torch.cat(alone).square().sum(), list(model.parameters()))
    for row, expected in enumerate(alone):
        torch.testing.assert_close(logits[row, : len(expected)], expected, **CLOSE[dtype])
    for found, expected in zip(of_packed, of_alone, strict=True):
        # Sums over tokens of what the logits are sums of.
        slack = {"rtol": 0, "atol": 10 * CLOSE[dtype]["atol"] * max(1.0, float(expected.abs().max()))}
        torch.testing.assert_close(found, expected, **slack)


@pytest.mark.parametrize("n_examples", [40, pytest.param(120, marks=pytest.mark.slow)])
def test_a_packed_row_gives_what_its_documents_give_alone(n_examples):
    settings(max_examples=n_examples)(compare_packed)()


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 19), max_size=3),
    network=st.sampled_from(sorted(CONFIGS)),
    says_ids=st.booleans(),
    frozen=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def continue_cached(lengths, cuts, network, says_ids, frozen, seed):
    model, rows = make_model(network), [draw_tokens(lengths, seed)]
    ids, of_each = join(rows)
    n = ids.shape[1]
    ends = sorted({cut for cut in cuts if cut < n} | {n})
    starts = torch.cat([torch.ones(1, 1, dtype=torch.bool), of_each[:, 1:] != of_each[:, :-1]], 1)
    cache, found, begin = HookedKeyValueCache.init_cache(model.cfg, dtype=model.dtype), [], 0
    for end in ends:
        part = slice(begin, end)
        said = {"document_ids": of_each[:, part]} if says_ids else {"document_borders": starts[:, part]}
        if frozen and begin:
            # What is read only is left as it is.
            before = cache.document_ids
            with cache.frozen_context():
                on_frozen = model(ids[:, part], past_kv_cache=cache, **said)
            assert torch.equal(cache.document_ids, before)
        found.append(model(ids[:, part], past_kv_cache=cache, **said))
        if frozen and begin:
            torch.testing.assert_close(on_frozen, found[-1], **CLOSE[torch.float64])
        begin = end
    alone = torch.cat([model(document[None])[0] for document in rows[0]])
    torch.testing.assert_close(torch.cat(found, 1)[0], alone, **CLOSE[torch.float64])
    kept = cache.document_ids
    assert torch.equal(kept[:, 1:] != kept[:, :-1], starts[:, 1:])


@pytest.mark.parametrize("n_examples", [25, pytest.param(60, marks=pytest.mark.slow)])
def test_a_cache_goes_on_within_a_document_and_with_the_next_one(n_examples):
    settings(max_examples=n_examples)(continue_cached)()


@torch.no_grad()
def test_new_tokens_go_on_with_the_last_document():
    """Also those of generation, which knows nothing of documents."""
    model = make_model("capped")
    first, last = draw_tokens([4, 5], 1)
    kv = model.prefill(torch.cat([first, last])[None], document_borders=4)
    alone = model.prefill(last[None])
    more = random_tokens(3, 4, seed=9)
    torch.testing.assert_close(model(more, past_kv_cache=kv), model(more, past_kv_cache=alone))
    torch.testing.assert_close(kv.last_logits, alone.last_logits)
    for n in (1, 4):
        options = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False}
        assert torch.equal(
            model.generate(more[:, :n], past_kv_cache=kv, **options),
            model.generate(more[:, :n], past_kv_cache=alone, **options),
        )


@torch.no_grad()
def test_a_row_may_hold_more_tokens_than_positions():
    """The context limits each document, not what stands in a row."""
    model = make_model("learned, tied")
    parts = draw_tokens([N_CTX, N_CTX - 8, N_CTX], 2)
    ids, of_each = join([parts])
    alone = torch.cat([model(one[None])[0] for one in parts])
    torch.testing.assert_close(model(ids, document_ids=of_each)[0], alone, **CLOSE[torch.float64])
    with pytest.raises(InputError, match=f"needs {ids.shape[1]} positions"):
        model(ids, document_ids=of_each, restart_positions=False)
    with pytest.raises(InputError, match=f"needs {N_CTX + 1} positions"):
        model(random_tokens(1, 2 * N_CTX), document_borders=N_CTX - 1)
    kv = model.prefill(ids[:, : 2 * N_CTX - 8], document_ids=of_each[:, : 2 * N_CTX - 8])
    assert kv.continued_lengths.tolist() == [N_CTX - 8]
    options = {"past_kv_cache": kv, "stop_at_eos": False, "verbose": False}
    assert model.generate(ids[:, :2], max_new_tokens=6, **options).shape == (1, 8)
    with pytest.raises(InputError, match=f"row 0 has {N_CTX - 8} tokens in past_kv_cache, 2 prompt tokens"):
        model.generate(ids[:, :2], max_new_tokens=7, **options)


@torch.no_grad()
@pytest.mark.parametrize("network", CONFIGS)
def test_positions_that_do_not_restart_are_those_along_the_row(network):
    model, ids = make_model(network), random_tokens(1, 9)
    along = torch.arange(9)
    said = {"document_borders": [3, 4]}
    found = model(ids, restart_positions=False, **said)
    if network != "bare":
        torch.testing.assert_close(found, model(ids, positions=along, **said), **CLOSE[torch.float64])
    kv = model.prefill(ids[:, :6], restart_positions=False, **said)
    assert not kv.restarts_positions
    torch.testing.assert_close(model(ids[:, 6:], past_kv_cache=kv), found[:, 6:], **CLOSE[torch.float64])
    with pytest.raises(CacheError, match="restart_positions=True, but the cached keys"):
        model(ids[:, 6:], past_kv_cache=kv, restart_positions=True)


@torch.no_grad()
@pytest.mark.parametrize("network", [network for network in CONFIGS if network != "bare"])
def test_without_the_mask_documents_only_say_where_positions_may_start_anew(network):
    """`document_mask=False`: a token sees its whole row, also across the end of a cache."""
    model = make_model(CONFIGS[network].replace(document_mask=False))
    ids = random_tokens(1, 9)
    said = {"document_borders": [0, 4]}
    expected = model(ids, positions=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]))
    found = model(ids, restart_positions=True, **said)
    torch.testing.assert_close(found, expected, **CLOSE[torch.float64])
    masked = make_model(CONFIGS[network])(ids, **said)
    assert (found - masked)[:, 4:].abs().max() > 1e-3
    torch.testing.assert_close(model(ids, **said), model(ids), **CLOSE[torch.float64])
    kv = model.prefill(ids[:, :6], restart_positions=True, **said)
    torch.testing.assert_close(model(ids[:, 6:], past_kv_cache=kv), found[:, 6:], **CLOSE[torch.float64])


@torch.no_grad()
def test_padding_anywhere_between_documents():
    model = make_model("alibi, grouped")
    parts = draw_tokens([3, 2, 4], 3)
    pad = torch.tensor([7, 7])
    ids = torch.cat([pad, parts[0], pad, parts[1], parts[2][:2], pad, parts[2][2:], pad])[None]
    of_each = torch.tensor([[-1] * 2 + [4] * 3 + [-1] * 2 + [0] * 2 + [9] * 2 + [-1] * 2 + [9] * 2 + [-1] * 2])
    alone = torch.cat([model(one[None])[0] for one in parts])
    borders = torch.zeros(1, 17, dtype=torch.bool)
    # A border on padding stands before the next token.
    borders[0, [0, 6, 9]] = True
    mask = of_each >= 0
    for said in (
        {"document_ids": of_each},
        {"document_ids": of_each.masked_fill(~mask, 2), "attention_mask": mask},
        {"document_ids": of_each, "attention_mask": torch.ones(1, 17)},
        {"document_borders": borders, "attention_mask": mask},
    ):
        torch.testing.assert_close(model(ids, **said)[mask], alone, **CLOSE[torch.float64])


@pytest.mark.parametrize("per_token", [True, False])
@torch.no_grad()
def test_no_first_token_of_a_document_counts_in_the_loss(per_token):
    model = make_model("rotary")
    rows = [draw_tokens([3, 1, 4], 4), draw_tokens([5, 2], 5)]
    ids, of_each = join(rows)
    alone = [
        model(one[None], return_type="loss", loss_per_token=True)[0] for row in rows for one in row if len(one) > 1
    ]
    found = model(ids, document_ids=of_each, return_type="loss", loss_per_token=per_token)
    if per_token:
        counted = (of_each[:, 1:] == of_each[:, :-1]) & (of_each[:, 1:] >= 0)
        torch.testing.assert_close(found[counted], torch.cat(alone))
        assert bool((found[~counted] == 0).all())
    else:
        torch.testing.assert_close(found, torch.cat(alone).mean())
    with pytest.raises(InputError, match="rows and documents of one token have no next token"):
        model(ids, document_borders=slice(None), return_type="loss")


@torch.no_grad()
def test_a_new_document_is_not_predicted_by_the_prefix():
    model, ids = make_model("grouped"), random_tokens(1, 8)
    kv = model.prefill(ids[:, :3])
    losses = model(ids[:, 3:], past_kv_cache=kv, document_borders=[0, 3], return_type="loss", loss_per_token=True)
    assert losses[0, [0, 3]].tolist() == [0, 0]
    alone = [model(part, return_type="loss", loss_per_token=True) for part in (ids[:, 3:6], ids[:, 6:])]
    torch.testing.assert_close(losses[0, [1, 2, 4]], torch.cat(alone, 1)[0])


@torch.no_grad()
def test_positions_of_edits_and_logits_are_counted_along_the_row():
    model = make_model("rotary")
    parts = draw_tokens([4, 5], 6)
    ids, of_each = join([parts])
    edit = Add("blocks.0.hook_resid_pre", 1.0, pos=6)
    found = model.run_with_hooks(ids, document_ids=of_each, edits=[edit], logits_at=[2, 7])
    at_two = Add("blocks.0.hook_resid_pre", 1.0, pos=2)
    expected = [model(parts[0][None], logits_at=2), model.run_with_hooks(parts[1][None], edits=[at_two], logits_at=3)]
    torch.testing.assert_close(found, torch.cat(expected, 1), **CLOSE[torch.float64])
    _, kept = model.run_with_cache(ids, document_ids=of_each, names_filter="pattern", pos_slice=5)
    _, alone = model.run_with_cache(parts[1][None], names_filter="pattern", pos_slice=1)
    pattern = kept["pattern", 1]
    torch.testing.assert_close(pattern[..., 4:], alone["pattern", 1], **CLOSE[torch.float64])
    assert not pattern[..., :4].any()


@torch.no_grad()
def test_rows_know_nothing_of_each_other():
    model, (ids, of_each) = make_model("capped"), join([draw_tokens([3, 4], 7), draw_tokens([6, 1], 8)])
    found = model(ids, document_ids=of_each)
    other = model(
        torch.cat([ids[:1], ids[1:].roll(1, 1)]), document_ids=torch.stack([of_each[0], torch.zeros(7).long()])
    )
    assert torch.equal(found[0], other[0])


@pytest.mark.parametrize("network", CONFIGS)
@torch.no_grad()
def test_a_planned_call_with_documents_looks_at_nothing(network):
    model, tokens = make_model(network), random_tokens(2, 8)
    marks = model.read_documents(tokens, [0, 0, 0, 4, 4, 1, 1, 1])
    plan = model.make_plan(tokens, marks=marks)
    cache = model.prefill(tokens, document_borders=3).unfreeze()
    with no_looks():
        model.run(tokens, plan)
        for step in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:5]):
            model.run(step, model.make_plan(step, None, None, cache), past_kv_cache=cache)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"document_ids": [[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]}, r"in rows \[0\] a document is interrupted"),
        ({"document_ids": [0, 1, 0, 2, 1]}, r"in rows \[0\] a document is interrupted"),
        ({"document_ids": [0, 1]}, r"document_ids has shape \[2\]; expected \[5\] or \[2, 5\]"),
        ({"document_ids": torch.zeros(3, 5, dtype=torch.long)}, r"has shape \[3, 5\]"),
        ({"document_ids": [0, 0, -2, -2, -1]}, "hold -2"),
        ({"document_ids": [0.0, 1, 1, 1, 1]}, "whole numbers"),
        ({"document_ids": [True, False, True, True, True]}, "whole numbers"),
        ({"document_ids": "abc"}, "document_ids"),
        ({"document_ids": [0, 0, 0, 1, 1], "document_borders": [3]}, "leave one of them out"),
        ({"document_ids": [[-1] * 5, [0] * 5]}, r"no token in rows \[0\], all is padding"),
        (
            {"document_ids": [-1, 0, 0, 0, 0], "attention_mask": torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])},
            r"no token in rows \[1\]",
        ),
        ({"document_borders": [5]}, "out of range"),
        ({"document_borders": [1, 1]}, "more than once"),
        ({"document_borders": [[1], [2]]}, "document borders are booleans"),
        ({"document_borders": torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])}, "document borders are booleans"),
        ({"document_borders": torch.zeros(2, 4, dtype=torch.bool)}, r"has shape \[2, 4\]"),
        ({"document_borders": 0.5}, "document borders are booleans"),
        ({"restart_positions": True}, "there are no documents"),
        ({"restart_positions": "no", "document_borders": [2]}, "True or False"),
        ({"document_borders": [2], "restart_positions": True, "positions": torch.arange(5)}, "both say where"),
    ],
)
def test_what_says_nothing_clear_is_refused(said, text):
    model, ids = make_model("rotary"), random_tokens(2, 5)
    with unchecked():
        for call in (model, model.run_with_cache, model.run_with_hooks, model.prefill):
            with pytest.raises(InputError, match=text):
                call(ids, **said)


def test_a_call_from_a_layer_takes_documents_again():
    model = make_model("rotary")
    stream = model(random_tokens(2, 5), stop_at_layer=1, document_borders=[2])
    found = model(stream, start_at_layer=1, document_borders=[2])
    torch.testing.assert_close(found, model(random_tokens(2, 5), document_borders=[2]))


def test_ids_need_to_know_the_documents_before_them():
    model, ids = make_model("rotary"), random_tokens(1, 6)
    kv = model.prefill(ids[:, :3])
    with pytest.raises(CacheError, match=r"document_ids after 3 cached columns that have none.*document_borders"):
        model(ids[:, 3:], past_kv_cache=kv, document_ids=[0, 1, 1])
    kv = model.prefill(ids[:, :3], document_ids=[5, 5, 2])
    with pytest.raises(InputError, match=r"interrupted by another one.*cache included"):
        model(ids[:, 3:], past_kv_cache=kv, document_ids=[2, 5, 5])


@pytest.mark.parametrize(
    "given",
    [
        [False, True, False, True, False],
        [[False, True, False, True, False]] * 2,
        np.array([False, True, False, True, False]),
        torch.tensor([True, True, False, True, False]),
        [1, 3],
        (3, -4),
        np.array([1, 3]),
        torch.tensor([0, 1, 3]),
        slice(1, None, 2),
    ],
)
@torch.no_grad()
def test_borders_of_every_kind(given):
    model, ids = make_model("rotary"), random_tokens(2, 5)
    with unchecked():
        found = model(ids, document_borders=given)
    for said in ({"document_ids": [3, 8, 8, 1, 1]}, {"document_ids": torch.tensor([[0, 1, 1, 2, 2]] * 2).int()}):
        with unchecked():
            assert torch.equal(found, model(ids, **said))


def test_document_ids_say_what_is_padding():
    """Ids that look padded are not guessed about where document ids tell."""
    model = make_model("rotary")
    ids, of_each = documents.pack([[1, 2, 3], [4, 5, 6, 7], [8]], 5, pad_id=0)
    alone = [model(torch.tensor([one]))[0] for one in ([1, 2, 3], [4, 5, 6, 7], [8])]
    found = documents.unpack(model(ids, document_ids=of_each), of_each)
    assert sorted(found) == [0, 1, 2]
    for index, expected in enumerate(alone):
        torch.testing.assert_close(found[index], expected, **CLOSE[torch.float64])


@torch.no_grad()
def test_borders_after_ids_that_were_in_no_order():
    """New documents were numbered on from the last one, and met an earlier one's number."""
    model, ids = make_model("grouped"), random_tokens(1, 9)
    kv = model.prefill(ids[:, :5], document_ids=[9, 9, 8, 8, 8])
    found = model(ids[:, 5:], past_kv_cache=kv, document_borders=[1, 3])
    alone = torch.cat([model(ids[:, 2:6])[:, 3:], model(ids[:, 6:8]), model(ids[:, 8:])], 1)
    torch.testing.assert_close(found, alone, **CLOSE[torch.float64])


def test_rotary_frequencies_that_depend_on_the_length_of_a_document():
    """They were those of the row, and a cache of short documents was refused for its length."""
    model = make_model(make_config(positions=RotaryPositions(dim=6, scaling=DYNAMIC)))
    ids = random_tokens(1, 9)
    with torch.no_grad():
        kv = model.prefill(ids[:, :6], document_borders=3)
        torch.testing.assert_close(model(ids[:, 6:7], past_kv_cache=kv), model(ids[:, 3:7])[:, 3:])
        with pytest.raises(CacheError, match=re.escape("rotary scaling 'dynamic': past 4 tokens")):
            model(ids[:, 6:8], past_kv_cache=kv)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["neox-parallel", "llama-gqa", "llama-dynamic", "falcon-40b"])
@torch.no_grad()
def test_transformers_with_a_mask_of_its_own_gives_the_same(name, causal):
    """Told of each pair of tokens and of each position, since it knows neither documents nor both ways."""
    hf_model = build_variant(name, dtype=torch.float64)
    read = HookedCausalLM.from_hf(hf_model)
    model = HookedCausalLM.from_state_dict(read.state_dict(), read.cfg.replace(causal=causal, origin=None))
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(5))
    of_each = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
    visible = of_each[:, :, None] == of_each[:, None, :]
    if causal:
        visible = visible.tril()
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [*range(8), 0]])
    expected = hf_model(
        ids, attention_mask=torch.where(visible, 0.0, -torch.inf).double()[:, None], position_ids=positions
    ).logits
    # transformers takes the mean square of an RMS norm in float32; otherwise the same sums in another order.
    slack = 1e-5 if name.startswith("llama") else 1e-12
    torch.testing.assert_close(model(ids, document_ids=of_each), expected, rtol=slack, atol=slack)
