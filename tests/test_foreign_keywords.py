"""Keywords of other libraries: every answer names what really exists here."""

import inspect
import re

import pytest

import hooklens
from hooklens import (
    HookedCausalLM,
    HookedConfig,
    alignment,
    analysis,
    datasets,
    evaluation,
    patching,
    sae,
    steering,
    training,
    verification,
    viz,
)
from hooklens.analysis import heads
from hooklens.arguments.foreign import ATTRIBUTES, MEANINGS, explain_keyword
from hooklens.hooks import HookedModule
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
    HookedConfig,
]
PUBLIC = (hooklens, alignment, analysis, datasets, evaluation, patching, sae, steering, training, verification, viz)
# What is not called by a user's own code with words of other libraries: functions that are handed to others.
HANDED_ON = {name for name in patching.__all__ if name.endswith("patch_setter")} | {"get_act_name"}


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


def _public_functions():
    for module in PUBLIC:
        for name in getattr(module, "__all__", ()):
            found = getattr(module, name)
            if inspect.isfunction(found) and name not in HANDED_ON:
                yield pytest.param(found, id=f"{module.__name__}.{name}")
    for name in ("to_tokens", "to_string", "to_str_tokens", "to_single_token", "generate_stream", "get_token_position"):
        yield pytest.param(getattr(HookedCausalLM, name), id=name)
    yield pytest.param(HookedConfig, id="HookedConfig")


@pytest.mark.parametrize("function", list(_public_functions()))
def test_every_public_function_explains_words_of_others(function):
    """`attribution(clean_tokens=...)`, `HookedConfig(hidden_size=...)` and sixty others said only "unexpected"."""
    known = inspect.signature(function).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return
    with unchecked(), pytest.raises(TypeError, match=r"'fold_ln'\. Instead: nothing is processed on loading"):
        function(fold_ln=1)
    for word in ("input_ids", "clean_tokens", "hidden_size", "torch_dtype"):
        ours = next((name for name in _keywords_for(word) if name in known), None)
        if ours is not None:
            with unchecked(), pytest.raises(TypeError, match=f"Here it is {ours}="):
                function(**{word: 1})


def _keywords_for(word):
    return next(meaning.keywords for meaning in MEANINGS if word in meaning.words)


def test_attributes_of_others_name_what_exists():
    """`model.transformer.h` said that there is no such attribute, and not what there is."""
    models = [make_model(name) for name in ("capped", "learned, tied", "rotary")]
    parts = [part for model in models for part in model.modules() if isinstance(part, HookedModule)]
    for word, ours in ATTRIBUTES.items():
        told = set()
        for part in parts:
            if hasattr(part, word):
                continue
            with pytest.raises(AttributeError, match=rf"has no attribute '{word}'") as found:
                getattr(part, word)
            names = re.findall(r"\.(\w+)", str(found.value).partition("Here it is")[2])
            assert all(name in dir(part) for name in names)
            told.update(names)
        assert told, word
        assert told <= set(ours)
    model = models[0]
    assert not hasattr(model, "nothing_of_the_kind")


@pytest.mark.parametrize(
    ("find", "text"),
    [
        (lambda model: model.model.layers, r"has no attribute 'model'\. Here it is \.blocks$"),
        (lambda model: model.lm_head, r"Here it is \.unembed$"),
        (lambda model: model.blocks[0].self_attn, r"'Block' object has no attribute 'self_attn'\. Here it is \.attn$"),
        (lambda model: model.blocks[0].attn.c_attn, r"Here it is \.W_Q, \.W_K, \.W_V$"),
        (lambda model: model.trace, r"Here it is \.run_with_cache, \.run_with_hooks$"),
        (lambda model: model.blcoks, r"has no attribute 'blcoks'$"),
    ],
)
def test_attributes(find, text):
    with pytest.raises(AttributeError, match=text):
        find(MODEL)


def test_a_slip_of_the_pen_is_still_told():
    assert explain_keyword("retrun_type", ["return_type"]) == " Did you mean 'return_type'?"
    assert explain_keyword("xyz", ["return_type"]) == ""
