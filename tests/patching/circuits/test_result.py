import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hooklens.errors import CheckpointError, HookLensError
from hooklens.patching import Circuit, CircuitResult, SweepStats
from hooklens.patching.results.statistics import bootstrap_interval, permutation_p_value
from tests.annotations import unchecked
from tests.checkpoints import load_apart

STATS = SweepStats(cells=2, pairs=3, unchanged=0, forwards=4, tokens=5.5, naive_forwards=6, naive_tokens=7)
RESULT = CircuitResult(
    circuits=(Circuit([("embed", "m0"), ("m0", "logits")]), Circuit([("a0.h1", "logits")])),
    labels=("mlp", 7),
    per_pair=torch.tensor([[1.0, 3.0, 2.0], [6.0, 5.0, 10.0]]).double(),
    full_per_pair=torch.tensor([4.0, 5.0, 6.0]).double(),
    empty_per_pair=torch.tensor([-1.0, 1.0, 0.0]).double(),
    metric="LogitDiff",
    ablation="resample",
    stats=STATS,
)


def test_faithfulness_of_both_papers():
    """The ratio of Hanna et al. stood under the bare name, and the difference of Wang et al. was not to be had."""
    # Means: circuits 2 and 7, the network 5, nothing 0.
    assert (RESULT.full, RESULT.empty) == (5.0, 0.0)
    assert RESULT.faithfulness_hanna.tolist() == pytest.approx([0.4, 1.4])
    assert RESULT.faithfulness_wang.tolist() == pytest.approx([3.0, 2.0])
    assert torch.equal(RESULT.normalized, RESULT.faithfulness_hanna)


def test_standard_errors():
    assert RESULT.standard_errors.tolist() == pytest.approx([1 / math.sqrt(3), math.sqrt(7) / math.sqrt(3)])
    alone = replace(
        RESULT,
        per_pair=RESULT.per_pair[:, :1],
        full_per_pair=RESULT.full_per_pair[:1],
        empty_per_pair=RESULT.empty_per_pair[:1],
    )
    assert bool(alone.standard_errors.isnan().all())
    assert bool(alone.faithfulness_hanna_errors.isnan().all())


def test_errors_of_a_ratio_are_those_of_many_samples():
    """Against the spread of the ratio over draws of 200 pairs."""
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(400):
        shared, own, noise = torch.randn(3, 200, generator=generator, dtype=torch.float64)
        draws.append(
            replace(
                RESULT,
                circuits=RESULT.circuits[:1],
                labels=("one",),
                per_pair=(2.0 + shared + 0.5 * own)[None],
                full_per_pair=4.0 + 1.5 * shared,
                empty_per_pair=0.3 * noise,
            )
        )
    found = torch.cat([draw.faithfulness_hanna for draw in draws])
    expected = torch.cat([draw.faithfulness_hanna_errors for draw in draws]).mean()
    # The spread of 400 draws is known to a twentieth; three times that.
    assert float(expected) == pytest.approx(float(found.std()), rel=0.15)


def test_table_and_plot():
    table = RESULT.to_dataframe()
    assert table["circuit"].tolist() == ["mlp", 7]
    assert table["edges"].tolist() == [2, 1]
    assert table["heads"].tolist() == [0, 1]
    assert table["faithfulness_hanna"].tolist() == pytest.approx([0.4, 1.4])
    assert table["faithfulness_wang"].tolist() == pytest.approx([3.0, 2.0])
    assert table["standard_error"].tolist() == pytest.approx(RESULT.standard_errors.tolist())
    figure = RESULT.plot(backend="matplotlib", title="kept")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["mlp", "7"]
    same = replace(RESULT, full_per_pair=RESULT.empty_per_pair)
    with pytest.raises(HookLensError, match="no scale between them; faithfulness_wang needs none"):
        _ = same.faithfulness_hanna
    assert "faithfulness_hanna" not in same.to_dataframe()
    assert same.to_dataframe()["faithfulness_wang"].tolist() == pytest.approx([2.0, 7.0])


def test_round_trip(tmp_path):
    path = tmp_path / "circuits.safetensors"
    RESULT.save(path)
    loaded = CircuitResult.load(path)
    assert (loaded.circuits, loaded.labels, loaded.stats) == (RESULT.circuits, RESULT.labels, RESULT.stats)
    assert (loaded.metric, loaded.ablation, loaded.axes) == ("LogitDiff", "resample", RESULT.axes)
    for name in ("per_pair", "full_per_pair", "empty_per_pair"):
        assert torch.equal(getattr(loaded, name), getattr(RESULT, name))
    assert list(tmp_path.iterdir()) == [path]


DAMAGED = {
    "labels": [None, ["mlp", 1.5], "ab", {}],
    "circuits": [None, [[]], [[], [["embed", "embed"]]], [[], 3], [[], [3]], [["embed", "logits"], []]],
    "metric": [None, 3],
    "ablation": [None, ["zero"]],
    "stats": [None, {}, {"cells": 2}, 5],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in DAMAGED.items() for value in values])
def test_damaged_descriptions_are_refused(tmp_path, key, value):
    path = tmp_path / "circuits.safetensors"
    RESULT.save(path)
    described = json.loads(_metadata(path)["description"])
    described[key] = value
    _rewrite(path, description=json.dumps(described))
    with pytest.raises(CheckpointError, match=rf"circuits\.safetensors is damaged: key '{key}'"):
        CircuitResult.load(path)


