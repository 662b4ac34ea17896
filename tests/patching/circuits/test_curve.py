from dataclasses import replace

import numpy as np
import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.errors import CheckpointError, HookLensError, InputError
from hooklens.patching import (
    Circuit,
    CircuitResult,
    EdgeChoice,
    FaithfulnessCurve,
    LogitDiff,
    ScoredEdges,
    SweepStats,
    random_circuits,
)
from hooklens.patching.graph.nodes import list_edges
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens
from tests.slow_cases import slow_but

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
METRIC = LogitDiff(3, 5)
SCORES = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC)
EDGES = list_edges(MODEL.cfg)


def curve(**options):
    return patching.faithfulness_curve(MODEL, CLEAN, CORRUPTED, SCORES, METRIC, **{"progress": False, **options})


def made_up(points):
    """A curve of given faithfulness by number of edges."""
    values = torch.tensor([[value] for value in points.values()])
    stats = SweepStats(
        cells=len(points), pairs=1, unchanged=0, forwards=1, tokens=1.0, naive_forwards=1, naive_tokens=1
    )
    result = CircuitResult(
        circuits=tuple(Circuit(EDGES[:size]) for size in points),
        labels=tuple(points),
        per_pair=values,
        full_per_pair=torch.ones(1),
        empty_per_pair=torch.zeros(1),
        metric="LogitDiff",
        ablation="resample",
        stats=stats,
    )
    return FaithfulnessCurve(result=result)


@pytest.mark.parametrize("connected", [True, False])
def test_the_curve_runs_the_circuits_of_the_strongest_edges(connected):
    sizes = [40, 3, 10, 82, 3]
    found = curve(sizes=sizes, connected=connected)
    assert found.sizes == (3, 10, 40, 82)
    assert found.circuits == tuple(SCORES.circuit(size, connected=connected) for size in found.sizes)
    expected = patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, found.circuits, METRIC, progress=False)
    torch.testing.assert_close(found.faithfulness, expected.normalized, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-10)
    assert float(found.faithfulness[-1]) == pytest.approx(1.0, abs=1e-9)
    assert found.result.axes == {"circuit": (3, 10, 40, 82)}


def test_sizes_are_spaced_by_their_logarithm():
    found = curve()
    assert (found.sizes[0], found.sizes[-1]) == (1, 82)
    assert 14 <= len(found.sizes) <= 20
    ratios = [b / a for a, b in zip(found.sizes[-8:], found.sizes[-7:], strict=False)]
    assert max(ratios) < 1.4


def test_ablation_is_handed_on():
    zero = curve(sizes=[10], ablation="zero")
    expected = patching.evaluate_circuits(
        MODEL, CLEAN, CORRUPTED, zero.circuits, METRIC, ablation="zero", progress=False
    )
    torch.testing.assert_close(zero.values, expected.values, rtol=0, atol=1e-10)
    assert abs(zero.result.empty - curve(sizes=[10]).result.empty) > 1e-6


def test_smallest():
    found = made_up({2: 0.1, 5: 0.85, 10: 0.7, 30: 1.0})
    assert len(found.smallest(0.8)) == 5
    assert len(found.smallest(0.05)) == 2
    assert len(found.smallest(1.0)) == 30
    with pytest.raises(HookLensError, match=r"reaches a faithfulness of 1\.2: the highest is 1\.000, .* 2 to 30 edges"):
        found.smallest(1.2)


def test_area():
    found = made_up({0: 0.0, 1: 0.0, 4: 0.5, 16: 1.0})
    # On the logarithmic axis the curve is a straight line from 0 to 1.
    assert found.area() == pytest.approx(0.5)
    assert found.area(scale="linear") == pytest.approx((3 * 0.25 + 12 * 0.75) / 15)
    assert made_up({1: 1.0, 7: 1.0, 50: 1.0}).area() == pytest.approx(1.0)
    with unchecked(), pytest.raises(HookLensError, match="scale is 'square'"):
        found.area(scale="square")
    with pytest.raises(HookLensError, match="a curve of 1 circuits with edges has no area"):
        made_up({0: 0.0, 4: 0.5}).area()


