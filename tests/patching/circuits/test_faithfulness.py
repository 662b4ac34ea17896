import math

import numpy as np
import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import KL, Circuit, FractionRecovered, FunctionMetric, LogitDiff, LogProb, Loss
from hooklens.patching.circuits import runner
from hooklens.patching.graph.nodes import list_edges
from hooklens.patching.paths.passes import share_of_mlp
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens
from tests.patching.live_bytes import LiveBytes
from tests.patching.masked_reference import MaskedReference

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(3, 6, seed=1), random_tokens(3, 6, seed=2)
CORRUPTED[:, :2] = CLEAN[:, :2]
EDGES = list_edges(MODEL.cfg)
CIRCUITS = {
    "full": Circuit.full(MODEL.cfg),
    "half": Circuit(EDGES[::2]),
    "third": Circuit(EDGES[1::3]),
    "none": Circuit(),
}
METRIC = LogitDiff(3, [5, 6, 7])


def evaluate(circuits, metric, **options):
    return patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, circuits, metric, progress=False, **options)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_values_are_the_metric_of_the_masked_runs(ablation):
    result = evaluate(CIRCUITS, METRIC, ablation=ablation)
    reference = MaskedReference(MODEL, CLEAN, CORRUPTED, ablation)
    for value, circuit in zip(result.per_pair, CIRCUITS.values(), strict=True):
        torch.testing.assert_close(value, METRIC(reference.logits(circuit)), rtol=0, atol=1e-9)
    assert result.axes == {"circuit": ("full", "half", "third", "none")}
    torch.testing.assert_close(result.full_per_pair, METRIC(MODEL(CLEAN).detach()), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.empty_per_pair, METRIC(reference.logits(Circuit())), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.normalized[[0, 3]], torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-9)
    expected = (result.values[1] - result.empty) / (result.full - result.empty)
    assert float(result.normalized[1]) == pytest.approx(float(expected))
    table = result.to_dataframe()
    assert table["edges"].tolist() == [len(circuit) for circuit in CIRCUITS.values()]
    assert result.ablation == ablation


