from dataclasses import replace

import pytest
import torch

from hooklens.errors import CheckpointError, HookLensError
from hooklens.patching import Circuit, EdgeScores, LearnedCircuit, SweepStats
from hooklens.patching.graph.nodes import Graph, list_edges
from hooklens.patching.learned.level import GateLayout
from tests.annotations import unchecked
from tests.model.networks import make_config

CFG = make_config()
GRAPH = Graph.of(CFG)
STATS = SweepStats(cells=40, pairs=3, unchanged=0, forwards=9, tokens=2.5, naive_forwards=5, naive_tokens=7)


def made(level="edge", *, steps=40, size=6):
    layout = GateLayout.of(GRAPH, level)
    gates = torch.randn(len(layout), generator=torch.Generator().manual_seed(0))
    return LearnedCircuit(
        log_alpha=layout.spread(gates, closed=-torch.inf, fixed=torch.inf),
        writers=tuple(map(str, GRAPH.writers)),
        readers=tuple(map(str, GRAPH.readers)),
        level=level,
        size=size,
        losses=torch.linspace(1, 0.25, steps, dtype=torch.float64),
        sizes=torch.linspace(80, 7, steps, dtype=torch.float64),
        targets=torch.linspace(80, 6, steps, dtype=torch.float64),
        held_out_pairs=torch.tensor([False, True, False]),
        values=torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 4.0], [0.0, 1.0, 0.0]]),
        metric="KL",
        ablation="mean",
        method="lagrangian",
        stats=STATS,
    )


def test_circuits_take_the_gates_most_likely_open():
    found = made()
    ranked = sorted(
        list_edges(CFG),
        key=lambda edge: -float(found.log_alpha[found.readers.index(edge[1]), found.writers.index(edge[0])]),
    )
    assert found.circuit(7, connected=False) == Circuit(ranked[:7])
    assert found.circuit(connected=False) == Circuit(ranked[:6])
    assert len(found.circuit(20)) == 20
    assert found.n_gates == len(ranked)
    assert isinstance(found.scores, EdgeScores)
    assert found.scores.standard_errors.isnan().all()
    with pytest.raises(HookLensError, match=r"LearnedCircuit.circuit: n is -1"):
        found.circuit(-1)


def test_nodes_are_taken_with_all_edges_that_lead_away():
    found = made("node", size=2)
    ranked = sorted(found.writers[1:], key=lambda name: -float(found.log_alpha[-1, found.writers.index(name)]))
    assert found.ranked_nodes() == ranked
    assert found.circuit() == Circuit(edge for edge in list_edges(CFG) if edge[0] in ("embed", *ranked[:2]))
    assert found.n_gates == len(found.writers) - 1


def test_gates_far_open_keep_their_order():
    found = made()
    exists = found.log_alpha > -torch.inf
    far = torch.where(exists, 20 + found.log_alpha, found.log_alpha)
    assert replace(found, log_alpha=far).circuit(9) == found.circuit(9)


def test_faithfulness_on_trained_and_held_out_pairs():
    found = made()
    assert found.trained.per_pair.tolist() == [[1.0, 3.0]]
    assert float(found.trained.faithfulness_hanna) == pytest.approx(4 / 6)
    assert float(found.held_out.faithfulness_hanna) == 1.0
    assert found.held_out.circuits == (found.circuit(),)
    alone = replace(found, held_out_pairs=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(HookLensError, match=r"no held-out pairs; give learn_circuit a holdout, such as 0.25"):
        _ = alone.held_out
    stopped = replace(found, values=torch.full((3, 3), torch.nan))
    with pytest.raises(HookLensError, match="was not measured on held-out pairs, since training stopped before"):
        _ = stopped.held_out


def test_tables():
    found = made()
    table = found.to_dataframe()
    assert list(table.columns) == ["writer", "reader", "score"]
    assert len(table) == found.n_gates
    assert table["score"].is_monotonic_decreasing
    trace = found.trace
    assert list(trace.columns) == ["loss", "size", "target"]
    assert trace["loss"].tolist() == found.losses.tolist()
    with pytest.raises(HookLensError, match="no statistic over pairs exists; train with several seeds"):
        found.to_dataframe(statistics=["bootstrap"])


def test_what_it_shows():
    text = repr(made())
    assert text.splitlines() == [
        "LearnedCircuit(6 of 110 edges, by lagrangian, mean ablation, 40 steps)",
        "  metric  KL",
        "  loss    0.2500 of the ablated run's, 7.0 edges open",
        f"  took    {made().stats.forwards} forwards",
        "  pairs       number  circuit  network  all ablated",
        "  trained on       2     2.00     3.00          0.0",
        "  held out         1     2.00     2.00         1.00",
    ]


def test_figures():
    found = made()
    figure = found.plot()
    assert figure.layout.title.text == "KL: learned circuit of 6 edges"
    assert [trace.name for trace in figure.data] == ["loss", "expected", "target"]
    assert list(figure.data[0].y)[-1] == 0.25
    assert list(figure.layout.xaxis.ticktext)[-1] == "39"
    assert len(figure.data[0].y) == 25
    axes = found.plot(backend="matplotlib", title="mine").axes
    assert [one.get_title() for one in axes] == ["loss (1: everything ablated)", "open edges"]
    assert len(made(steps=3).plot().data[0].y) == 3
    with pytest.raises(HookLensError, match="no steps, so there is nothing to draw"):
        made(steps=0).plot()
    with unchecked(), pytest.raises(HookLensError, match="backend is 'gnuplot'"):
        found.plot(backend="gnuplot")


@pytest.mark.parametrize("level", ["edge", "node"])
def test_files(tmp_path, level):
    found = made(level)
    found.save(tmp_path / "found.safetensors")
    read = LearnedCircuit.load(tmp_path / "found.safetensors")
    assert repr(read) == repr(found)
    for name in ("log_alpha", "losses", "sizes", "targets", "held_out_pairs", "values"):
        assert torch.equal(getattr(read, name), getattr(found, name))
    for name in ("writers", "readers", "level", "size", "metric", "ablation", "method", "stats"):
        assert getattr(read, name) == getattr(found, name)


def test_damaged_files(tmp_path):
    path = tmp_path / "found.safetensors"
    with unchecked():
        replace(made(), size="6").save(path)
    with pytest.raises(CheckpointError, match="key 'size' is '6', expected a whole number"):
        LearnedCircuit.load(path)
    with unchecked():
        replace(made(), losses=torch.zeros(3, dtype=torch.float64)).save(path)
    with pytest.raises(CheckpointError, match="is damaged: key 'sizes'"):
        LearnedCircuit.load(path)
    with pytest.raises(CheckpointError, match="does not hold edge scores"):
        EdgeScores.load(path)
