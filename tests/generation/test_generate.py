"""Generation against transformers, and against plain loops over full forwards."""

import math
import statistics
import time
from itertools import pairwise

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import CacheError, InputError
from hooklens.generation import GenerationOutput
from tests.annotations import unchecked
from tests.checkpoints import VARIANTS
from tests.generation.networks import PadsWithZero, left_pad, pair, reader

RAGGED = [[5, 17, 80, 3, 44, 9], [61, 2, 33], [12, 90, 7, 25, 31]]


def greedy_loop(model, row, n):
    """Most likely tokens by one full forward without a cache for each."""
    row = list(row)
    for _ in range(n):
        with torch.no_grad():
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    return row


def with_padding_id(model):
    padded = HookedCausalLM.from_state_dict(dict(model.named_weights()), model.cfg)
    padded.tokenizer = PadsWithZero()
    return padded


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_generation_equals_transformers(name):
    model, hf_model = pair(name)
    ids = torch.randint(1, 97, (2, 6))
    ours = model.generate(ids, max_new_tokens=8, do_sample=False, verbose=False)
    theirs = hf_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_generation_of_ragged_prompts_equals_transformers(name):
    model, hf_model = pair(name)
    ids, mask = left_pad(RAGGED)
    ours = with_padding_id(model).generate(ids, max_new_tokens=8, do_sample=False, return_type="output", verbose=False)
    theirs = hf_model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert [row.tolist() for row in ours.new_tokens] == theirs[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}])
def test_penalised_greedy_generation_equals_transformers(penalty):
    model, hf_model = pair()
    ids = torch.tensor([RAGGED[0]])
    ours = model.generate(ids, max_new_tokens=20, do_sample=False, verbose=False, **penalty)
    theirs = hf_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **penalty,
    )
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", ["llama-gqa", "neox-parallel", "falcon-rw"])
def test_every_way_of_running_gives_the_rows_of_a_plain_loop(name):
    model, _ = pair(name)
    padded = with_padding_id(model)
    expected = [greedy_loop(model, row, 9)[len(row) :] for row in RAGGED]
    ids, _ = left_pad(RAGGED)
    right = torch.tensor([row + [0] * (6 - len(row)) for row in RAGGED])
    for batch in (ids, right):
        for use_cache in (True, False):
            out = padded.generate(
                batch,
                max_new_tokens=9,
                do_sample=False,
                use_past_kv_cache=use_cache,
                return_type="output",
                verbose=False,
            )
            assert [row.tolist() for row in out.new_tokens] == expected


def test_result_is_a_rectangle_padded_on_the_right():
    model, _ = pair()
    ids, _ = left_pad(RAGGED)
    tokens = with_padding_id(model).generate(ids, max_new_tokens=2, do_sample=False, verbose=False)
    assert tokens.shape == (3, 8)
    for row, prompt in zip(tokens.tolist(), RAGGED, strict=True):
        assert row[: len(prompt)] == prompt
        assert row[len(prompt) + 2 :] == [0] * (6 - len(prompt))


def test_rows_end_with_their_end_token_and_leave_the_batch():
    """Each row ends by itself, and the rows that go on are what they are alone."""
    model, _ = pair()
    rows = [greedy_loop(model, row, 12) for row in RAGGED]
    new = [row[len(prompt) :] for row, prompt in zip(rows, RAGGED, strict=True)]
    end = new[1][3]
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in new]
    assert len({len(ids) for ids in expected}) > 1
    sizes = []
    padded = with_padding_id(model)
    run = padded.run
    padded.run = lambda ids, *args, **keywords: (sizes.append(len(ids)), run(ids, *args, **keywords))[1]
    out = padded.generate(
        left_pad(RAGGED)[0], max_new_tokens=12, do_sample=False, eos_token_id=end, return_type="output", verbose=False
    )
    assert [ids.tolist() for ids in out.new_tokens] == expected
    assert out.finish_reasons == ["end_token" if ids[-1] == end else "length" for ids in expected]
    # A row of n new tokens takes n calls.
    assert sizes == [sum(len(ids) > step for ids in expected) for step in range(max(map(len, expected)))]


def test_end_token_on_the_last_step_ends_the_row():
    """curated-transformers: an end token predicted on the last allowed step cancels the length, and one more token
    comes out."""
    model, _ = pair()
    row = greedy_loop(model, RAGGED[0], 4)
    out = model.generate(
        torch.tensor([RAGGED[0]]),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=row[-1],
        return_type="output",
        verbose=False,
    )
    new = row[len(RAGGED[0]) :]
    expected = new[: new.index(row[-1]) + 1]
    assert out.new_tokens[0].tolist() == expected
    assert out.finish_reasons == ["end_token"]


