import math

import numpy as np
import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.config import RotaryPositions
from hooklens.errors import InputError
from hooklens.patching import KL, Circuit, FunctionMetric, LogitDiff, LogProb
from hooklens.patching.circuits import acdc
from hooklens.patching.graph.nodes import inputs_of, list_edges, list_readers, list_writers
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, pad_rows, random_tokens
from tests.patching.masked_reference import MaskedReference

CLEAN, CORRUPTED = random_tokens(3, 6, seed=1), random_tokens(3, 6, seed=2)
CORRUPTED[:, :2] = CLEAN[:, :2]
METRICS = {"KL": KL(), "LogitDiff": LogitDiff(3, [5, 6, 7]), "LogProb": LogProb(4, pos=[2, -1])}


def find(model, metric=None, **options):
    return patching.discover_circuit(model, CLEAN, CORRUPTED, metric, **{"progress": False, "holdout": 0, **options})


def discover_naively(cfg, threshold, damage_of):
    """ACDC as the paper tells it: one run per edge that leads somewhere, each after the last is decided."""
    group = cfg.n_heads // cfg.n_kv_heads
    fed = {str(reader): [] for reader in list_readers(cfg)}
    for writer in list_writers(cfg):
        for reader in inputs_of(writer, group_size=group):
            fed[str(reader)].append(str(writer))
    edges = set(list_edges(cfg))
    current, decisions = 0.0, []
    for reader in reversed(list_readers(cfg)):
        for writer in reversed(list_writers(cfg)):
            edge = (str(writer), str(reader))
            if edge not in edges:
                continue
            if edge[1] != "logits" and not any(start in fed[edge[1]] for start, _ in edges):
                edges.remove(edge)
                decisions.append((*edge, "unreachable"))
                continue
            damage = damage_of(Circuit(edges - {edge}))
            if damage - current < threshold:
                edges.remove(edge)
                current = damage
                decisions.append((*edge, "removed"))
            else:
                decisions.append((*edge, "kept"))
    return Circuit(edges), decisions, current


def damage_by_evaluation(model, metric, ablation):
    def damage_of(circuit):
        result = patching.evaluate_circuits(
            model, CLEAN, CORRUPTED, [circuit], metric, ablation=ablation, progress=False
        )
        return float((result.per_pair[0] - result.full_per_pair).abs().mean())

    return damage_of


# Thresholds between the smallest and the largest damage that edges of these networks do.
@pytest.mark.parametrize(
    ("network", "metric", "threshold", "ablation"),
    [
        # By default, those on the reference below.
        pytest.param("grouped", "KL", 0.001, "resample", marks=pytest.mark.slow),
        pytest.param("grouped", "KL", 0.01, "resample", marks=pytest.mark.slow),
        pytest.param("grouped", "LogitDiff", 0.03, "zero", marks=pytest.mark.slow),
        pytest.param("rotary", "KL", 0.001, "mean", marks=pytest.mark.slow),
        ("rotary", "LogProb", 0.01, "resample"),
        pytest.param("shared norm", "LogitDiff", 0.01, "resample", marks=pytest.mark.slow),
        ("alibi, grouped", "KL", 0.003, "zero"),
        ("learned, tied", "LogitDiff", 0.02, "mean"),
    ],
)
def test_decisions_are_those_of_one_run_per_edge(network, metric, threshold, ablation):
    model = make_model(network)
    found = find(model, METRICS[metric], threshold=threshold, ablation=ablation)
    circuit, decisions, damage = discover_naively(
        model.cfg, threshold, damage_by_evaluation(model, METRICS[metric], ablation)
    )
    assert [(each.writer, each.reader, each.verdict) for each in found.decisions] == decisions
    assert found.circuit == circuit
    assert found.damage == pytest.approx(damage, abs=1e-9)
    # No increase lies so near to the threshold that rounding could decide.
    margins = [abs(each.increase - threshold) for each in found.decisions if each.increase is not None]
    assert min(margins) > 1e-9
    verdicts = {verdict for *_, verdict in decisions}
    assert {"kept", "removed"} <= verdicts
    value = damage_by_evaluation(model, METRICS[metric], ablation)(found.circuit)
    assert value == pytest.approx(found.damage, abs=1e-9)


def test_decisions_equal_the_search_on_the_reference():
    model = make_model("grouped")
    reference = MaskedReference(model, CLEAN, CORRUPTED)
    clean = model(CLEAN).detach()[:, -1].log_softmax(-1)

    def damage_of(circuit):
        patched = reference.logits(circuit)[:, -1].log_softmax(-1)
        return float((clean.exp() * (clean - patched)).sum(-1).mean())

    _, decisions, _ = discover_naively(model.cfg, 0.001, damage_of)
    found = find(model, threshold=0.001)
    assert [(each.writer, each.reader, each.verdict) for each in found.decisions] == decisions
    assert found.metric == "KL"


