import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import CheckpointError
from hooklens.patching import Circuit, SiteError
from hooklens.patching.graph.nodes import Graph, list_edges
from tests.annotations import unchecked
from tests.model.networks import CONFIGS

SEQUENTIAL, PARALLEL = CONFIGS["grouped"], CONFIGS["rotary"]
EDGES = list_edges(SEQUENTIAL)
some_edges = st.lists(st.sampled_from(EDGES), max_size=30)


@settings(max_examples=40)
@given(first=some_edges, second=some_edges)
def test_circuits_are_sets_in_the_order_of_the_network(first, second):
    one, other = Circuit(first), Circuit(second)
    assert list(one) == [edge for edge in EDGES if edge in set(first)]
    assert len(one) == len(set(first))
    assert set(one | other) == set(first) | set(second)
    assert set(one & other) == set(first) & set(second)
    assert set(one - other) == set(first) - set(second)
    assert (one <= other) == (set(first) <= set(second))
    assert (one == Circuit(second)) == (set(first) == set(second))
    assert hash(one) == hash(Circuit(reversed(first)))
    assert one.with_edges(second) == one | other
    assert (one | other).without_edges(second) == one - other
    assert one.complement(SEQUENTIAL) == Circuit.full(SEQUENTIAL) - one
    assert not one.complement(SEQUENTIAL) & one


@settings(max_examples=40)
@given(edges=some_edges)
def test_masks_hold_the_edges(edges):
    circuit, graph = Circuit(edges), Graph.of(SEQUENTIAL)
    mask = circuit.to_mask(SEQUENTIAL)
    found = [(str(graph.writers[writer]), str(graph.readers[reader])) for reader, writer in mask.nonzero().tolist()]
    assert found == list(circuit)
    assert torch.equal(Circuit.full(SEQUENTIAL).to_mask(SEQUENTIAL), graph.exists())


def paths_from_embed(circuit):
    """All edges on some path embed -> logits, by walking every path (grouped network: two heads per kv head)."""
    used = set()

    def owners(reader):
        if "." not in reader:
            return [reader]
        layer, head, kind = reader.split(".")
        if kind == "q":
            return [f"{layer}.{head}"]
        return [f"{layer}.h{query}" for query in range(4) if query // 2 == int(head[1:])]

    def walk(writer, path):
        for edge in circuit:
            if edge[0] != writer:
                continue
            if edge[1] == "logits":
                used.update([*path, edge])
            else:
                for node in owners(edge[1]):
                    walk(node, [*path, edge])

    walk("embed", [])
    return used


@settings(max_examples=40)
@given(edges=some_edges)
def test_pruned_circuits_hold_the_edges_on_paths(edges):
    circuit = Circuit(edges)
    pruned = circuit.pruned(SEQUENTIAL)
    assert set(pruned) == paths_from_embed(circuit)
    assert pruned.pruned(SEQUENTIAL) == pruned


def test_a_key_value_head_feeds_its_group():
    path = [("embed", "a0.h1.v"), ("a0.h3", "logits")]
    assert Circuit([*path, ("a0.h1", "logits"), ("embed", "m0")]).pruned(SEQUENTIAL) == Circuit(path)
    assert Circuit.full(SEQUENTIAL).pruned(SEQUENTIAL) == Circuit.full(SEQUENTIAL)


def test_nodes_and_printing():
    circuit = Circuit([("a1.h0", "logits"), ("m0", "a1.h0.k"), ("embed", "m0"), ("embed", "a0.h0.q")])
    assert circuit.nodes() == ("embed", "m0", "a1.h0", "logits")
    assert circuit.heads() == ("a1.h0",)
    assert ("m0", "a1.h0.k") in circuit
    assert ("m0", "a1.h0.q") not in circuit
    assert repr(circuit) == ("Circuit(4 edges: a1.h0 -> logits, m0 -> a1.h0.k, embed -> m0, embed -> a0.h0.q)")
    assert repr(Circuit()) == "Circuit(0 edges)"
    assert repr(Circuit.full(SEQUENTIAL)).endswith(f"a1.h0 -> logits, and {len(EDGES) - 5} more)")
    assert circuit.to_dataframe().to_numpy().tolist() == [list(edge) for edge in circuit]
    # Layers count as numbers.
    assert Circuit([("a10.h0", "logits"), ("a9.h0", "logits")]).nodes() == ("a9.h0", "a10.h0", "logits")


def test_save_and_load(tmp_path):
    path = tmp_path / "circuit.json"
    circuit = Circuit(EDGES[::7])
    circuit.save(path)
    assert Circuit.load(path) == circuit
    with pytest.raises(CheckpointError, match=r"cannot read a circuit from .*missing\.json"):
        Circuit.load(tmp_path / "missing.json")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="cannot read a circuit"):
        Circuit.load(path)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="is not a saved circuit"):
        Circuit.load(path)
    path.write_text(json.dumps({"format": "hooklens.patching.circuit-1", "edges": [["embed", "nowhere"]]}))
    with pytest.raises(CheckpointError, match=r"is damaged: .*'nowhere'"):
        Circuit.load(path)


def test_what_is_no_edge():
    with unchecked(), pytest.raises(SiteError) as caught:
        Circuit([("embed", "logits"), ("logits", "m0"), ("embed", "a0.h1"), "m0", ("a00.h1", "m0"), ("m0", "m1", "m2")])
    message = str(caught.value)
    assert "('embed', 'logits')" not in message
    for wrong in ("('logits', 'm0')", "('embed', 'a0.h1')", "'m0'", "('a00.h1', 'm0')", "('m0', 'm1', 'm2')"):
        assert wrong in message
    assert "Writers are 'embed', heads 'a0.h1' and MLPs 'm0', readers 'a0.h1.q'" in message


def test_edges_that_a_network_has_not():
    circuit = Circuit([("a0.h1", "m0"), ("a0.h9", "logits"), ("embed", "a1.h2.k"), ("m1", "m0"), ("m0", "m1")])
    with pytest.raises(SiteError) as caught:
        circuit.check(SEQUENTIAL)
    message = str(caught.value)
    assert "no nodes 'a0.h9', 'a1.h2.k' (it has layers 0 to 1, heads 0 to 3, key-value heads 0 to 1" in message
    assert "no edges m1 -> m0 (in sequential blocks" in message
    with pytest.raises(SiteError, match=r"no edges a0\.h1 -> m0 .in parallel blocks the reader does not read this"):
        Circuit([("a0.h1", "m0")]).to_mask(PARALLEL)
    with pytest.raises(SiteError, match="the circuit of 1 edges does not hold embed -> m0, m0 -> logits"):
        Circuit([("embed", "logits")]).without_edges([("embed", "m0"), ("m0", "logits")])


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """A circuit was written over the old file, so a full disk or a kill left half of one."""
    path = tmp_path / "circuit.json"
    Circuit([("embed", "logits")]).save(path)
    before = path.read_bytes()

    def fail(self, *arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(type(path), "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        Circuit([("m0", "logits")]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
