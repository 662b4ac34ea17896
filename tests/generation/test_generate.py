"""Generation against transformers, and against plain loops over full forwards."""

import math

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.errors import CacheError, InputError
from hooklens.generation import GenerationOutput
from tests.annotations import unchecked
from tests.checkpoints import VARIANTS
from tests.generation.networks import RAGGED, greedy_loop, left_pad, pair, reader, with_padding_id


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


@pytest.mark.parametrize("temperature", [0, 0.0, -0.0])
@pytest.mark.parametrize("more", [{}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}, {"repetition_penalty": 1.7}], ids=str)
def test_a_temperature_of_0_is_greedy(temperature, more):
    """It had been refused, so that code which turns sampling off by it did not run."""
    model, _ = pair()
    ids = torch.tensor([RAGGED[0], RAGGED[0][::-1]])
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False, return_type="output", verbose=False, **more)
    state = torch.get_rng_state()
    cold = model.generate(ids, max_new_tokens=8, temperature=temperature, return_type="output", verbose=False, **more)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(cold.tokens, greedy.tokens)
    assert torch.equal(cold.logprobs, greedy.logprobs)
    steps = model.generate_stream(ids, max_new_tokens=8, temperature=0, **more)
    assert torch.equal(torch.stack([step.tokens for step in steps], 1), greedy.tokens[:, ids.shape[1] :])


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


def test_full_context_window_is_refused_before_any_work():
    model, _ = pair()
    model.generate(torch.ones(1, 60, dtype=torch.long), max_new_tokens=4, verbose=False)
    with pytest.raises(InputError, match=r"60 prompt tokens and max_new_tokens=5, 65 positions.*n_ctx=64"):
        model.generate(torch.ones(1, 60, dtype=torch.long), max_new_tokens=5, verbose=False)
    kv = model.prefill(torch.ones(1, 50, dtype=torch.long))
    with pytest.raises(InputError, match="50 tokens in past_kv_cache, 10 prompt tokens and max_new_tokens=10"):
        model.generate(torch.ones(1, 10, dtype=torch.long), past_kv_cache=kv, verbose=False)


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


STRETCHES = {
    "dynamic": RotaryScaling(kind="dynamic", factor=4.0, original_n_ctx=8),
    "longrope": RotaryScaling(
        kind="longrope",
        factor=4.0,
        original_n_ctx=8,
        short_factors=(1.0, 1.3, 2.0, 3.0),
        long_factors=(1.0, 2.5, 6.0, 16.0),
    ),
}


def stretched(kind: str) -> HookedCausalLM:
    """A model whose rotary frequencies depend on the length of sequences of more than 8 tokens."""
    model, _ = pair()
    positions = RotaryPositions(dim=8, scaling=STRETCHES[kind])
    return HookedCausalLM.from_state_dict(dict(model.named_weights()), model.cfg.replace(positions=positions))


@pytest.mark.parametrize("kind", STRETCHES)
def test_rows_that_outgrow_their_rotary_frequencies_are_those_of_a_plain_loop(kind):
    """Cached keys have turned at other frequencies then, and the generation ended there with an error, its tokens lost.

    The rows get there one after the other, and some end before.
    """
    model = stretched(kind)
    padded = with_padding_id(model)
    expected = [greedy_loop(model, row, 9)[len(row) :] for row in RAGGED]
    found = padded.generate(left_pad(RAGGED)[0], max_new_tokens=9, do_sample=False, return_type="output", verbose=False)
    assert [row.tolist() for row in found.new_tokens] == expected
    end = expected[0][4]
    ends = [row[: row.index(end) + 1] if end in row else row for row in expected]
    found = padded.generate(
        left_pad(RAGGED)[0], max_new_tokens=9, do_sample=False, eos_token_id=end, return_type="output", verbose=False
    )
    assert [row.tolist() for row in found.new_tokens] == ends


@pytest.mark.parametrize("kind", STRETCHES)
def test_samples_that_outgrow_their_rotary_frequencies_are_those_without_a_cache(kind):
    padded = with_padding_id(stretched(kind))
    cached, whole = (
        padded.generate(
            left_pad(RAGGED)[0],
            max_new_tokens=9,
            num_return_sequences=2,
            seed=3,
            use_past_kv_cache=use_past_kv_cache,
            verbose=False,
        )
        for use_past_kv_cache in (True, False)
    )
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("kind", STRETCHES)
def test_captures_of_rows_that_outgrow_their_rotary_frequencies_are_refused(kind):
    """They would be of keys at two frequencies."""
    with pytest.raises(CacheError, match="run the whole sequence without a cache"):
        stretched(kind).generate(
            torch.tensor([RAGGED[0]]), max_new_tokens=9, do_sample=False, names_filter="hook_embed", verbose=False
        )


@torch.no_grad()
def test_alternatives_are_the_likeliest_tokens_of_the_model_itself():
    """Before temperature and truncation, for rows that end at other steps than each other."""
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    prompts = ["When Mary and John went to the store , John gave a drink to", "Mary gave"]
    out = model.generate(
        prompts, max_new_tokens=6, temperature=1.7, top_k=20, seed=3, return_type="output", verbose=False
    )
    assert [len(row) for row in out.alternatives] == out.n_new_tokens
    for row, new in enumerate(out.n_new_tokens):
        length = out.prompt_lengths[row] + new
        logprobs = model(out.tokens[row : row + 1, :length]).log_softmax(-1)[0, out.prompt_lengths[row] - 1 : -1]
        expected = logprobs.topk(5)
        for step, found in enumerate(out.alternatives[row]):
            assert [one.token for one in found] == expected.indices[step].tolist()
            assert [one.string for one in found] == [model.to_single_str_token(one.token) for one in found]
            # float32: the cache and the whole row round differently.
            torch.testing.assert_close(
                torch.tensor([one.logprob for one in found]), expected.values[step], atol=1e-4, rtol=1e-4
            )
    page = out._repr_html_()
    assert f"likeliest: {out.alternatives[0][0][0].string.replace(' ', chr(0xB7))}" in page
    plain = model.generate(prompts[0], max_new_tokens=2, return_type="tokens", verbose=False)
    assert plain.shape[0] == 1