@pytest.mark.parametrize("batch_size", [1, 5, 60])
def test_batches_change_nothing(batch_size):
    model = make_model("rotary")
    one, other = (find(model, threshold=0.001, batch_size=size) for size in (batch_size, "auto"))
    assert one.circuit == other.circuit
    assert [each.verdict for each in one.decisions] == [each.verdict for each in other.decisions]
    if batch_size == 1:
        # Rows of one candidate are never run in vain.
        assert one.stats.circuits_run == one.stats.decided - one.stats.unreachable


@pytest.mark.parametrize(("metric", "ablation"), [("KL", "resample"), ("LogProb", "zero")])
@pytest.mark.parametrize("batch_size", ["auto", 1])
def test_held_out_pairs_are_measured_and_not_searched_on(metric, ablation, batch_size):
    model = make_model("rotary")
    clean, corrupted = random_tokens(6, 6, seed=1), random_tokens(6, 6, seed=2)
    options = {"threshold": 0.003, "ablation": ablation, "batch_size": batch_size, "progress": False}
    found = patching.discover_circuit(model, clean, corrupted, METRICS[metric], holdout=0.3, seed=4, **options)
    out = found.held_out_pairs
    assert int(out.sum()) == 2
    alone = patching.discover_circuit(model, clean[~out], corrupted[~out], METRICS[metric], holdout=0, **options)
    assert [(each.writer, each.reader, each.verdict) for each in found.decisions] == [
        (each.writer, each.reader, each.verdict) for each in alone.decisions
    ]
    assert found.damage == pytest.approx(alone.damage, abs=1e-10)
    assert (alone.held_out_damage, int(alone.held_out_pairs.sum())) == (None, 0)
    value = patching.evaluate_circuits(
        model, clean[out], corrupted[out], [found.circuit], METRICS[metric], ablation=ablation, progress=False
    )
    damage = float((value.per_pair[0] - value.full_per_pair).abs().mean())
    assert found.held_out_damage == pytest.approx(damage, abs=1e-10)
    assert abs(damage - found.damage) > 1e-6
    # Of each held-out pair a circuit is run, and the two runs without a patch.
    assert found.stats.naive_forwards == alone.stats.naive_forwards + 3 * 2
    assert found.stats.naive_tokens == alone.stats.naive_tokens + 3 * 2 * 6


def test_pairs_are_held_out_by_default_where_there_are_several():
    model = make_model("grouped")
    by_default = [
        patching.discover_circuit(model, CLEAN[:n], CORRUPTED[:n], threshold=0.01, progress=False) for n in (1, 2, 3)
    ]
    assert [int(found.held_out_pairs.sum()) for found in by_default] == [0, 1, 1]
    assert [found.held_out_damage is None for found in by_default] == [True, False, False]
    drawn = {
        tuple(
            patching.discover_circuit(
                model, CLEAN, CORRUPTED, threshold=math.inf, seed=seed, progress=False
            ).held_out_pairs.tolist()
        )
        for seed in range(8)
    }
    assert len(drawn) == 3


def test_draws_of_one_prompt_are_held_out_together():
    model = make_model("grouped")
    noise = patching.Noise(pos=[1, 2], draws=3)
    found = patching.discover_circuit(model, CLEAN, noise, threshold=math.inf, holdout=0.4, progress=False)
    assert found.held_out_pairs.view(3, 3).all(1).tolist() == found.held_out_pairs.view(3, 3).any(1).tolist()
    assert int(found.held_out_pairs.sum()) == 3


def test_thresholds_at_the_ends():
    model = make_model("grouped")
    n_edges = len(list_edges(model.cfg))
    everything = find(model, threshold=0)
    assert everything.circuit == Circuit.full(model.cfg)
    assert {each.verdict for each in everything.decisions} == {"kept"}
    assert everything.damage == 0.0
    nothing = find(model, threshold=math.inf)
    assert nothing.circuit == Circuit()
    assert nothing.stats.unreachable == n_edges - 1 - 2 * (4 + 1)
    assert nothing.damage == pytest.approx(float(KL_of_the_corrupted_run(model)), abs=1e-9)


@torch.no_grad()
def KL_of_the_corrupted_run(model):  # noqa: N802
    clean, corrupted = (model(tokens)[:, -1].log_softmax(-1) for tokens in (CLEAN, CORRUPTED))
    return (clean.exp() * (clean - corrupted)).sum(-1).mean()