def test_other_damage_is_refused(tmp_path):
    path = tmp_path / "circuits.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot read circuits' values from .*circuits\.safetensors"):
        CircuitResult.load(path)
    RESULT.save(path)
    whole = path.read_bytes()
    for text in ("", "[" * 5000, "3"):
        _rewrite(path, description=text)
        with pytest.raises(CheckpointError, match="is damaged: key 'description' is"):
            CircuitResult.load(path)
    for name in ("per_pair", "full_per_pair", "empty_per_pair"):
        for tensor in (None, torch.zeros(2, 5), torch.zeros(3, dtype=torch.long)):
            path.write_bytes(whole)
            _rewrite(path, tensors={name: tensor})
            with pytest.raises(CheckpointError, match=r"is damaged: (key|it holds the tensors) .*per_pair'"):
                CircuitResult.load(path)
    for n in range(0, len(whole), 97):
        path.write_bytes(whole[:n])
        with pytest.raises(CheckpointError, match=r"circuits\.safetensors"):
            CircuitResult.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(
        CheckpointError, match=r"does not hold circuits' values; expected a file that CircuitResult.save wrote"
    ):
        CircuitResult.load(path)


def _metadata(path):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


def _rewrite(path, *, tensors=(), **metadata):
    kept = {name: tensor for name, tensor in {**load_apart(path), **dict(tensors)}.items() if tensor is not None}
    kept_metadata = {key: value for key, value in {**_metadata(path), **metadata}.items() if key != "digest"}
    save_file(kept, path, metadata=kept_metadata)


def many_pairs():
    """Twelve pairs; circuits that do what the network does up to noise, half of it, and all of it."""
    generator = torch.Generator().manual_seed(3)
    full, empty, noise = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    full, empty = 5.0 + full, 0.2 * empty
    values = torch.stack([full + 0.3 * (noise - noise.mean()), full / 2 + 0.1 * noise, full])
    return CircuitResult(
        circuits=(RESULT.circuits[0], RESULT.circuits[1], Circuit()),
        labels=("like", "half", "whole"),
        per_pair=values,
        full_per_pair=full,
        empty_per_pair=empty,
        metric="LogitDiff",
        ablation="resample",
        stats=STATS,
    )


def test_intervals_and_p_values_are_scipys():
    """Only sweeps had them."""
    stats = pytest.importorskip("scipy.stats")
    result = many_pairs()
    kept, whole = (result.per_pair - result.empty_per_pair).numpy(), result.full_per_pair - result.empty_per_pair
    found = result.bootstrap_faithfulness(n_resamples=499)
    for row in (0, 1):
        expected = stats.bootstrap(
            (kept[row], whole.numpy()),
            lambda a, b, axis=-1: a.mean(axis) / b.mean(axis),
            paired=True,
            n_resamples=499,
            random_state=np.random.default_rng(0),
        ).confidence_interval
        assert (float(found.low[row]), float(found.high[row])) == pytest.approx(tuple(expected), abs=1e-12)
    assert (float(found.low[2]), float(found.high[2])) == pytest.approx((1.0, 1.0))
    assert torch.equal(result.bootstrap(n_resamples=99).low, bootstrap_interval(result.per_pair, n_resamples=99).low)
    p_values = result.permutation_test()
    assert torch.equal(p_values, permutation_p_value(result.per_pair, result.full_per_pair))
    assert float(p_values[0]) > 0.9
    assert float(p_values[1]) < 0.01
    assert float(p_values[2]) == 1.0


def test_intervals_of_wangs_faithfulness_hold_what_the_difference_may_be():
    pytest.importorskip("scipy")
    result = many_pairs()
    found = result.bootstrap_faithfulness("wang", n_resamples=499)
    low, high = bootstrap_interval(result.full_per_pair - result.per_pair, n_resamples=499)
    assert float(low[0]) < 0 < float(high[0])
    assert (float(found.low[0]), float(found.high[0])) == (0.0, max(-float(low[0]), float(high[0])))
    assert (float(found.low[1]), float(found.high[1])) == (float(low[1]), float(high[1]))
    assert float(found.low[1]) <= float(result.faithfulness_wang[1]) <= float(found.high[1])
    with unchecked(), pytest.raises(HookLensError, match="definition is 'chan', expected 'hanna' or 'wang'"):
        result.bootstrap_faithfulness("chan")


@pytest.mark.parametrize("mark", ["bootstrap", "permutation_test"])
def test_tables_and_plots_have_them_on_request(mark):
    pytest.importorskip("scipy")
    result = many_pairs()
    table = result.to_dataframe(statistics=["bootstrap", "permutation_test"])
    assert {"low", "high", "p_value", "faithfulness_hanna_low", "faithfulness_wang_high"} <= set(table.columns)
    assert table["faithfulness_hanna_low"].tolist() == result.bootstrap_faithfulness().low.tolist()
    assert table["high"].tolist() == result.bootstrap().high.tolist()
    assert "low" not in result.to_dataframe()
    assert len(set(table.columns)) == len(table.columns)
    with unchecked(), pytest.raises(HookLensError, match="statistics is 'variance'"):
        result.to_dataframe(statistics=["variance"])
    figure = result.plot(mark=mark)
    assert list(figure.data[0].text[0]) == ["\N{MULTIPLICATION SIGN}", "", "\N{MULTIPLICATION SIGN}"]
    assert "not told from the network" in figure.layout.title.text
    with pytest.raises(HookLensError, match="needs at least two pairs"):
        replace(
            result,
            per_pair=result.per_pair[:, :1],
            full_per_pair=result.full_per_pair[:1],
            empty_per_pair=result.empty_per_pair[:1],
        ).to_dataframe(statistics=[mark])
