import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import KL, LogitDiff, LogProb
from hooklens.patching.estimates import attribution
from hooklens.patching.estimates.gradients import fractions_of
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens
from tests.patching.naive import cell_index

SITES = [
    patching.grid("resid_pre"),
    patching.grid("mlp_out", positions="all"),
    patching.grid("z", positions="each"),
    patching.grid("k"),
    patching.grid("pattern", positions="each", sources="each", heads=[1, 3]),
    patching.grid("attn_scores"),
    patching.grid("hook_embed"),
    patching.grid("q_input"),
    patching.grid("ln_final.hook_normalized"),
]


@torch.no_grad()
def finite_difference(model, clean, corrupted, cell, metric, *, step=1e-4):
    """The metric's derivative as one cell's activation moves from the corrupted run's to the clean run's."""
    name = cell["site"]
    index = cell_index(cell, name)
    _, cache = model.run_with_cache(clean, names_filter=name)

    def value(fraction):
        def move(tensor, hook):
            moved = tensor.clone()
            change = cache[name] - tensor
            moved[index] = (tensor + fraction * torch.where(change.isnan(), 0.0, change))[index]
            return moved

        return metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, move)]))

    return (value(step) - value(-step)) / (2 * step)


@pytest.mark.parametrize("network", ["grouped", "alibi", "shared norm", "capped"])
def test_equals_finite_differences(network):
    model = make_model(network)
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    metric = LogProb([3, 4])
    result = patching.attribution(model, clean, corrupted, SITES, metric, rules="gradient")
    effects = result.per_pair - result.corrupted_per_pair
    for i in range(0, len(result.cells), 11):
        expected = finite_difference(model, clean, corrupted, result.cells[i], metric)
        # Central differences of step 1e-4 are off by the third derivative times 1e-8.
        torch.testing.assert_close(effects[i], expected, rtol=1e-4, atol=1e-4)


def test_parameters_need_no_gradients_and_get_none():
    model = make_model("rotary").requires_grad_(False)
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    frozen = patching.attribution(model, clean, corrupted, "z", LogitDiff(3, 5))
    model.requires_grad_(True)
    with torch.no_grad():
        trainable = patching.attribution(model, clean, corrupted, "z", LogitDiff(3, 5))
    assert torch.equal(frozen.per_pair, trainable.per_pair)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_padding_changes_nothing():
    model = make_model("learned, tied")
    lengths = (6, 4)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(2, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], "left"), pad_rows(rows[1], "left")
    sites = [patching.grid("resid_mid", positions=-1), patching.grid("v")]
    together = patching.attribution(model, clean, corrupted, sites, LogitDiff(3, 5), attention_mask=mask)
    for i in range(2):
        alone = patching.attribution(model, rows[0][i][None], rows[1][i][None], sites, LogitDiff(3, 5))
        torch.testing.assert_close(together.per_pair[..., i], alone.per_pair[..., 0], rtol=0, atol=1e-10)


def test_integrated_gradients_of_the_embedding_sum_to_the_whole_difference():
    """Completeness (Sundararajan et al. 2017): over all embeddings they add up to what lies between the runs."""
    model = make_model("grouped")
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    site = patching.grid("hook_embed", positions="all")
    result = patching.attribution(model, clean, corrupted, site, LogitDiff(3, 5), method="ig", rules=[], steps=50)
    # The midpoint rule's error falls with the square of the steps; norms bend sharply near these embeddings.
    torch.testing.assert_close(result.per_pair, result.clean_per_pair, rtol=0, atol=0.02)


