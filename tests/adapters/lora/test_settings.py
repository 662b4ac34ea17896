"""What an adapter_config.json says; what it may not say."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.adapters.lora import LoraSettings, read_settings
from hooklens.errors import UnsupportedModelError

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}


def read(**config: Any) -> LoraSettings:
    return read_settings({**PLAIN, **config}, where="here")


def test_all_that_peft_writes_of_plain_lora_is_known() -> None:
    """A key that a version of PEFT writes beside must not make every adapter of it unreadable."""
    peft = pytest.importorskip("peft")
    written = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=True).to_dict()
    found = read_settings({**written, "peft_type": "LORA", "key_of_tomorrow": None, "another": False}, where="here")
    assert (found.rank, found.alpha, found.rslora, found.dora) == (4, 6, True, False)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "IA3"}, r"here: is a PEFT adapter of type 'IA3'; .* Merge it with peft"),
        ({"peft_type": "PREFIX_TUNING"}, "type 'PREFIX_TUNING'"),
        ({"peft_type": None}, "type None"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: single trained tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: repeated layers"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config"),
        ({"kasa_config": {"beta": 1.0}}, "kasa_config"),
        ({"velora_config": {"a": 1}}, "velora_config"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa': it moved a part of the base's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"key_of_tomorrow": 3}, "key_of_tomorrow=3: unknown"),
        ({"r": 0}, "r=0: expected a positive whole number"),
        ({"r": "four"}, "r='four': expected a number"),
        ({"lora_alpha": True}, "lora_alpha=True: expected a number"),
        ({"rank_pattern": {"q": "2"}}, "rank_pattern=.*: expected numbers by pattern"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern=.*: expected positive whole numbers"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern holds '\(': is no regular expression"),
        ({"target_parameters": "experts"}, "target_parameters='experts': expected a list of names"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3: expected a text"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(config: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModelError, match=text):
        read(**config)


def test_all_that_stands_against_it_is_listed() -> None:
    with pytest.raises(UnsupportedModelError, match=r"use_qalora.*init_lora_weights.*one=1: unknown.*r=-1"):
        read(use_qalora=True, init_lora_weights="corda", one=1, r=-1)


_SEGMENTS = st.sampled_from(["q_proj", "v_proj", "layers.1", "1.q_proj", r"layers\.[01]\..*", "model", ".*v", "q"])
_MODULES = st.builds(
    "model.layers.{}.self_attn.{}".format, st.integers(0, 12), st.sampled_from(["q_proj", "v_proj", "xq_proj"])
)


@settings(max_examples=60)
@given(patterns=st.lists(_SEGMENTS, unique=True), module=_MODULES)
def test_patterns_name_the_modules_that_they_name_for_peft(patterns: list[str], module: str) -> None:
    other = pytest.importorskip("peft.utils.other")
    ranks = {one: place + 5 for place, one in enumerate(patterns)}
    found = read(rank_pattern=ranks, alpha_pattern={one: 10 * rank for one, rank in ranks.items()})
    expected = ranks.get(other.get_pattern_key(ranks.keys(), module), 4)
    assert found.rank_of(module) == expected
    assert found.scale_of(module) == (6 / 4 if expected == 4 else 10)


def test_parameters_are_named_by_their_last_segments() -> None:
    found = read(target_parameters=["experts.down_proj", "model.gate"])
    named = {
        name: found.targets(name) for name in ("a.experts.down_proj", "a.xexperts.down_proj", "model.gate", "gate")
    }
    assert list(named.values()) == [True, False, True, False]
