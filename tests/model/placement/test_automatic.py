"""Tests of hooklens.model.placement.automatic: what accelerate computes, as a placement of whole parts."""

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import InputError, MissingDependencyError
from hooklens.model.placement.automatic import read_memory, spread_network, spread_parts
from hooklens.model.placement.placement import list_parts, part_of
from tests.model.networks import ALL_CONFIGS

CFG = ALL_CONFIGS["grouped"].replace(n_layers=6)
TIED = ALL_CONFIGS["learned, tied"].replace(n_layers=6)


def meta(cfg, dtype=torch.float32):
    with torch.device("meta"):
        return HookedCausalLM(cfg).to(dtype)


def sizes(cfg):
    """Bytes of each part."""
    held = dict.fromkeys(list_parts(cfg), 0)
    for name, parameter in meta(cfg).named_parameters():
        held[part_of(name)] += parameter.nbytes
    return held


def filled(cfg, places):
    used = {}
    for part, size in sizes(cfg).items():
        used[places[part]] = used.get(places[part], 0) + size
    return used


@pytest.mark.parametrize("kind", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize("cfg", [CFG, TIED], ids=["untied", "tied"])
def test_parts_are_spread_whole_and_in_order(kind, cfg):
    total, block = sum(sizes(cfg).values()), sizes(cfg)["blocks.0"]
    memory = dict.fromkeys(range(3), total // 2 + 2 * block)
    places = spread_parts(meta(cfg), cfg, kind, memory)
    assert list(places) == list_parts(cfg)
    along = [places[part] for part in places if part != "unembed"]
    assert along == sorted(along)
    assert all(used <= memory[number] for number, used in filled(cfg, places).items())
    if cfg.tied_unembed:
        assert places["unembed"] == places["embed"]
    if kind == "sequential":
        assert 2 not in places.values()
    elif kind == "balanced_low_0":
        assert filled(cfg, places).get(0, 0) < min(filled(cfg, places)[1], filled(cfg, places)[2])
    else:
        shares = filled(cfg, places).values()
        assert len(shares) == 3
        assert max(shares) < total / 3 + 2 * block


def test_what_finds_no_room_on_accelerators_computes_on_the_cpu():
    total = sum(sizes(CFG).values())
    places = spread_parts(meta(CFG), CFG, "auto", {0: total // 2, "cpu": 10 * total})
    assert places["embed"] == 0
    assert places["unembed"] == "cpu"


def test_half_the_bytes_find_room_where_all_do_not():
    """Sizes are those of the dtype that the weights are to have."""
    total, block = sum(sizes(CFG).values()), sizes(CFG)["blocks.0"]
    memory = {0: total // 4 + block, 1: total // 4 + block}
    with pytest.raises(InputError):
        spread_parts(meta(CFG), CFG, "sequential", dict(memory))
    spread_parts(meta(CFG, torch.bfloat16), CFG, "sequential", dict(memory))


def test_too_little_memory_is_refused_with_what_is_missing():
    with pytest.raises(InputError) as caught:
        spread_parts(meta(CFG), CFG, "auto", {0: sizes(CFG)["blocks.0"] * 4, 1: 2**20 // 1000})
    text = str(caught.value)
    assert "no room for 'blocks." in text
    assert "'unembed' of 6 blocks" in text
    assert "max_memory=" in text
    assert "MiB" in text


def test_without_an_accelerator_all_lies_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    placement = spread_network(meta(CFG), CFG, "auto", None)
    assert set(placement.values()) == {torch.device("cpu")}


def test_memory_is_read_by_device():
    given = {0: 100, "cuda:1": "1KB", torch.device("cuda", 2): 2**40, "cpu": "2GiB"}
    assert read_memory(given) == {0: 100, 1: 1000, 2: 2**40, "cpu": 2**31}


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, ["max_memory is {}"]),
        (
            {"disk": 1, "here": 2, -1: 3, 0: "much", 1: 1.5, 2: -1},
            ["'disk'", "'here'", "is -1", "'much', expected bytes", "max_memory[1] is 1.5", "max_memory[2] is -1"],
        ),
    ],
)
def test_other_memory_is_refused_whole(given, parts):
    with pytest.raises(InputError) as caught:
        read_memory(given)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are CUDA devices")
def test_memory_of_devices_that_there_are_not_is_refused():
    with pytest.raises(InputError, match=r"max_memory: 5"):
        spread_network(meta(CFG), CFG, "auto", {5: 10**9})


def test_without_accelerate_the_extra_is_named(monkeypatch):
    def find_nothing(wanted):
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    monkeypatch.setattr("importlib.import_module", find_nothing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hooklens\[placement\]'"):
        spread_parts(meta(CFG), CFG, "auto", {0: 10**6})