def test_stop_at_eos_false_goes_on():
    model = reader()
    text_model_end = model.tokenizer.eos_token_id

    def force_end(ids, scores):
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([text_model_end]), 0.0)

    out = model.generate("Mary went to", logits_processor=[force_end], return_type="output", verbose=False)
    assert out.n_new_tokens == [1]
    out = model.generate(
        "Mary went to", logits_processor=[force_end], stop_at_eos=False, return_type="output", verbose=False
    )
    assert out.n_new_tokens == [10]


def test_text_comes_out_for_text():
    model = reader()
    text = model.generate("Mary went to", max_new_tokens=3, do_sample=False, verbose=False)
    assert isinstance(text, str)
    assert text.startswith("Mary went to ")
    both = model.generate(["Mary went to", "Mary"], max_new_tokens=3, do_sample=False, verbose=False)
    assert isinstance(both, list)
    assert both[0] == text
    assert both[1] == model.generate("Mary", max_new_tokens=3, do_sample=False, verbose=False)
    ids = model.generate("Mary went to", max_new_tokens=3, do_sample=False, return_type="tokens", verbose=False)
    assert ids.shape == (1, 1 + 3 + 3)


def test_empty_text_is_the_bos_token():
    model = reader()
    ids = model.generate(max_new_tokens=2, return_type="tokens", verbose=False)
    assert ids.shape == (1, 3)
    assert int(ids[0, 0]) == model.tokenizer.bos_token_id


def test_num_return_sequences_run_the_prompt_once_and_are_samples_of_their_own():
    model, _ = pair()
    widths = []
    run = type(model).run
    model.run = lambda ids, *args, **keywords: (widths.append(tuple(ids.shape)), run(model, ids, *args, **keywords))[1]
    try:
        tokens = model.generate(torch.tensor([[5, 17, 80]]), num_return_sequences=4, seed=3, verbose=False)
    finally:
        del model.run
    assert widths == [(1, 3)] + [(4, 1)] * 9
    assert tokens.shape == (4, 13)
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    two = model.generate(torch.tensor([[5, 17, 80], [9, 9, 1]]), num_return_sequences=2, seed=3, verbose=False)
    assert two[:, :3].tolist() == [[5, 17, 80], [5, 17, 80], [9, 9, 1], [9, 9, 1]]
    assert two[:2].tolist() == tokens[:2].tolist()


def test_seed_reproduces_and_rows_do_not_depend_on_each_other():
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80], [9, 9, 1], [4, 8, 15]])
    first = model.generate(ids, seed=7, max_new_tokens=20, verbose=False)
    assert first.tolist() == model.generate(ids, seed=7, max_new_tokens=20, verbose=False).tolist()
    assert first.tolist() != model.generate(ids, seed=8, max_new_tokens=20, verbose=False).tolist()
    assert first[:2].tolist() == model.generate(ids[:2], seed=7, max_new_tokens=20, verbose=False).tolist()
    assert first[:, :8].tolist() == model.generate(ids, seed=7, max_new_tokens=5, verbose=False).tolist()
    end = int(first[0, 5])
    ended = model.generate(ids, seed=7, max_new_tokens=20, eos_token_id=end, return_type="output", verbose=False)
    for row, new in zip(first[:, 3:].tolist(), ended.new_tokens, strict=True):
        assert new.tolist() == (row[: row.index(end) + 1] if end in row else row)
    torch.manual_seed(1)
    unseeded = model.generate(ids, verbose=False)
    torch.manual_seed(1)
    assert unseeded.tolist() == model.generate(ids, verbose=False).tolist()


def test_without_a_cache_the_same_tokens_are_drawn():
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80]])
    with_cache = model.generate(ids, seed=1, max_new_tokens=20, verbose=False)
    without = model.generate(ids, seed=1, max_new_tokens=20, use_past_kv_cache=False, verbose=False)
    assert with_cache.tolist() == without.tolist()