def test_table_and_plots():
    found = curve(sizes=[0, 5, 82])
    table = found.to_dataframe()
    assert table["edges"].tolist() == [0, 5, 82]
    assert table["heads"].tolist() == [len(circuit.heads()) for circuit in found.circuits]
    assert table["faithfulness_hanna"].tolist() == pytest.approx([0.0, float(found.faithfulness[1]), 1.0], abs=1e-9)
    figure = found.plot(backend="matplotlib", title="kept")
    (axes,) = figure.axes
    assert axes.get_title() == "kept"
    assert axes.get_xscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == [5, 82]
    plotly = pytest.importorskip("plotly")
    assert plotly is not None
    assert list(found.plot().data[0].x) == [5, 82]


def test_a_curve_comes_back_from_its_file(tmp_path):
    found = curve(sizes=[3, 10])
    found.save(tmp_path / "curve.safetensors")
    loaded = FaithfulnessCurve.load(tmp_path / "curve.safetensors")
    assert loaded.circuits == found.circuits
    assert torch.equal(loaded.faithfulness, found.faithfulness)


def test_refusals():
    with pytest.raises(InputError, match=r"sizes \[-1, 83\]; expected numbers of edges from 0 to 82"):
        curve(sizes=[-1, 4, 83])
    with unchecked(), pytest.raises(InputError, match=r"a size is 3\.5, expected a whole number"):
        curve(sizes=[1, 3.5])
    with unchecked(), pytest.raises(InputError, match="sizes are 5; expected a list"):
        curve(sizes=5)
    with unchecked():
        assert [type(size) for size in curve(sizes=np.array([3, 5])).sizes] == [int, int]
    with pytest.raises(InputError, match=r"sizes \[\]"):
        curve(sizes=[])
    with unchecked(), pytest.raises(HookLensError, match="backend is 'ascii'"):
        curve(sizes=[3]).plot(backend="ascii")
    same = made_up({1: 0.0})
    same = replace(same, result=replace(same.result, full_per_pair=torch.zeros(1)))
    assert "faithfulness_hanna" not in same.to_dataframe()
    with pytest.raises(HookLensError, match="no scale between them"):
        _ = same.faithfulness


NAMES = [("Mary", "John"), ("Anna", "Paul"), ("Alice", "Tom"), ("Sarah", "James")]
SENTENCE = "When {first} and {second} went to the store , {subject} gave a drink to"


@pytest.mark.parametrize("checkpoint", slow_but(["tiny-gpt-neox", "tiny-llama", "tiny-falcon"], ["tiny-falcon"]))
def test_few_edges_carry_the_indirect_object(checkpoint):
    model = HookedCausalLM.from_pretrained(f"bundled:{checkpoint}")
    couples = [*NAMES, *(couple[::-1] for couple in NAMES)]
    clean, corrupted = (
        [SENTENCE.format(first=one, second=other, subject=(one, other)[who]) for one, other in couples]
        for who in (1, 0)
    )
    metric = LogitDiff([one for one, _ in couples], [other for _, other in couples])
    scores = patching.edge_attribution(model, clean, corrupted, metric, method="eap-ig", steps=16)
    # A tenth of the edges is few, and half of the heads.
    few = int(scores.exists.sum()) // 10
    found = patching.faithfulness_curve(
        model, clean, corrupted, scores, metric, sizes=range(1, few + 1, 2), progress=False
    )
    assert found.result.full > 10 > -10 > found.result.empty
    assert len(found.smallest(0.8).pruned(model.cfg).heads()) <= 8
    searched = patching.discover_circuit(model, clean, corrupted, metric, threshold=0.5, progress=False).circuit
    assert len(searched) <= few
    assert len(searched.heads()) <= 8
    kept = patching.evaluate_circuits(model, clean, corrupted, [searched], metric, progress=False)
    assert float(kept.normalized[0]) >= 0.8


