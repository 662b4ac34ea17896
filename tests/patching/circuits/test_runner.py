import pytest
import torch

from hooklens.errors import InputError
from hooklens.patching import Circuit, FunctionMetric, LogProb
from hooklens.patching.circuits import runner as module
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.pairs.prompts import read_pairs
from hooklens.patching.paths.passes import share_of_mlp
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(5, 6, seed=1), random_tokens(5, 6, seed=2)
PROMPTS = read_pairs(MODEL, CLEAN, CORRUPTED)
METRIC = LogProb(4)


def runner(metric=METRIC, batch_size="auto", ablation="resample"):
    return CircuitRunner(MODEL, PROMPTS, metric, ablation=ablation, batch_size=batch_size)


@torch.no_grad()
def test_sizes_follow_the_batch_size():
    assert list(runner(batch_size=2).groups()) == [[0, 1], [2, 3], [4]]
    assert list(runner(batch_size=100).groups()) == [[0, 1, 2, 3, 4]]
    # A function of all logits cannot be measured for some pairs alone.
    together = runner(FunctionMetric(lambda logits: logits[:, -1, 0]), batch_size=2)
    assert list(together.groups()) == [[0, 1, 2, 3, 4]]
    assert together.rows_per_batch(together.prepare([0, 1, 2, 3, 4])) == 1
    wide = runner(batch_size=23)
    assert wide.rows_per_batch(wide.prepare([0, 1, 2, 3, 4])) == 4


@torch.no_grad()
def test_sizes_follow_the_memory(monkeypatch):
    ample = runner()
    assert list(ample.groups()) == [[0, 1, 2, 3, 4]]
    rows = ample.rows_per_batch(ample.prepare([0, 1]))
    assert rows > 10
    monkeypatch.setattr(module, "assume_free_bytes", lambda device: 1000)
    scarce = runner()
    assert list(scarce.groups()) == [[0], [1], [2], [3], [4]]
    assert scarce.rows_per_batch(scarce.prepare([0])) == 1


@torch.no_grad()
def test_counts():
    """Both unpatched prompts ran twice: once for the metric, and once for what every node writes."""
    counted = runner()
    ground = counted.prepare([0, 1, 2, 3, 4])
    unpatched = 2 * 5 * 6 * 2
    assert (counted.forwards, counted.token_layers) == (1, unpatched)
    full = Circuit.full(MODEL.cfg)
    counted.measure(ground, full.without_edges([("m1", "logits")]).to_mask(MODEL.cfg)[None])
    assert (counted.forwards, counted.token_layers) == (1, unpatched)
    # The last MLP alone, at the position that is read.
    late = full.without_edges([("m0", "m1")]).to_mask(MODEL.cfg)
    counted.measure(ground, torch.stack([late, late, late]))
    share = share_of_mlp(MODEL.blocks[0])
    assert (counted.forwards, counted.token_layers) == (2, pytest.approx(unpatched + 3 * 5 * share))
    # A head of the last block, and the MLP behind it.
    head = full.without_edges([("m0", "a1.h0.q")]).to_mask(MODEL.cfg)
    before = counted.token_layers
    counted.measure(ground, head[None])
    assert counted.token_layers - before == pytest.approx(5 * (ground.width * (1 - share) + share))


@torch.no_grad()
@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_counts_are_what_ran(ablation):
    """Both unpatched prompts are one batch; means over the corrupted prompts come before."""
    ran = []
    handle = MODEL.blocks[0].register_forward_pre_hook(lambda block, inputs: ran.append(inputs[0].shape[:2].numel()))
    try:
        counted = runner(ablation=ablation, batch_size=3)
        counted.prepare([0, 1, 2])
    finally:
        handle.remove()
    assert counted.forwards == len(ran)
    assert counted.token_layers == sum(ran) * MODEL.cfg.n_layers


@torch.no_grad()
def test_the_ablated_run_is_that_of_the_empty_circuit():
    for ablation in ("resample", "mean", "zero"):
        measured = runner(ablation=ablation)
        ground = measured.prepare([0, 1, 2, 3, 4])
        empty = measured.measure(ground, Circuit().to_mask(MODEL.cfg)[None])[0]
        torch.testing.assert_close(measured.measure_ablated(ground), empty, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_sizes_below_one(batch_size):
    with pytest.raises(InputError, match=f"batch_size is {batch_size}; expected 'auto' or a number of rows >= 1"):
        runner(batch_size=batch_size)
