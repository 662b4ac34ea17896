import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hooklens.adapters import families, read_hf_model, to_hub
from hooklens.adapters.choice import choose_family, find_family
from hooklens.adapters.families import load_families
from hooklens.adapters.tables import mlp_rules
from hooklens.config import HookedConfig
from hooklens.errors import UnsupportedModelError
from hooklens.weights.shapes import weight_shapes
from tests.checkpoints import VARIANTS, build_variant

FAMILIES = load_families()


def test_families_are_found_without_a_registry() -> None:
    files = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert {family.name for family in FAMILIES} == files
    assert len(FAMILIES) == len(files)
    assert FAMILIES[0].name == "llama"


def test_no_name_of_an_architecture_is_claimed_twice() -> None:
    for attribute in ("model_types", "architectures", "dialects"):
        claimed = [name for family in FAMILIES for name in getattr(family, attribute)]
        assert len(claimed) == len(set(claimed)), attribute


@pytest.mark.parametrize("name", VARIANTS)
def test_config_survives_the_round_trip_with_and_without_its_origin(name) -> None:
    cfg, _ = read_hf_model(build_variant(name))
    family = find_family(json.loads(cfg.origin.hub_config), FAMILIES, where="here")
    assert family.read_config(family.write_config(cfg), where="here") == cfg
    bare = cfg.replace(origin=None)
    other = choose_family(bare, FAMILIES)
    assert other.read_config(other.write_config(bare), where="here") == cfg
    assert HookedConfig.from_json(cfg.to_json()).origin == cfg.origin


def test_saving_keeps_the_original_keys_and_updates_what_changed() -> None:
    cfg, _ = read_hf_model(build_variant("neox-parallel"))
    (family,) = [family for family in FAMILIES if family.name == "gpt_neox"]
    config = json.loads(cfg.origin.hub_config)
    del config["rope_parameters"]
    config |= {
        "architectures": ["GPTNeoXForCausalLM"],
        "rotary_pct": 0.5,
        "rotary_emb_base": 10000,
        "hidden_dropout": 0.1,
        "eos_token_id": 7,
    }
    cfg = family.read_config(config, where="here")
    assert family.write_config(cfg) == config
    assert family.write_config(cfg.replace(n_layers=1)) == {**config, "num_hidden_layers": 1}

    longer = family.write_config(cfg.replace(n_ctx=128))
    assert longer["max_position_embeddings"] == 128
    assert longer["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert "rotary_pct" not in longer


def test_a_change_the_origin_cannot_express_says_which_field() -> None:
    cfg, state = read_hf_model(build_variant("llama-gqa"))
    with pytest.raises(
        UnsupportedModelError, match=r"llama checkpoint cannot express wiring='parallel', embed_scale=2.0"
    ):
        to_hub(cfg.replace(wiring="parallel", embed_scale=2.0), state)


def test_impossible_sizes_are_an_error_of_the_checkpoint() -> None:
    config = json.loads(read_hf_model(build_variant("llama-gqa"))[0].origin.hub_config)
    (family,) = [family for family in FAMILIES if family.name == "llama"]
    with pytest.raises(
        UnsupportedModelError, match=r"here: .* cannot be: .*n_heads=4 is not a multiple of n_kv_heads=3"
    ):
        family.read_config({**config, "num_key_value_heads": 3}, where="here")
    with pytest.raises(UnsupportedModelError, match="n_heads=0"):
        family.read_config({**config, "num_attention_heads": 0, "head_dim": None}, where="here")


@pytest.mark.parametrize("conv1d", [True, False])
def test_families_whose_linear_maps_lie_as_in_out(conv1d) -> None:
    """What a quantised checkpoint stores as `[out, in]` is turned for them."""
    (family,) = (one for one in load_families() if one.name == "gpt_neox")
    hub = "gpt_neox.layers.{i}.mlp"
    rules = mlp_rules(hub, up="dense_h_to_4h", down="dense_4h_to_h", conv1d=conv1d)
    others = tuple(rule for rule in family.weights if not rule.hub.startswith(hub))
    assert dataclasses.replace(family, weights=(*others, *rules)).is_conv1d is conv1d
    assert not family.is_conv1d


def test_rules_name_every_parameter_once() -> None:
    for name in VARIANTS:
        cfg, _ = read_hf_model(build_variant(name))
        (family,) = [family for family in FAMILIES if family.name == cfg.origin.family]
        named = [ours for bound in family.bind_rules(cfg) for ours in bound.ours]
        expected = [ours for ours in weight_shapes(cfg) if not (cfg.tied_unembed and ours == "unembed.W_U")]
        assert sorted(named) == sorted(expected)
        assert torch.tensor([bound.layer for bound in family.bind_rules(cfg)]).max() == cfg.n_layers - 1
