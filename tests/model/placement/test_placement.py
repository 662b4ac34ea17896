"""Tests of hooklens.model.placement.placement: mappings from parts to devices, and where a network lies."""

import pytest
import torch

from hooklens.errors import InputError
from hooklens.model.placement.placement import find_place, find_placement, list_parts, part_of, read_device_map
from tests.model.networks import ALL_CONFIGS, make_config, make_model
from tests.pretended_devices import FIRST, SECOND, pretending

ROTARY, TIED = ALL_CONFIGS["rotary"], ALL_CONFIGS["learned, tied"]


@pytest.fixture(autouse=True)
def _devices():
    with pretending():
        yield


def test_parts_come_in_the_order_of_a_call():
    assert list_parts(ROTARY) == ["embed", "blocks.0", "blocks.1", "ln_final", "unembed"]
    assert list_parts(TIED) == ["embed", "pos_embed", "blocks.0", "blocks.1", "ln_final", "unembed"]
    assert list_parts(ALL_CONFIGS["attention only"]) == ["embed", "blocks.0", "blocks.1", "unembed"]
    assert part_of("blocks.11.attn.W_Q") == "blocks.11"
    assert part_of("embed.table.weight") == "embed"


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_every_weight_is_in_a_part(network):
    model = make_model(network)
    names = {part_of(name) for name in [*model.state_dict(), *model.named_weights()]}
    assert names <= set(list_parts(model.cfg))


def test_a_mapping_names_each_part_once():
    placement = read_device_map({"embed": "lazy:0", "blocks": SECOND, "ln_final": SECOND, "unembed": "cpu"}, ROTARY)
    assert dict(placement) == {
        "embed": FIRST, "blocks.0": SECOND, "blocks.1": SECOND, "ln_final": SECOND, "unembed": torch.device("cpu"),
    }  # fmt: skip
    assert placement.layers == (SECOND, SECOND)
    assert placement.all == (FIRST, SECOND, torch.device("cpu"))
    assert placement.of_weight("blocks.1.mlp.W_in") == SECOND
    assert set(read_device_map({"": SECOND}, TIED).values()) == {SECOND}


def test_what_holds_no_weights_follows_what_it_reads():
    """A tied unembedding stays with the embedding, a norm without weights with the last block."""
    bare = make_config(norm=ALL_CONFIGS["attention only"].norm, tied_unembed=True)
    placement = read_device_map({"embed": FIRST, "blocks.0": FIRST, "blocks.1": SECOND}, bare)
    assert (placement["ln_final"], placement["unembed"]) == (SECOND, FIRST)


@pytest.mark.parametrize(
    ("given", "cfg", "parts"),
    [
        ({"embed": FIRST, "blocks": FIRST, "unembed": FIRST}, ROTARY, ["no device for 'ln_final'"]),
        ({"": FIRST, "blocks.0": SECOND}, ROTARY, ["several devices for 'blocks.0' (by '', 'blocks.0')"]),
        (
            {"": FIRST, "blocks.7": FIRST, "blcks": FIRST, "blocks.0.attn": FIRST, 3: FIRST},
            ROTARY,
            [
                "the network has no part 'blocks.7'", "the network has no part 'blcks'. Did you mean 'blocks'",
                "'blocks.0.attn' lies inside 'blocks.0', and a part lies on one device whole", "3 is no name",
            ],
        ),
        ({"": FIRST, "pos_embed": FIRST}, ROTARY, ["the network has no 'pos_embed': its positions are no vectors"]),
        (
            {"embed": "Disk", "blocks": "meta", "ln_final": "nowhere", "unembed": True},
            ROTARY,
            ["'Disk'", "'meta', where tensors have no values", "'nowhere'", "is True"],
        ),
        (
            {"embed": FIRST, "pos_embed": FIRST, "blocks": FIRST, "ln_final": FIRST, "unembed": SECOND},
            TIED,
            ["the unembedding is tied to the embedding", "lazy:0", "lazy:1"],
        ),
        ({}, ROTARY, ["device_map is {}, expected a mapping"]),
    ],
)  # fmt: skip
def test_mappings_that_do_not_fit_are_refused_whole(given, cfg, parts):
    with pytest.raises(InputError) as caught:
        read_device_map(given, cfg)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_network_is_found_where_its_parameters_lie():
    model = make_model("rotary")
    assert find_placement(model, ROTARY) is None
    model.blocks[1].to(SECOND)
    found = find_placement(model, ROTARY)
    assert dict(found) == {**dict.fromkeys(list_parts(ROTARY), torch.device("cpu")), "blocks.1": SECOND}
    assert find_placement(model, ROTARY, found) is found
    model.probe = torch.nn.Linear(2, 2, device=FIRST)
    assert find_placement(model, ROTARY, found) is found


def test_weights_say_where_a_network_is_to_lie():
    weights = dict(make_model("learned, tied").named_weights())
    assert find_place(weights, TIED) == torch.device("cpu")
    weights["blocks.1.attn.W_Q"] = weights["blocks.1.attn.W_Q"].to(SECOND)
    # A part that lies on two devices is no part of a placement.
    assert find_place(weights, TIED) == torch.device("cpu")
    moved = {name: one.to(SECOND) if name.startswith("blocks.1.") else one for name, one in weights.items()}
    assert find_place(moved, TIED)["blocks.1"] == SECOND
    apart = {name: one.to(SECOND) if name.startswith("embed.") else one for name, one in moved.items()}
    assert find_place(apart, TIED)["unembed"] == SECOND