def test_output_holds_log_probabilities_of_the_model_itself():
    model, _ = pair()
    out = model.generate(
        torch.tensor([[5, 17, 80]]), temperature=0.5, top_k=3, seed=0, return_type="output", verbose=False
    )
    assert isinstance(out, GenerationOutput)
    with torch.no_grad():
        expected = model(out.tokens).log_softmax(-1)[0, 2:-1].gather(-1, out.tokens[0, 3:, None])[:, 0]
    # float32 logits by way of the cache and of one forward differ in rounding.
    torch.testing.assert_close(out.logprobs[0], expected, atol=1e-4, rtol=1e-4)
    timing = out.timing
    assert 0 < timing.time_to_first_token < timing.total
    assert timing.time_per_token == pytest.approx((timing.total - timing.time_to_first_token) / 9)


def test_frozen_prefix_serves_all_prompts_and_stays_as_it_is():
    model, _ = pair()
    prefix = torch.tensor([[5, 17, 80, 3]])
    kv = model.prefill(prefix)
    before = [entry.past_keys.clone() for entry in kv.entries]
    suffixes = torch.tensor([[61, 2], [33, 12]])
    expected = model.generate(
        torch.cat([prefix.expand(2, -1), suffixes], 1), do_sample=False, max_new_tokens=8, verbose=False
    )[:, 4:]
    for _ in range(2):
        ours = model.generate(suffixes, past_kv_cache=kv, do_sample=False, max_new_tokens=8, verbose=False)
        assert ours.tolist() == expected.tolist()
    assert len(kv) == 4
    assert kv.frozen
    assert all(torch.equal(entry.past_keys, keys) for entry, keys in zip(kv.entries, before, strict=True))
    samples = model.generate(
        suffixes, past_kv_cache=kv, num_return_sequences=3, max_new_tokens=4, seed=0, verbose=False
    )
    assert samples.shape == (6, 6)


def test_unfrozen_cache_is_appended_to_and_goes_on():
    model, _ = pair()
    prompt = torch.tensor([[5, 17, 80, 3], [9, 4, 7, 7]])
    once = model.generate(prompt, do_sample=False, max_new_tokens=9, verbose=False)
    kv = model.prefill(prompt[:, :3]).unfreeze()
    first = model.generate(prompt[:, 3:], past_kv_cache=kv, do_sample=False, max_new_tokens=4, verbose=False)
    assert len(kv) == 3 + 1 + 3
    second = model.generate(first[:, -1:], past_kv_cache=kv, do_sample=False, max_new_tokens=5, verbose=False)
    assert torch.cat([prompt[:, :3], first, second[:, 1:]], 1).tolist() == once.tolist()


def test_unfrozen_cache_masks_what_follows_a_rows_end():
    model, _ = pair()
    prompt = torch.tensor([[5, 17, 80, 3], [9, 4, 7, 7]])
    once = model.generate(prompt, do_sample=False, max_new_tokens=6, verbose=False)
    end = int(once[0, 5])
    assert end not in once[1, 4:]
    kv = model.prefill(prompt[:, :3]).unfreeze()
    model.generate(prompt[:, 3:], past_kv_cache=kv, do_sample=False, max_new_tokens=6, eos_token_id=end, verbose=False)
    # Row 0 ran its prompt and its first new token; its end token was never run.
    assert kv.previous_attention_mask.sum(1).tolist() == [5, 9]


def test_streamer_gets_prompts_and_every_step():
    class Collector:
        def __init__(self):
            self.values, self.ended = [], 0

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended += 1

    model, _ = pair()
    collector = Collector()
    tokens = model.generate(torch.tensor([[5, 17]]), streamer=collector, max_new_tokens=4, seed=0, verbose=False)
    assert collector.values[0].tolist() == [[5, 17]]
    assert [int(value) for value in collector.values[1:]] == tokens[0, 2:].tolist()
    assert collector.ended == 1


def test_interrupting_gives_what_there_is():
    model, _ = pair()

    def interrupt(ids, scores):
        if ids.shape[1] == 5:
            raise KeyboardInterrupt
        return scores

    with pytest.warns(UserWarning, match="interrupted after 3 tokens"):
        out = model.generate(
            torch.tensor([[5, 17]]),
            logits_processor=[interrupt],
            do_sample=False,
            names_filter="resid_post",
            return_type="output",
            verbose=False,
        )
    assert out.interrupted
    assert out.finish_reasons == ["interrupted"]
    assert out.tokens[0].tolist() == greedy_loop(model, [5, 17], 3)
    assert out.logprobs.shape == (1, 3)
    assert out.cache["resid_post", 0].shape == (1, 4, 32)


