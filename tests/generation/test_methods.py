"""The methods' keywords are written out three times over, for readers and editors; they must say the same."""

import inspect
from dataclasses import fields

import pytest
import torch

from hooklens.generation import methods
from hooklens.generation.methods import TextGeneration
from hooklens.generation.options import GenerationOptions
from tests.generation.networks import pair

# A value for each keyword that is not its default.
OTHER_VALUES = {
    "max_new_tokens": 3,
    "stop_at_eos": False,
    "eos_token_id": [7, 9],
    "do_sample": False,
    "temperature": 0.7,
    "top_k": 4,
    "top_p": 0.9,
    "min_p": 0.1,
    "freq_penalty": 0.5,
    "repetition_penalty": 1.5,
    "stop_strings": ["end"],
    "num_return_sequences": 2,
    "use_past_kv_cache": False,
    "past_kv_cache": "a cache",
    "prepend_bos": True,
    "seed": 5,
    "logits_processor": [lambda ids, scores: scores],
    "stopping_criteria": [lambda ids, scores: False],
    "edits": ["an edit"],
    "names_filter": "*",
}
# What `generate` does with the tokens, which decides none of them, and what a stream has no use for.
OF_THE_RESULT = {"generate": {"streamer", "return_type", "verbose"}, "generate_stream": set()}
LEFT_OUT = {"generate": set(), "generate_stream": {"names_filter"}}


@pytest.mark.parametrize("name", ["generate", "generate_stream"])
def test_keywords_defaults_and_types_are_those_of_the_options(name: str) -> None:
    parameters = inspect.signature(getattr(TextGeneration, name)).parameters
    keywords = {key: value for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}
    options = inspect.signature(GenerationOptions).parameters
    assert keywords.keys() == (options.keys() - LEFT_OUT[name]) | OF_THE_RESULT[name]
    for key in keywords.keys() - OF_THE_RESULT[name]:
        assert (keywords[key].default, keywords[key].annotation) == (options[key].default, options[key].annotation), key


@pytest.mark.parametrize("name", ["generate", "generate_stream"])
def test_every_keyword_arrives_under_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`GenerationOptions` is replaced, since values that differ from the defaults exclude each other."""
    assert OTHER_VALUES.keys() == {field.name for field in fields(GenerationOptions)}
    received: list[dict[str, object]] = []
    monkeypatch.setattr(methods, "GenerationOptions", lambda **keywords: received.append(keywords))
    monkeypatch.setattr(methods, name, lambda model, input, options, **keywords: None)
    given = {key: value for key, value in OTHER_VALUES.items() if key not in LEFT_OUT[name]}
    # Past the check of annotations, which stand-ins do not pass.
    inspect.unwrap(getattr(TextGeneration, name))(pair()[0], torch.tensor([[5]]), **given)
    assert received == [given]
