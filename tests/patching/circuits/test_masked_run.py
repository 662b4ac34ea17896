import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.patching import Circuit, FunctionMetric, LogProb
from hooklens.patching.circuits.ground import prepare_ground
from hooklens.patching.circuits.masked_run import MaskedRun
from hooklens.patching.circuits.reach import Wiring
from hooklens.patching.graph.nodes import Graph, list_edges
from hooklens.patching.pairs.prompts import read_pairs
from hooklens.patching.runs.edits import NO_EDITS
from tests.model.networks import Allocations, make_config, make_model, pad_rows, random_tokens
from tests.patching.masked_reference import MaskedReference

NETWORKS = ["grouped", "rotary", "shared norm", "alibi, grouped", "learned, tied", "bare"]
NETWORKS += ["attention only", "heads and MLPs apart"]
MODELS = {network: make_model(network) for network in NETWORKS}
# All logits: whatever differs shows.
EVERYWHERE = LogProb(4, pos=[0, 2, 3, -1])


def pair_of_batches(model, *, n=2, length=6, shared=2):
    clean, corrupted = random_tokens(n, length, seed=1), random_tokens(n, length, seed=2)
    corrupted[:, :shared] = clean[:, :shared]
    return clean, corrupted


def run(model, clean, corrupted, circuits, *, ablation="resample", metric=EVERYWHERE, mask=None, edits=NO_EDITS):
    """Logits at the positions that the metric reads, `[circuit pair read d_vocab]`."""
    prompts = read_pairs(model, clean, corrupted, mask)
    with torch.no_grad():
        ground = prepare_ground(model, prompts, list(range(len(prompts))), metric, ablation, edits)
        masks = torch.stack([circuit.to_mask(model.cfg) for circuit in circuits])
        return MaskedRun(model, Wiring.of(model.cfg), ground, masks).logits()


def at_reads(logits):
    return logits[:, EVERYWHERE.positions]