def test_stream_gives_the_tokens_and_the_text_of_generate():
    model = reader()
    prompts = ["Mary went to the", "Mary"]
    end = None
    whole = model.generate(prompts, seed=5, max_new_tokens=12, return_type="output", verbose=False)
    steps = list(model.generate_stream(prompts, seed=5, max_new_tokens=12, eos_token_id=end))
    assert len(steps) == max(whole.n_new_tokens)
    for row, new in enumerate(whole.new_tokens):
        taken = [step for step in steps if bool(step.is_new[row])]
        assert [int(step.tokens[row]) for step in taken] == new.tolist()
        assert prompts[row] + "".join(step.text[row] for step in steps) == whole.text[row]
        streamed = torch.stack([step.logprobs[row] for step in taken])
        assert torch.equal(streamed, whole.logprobs[row, : len(taken)])
        assert steps[-1].finish_reasons[row] == whole.finish_reasons[row]


def test_model_is_free_between_the_steps_of_a_stream():
    from hooklens import edits

    model, _ = pair()
    ids = torch.tensor([[5, 17, 80]])
    with torch.no_grad():
        plain = model(ids)
    edit = edits.Zero("blocks.0.hook_attn_out")
    stream = model.generate_stream(ids, max_new_tokens=3, do_sample=False, edits=[edit])
    tokens = []
    for step in stream:
        tokens.append(int(step.tokens[0]))
        with torch.no_grad():
            assert torch.equal(model(ids), plain)
    assert tokens == model.generate(ids, max_new_tokens=3, do_sample=False, edits=[edit], verbose=False)[0, 3:].tolist()


def test_generation_leaves_no_listener_behind():
    from hooklens import edits

    model, _ = pair()

    def fail(ids, scores):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.generate(
            torch.tensor([[5]]),
            edits=[edits.Zero("hook_embed")],
            names_filter="*",
            logits_processor=[fail],
            verbose=False,
        )
    assert not any(point.listening for point in model.hook_points().values())
    assert model._phase == "prefill"


def test_full_context_window_is_refused_before_any_work():
    model, _ = pair()
    model.generate(torch.ones(1, 60, dtype=torch.long), max_new_tokens=4, verbose=False)
    with pytest.raises(InputError, match=r"60 prompt tokens and max_new_tokens=5, 65 positions.*n_ctx=64"):
        model.generate(torch.ones(1, 60, dtype=torch.long), max_new_tokens=5, verbose=False)
    kv = model.prefill(torch.ones(1, 50, dtype=torch.long))
    with pytest.raises(InputError, match="50 tokens in past_kv_cache, 10 prompt tokens and max_new_tokens=10"):
        model.generate(torch.ones(1, 10, dtype=torch.long), past_kv_cache=kv, verbose=False)


def test_foreign_caches_are_refused():
    model, _ = pair()
    ids = torch.tensor([[5]])
    other, _ = pair("llama-mqa")
    with pytest.raises(CacheError, match="another"):
        model.generate(ids, past_kv_cache=other.prefill(ids), verbose=False)
    with pytest.raises(CacheError, match="float64"):
        model.generate(ids, past_kv_cache=model.prefill(ids).to(dtype=torch.float64), verbose=False)
    with pytest.raises(CacheError, match="2 rows"):
        model.generate(ids, past_kv_cache=model.prefill(torch.tensor([[5], [6]])), verbose=False)


def test_bad_input_is_refused():
    model, _ = pair()
    ids = torch.tensor([[5]])
    with pytest.raises(TypeError, match="top_q"):
        model.generate(ids, top_q=0.5)
    with unchecked(), pytest.raises(InputError, match="return_type is 'tensor'"):
        model.generate(ids, return_type="tensor")
    with pytest.raises(InputError, match="no tokenizer"):
        model.generate("text")
    with pytest.raises(InputError, match="needs a tokenizer"):
        model.generate(ids, return_type="str")
    with pytest.raises(InputError, match="outside the vocabulary"):
        model.generate(torch.tensor([[97]]))


def test_time_per_token_stays_flat():
    """Appending to the cache costs O(1) a token: the last hundred steps of 2,000 take about as long as the first.

    A doubling of time leaves room for attention, which grows, and for other processes on the machine.
    """
    cfg = pair()[0].cfg.replace(n_ctx=2048, origin=None)
    model = HookedCausalLM(cfg)
    times = [time.perf_counter()]
    with unchecked():
        for _ in model.generate_stream(torch.tensor([[5]]), max_new_tokens=2000, do_sample=False):
            times.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(times[1:])]
    assert statistics.median(steps[-100:]) < 2 * statistics.median(steps[:100])
