import pytest
import torch

from hooklens.patching.errors import SiteError
from hooklens.patching.graph.nodes import (
    Graph,
    Reader,
    Writer,
    inputs_of,
    list_edges,
    list_readers,
    list_writers,
    reaches,
    reader_place,
    split_writer,
    writer_place,
)
from tests.model.networks import CONFIGS


@pytest.mark.parametrize("network", ["grouped", "rotary", "shared norm"])
def test_the_graph_holds_the_edges_of_the_wiring(network):
    cfg = CONFIGS[network]
    graph = Graph.of(cfg)
    expected = [[reaches(writer, reader, cfg) for writer in list_writers(cfg)] for reader in list_readers(cfg)]
    assert torch.equal(graph.exists(), torch.tensor(expected))
    assert graph.n_inputs == tuple(map(sum, expected))
    assert list_edges(cfg) == [
        (str(writer), str(reader))
        for reader in graph.readers
        for writer in graph.writers
        if reaches(writer, reader, cfg)
    ]


@pytest.mark.parametrize("network", ["grouped", "rotary"])
def test_names_stand_in_the_order_of_the_network(network):
    writers, readers = list_writers(CONFIGS[network]), list_readers(CONFIGS[network])
    assert [split_writer(str(writer)) for writer in writers] == writers
    assert sorted(map(str, reversed(writers)), key=writer_place) == list(map(str, writers))
    assert sorted(map(str, reversed(readers)), key=reader_place) == list(map(str, readers))


def test_inputs_of_writers():
    assert inputs_of(Writer("embed"), group_size=2) == []
    assert inputs_of(Writer("mlp", 3), group_size=2) == [Reader("mlp", 3)]
    assert list(map(str, inputs_of(Writer("head", 1, 3), group_size=2))) == ["a1.h3.q", "a1.h1.k", "a1.h1.v"]


@pytest.mark.parametrize("name", ["", "a1", "a1.h2.q", "m", "m01", "logits", "embed "])
def test_no_writer(name):
    with pytest.raises(SiteError, match="is no writer's name; these are 'embed', heads"):
        split_writer(name)


@pytest.mark.parametrize("name", ["", "a1.h2", "a1.h2.z", "embed", "a1.h02.q"])
def test_no_reader(name):
    with pytest.raises(SiteError, match=r"is no reader's name; these are 'a0\.h1\.q'"):
        reader_place(name)