def test_other_scores_are_refused():
    with unchecked(), pytest.raises(InputError, match="scores are a list; expected those of edge_attribution"):
        patching.faithfulness_curve(MODEL, CLEAN, CORRUPTED, [("embed", "logits")], METRIC)


@pytest.mark.parametrize("interval", ["standard_error", "bootstrap"])
def test_bars_stand_for_what_pairs_leave_open(interval):
    pytest.importorskip("scipy")
    found = curve(sizes=[0, 5, 40])
    if interval == "bootstrap":
        low, high = found.result.bootstrap_faithfulness()
    else:
        errors = found.result.faithfulness_hanna_errors
        low, high = found.faithfulness - errors, found.faithfulness + errors
    bars = found.plot(interval=interval).data[0]
    assert [y + up for y, up in zip(bars.y, bars.error_y.array, strict=True)] == pytest.approx(high[1:].tolist())
    assert [y - up for y, up in zip(bars.y, bars.error_y.arrayminus, strict=True)] == pytest.approx(low[1:].tolist())
    (axes,) = found.plot(interval=interval, backend="matplotlib").axes
    ends = axes.containers[0][2][0].get_segments()
    assert [segment[0][1] for segment in ends] == pytest.approx(low[1:].tolist())
    assert "faithfulness_hanna_low" in found.to_dataframe(statistics=["bootstrap"])
    with unchecked(), pytest.raises(HookLensError, match="plot: interval is 'all'"):
        found.plot(interval="all")
    with pytest.raises(HookLensError, match="needs at least two pairs"):
        made_up({1: 0.0, 4: 1.0}).plot(interval=interval)


def test_random_circuits_of_equal_size_stand_beside_a_curve():
    found = curve(sizes=[3, 10, 40], random_draws=2, seed=7)
    assert [len(circuit) for circuit in found.random.circuits] == [3, 10, 40] * 2
    assert found.random.circuits[:3] == tuple(random_circuits(SCORES.edges, [3, 10, 40], seed=7))
    assert found.random.circuits[3:] == tuple(random_circuits(SCORES.edges, [3, 10, 40], seed=8))
    expected = patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, found.random.circuits, METRIC, progress=False)
    torch.testing.assert_close(found.random_faithfulness.flatten(), expected.normalized, rtol=0, atol=1e-10)
    table = found.to_dataframe()
    assert table.random_low.tolist() == found.random_faithfulness.amin(0).tolist()
    assert table.random_mean[1] == pytest.approx(float(found.random_faithfulness[:, 1].mean()))
    # A display draws what the table says; one size is no line.
    drawn = found._draw()
    assert drawn.x == (3, 10, 40)
    torch.testing.assert_close(drawn.values[0], found.values)
    torch.testing.assert_close(drawn.values[1], found.random.values.view(2, 3).mean(0))
    assert "by the number of edges" in found._repr_html_()
    assert "by the number of edges" not in curve(sizes=[3], random_draws=2)._repr_html_()
    assert "random_mean" not in curve(sizes=[3], random_draws=0).to_dataframe()
    with pytest.raises(HookLensError, match="no random circuits beside it; run faithfulness_curve with random_draws=3"):
        _ = curve(sizes=[3], random_draws=0).random_faithfulness


@pytest.mark.parametrize("search", ["top", "pruned", "greedy"])
def test_random_circuits_have_the_sizes_of_what_was_chosen(search):
    choice = EdgeChoice(search=search, by="signed")
    found = curve(sizes=[3, 12, 40], choice=choice, random_draws=1)
    assert found.circuits == tuple(SCORES.circuit(size, choice=choice) for size in (3, 12, 40))
    assert tuple(len(circuit) for circuit in found.random.circuits) == found.sizes
    if search == "pruned":
        assert all(circuit.pruned(MODEL.cfg) == circuit for circuit in found.random.circuits)


def test_what_occurs_twice_is_run_once():
    assert curve(sizes=[0, 82], random_draws=3).result.stats.cells == 2