def test_means_of_ones_own():
    means = patching.mean_activations(MODEL, CORRUPTED, ["resid_pre", "result", "mlp_out"])
    one, other = (evaluate(CIRCUITS, METRIC, ablation=ablation) for ablation in (means, "mean"))
    torch.testing.assert_close(one.per_pair, other.per_pair, rtol=0, atol=1e-10)
    # At other values than the corrupted prompts' mean, something else comes out.
    others = {name: 0.5 * mean for name, mean in means.items()}
    half = evaluate(CIRCUITS, METRIC, ablation=others).per_pair[1]
    assert float((half - one.per_pair[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "metric",
    [
        LogProb(4, pos=[1, -1]),
        KL(),
        KL(pos=None),
        FractionRecovered(METRIC),
        Loss(),
        FunctionMetric(lambda logits: logits[:, -1, 2] - logits[:, -1].mean(-1)),
    ],
    ids=lambda metric: metric.name,
)
def test_batches_change_nothing(metric):
    together = evaluate(CIRCUITS, metric)
    for batch_size in (1, 4, 7):
        apart = evaluate(list(CIRCUITS.values()), metric, batch_size=batch_size)
        torch.testing.assert_close(apart.per_pair, together.per_pair, rtol=0, atol=1e-9)
        torch.testing.assert_close(apart.empty_per_pair, together.empty_per_pair, rtol=0, atol=1e-9)
    assert apart.axes == {"circuit": (0, 1, 2, 3)}
    torch.testing.assert_close(together.per_pair[0], together.full_per_pair, rtol=0, atol=1e-9)
    torch.testing.assert_close(together.per_pair[3], together.empty_per_pair, rtol=0, atol=1e-9)


def test_loss_is_that_of_the_clean_tokens():
    result = evaluate([Circuit.full(MODEL.cfg)], Loss())
    losses = MODEL(CLEAN, return_type="loss", loss_per_token=True).mean(1)
    torch.testing.assert_close(result.per_pair[0], losses.detach(), rtol=0, atol=1e-9)


def test_pairs_of_different_length():
    lengths = (6, 4)
    rows = [[row[:n] for row, n in zip(tokens, lengths, strict=False)] for tokens in (CLEAN, CORRUPTED)]
    for side in ("left", "right"):
        (clean, mask), (corrupted, _) = pad_rows(rows[0], side), pad_rows(rows[1], side)
        for metric in (LogProb(4), KL(pos=None), FunctionMetric(lambda logits: logits[:, 0].sum(-1))):
            result = patching.evaluate_circuits(
                MODEL, clean, corrupted, CIRCUITS, metric, attention_mask=mask, progress=False
            )
            if metric.name == "KL":
                # Padding is read with all positions, as by a sweep.
                assert bool(result.per_pair.isfinite().all())
                continue
            for pair in range(2):
                alone = patching.evaluate_circuits(
                    MODEL, rows[0][pair][None], rows[1][pair][None], CIRCUITS, metric, progress=False
                )
                torch.testing.assert_close(result.per_pair[:, pair], alone.per_pair[:, 0], rtol=0, atol=1e-10)


def test_pruning_changes_nothing_under_resampling():
    generator = torch.Generator().manual_seed(3)
    circuits = [
        Circuit(
            edge for edge, draw in zip(EDGES, torch.rand(len(EDGES), generator=generator), strict=True) if draw < 0.3
        )
        for _ in range(6)
    ]
    pruned = [circuit.pruned(MODEL.cfg) for circuit in circuits]
    assert any(len(one) < len(other) for one, other in zip(pruned, circuits, strict=True))
    values = [evaluate(each, METRIC).per_pair for each in (circuits, pruned)]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-9)


def test_stats_count_what_was_run():
    full = CIRCUITS["full"]
    late = [full.without_edges([edge]) for edge in [("m1", "logits"), ("embed", "logits")]]
    stats = evaluate(late, METRIC).stats
    # Both prompts; none of the circuits runs a block.
    assert stats.tokens == 2 * CLEAN.numel()
    stats = evaluate([CIRCUITS["half"]], METRIC).stats
    # Behind the first two columns, which are the same; the last MLP at the position that is read. Half of the edges
    # leave the first MLP without a way to the logits.
    share = share_of_mlp(MODEL.blocks[0])
    attention, mlp = 4 * (1 - share), 4 * share
    nodes = [str(node) for node in CIRCUITS["half"].pruned(MODEL.cfg).nodes()]
    assert stats.tokens == pytest.approx(
        2 * CLEAN.numel() + 3 * (2 * attention + mlp * ("m0" in nodes) + share * ("m1" in nodes)) / 2
    )
    assert (stats.cells, stats.pairs, stats.naive_forwards) == (1, 3, 3 + 6)


def test_memory_does_not_grow_with_the_number_of_pairs(monkeypatch):
    """One ground held as many pairs as fitted into a quarter of the memory, and the next was made beside it."""
    monkeypatch.setattr(runner, "_BYTES_ON_CPU", 2**19)
    peaks = []
    for n in (32, 192):
        clean, corrupted = random_tokens(n, 12, seed=1), random_tokens(n, 12, seed=2)
        with LiveBytes() as live:
            patching.evaluate_circuits(MODEL, clean, corrupted, CIRCUITS, LogitDiff(3, 5), progress=False)
        peaks.append(live.peak)
    # Token ids and values themselves: some hundred bytes for each pair.
    assert peaks[1] - peaks[0] < 160 * 1000
    assert max(peaks) < 3 * 2**19


def test_labels_may_be_numbers():
    result = evaluate({12: CIRCUITS["half"]}, METRIC)
    assert result.axes == {"circuit": (12,)}
    with unchecked():
        (label,) = evaluate({np.int64(12): CIRCUITS["half"]}, METRIC).labels
    assert type(label) is int
    with unchecked(), pytest.raises(InputError, match=r"a label that is no text is 1\.5, expected a whole number"):
        evaluate({1.5: CIRCUITS["half"]}, METRIC)


def test_results_do_not_depend_on_the_grad_mode():
    plain = evaluate(CIRCUITS, METRIC)
    with torch.inference_mode():
        inside = evaluate(CIRCUITS, METRIC)
    assert torch.equal(plain.per_pair, inside.per_pair)
    assert not plain.per_pair.requires_grad


def test_refusals():
    with pytest.raises(InputError, match="needs at least one circuit"):
        evaluate([], METRIC)
    with unchecked(), pytest.raises(InputError, match=r"this one holds list\. Make them with Circuit\(edges\)"):
        evaluate([[("embed", "logits")]], METRIC)
    with unchecked(), pytest.raises(InputError, match=r"holds tuple\..*a single one as \[circuit\]"):
        evaluate(Circuit([("embed", "logits")]), METRIC)
    with pytest.raises(patching.SiteError, match=r"no nodes 'a7\.h0'"):
        evaluate([Circuit([("a7.h0", "logits")])], METRIC)
    with pytest.raises(InputError, match="batch_size is 0"):
        evaluate(CIRCUITS, METRIC, batch_size=0)
    capped = make_model("capped")
    with pytest.raises(InputError, match="a norm follows each branch"):
        patching.evaluate_circuits(capped, CLEAN, CORRUPTED, [Circuit()], METRIC)
    with pytest.raises(patching.MetricError, match=r"NaN for the unpatched runs of pairs \[0, 1, 2\]"):
        evaluate(CIRCUITS, FunctionMetric(lambda logits: logits[:, -1, 0] * math.nan))


def test_an_interruption_keeps_what_was_measured():
    calls = []

    def stop(logits):
        calls.append(logits)
        # The clean and the corrupted run, the ablated one, two circuits.
        if len(calls) > 5:
            raise KeyboardInterrupt
        return logits[:, -1, 3]

    with pytest.raises(
        patching.SweepInterruptedError, match=r"stopped after 6 of 12 values \(KeyboardInterrupt"
    ) as caught:
        evaluate(CIRCUITS, FunctionMetric(stop), batch_size=3)
    partial = caught.value.result
    assert partial.per_pair.isnan().any(1).tolist() == [False, False, True, True]
    torch.testing.assert_close(partial.per_pair[0], partial.full_per_pair, rtol=0, atol=1e-9)


def test_nan_names_the_circuit():
    clean_logits = MODEL(CLEAN)[:, -1, 0].detach()

    def broken(logits):
        value = logits[:, -1, 0]
        return torch.where((value - clean_logits).abs() < 1e-9, value * math.nan, value)

    def fine_for_the_clean_run(logits):
        calls.append(logits)
        return logits[:, -1, 0] if len(calls) < 3 else broken(logits)

    calls = []
    with pytest.raises(patching.SweepInterruptedError, match=r"NaN for the circuits \['full'\]"):
        evaluate(CIRCUITS, FunctionMetric(fine_for_the_clean_run))
    # In a batch that is not the first, rows are counted from where it starts.
    calls = []
    later = {name: CIRCUITS[name] for name in ("half", "third", "none", "full")}
    with pytest.raises(patching.SweepInterruptedError, match=r"NaN for the circuits \['full'\]"):
        evaluate(later, FunctionMetric(fine_for_the_clean_run), batch_size=6)
