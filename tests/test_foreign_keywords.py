"""Keywords of other libraries: every answer names what really exists here."""

import inspect
import re

import pytest

from hooklens import HookedCausalLM, patching
from hooklens.analysis import heads
from hooklens.arguments.foreign import MEANINGS, explain_keyword
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("bare")
IDS = random_tokens(1, 4)
FUNCTIONS = [
    HookedCausalLM.from_pretrained,
    HookedCausalLM.forward,
    HookedCausalLM.run_with_cache,
    HookedCausalLM.run_with_hooks,
    HookedCausalLM.generate,
    HookedCausalLM.add_hook,
    HookedCausalLM.to_tokens,
    HookedCausalLM.prefill,
    patching.sweep,
    heads.detect_heads,
]


@pytest.mark.parametrize("meaning", MEANINGS, ids=lambda meaning: meaning.words[0])
def test_every_entry_names_what_exists(meaning):
    assert meaning.keywords or meaning.advice
    taken = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
    if meaning.keywords:
        assert taken & set(meaning.keywords), "no function has any of them"
    for word in meaning.words:
        advice = meaning.advice.format(word=word)
        if not advice.startswith("leave it out") and advice:
            assert re.search(r"(model|HookedCausalLM)[.(]|\w+=", advice)
        for method, given in re.findall(r"(?:model|HookedCausalLM)\.(\w+)\((.*?)\)", advice):
            function = getattr(HookedCausalLM, method)
            if method != "to":
                names = inspect.signature(function).parameters
                assert set(re.findall(r"(\w+)=", given)) <= names.keys()
        for given in re.findall(r"model\((.*?)\)", advice):
            assert set(re.findall(r"(\w+)=", given)) <= inspect.signature(HookedCausalLM.forward).parameters.keys()


def test_no_word_has_two_meanings_and_none_is_ours_alone():
    words = [word for meaning in MEANINGS for word in meaning.words]
    assert len(words) == len(set(words))


CALLS = {
    "from_pretrained": lambda **given: HookedCausalLM.from_pretrained("bundled:tiny-llama", **given),
    "forward": lambda **given: MODEL(IDS, **given),
    "run_with_cache": lambda **given: MODEL.run_with_cache(IDS, **given),
    "run_with_hooks": lambda **given: MODEL.run_with_hooks(IDS, **given),
    "generate": lambda **given: MODEL.generate(IDS, **given),
    "prefill": lambda **given: MODEL.prefill(IDS, **given),
    "sweep": lambda **given: patching.sweep(MODEL, IDS, IDS, "z", **given),
}


@pytest.mark.parametrize("name", CALLS)
def test_all_foreign_words_are_type_errors_that_say_what_to_write(name):
    """`from_pretrained(..., fold_ln=True)` said only that the keyword was unexpected."""
    function = patching.sweep if name == "sweep" else getattr(HookedCausalLM, name)
    known = inspect.signature(function).parameters
    for meaning in MEANINGS:
        for word in set(meaning.words) - known.keys():
            with unchecked(), pytest.raises(TypeError, match="unexpected keyword") as found:
                CALLS[name](**{word: 1})
            named = [ours for ours in meaning.keywords if f" Here it is {ours}=" in str(found.value)]
            assert not named or named[0] in known
            if set(meaning.keywords) & known.keys():
                assert named
            elif meaning.advice:
                assert f" Instead: {meaning.advice.format(word=word)}" in str(found.value)


@pytest.mark.parametrize(
    ("name", "word", "text"),
    [
        ("from_pretrained", "torch_dtype", r"'torch_dtype'\. Here it is dtype="),
        ("from_pretrained", "fold_ln", r"nothing is processed on loading: model.process_weights\(fold_ln="),
        ("from_pretrained", "load_in_8bit", "Here it is quantize="),
        ("from_pretrained", "trust_remote_code", "leave it out: code that comes with a checkpoint is never run"),
        ("forward", "past_key_values", "Here it is past_kv_cache="),
        ("forward", "input_ids", "Here it is input="),
        ("run_with_cache", "output_attentions", r"model.run_with_cache\(input, names_filter='pattern'\)"),
        ("run_with_hooks", "hook", "Here it is fwd_hooks="),
        ("generate", "max_length", "Here it is max_new_tokens="),
        ("generate", "use_cache", "Here it is use_past_kv_cache="),
        ("sweep", "patching_metric", "Here it is metric="),
    ],
)
def test_answers(name, word, text):
    with unchecked(), pytest.raises(TypeError, match=text):
        CALLS[name](**{word: 1})


def test_a_slip_of_the_pen_is_still_told():
    assert explain_keyword("retrun_type", ["return_type"]) == " Did you mean 'return_type'?"
    assert explain_keyword("xyz", ["return_type"]) == ""
