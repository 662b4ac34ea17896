"""Bad values are refused together, in words."""

import pytest
import torch

from hooklens.errors import InputError
from hooklens.generation.options import GenerationOptions
from tests.annotations import unchecked
from tests.generation.networks import pair


def test_defaults_are_those_of_the_public_surface():
    options = GenerationOptions()
    assert (options.max_new_tokens, options.do_sample, options.temperature, options.freq_penalty) == (10, True, 1.0, 0)
    assert options.stop_at_eos
    assert options.use_past_kv_cache


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1.0, expected a number >= 0 \(0 takes the most likely token\)"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected a probability in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": 0}, "top_k is 0, expected a whole number >= 1"),
        ({"min_p": -0.1}, r"min_p is -0.1, expected a fraction in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"freq_penalty": float("inf")}, "freq_penalty is inf"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"stop_strings": ""}, "stop_strings is '', expected strings that are not empty"),
        ({"stop_strings": ["a", ""]}, "stop_strings is"),
        ({"do_sample": False, "num_return_sequences": 2}, "would give the same row again"),
        (
            {"temperature": 0, "num_return_sequences": 2},
            "num_return_sequences=2 with temperature=0 would give the same",
        ),
        ({"stop_at_eos": False, "eos_token_id": 3}, "eos_token_id=3 is given and stop_at_eos=False"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(keywords, message):
    with pytest.raises(InputError, match=message):
        GenerationOptions(**keywords)


def test_values_of_other_types_are_refused():
    bad = {
        "temperature": "hot",
        "top_k": 2.5,
        "seed": 1.5,
        "logits_processor": [3],
        "stopping_criteria": print,
        "edits": ["hook_embed"],
        "max_new_tokens": True,
    }
    for name, value in bad.items():
        with unchecked(), pytest.raises(InputError, match=name):
            GenerationOptions(**{name: value})


def test_all_problems_are_named_at_once():
    with pytest.raises(InputError, match=r"temperature is -1.*top_k is 0.*top_p is 2"):
        GenerationOptions(top_k=0, temperature=-1, top_p=2)


def test_edges_of_the_ranges_are_accepted():
    GenerationOptions(top_p=1.0, min_p=0.0, temperature=0, top_k=1, max_new_tokens=1, stop_strings=["a"])


def test_caches_that_exclude_other_values_are_refused():
    model, _ = pair()
    kv = model.prefill(torch.tensor([[5]]))
    with pytest.raises(InputError, match="past_kv_cache is given and use_past_kv_cache=False"):
        GenerationOptions(past_kv_cache=kv, use_past_kv_cache=False)
    GenerationOptions(past_kv_cache=kv, num_return_sequences=2)
    with pytest.raises(InputError, match=r"num_return_sequences=2 cannot be appended.*freeze it"):
        GenerationOptions(past_kv_cache=kv.clone().unfreeze(), num_return_sequences=2)
