import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest

from hooklens.adapters import read_hf_model, to_hub
from hooklens.adapters.choice import choose_family, find_family, find_nearest
from hooklens.adapters.families import load_families
from hooklens.adapters.keys import ConfigMap
from hooklens.config import HookedConfig, NormConfig, RotaryPositions
from hooklens.errors import UnsupportedModelError
from tests.checkpoints import build_variant

FAMILIES = load_families()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' with .* 'mamba'"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({}, "architecture not given with model_type None"),
    ],
)
def test_unsupported_architectures_are_named_with_the_supported_ones(config, named) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        find_family(config, FAMILIES, where="here")
    assert all(name in str(caught.value) for name in ("falcon", "gpt_neox", "llama", "#adding-a-family"))


def test_another_head_on_a_supported_model_says_which_heads_are_read() -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    with pytest.raises(UnsupportedModelError, match="models of llama that are: 'LlamaForCausalLM'"):
        find_family(config, FAMILIES, where="here")


@pytest.mark.parametrize(
    "config", [{"model_type": "llama"}, {"architectures": ["LlamaForCausalLM"]}, {"model_type": "RefinedWeb"}]
)
def test_either_name_is_enough(config) -> None:
    assert find_family(config, FAMILIES, where="here").name in ("llama", "falcon")


class TestNearest:
    """A new architecture is mostly an old one with a new name."""

    @pytest.mark.parametrize(("variant", "family"), [("llama-gqa", "llama"), ("neox-parallel", "gpt_neox")])
    def test_a_renamed_model_comes_closest_to_what_it_is(self, variant, family) -> None:
        config = json.loads(read_hf_model(build_variant(variant))[0].origin.hub_config)
        nearest = find_nearest({**config, "model_type": "newest"}, FAMILIES)
        assert nearest.family.name == family
        assert nearest.differences == ()

    def test_the_error_says_what_differs(self) -> None:
        config = json.loads(read_hf_model(build_variant("llama-gqa"))[0].origin.hub_config)
        config |= {"model_type": "newest", "architectures": ["NewestForCausalLM"], "hidden_act": "snake", "n_loops": 3}
        with pytest.raises(UnsupportedModelError) as caught:
            find_family(config, FAMILIES, where="here")
        text = str(caught.value)
        assert (
            "'NewestForCausalLM' with model_type 'newest' is not supported. By its config llama comes closest" in text
        )
        assert "hidden_act is 'snake'; expected one of" in text
        assert "n_loops is a key that it does not know" in text

    def test_a_config_that_shares_next_to_nothing_is_compared_with_nobody(self) -> None:
        with pytest.raises(UnsupportedModelError) as caught:
            find_family({"model_type": "mamba", "state_size": 16, "vocab_size": 7}, FAMILIES, where="here")
        assert "closest" not in str(caught.value)

    @pytest.mark.parametrize("family", [family.name for family in FAMILIES])
    def test_every_family_can_be_held_against_any_config(self, family) -> None:
        """What is read of a foreign config is nonsense, and has to stay an answer all the same."""
        (held,) = [one for one in FAMILIES if one.name == family]
        own = [
            json.loads(read_hf_model(build_variant(name))[0].origin.hub_config) for name in ("llama-yarn", "falcon-rw")
        ]
        odd = [dict.fromkeys(config, value) for config in own for value in (None, 0, -1, "x", [], {}, True, 1e9, 2**31)]
        for config in [{}, *own, *odd]:
            known, problems, unknown = held.config.survey(config)
            assert set(known) <= set(config)
            assert all(isinstance(told, str) for told in (*problems, *unknown))


CFG = HookedConfig(
    d_model=8,
    n_layers=1,
    n_heads=2,
    d_vocab=7,
    n_ctx=16,
    positions=RotaryPositions(dim=4),
    norm=NormConfig(kind="rms", eps=1e-6, bias=False),
    gated_mlp=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    attn_softcap=50.0,
    clip_qkv=3.0,
)


def test_a_config_no_family_can_express_says_which_field() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Fields that differ, in the families that come closest: \w+: "):
        to_hub(CFG, {})
    assert choose_family(CFG.replace(attn_softcap=None, clip_qkv=None), FAMILIES).name == "llama"


def test_a_family_that_refuses_a_network_is_not_the_one_that_comes_closest() -> None:
    """A refusal counted as one difference, so that it stood before families with two."""
    refusing = dataclasses.replace(FAMILIES[0], name="refusing", config=_Refusing(parts=()))
    cfg = HookedConfig(
        d_model=8, n_layers=1, n_heads=2, d_vocab=7, n_ctx=16, positions=RotaryPositions(dim=4), attn_softcap=50.0
    )
    with pytest.raises(UnsupportedModelError, match=r"no family can express attn_softcap=50\.0") as caught:
        choose_family(cfg, [refusing, *(family for family in FAMILIES if family.name in ("llama", "gpt_neox"))])
    assert str(caught.value).index("llama:") < str(caught.value).index("refusing: ")


class _Refusing(ConfigMap):
    """Reads no config."""

    def read(self, config: Mapping[str, Any], *, where: str, warn: bool = True) -> dict[str, Any]:
        raise UnsupportedModelError("this cannot be")