def test_losses_and_gains_of_pairs_do_not_cancel():
    """One pair gains by each edge what the other loses, so their mean never moves."""
    model = make_model("grouped")
    clean, corrupted = CLEAN[:2], CORRUPTED[:2]
    last = {}

    def opposed(logits):
        value = logits[:, -1, 3] - logits[:, -1, 5]
        last.setdefault("clean", value)
        away = (value - last["clean"])[:1]
        return torch.cat([away, -away])

    found = patching.discover_circuit(
        model, clean, corrupted, FunctionMetric(opposed), threshold=1e-6, holdout=0, progress=False
    )
    assert len(found.circuit) > 10


def test_padded_pairs_equal_the_mean_over_pairs():
    model = make_model("grouped")
    lengths = (6, 4)
    rows = [[row[:n] for row, n in zip(tokens, lengths, strict=False)] for tokens in (CLEAN, CORRUPTED)]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], "left"), pad_rows(rows[1], "left")
    found = patching.discover_circuit(
        model, clean, corrupted, threshold=0.001, holdout=0, attention_mask=mask, progress=False
    )
    damages = [
        patching.evaluate_circuits(model, one[None], other[None], [found.circuit], KL(), progress=False).values
        for one, other in zip(*rows, strict=True)
    ]
    assert found.damage == pytest.approx(float(torch.cat(damages).mean()), abs=1e-9)
    split = patching.discover_circuit(
        model, clean, corrupted, threshold=0.001, holdout=0, attention_mask=mask, batch_size=1, progress=False
    )
    assert split.circuit == found.circuit


def test_stats_and_late_starts():
    model = make_model("learned, tied")
    found = find(model, threshold=0.001)
    stats, n_edges = found.stats, len(list_edges(model.cfg))
    assert stats.edges == stats.decided == n_edges == len(found.trace)
    assert stats.unreachable == int((found.trace["verdict"] == "unreachable").sum())
    assert stats.naive_forwards == 3 * (n_edges - stats.unreachable + 2)
    assert stats.naive_tokens == 6 * stats.naive_forwards
    assert stats.forwards < stats.naive_forwards / 3
    # The first two columns are the same in both prompts, and the upper half of the search runs one layer of two.
    assert stats.tokens < 0.9 * 4 / 6 * 18 * stats.circuits_run + 4 * 18