@pytest.mark.parametrize("network", NETWORKS)
def test_full_circuit_is_the_clean_run_and_empty_the_corrupted_one(network):
    model = MODELS[network]
    clean, corrupted = pair_of_batches(model)
    full, empty = run(model, clean, corrupted, [Circuit.full(model.cfg), Circuit()])
    torch.testing.assert_close(full, at_reads(model(clean)), rtol=0, atol=1e-10)
    torch.testing.assert_close(empty, at_reads(model(corrupted)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=5)
@given(data=st.data())
def test_random_circuits_equal_the_reference(network, data):
    model = MODELS[network]
    ablation = data.draw(st.sampled_from(["resample", "mean", "zero"]))
    shared = data.draw(st.integers(0, 5))
    clean, corrupted = pair_of_batches(model, shared=shared)
    edges = list_edges(model.cfg)
    circuits = []
    for _ in range(2):
        # From a layer on, so that batches enter late, too.
        complete_below = data.draw(st.integers(0, len(edges)))
        density = data.draw(st.sampled_from([0.2, 0.6, 0.95]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
        chosen = torch.rand(len(edges), generator=generator) < density
        circuits.append(Circuit(edge for i, edge in enumerate(edges) if i < complete_below or chosen[i]))
    given_ablation = ablation
    if ablation == "mean":
        _, other = model.run_with_cache(corrupted, names_filter="*")
        given_ablation = {
            name: other[name].mean(0) for name in other if name.endswith(("hook_result", "hook_mlp_out", "resid_pre"))
        }
    found = run(model, clean, corrupted, circuits, ablation=given_ablation)
    reference = MaskedReference(model, clean, corrupted, ablation)
    for circuit, logits in zip(circuits, found, strict=True):
        # Sums of some twenty terms in another order, in float64.
        torch.testing.assert_close(logits, at_reads(reference.logits(circuit)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("edge", [("embed", "a0.h1.q"), ("a0.h1", "a1.h0.v"), ("m0", "m1"), ("a1.h2", "logits")])
@pytest.mark.parametrize("network", ["grouped", "rotary", "alibi, grouped"])
@torch.no_grad()
def test_one_edge_less_equals_one_input_moved(network, edge):
    model = MODELS[network]
    clean, corrupted = pair_of_batches(model)
    reader = next(reader for reader in Graph.of(model.cfg).readers if str(reader) == edge[1])
    writer = next(writer for writer in Graph.of(model.cfg).writers if str(writer) == edge[0])
    outputs = []
    for tokens in (clean, corrupted):
        _, cache = model.run_with_cache(tokens, names_filter=writer.hook_name)
        output = cache[writer.hook_name]
        outputs.append(output[:, :, writer.head] if output.ndim == 4 else output)

    def move(tensor, hook):
        moved = tensor.clone()
        part = moved[:, :, reader.head] if tensor.ndim == 4 else moved
        part += outputs[1] - outputs[0]
        return moved

    expected = model.run_with_hooks(clean, fwd_hooks=[(reader.hook_name, move)])
    (found,) = run(model, clean, corrupted, [Circuit.full(model.cfg).without_edges([edge])])
    torch.testing.assert_close(found, at_reads(expected), rtol=0, atol=1e-10)
    assert float((found - at_reads(model(clean))).abs().max()) > 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_pairs_equal_pairs_alone(side):
    for network in ("grouped", "rotary", "alibi", "learned, tied"):
        model = make_model(network)
        lengths, shared = (7, 4, 5), (3, 1, 2)
        clean = [row[:n] for row, n in zip(random_tokens(3, 7, seed=1), lengths, strict=True)]
        corrupted = [row[:n].clone() for row, n in zip(random_tokens(3, 7, seed=2), lengths, strict=True)]
        for one, other, n in zip(clean, corrupted, shared, strict=True):
            other[:n] = one[:n]
        circuit = Circuit(list_edges(model.cfg)[::2])
        (ids, mask), (others, _) = pad_rows(clean, side), pad_rows(corrupted, side)
        metric = LogProb(4, pos=[0, -1])
        (together,) = run(model, ids, others, [circuit], metric=metric, mask=mask)
        for pair in range(3):
            (alone,) = run(model, clean[pair][None], corrupted[pair][None], [circuit], metric=metric)
            torch.testing.assert_close(together[pair], alone[0], rtol=0, atol=1e-10)


def test_every_position_can_be_read():
    model = MODELS["grouped"]
    clean, corrupted = pair_of_batches(model)
    circuit = Circuit(list_edges(model.cfg)[::3])
    metric = FunctionMetric(lambda logits: logits.sum((1, 2)))
    (found,) = run(model, clean, corrupted, [circuit], metric=metric)
    expected = MaskedReference(model, clean, corrupted).logits(circuit)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_batches_equal_circuits_alone_and_enter_where_the_lowest_edge_is_missing():
    model = MODELS["grouped"]
    clean, corrupted = pair_of_batches(model)
    full = Circuit.full(model.cfg)
    late = [full.without_edges([("m0", "m1")]), full.without_edges([("a1.h3", "logits"), ("embed", "logits")]), full]
    early = [Circuit(list_edges(model.cfg)[::2]), full.without_edges([("embed", "a0.h0.k")])]
    together = run(model, clean, corrupted, [*late, *early])
    for circuit, logits in zip([*late, *early], together, strict=True):
        torch.testing.assert_close(run(model, clean, corrupted, [circuit])[0], logits, rtol=0, atol=1e-10)
    wiring = Wiring.of(model.cfg)

    def nodes(circuits):
        masks = torch.stack([circuit.to_mask(model.cfg) for circuit in circuits])
        found = wiring.find_nodes_to_run(masks, full.to_mask(model.cfg))
        return [str(wiring.graph.writers[node]) for node in found]

    above = ["a1.h0", "a1.h1", "a1.h2", "a1.h3", "m1"]
    assert nodes([late[0]]) == ["m1"]
    assert nodes([late[1]]) == nodes([full]) == []
    # Two query heads share the keys.
    assert nodes([early[1]]) == ["a0.h0", "a0.h1", "m0", *above]
    assert nodes(late) == ["m1"]
    # What leads nowhere is not run.
    only = Circuit([("embed", "a0.h1.q"), ("a0.h1", "a1.h1.v"), ("a1.h2", "logits"), ("m0", "m1")])
    assert nodes([only]) == ["a0.h1", "a1.h2"]


def test_columns_that_are_run():
    model = MODELS["grouped"]
    clean, corrupted = pair_of_batches(model, length=8, shared=5)
    prompts = read_pairs(model, clean, corrupted)

    @torch.no_grad()
    def columns(metric, ablation="resample"):
        ground = prepare_ground(model, prompts, [0, 1], metric, ablation)
        return ground.first, ground.width

    assert columns(LogProb(1)) == (5, 3)
    assert columns(LogProb(1, pos=6)) == (5, 2)
    assert columns(LogProb(1, pos=[1, 6])) == (1, 6)
    assert columns(LogProb(1), "zero") == (0, 8)
    same = read_pairs(model, clean, clean)
    with torch.no_grad():
        assert prepare_ground(model, same, [0, 1], LogProb(1), "resample").first == 7


def test_frequencies_that_depend_on_the_length_leave_nothing_to_cut_off():
    scaling = RotaryScaling(kind="dynamic", factor=2.0, original_n_ctx=4)
    model = make_model(make_config(positions=RotaryPositions(dim=6, scaling=scaling)))
    clean, corrupted = pair_of_batches(model, length=7, shared=3)
    circuit = Circuit(list_edges(model.cfg)[::2])
    metric = LogProb(4, pos=5)
    (found,) = run(model, clean, corrupted, [circuit], metric=metric)
    expected = MaskedReference(model, clean, corrupted).logits(circuit)[:, [5]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_nothing_holds_readers_times_writers_times_the_stream():
    model = MODELS["learned, tied"]
    clean, corrupted = pair_of_batches(model, n=1, shared=0)
    graph = Graph.of(model.cfg)
    largest = len(graph.writers) * model.cfg.n_heads * clean.numel() * model.cfg.d_model
    with Allocations() as allocations:
        run(model, clean, corrupted, [Circuit(list_edges(model.cfg)[::2])])
    assert max(torch.Size(shape).numel() for _, shape in allocations.sizes) < largest
