"""Text on a cached prefix, against the whole text: calls, and generation with every option."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MaxLengthCriteria, NoRepeatNGramLogitsProcessor

from hooklens import HookedKeyValueCache, edits
from hooklens.errors import CacheError, InputError
from hooklens.generation.text import decode_plain
from tests.text_models import reader_of
from tests.tokens.kinds import KINDS, TEMPLATES

# The most that keys and values in two parts round otherwise than in one, in float64.
CLOSE = {"rtol": 0, "atol": 1e-10}
PREFIX, TEXT = "A: yes\nthe cat", " sat on\nno, the world"
VECTOR = torch.linspace(-1, 1, 16, dtype=torch.float64)


def split_at_border(tokenizer):
    """The text in two parts, the first of whose tokens the whole begins with, as near to the middle as there are."""
    text = PREFIX + TEXT
    whole = tokenizer(text, add_special_tokens=False).input_ids
    for cut in sorted(range(1, len(text)), key=lambda place: abs(place - len(PREFIX))):
        begun = tokenizer(text[:cut], add_special_tokens=False).input_ids
        if len(begun) < len(whole) and whole[: len(begun)] == begun and text[cut - 1] != " ":
            return text[:cut], text[cut:]
    raise AssertionError("one token for the whole text")


@torch.no_grad()
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_calls_on_a_cached_prefix_give_what_the_whole_text_gives(kind, template):
    """Text was encoded alone, so most tokenizers of words made other tokens of it than of the whole."""
    model = reader_of(kind, template)
    prefix, text = split_at_border(model.tokenizer)
    kv = model.prefill(prefix)
    whole, watched = model.run_with_cache(prefix + text, names_filter="resid_post")
    n_past = len(kv)
    torch.testing.assert_close(model(text, past_kv_cache=kv), whole[:, n_past:], **CLOSE)
    logits, cache = model.run_with_cache(text, past_kv_cache=kv, names_filter="resid_post")
    torch.testing.assert_close(logits, whole[:, n_past:], **CLOSE)
    torch.testing.assert_close(cache["resid_post", 1], watched["resid_post", 1][:, n_past:], **CLOSE)
    hooked = model.run_with_hooks(text, past_kv_cache=kv, edits=[edits.Add("hook_embed", VECTOR, pos=n_past)])
    expected = model.run_with_hooks(prefix + text, edits=[edits.Add("hook_embed", VECTOR, pos=n_past)])
    torch.testing.assert_close(hooked, expected[:, n_past:], **CLOSE)
    # An unfrozen cache: what was appended is gone on from, too, where no EOS closed it.
    growing = kv.clone().unfreeze()
    model(text, past_kv_cache=growing, return_type=None)
    assert growing.token_rows() == model.to_tokens(prefix + text).tolist()


@torch.no_grad()
def test_each_row_of_a_cache_is_gone_on_from_by_its_own_text():
    model = reader_of("Metaspace always", "BOS")
    prefixes, texts = [PREFIX, "no"], ["\nno", " the cats on the mat"]
    for frozen in (True, False):
        kv = model.prefill(prefixes)
        kv = kv if frozen else kv.clone().unfreeze()
        logits = model(texts, past_kv_cache=kv, logits_at=-1)
        for row, (prefix, text) in enumerate(zip(prefixes, texts, strict=True)):
            torch.testing.assert_close(logits[row], model(prefix + text, logits_at=-1)[0], **CLOSE)
    with pytest.raises(CacheError, match="the cache has 2 rows and the input 1"):
        model(" on", past_kv_cache=model.prefill(prefixes))


def test_text_that_cannot_go_on_is_refused_with_both_tokenisations():
    model = reader_of("byte-level BPE")
    kv = model.prefill("the cat ")
    with pytest.raises(InputError, match=r"(?s)prompt 0: 'sat' does not go on.*together with the text ' sat'"):
        model("sat", past_kv_cache=kv)
    with pytest.raises(InputError, match="'sat' does not go on"):
        model.generate("sat", past_kv_cache=kv, verbose=False)
    with pytest.raises(InputError, match="prepend_bos=True: the text goes on"):
        model(" sat", past_kv_cache=model.prefill("the cat"), prepend_bos=True)


def test_a_cache_that_does_not_know_its_tokens():
    """Text behind it was encoded alone, and penalties did not see what it holds."""
    model = reader_of("Metaspace always", "BOS")
    known = model.prefill(PREFIX)
    kv = HookedKeyValueCache(known.entries, known.previous_attention_mask, fingerprint=known.fingerprint)
    ids = torch.tensor([[7, 9]])
    for call in (model, model.run_with_cache, lambda text, **keywords: model.generate(text, verbose=False, **keywords)):
        with pytest.raises(CacheError, match="the cache does not know which tokens it holds"):
            call(" sat", past_kv_cache=kv)
    torch.testing.assert_close(model(ids, past_kv_cache=kv), model(ids, past_kv_cache=known), **CLOSE)
    options = {"max_new_tokens": 2, "do_sample": False, "verbose": False}
    assert torch.equal(
        model.generate(ids, past_kv_cache=kv, **options), model.generate(ids, past_kv_cache=known, **options)
    )
    for option in (
        {"repetition_penalty": 2.0},
        {"freq_penalty": 1.0},
        {"logits_processor": [NoRepeatNGramLogitsProcessor(2)]},
        {"stopping_criteria": [MaxLengthCriteria(30)]},
    ):
        with pytest.raises(InputError, match=r"look at all tokens of a row, and past_kv_cache does not know those"):
            model.generate(ids, past_kv_cache=kv, **option, **options)
    kv.token_ids = known.token_ids
    torch.testing.assert_close(model(" sat", past_kv_cache=kv), model(" sat", past_kv_cache=known), **CLOSE)


OPTIONS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 8)},
    optional={
        "repetition_penalty": st.sampled_from([3.0, 0.7]),
        "freq_penalty": st.sampled_from([2.0, -1.0]),
        "logits_processor": st.just([NoRepeatNGramLogitsProcessor(2)]),
        "stopping_criteria": st.integers(8, 20).map(lambda n: [MaxLengthCriteria(n)]),
        "stop_strings": st.sampled_from([[" the"], "s", ["\n", "on"], [" "]]),
        "temperature": st.sampled_from([0.5, 2.0]),
        "top_k": st.integers(1, 20),
        "top_p": st.sampled_from([0.5, 0.9]),
        "stop_at_eos": st.booleans(),
    },
)
DRAWS = st.one_of(
    st.just({"do_sample": False}),
    st.fixed_dictionaries(
        {"do_sample": st.just(True), "seed": st.integers(0, 99), "num_return_sequences": st.sampled_from([1, 2])}
    ),
)
EDITS = st.sampled_from(
    [
        (),
        (edits.Scale("blocks.1.hook_resid_pre", 0.3, pos=-1),),
        (edits.Zero("blocks.0.hook_mlp_out", when="decode"), edits.Add("hook_embed", VECTOR, pos=-2)),
    ]
)
KINDS_OF_GENERATION = [
    "byte-level BPE",
    "Metaspace first",
    "Metaspace always",
    "Prepend, byte fallback",
    "unigram first",
]
WORDS = st.lists(st.sampled_from([" the", " cat", "\n", " sat", ":", " no", "s"]), min_size=1, max_size=5)


class Listening:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.put_in, self.ended = [], 0

    def put(self, value):
        self.put_in.append(value)

    def end(self):
        self.ended += 1


def tell_apart(model, prefix, text, kv, options):
    """What a generation gives in every form, for the whole text or (with a cache) for its second part."""
    given_text = prefix + text if kv is None else text
    keywords = {**options, "past_kv_cache": kv}
    listening = Listening()
    out = model.generate(given_text, return_type="output", streamer=listening, verbose=False, **keywords)
    steps = list(model.generate_stream(given_text, **keywords))
    forms = {
        form: model.generate(given_text, return_type=form, verbose=False, **keywords)
        for form in ("input", "str", "tokens")
    }
    streamed = ["".join(step.text[row] for step in steps) for row in range(len(out.tokens))]
    return out, listening.put_in[1:], streamed, forms


def check_generation_on_a_cached_prefix(kind, template, first, second, options, draws, acting):
    """Penalties, processors and criteria saw the suffix alone; returned and streamed text lost its first space."""
    model = reader_of(kind, template)
    prefix, text = "the mat" + "".join(first), "".join(second)
    kv = model.prefill(prefix)
    n_past = len(kv)
    try:
        model(text, past_kv_cache=kv, return_type=None)
    except InputError:
        with pytest.raises(InputError, match="does not go on"):
            model.generate(text, past_kv_cache=kv, verbose=False)
        return
    # Edits of both act behind the prefix.
    options = {**options, **draws, "edits": acting}
    # A template's EOS runs in a call, and is no part of a prompt.
    if acting and model.generate(text, past_kv_cache=kv, max_new_tokens=1, return_type="tokens").shape[1] < 3:
        options["edits"] = ()
    whole, put, streamed, forms = tell_apart(model, prefix, text, None, options)
    part, part_put, part_streamed, part_forms = tell_apart(model, prefix, text, kv, options)
    before = kv.token_rows()[0]
    assert whole.tokens[:, :n_past].tolist() == [before] * len(whole.tokens)
    assert torch.equal(part.tokens, whole.tokens[:, n_past:])
    assert torch.equal(part_forms["tokens"], forms["tokens"][:, n_past:])
    assert part.finish_reasons == whole.finish_reasons
    torch.testing.assert_close(part.logprobs, whole.logprobs, **CLOSE)
    shown = decode_plain(model.tokenizer, before)
    assert [shown + one for one in part.text] == whole.text
    for form in ("input", "str"):
        rows = part_forms[form] if isinstance(part_forms[form], list) else [part_forms[form]]
        assert [shown + one for one in rows] == ([forms[form]] if isinstance(forms[form], str) else forms[form])
    assert part_streamed == streamed
    assert [one.tolist() for one in part_put] == [one.tolist() for one in put]


DRAWN = given(
    kind=st.sampled_from(KINDS_OF_GENERATION), template=st.sampled_from(["none", "BOS", "both"]),
    first=WORDS, second=WORDS, options=OPTIONS, draws=DRAWS, acting=EDITS,
)  # fmt: skip


@settings(max_examples=20)
@DRAWN
def test_generation_on_a_cached_prefix_gives_what_the_whole_text_gives(**drawn):
    check_generation_on_a_cached_prefix(**drawn)


@pytest.mark.slow
@settings(max_examples=100)
@DRAWN
def test_in_more_cases_generation_on_a_cached_prefix_gives_what_the_whole_text_gives(**drawn):
    check_generation_on_a_cached_prefix(**drawn)


def test_ragged_texts_and_ragged_prefixes_are_seen_whole_by_processors():
    model = reader_of("Metaspace first", "BOS")
    texts = [" cat", " cats on the mat"]
    seen = []

    def keep(ids, scores):
        seen.append(sorted(ids.tolist()))
        return scores

    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "verbose": False,
        "logits_processor": [keep],
        "stop_at_eos": False,
    }
    for prefixes in (["the"] * 2, ["the", "no on\n"]):
        shared = model.prefill("the") if prefixes[0] == prefixes[1] else model.prefill(prefixes)
        model.generate(texts, past_kv_cache=shared, repetition_penalty=3.0, **options)
        parts, seen = seen, []
        model.generate([a + b for a, b in zip(prefixes, texts, strict=True)], repetition_penalty=3.0, **options)
        assert parts == seen
        assert len(seen) >= 3
        seen = []