@pytest.mark.parametrize(("method", "steps"), [("atp", 8), ("ig", 3)])
def test_stats_are_the_forwards_that_ran(method, steps):
    """Both unpatched prompts are one batch; then one forward per gradient, and where the embeddings move also one of
    the run as it is. One full forward per cell and prompt, and two unpatched ones, is what it is compared with."""
    model = make_model("rotary")
    lengths = (6, 4)
    pairs = [
        [row[0, :n] for row, n in zip(random_tokens(2, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(pairs[0], "right"), pad_rows(pairs[1], "right")
    rows = []
    model.blocks[-1].register_forward_pre_hook(lambda block, inputs: rows.append(len(inputs[0])))
    # A forward reaches the last block; reading the embeddings of the other run does not.
    result = patching.attribution(
        model,
        clean,
        corrupted,
        patching.grid("z", positions=-1),
        LogitDiff(3, 5),
        method=method,
        steps=steps,
        attention_mask=mask,
    )
    n_cells = model.cfg.n_layers * model.cfg.n_heads
    stats = result.stats
    assert stats.forwards == len(rows)
    # Each of two prompts is a row with all its tokens, in the unpatched batch, too.
    assert stats.tokens == sum(rows) // len(lengths) * sum(lengths)
    assert (stats.cells, stats.pairs, stats.unchanged) == (n_cells, 2, 0)
    assert stats.naive_forwards == (n_cells + 2) * 2
    assert stats.naive_tokens == (n_cells + 2) * sum(lengths)


def test_points_between_the_runs():
    """Counted from the corrupted run; a run that is patched from the clean end counts from there."""
    assert fractions_of("right", 2, direction="denoise") == [0.5, 1.0]
    assert fractions_of("left", 2, direction="denoise") == [0.0, 0.5]
    assert fractions_of("midpoint", 2, direction="denoise") == [0.25, 0.75]
    assert fractions_of("right", 2, direction="noise") == [0.5, 0.0]
    assert fractions_of("left", 2, direction="noise") == [1.0, 0.5]


def test_groups_of_pairs_change_nothing():
    """Memory would grow with the pairs if all of them ran at once."""
    model = make_model("grouped")
    clean, corrupted = random_tokens(5, 6, seed=1), random_tokens(5, 6, seed=2)
    sites = [patching.grid("z", positions="each"), patching.grid("pattern")]
    for method in ("atp", "ig"):
        options = {"method": method, "steps": 3, "progress": False}
        whole = patching.attribution(model, clean, corrupted, sites, LogitDiff([3, 4, 5, 6, 7], 1), **options)
        parts = patching.attribution(
            model, clean, corrupted, sites, LogitDiff([3, 4, 5, 6, 7], 1), batch_size=2, **options
        )
        torch.testing.assert_close(parts.per_pair, whole.per_pair, rtol=0, atol=1e-12)
        assert parts.stats.forwards == 3 * whole.stats.forwards
        assert parts.stats.tokens == whole.stats.tokens


def test_stopped_on_the_way(monkeypatch):
    model = make_model("grouped")
    clean, corrupted = random_tokens(3, 6, seed=1), random_tokens(3, 6, seed=2)
    expected = patching.attribution(model, clean, corrupted, "z", LogitDiff(3, 5), progress=False)
    run_group, calls = attribution._AttributionRun._run_group, []

    def stop(self, group):
        calls.append(group)
        if len(calls) == 3:
            raise KeyboardInterrupt
        run_group(self, group)

    monkeypatch.setattr(attribution._AttributionRun, "_run_group", stop)
    with pytest.raises(patching.SweepInterruptedError, match="attribution stopped after 16 of 24 values") as caught:
        patching.attribution(model, clean, corrupted, "z", LogitDiff(3, 5), batch_size=1, progress=False)
    found = caught.value.result.per_pair
    torch.testing.assert_close(found[..., :2], expected.per_pair[..., :2], rtol=0, atol=1e-12)
    assert bool(found[..., 2].isnan().all())


def test_noise_and_refusals():
    model = make_model("bare")
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    noise = patching.attribution(model, clean, corrupted, "z", LogitDiff(3, 5), direction="noise")
    swapped = patching.attribution(model, corrupted, clean, "z", LogitDiff(3, 5))
    torch.testing.assert_close(noise.per_pair, swapped.per_pair, rtol=0, atol=0)
    with unchecked(), pytest.raises(InputError, match="method is 'eap', expected 'atp' or 'ig'"):
        patching.attribution(model, clean, corrupted, "z", KL(), method="eap")
    with pytest.raises(InputError, match="steps is 0, expected a whole number >= 1"):
        patching.attribution(model, clean, corrupted, "z", KL(), method="ig", steps=0)
    with pytest.raises(InputError, match="has no gradient"):
        patching.attribution(model, clean, corrupted, "z", patching.Accuracy(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda model, *pair: patching.attribution(model, *pair, "z", LogitDiff(3, 5)).values,
        lambda model, *pair: patching.edge_attribution(model, *pair, LogitDiff(3, 5), method="eap-ig", steps=2).scores,
    ],
)
def test_inference_mode_is_left_for_the_gradients(make):
    """Prompts were read under inference mode, and their ids could not be saved for the backward pass."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    expected = make(model, clean, corrupted)
    with torch.inference_mode():
        model(clean)
        found = make(model, clean.clone(), corrupted.clone())
    assert torch.equal(found, expected)