def test_a_curve_of_other_scores():
    other = ScoredEdges.of(MODEL.cfg, {("m1", "logits"): 1.0, ("embed", "m1"): 0.5})
    found = patching.faithfulness_curve(MODEL, CLEAN, CORRUPTED, other, METRIC, sizes=[2], progress=False)
    assert found.circuits == (Circuit([("m1", "logits"), ("embed", "m1")]),)


def test_mib_measures_by_hand():
    """The areas, from one evaluation of each of the ten circuits."""
    found = curve(sizes="mib", choice=EdgeChoice(search="pruned", by="signed"), random_draws=2)
    fractions = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    kept = []
    for fraction in fractions:
        circuit = SCORES.circuit(int(fraction * 82), choice=EdgeChoice(search="pruned", by="signed"))
        alone = patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, [circuit], METRIC, progress=False)
        kept.append(float(alone.faithfulness_hanna[0]))
    assert found.cpr == pytest.approx(
        float(torch.trapezoid(torch.tensor(kept, dtype=torch.float64), torch.tensor(fractions, dtype=torch.float64))),
        abs=1e-9,
    )
    assert found.cmd == pytest.approx(
        float(
            torch.trapezoid(
                (1 - torch.tensor(kept, dtype=torch.float64)).abs(), torch.tensor(fractions, dtype=torch.float64)
            )
        ),
        abs=1e-9,
    )
    drawn = found.random_faithfulness
    assert found.random_cpr == pytest.approx(torch.trapezoid(drawn, torch.tensor(fractions).to(drawn)).tolist())
    assert found.random_cmd == pytest.approx(
        torch.trapezoid((1 - drawn).abs(), torch.tensor(fractions).to(drawn)).tolist()
    )
    with pytest.raises(HookLensError, match=r"ten given fractions .* run faithfulness_curve with sizes='mib'"):
        _ = curve(sizes=[1, 82]).cpr


def test_curves_are_kept_with_their_random_circuits(tmp_path):
    found = curve(sizes="mib", random_draws=2)
    found.save(tmp_path / "curve.safetensors")
    again = FaithfulnessCurve.load(tmp_path / "curve.safetensors")
    assert (again.cpr, again.random_cmd) == (found.cpr, found.random_cmd)
    assert again.result.labels == found.result.labels
    assert again.random.circuits == found.random.circuits
    alone = curve(sizes=[3], random_draws=0)
    alone.save(tmp_path / "alone.safetensors")
    assert FaithfulnessCurve.load(tmp_path / "alone.safetensors").random is None
    whole = found._whole
    broken = replace(whole, circuits=whole.circuits[:-1], labels=whole.labels[:-1], per_pair=whole.per_pair[:-1])
    broken.save(tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match="holds 10 circuits of a curve and 19 random ones"):
        FaithfulnessCurve.load(tmp_path / "broken.safetensors")


def test_random_circuits_are_a_band_in_the_plot():
    found = curve(sizes=[0, 3, 10, 40], random_draws=2)
    line, low, high = found.plot().data
    assert list(line.y) == pytest.approx(found.faithfulness[1:].tolist())
    assert list(low.y) == pytest.approx(found.random_faithfulness.amin(0)[1:].tolist())
    assert list(high.y) == pytest.approx(found.random_faithfulness.amax(0)[1:].tolist())
    assert (high.name, high.fill, list(high.x)) == ("random circuits, 2 draws", "tonexty", [3, 10, 40])
    assert len(found.plot(backend="matplotlib").axes[0].collections) >= 1


def test_choices_and_draws_are_read():
    with pytest.raises(InputError, match="both say how edges are chosen"):
        curve(choice=EdgeChoice(), connected=False)
    with pytest.raises(InputError, match="faithfulness_curve: random_draws is -1"):
        curve(random_draws=-1)
    with unchecked(), pytest.raises(InputError, match="sizes are 'all'; expected a list of numbers of edges, or 'mib'"):
        curve(sizes="all")