@pytest.mark.parametrize("checkpoint", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_a_decision_takes_little(checkpoint):
    """A decision took up to 0.3 forwards of the prompts on these tasks, and 0.6 on others."""
    model = HookedCausalLM.from_pretrained(f"bundled:{checkpoint}")
    couples = [("Mary", "John"), ("Tom", "Anna"), ("Paul", "Alice")]
    clean, corrupted = (
        [f"When {one} and {other} went to the store , {(one, other)[who]} gave a drink to" for one, other in couples]
        for who in (1, 0)
    )
    metric = LogitDiff(*([couple[who] for couple in couples] for who in (0, 1)))
    stats = patching.discover_circuit(model, clean, corrupted, metric, threshold=0.2, holdout=0, progress=False).stats
    n_run = stats.decided - stats.unreachable
    one_forward = stats.naive_tokens / (n_run + 2)
    assert stats.tokens / one_forward < 0.2 * n_run
    assert stats.circuits_run < 2 * n_run


@pytest.mark.parametrize("wiring", ["sequential", "parallel"])
def test_a_decision_takes_little_where_every_edge_counts(wiring):
    """Prompts differ from the first token on, and at this threshold hardly an edge is cut off: it took 1.0 forwards."""
    positions = RotaryPositions(dim=4)
    model = make_model(make_config(n_layers=4, d_model=16, d_mlp=32, wiring=wiring, positions=positions))
    clean, corrupted = random_tokens(3, 8, seed=1), random_tokens(3, 8, seed=2)
    stats = patching.discover_circuit(model, clean, corrupted, threshold=3e-5, holdout=0, progress=False).stats
    assert stats.unreachable < stats.decided / 3
    assert stats.tokens / clean.numel() < 0.3 * (stats.decided - stats.unreachable)


def test_the_run_of_the_circuit_so_far_is_kept(monkeypatch):
    """Every row ran all layers from its edge on, whatever had been removed above it."""
    model = make_model("grouped")
    with_run = find(model, threshold=0.003)
    monkeypatch.setattr(acdc.MaskedRun, "adopt", lambda self, row: None)
    without = find(model, threshold=0.003)
    assert [each.verdict for each in with_run.decisions] == [each.verdict for each in without.decisions]
    assert with_run.stats.tokens < without.stats.tokens


def test_grounds_that_do_not_fit_are_prepared_anew(monkeypatch):
    """The unpatched runs of all pairs were held at once, so memory grew with the number of pairs."""
    model = make_model("grouped")
    held = find(model, threshold=0.02, batch_size=1)
    monkeypatch.setattr(acdc.CircuitRunner, "grounds_to_hold", lambda self, ground, n_circuits: 1)
    anew = find(model, threshold=0.02, batch_size=1)
    assert [each.verdict for each in held.decisions] == [each.verdict for each in anew.decisions]
    assert anew.stats.forwards > held.stats.forwards + 2 * (anew.stats.circuits_run // 2)


def test_pairs_that_are_held_guess_for_all(monkeypatch):
    """Where pairs had to be run anew for each batch, most of a batch was run in vain behind a wrong guess."""
    model = make_model("grouped")
    held = find(model, threshold=0.02)
    monkeypatch.setattr(acdc.CircuitRunner, "grounds_to_hold", lambda self, ground, n_circuits: 1)
    monkeypatch.setattr(acdc.CircuitRunner, "_pairs_per_group", lambda self: 1)
    monkeypatch.setattr(acdc.CircuitRunner, "rows_per_batch", lambda self, ground: 64)
    with_guesses = find(model, threshold=0.02)
    monkeypatch.setattr(acdc._Search, "_scout", lambda self, plan, masks: None)
    without = find(model, threshold=0.02)
    for found in (with_guesses, without):
        assert [each.verdict for each in found.decisions] == [each.verdict for each in held.decisions]
    assert with_guesses.stats.circuits_run < without.stats.circuits_run


def test_guesses_make_use_of_rows_behind_a_kept_edge(monkeypatch):
    model = make_model("grouped")
    with_guesses = find(model, threshold=0.001)
    monkeypatch.setattr(acdc._Search, "guesses", property(lambda self: {}, lambda self, value: None), raising=False)
    without = find(model, threshold=0.001)
    assert with_guesses.circuit == without.circuit
    assert with_guesses.stats.forwards < without.stats.forwards


def test_an_interruption_keeps_what_was_decided(monkeypatch):
    model = make_model("grouped")
    whole = find(model, threshold=0.001)
    measure, calls = acdc._Search._measure, []

    def stop(self, masks, numbers):
        calls.append(len(masks))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, masks, numbers)

    monkeypatch.setattr(acdc._Search, "_measure", stop)
    with pytest.raises(patching.DiscoveryInterruptedError, match=r"stopped after \d+ of 82 edges \(Keyb") as caught:
        find(model, threshold=0.001)
    partial = caught.value.result
    n_decided = len(partial.decisions)
    assert 0 < n_decided < 82
    assert partial.decisions == whole.decisions[:n_decided]
    gone = [(each.writer, each.reader) for each in partial.decisions if each.verdict != "kept"]
    assert partial.circuit == Circuit.full(model.cfg).without_edges(gone)
    assert partial.stats.decided == n_decided


def test_refusals():
    model = make_model("grouped")
    for threshold in (-0.1, math.nan):
        with pytest.raises(InputError, match=rf"threshold={threshold}; expected a number >= 0 in the metric's units"):
            find(model, threshold=threshold)
    for threshold in (True, "0.1", None, [0.1]):
        with unchecked(), pytest.raises(InputError, match=r"threshold=.*; expected a number >= 0"):
            find(model, threshold=threshold)
    with unchecked():
        assert find(model, threshold=np.float32(0.5)).threshold == 0.5
    for holdout, error in (
        (1.0, "holdout is 1.0, expected a share from 0 to below 1"),
        (0.9, "discover_circuit: holdout=0.9 of 3 pairs leaves none to find a circuit on"),
    ):
        with pytest.raises(InputError, match=error):
            find(model, threshold=0.1, holdout=holdout)
    with pytest.raises(InputError, match="sees all pairs at once, so none can be held out; pass holdout=0"):
        find(model, FunctionMetric(lambda logits: logits[:, -1, 0]), threshold=0.1, holdout=0.25)
    with pytest.raises(InputError, match="a norm follows each branch"):
        find(make_model("capped"), threshold=0.1)
    with pytest.raises(InputError, match="training mode"):
        find(make_model("grouped").train(), threshold=0.1)
    with pytest.raises(patching.MetricError, match="NaN for the unpatched runs"):
        find(model, FunctionMetric(lambda logits: logits[:, -1, 0] * math.nan), threshold=0.1)


def test_nan_names_the_edge():
    calls = []

    def sometimes(logits):
        calls.append(logits)
        return logits[:, -1, 0] * (1.0 if len(calls) <= 5 else math.nan)

    with pytest.raises(
        patching.DiscoveryInterruptedError, match="MetricError: metric sometimes is NaN without the edge"
    ) as caught:
        find(make_model("grouped"), FunctionMetric(sometimes), threshold=math.inf)
    assert len(caught.value.result.decisions) == 3
