import random
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.errors import HookNameError, InputError, TransformError
from hooklens.patching import KL, FunctionMetric, LogitDiff, LogProb
from hooklens.patching.runs.tally import Tally
from tests.annotations import unchecked
from tests.checkpoints import D_VOCAB, build_variant
from tests.model.networks import CONFIGS, activations_of, make_model, pad_rows, random_tokens
from tests.patching.naive import patch_naively
from tests.patching.variants import variants
from tests.slow_cases import slow_but

METRIC = LogitDiff(3, 5)
N_TOKENS = 6


def pair(*, batch=1, n=N_TOKENS, d_vocab=23, n_shared=2):
    """Two batches of tokens that agree in their first tokens."""
    clean, corrupted = (
        random_tokens(batch, n, seed=1, d_vocab=d_vocab),
        random_tokens(batch, n, seed=2, d_vocab=d_vocab),
    )
    corrupted[:, :n_shared] = clean[:, :n_shared]
    return clean, corrupted


def every_grid(model):
    """Grids that name every hook point of a model, by position and at all positions."""
    kinds = {}
    for name in activations_of(model):
        kinds.setdefault(name if not name.startswith("blocks.") else "blocks.*." + name.split(".", 2)[2], name)
    for site, name in kinds.items():
        yield patching.grid(site, positions="each", heads="each")
        yield patching.grid(site, positions="all", heads="all")
        if name.endswith(("pattern", "attn_scores")):
            yield patching.grid(site, positions="each", sources="each", heads=[0, 2])


def assert_exact(model, clean, corrupted, result, tolerance, *, n_cells=2, into_clean=False, seed=0):
    values = result.per_pair.reshape(-1, result.per_pair.shape[-1])
    source, into = (corrupted, clean) if into_clean else (clean, corrupted)
    chosen = random.Random(seed).sample(range(len(values)), min(n_cells, len(values)))
    for index in chosen:
        expected = patch_naively(model, source, into, result.cells[index], METRIC)
        bound = tolerance * (1 + float(expected.abs().max()))
        found = values[index]
        assert bool(((found - expected).abs() <= bound).all()), (result.cells[index], found, expected)


@pytest.mark.parametrize("network", slow_but(CONFIGS, ["grouped", "capped", "shared norm", "learned, tied"]))
def test_every_site_equals_one_full_forward_per_cell(network):
    model = make_model(network)
    clean, corrupted = pair(n=4)
    for grid in every_grid(model):
        # 1e-10: float64 rounding through two layers, far below any real difference.
        result = patching.sweep(model, clean, corrupted, grid, METRIC, progress=False)
        assert_exact(model, clean, corrupted, result, 1e-10, seed=hash(grid.site) % 1000)


@pytest.mark.parametrize("network", ["grouped", "alibi, grouped", "capped", "shared norm"])
def test_long_pasts_are_attended_to_where_they_stand(network, monkeypatch):
    """Past some length the unpatched run's keys are not copied for each row: another way through attention."""
    monkeypatch.setattr("hooklens.patching.sweeps.passes._SHORT_PAST", 0)
    model = make_model(network)
    clean, corrupted = pair(n_shared=3)
    for site in ("resid_pre", "k", "pattern", "mlp_out"):
        result = patching.sweep(model, clean, corrupted, patching.grid(site, positions="each"), METRIC, progress=False)
        assert_exact(model, clean, corrupted, result, 1e-10, n_cells=6)


@pytest.mark.parametrize("network", ["grouped", "rotary", "shared norm"])
def test_the_last_mlp_runs_for_tokens_that_are_read_only(network):
    model = make_model(network)
    clean, corrupted = pair(n_shared=0)
    seen = []
    linear = torch.nn.functional.linear
    W_out = model.blocks[-1].mlp.W_out

    def record(x, weight, bias=None):
        if weight.data_ptr() == W_out.data_ptr():
            seen.append(x.shape[:2].numel())
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", record)
        patching.sweep(model, clean, corrupted, patching.grid("resid_pre", layers=0), METRIC, progress=False)
    # Both unpatched prompts in full, then one token for each patched one.
    assert seen == [2 * N_TOKENS, N_TOKENS]


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(torch.float32, 1e-5, marks=pytest.mark.slow), (torch.float64, 1e-10)]
)
def test_checkpoint_variants(variant, dtype, tolerance):
    model = HookedCausalLM.from_hf(build_variant(variant, dtype=dtype))
    clean, corrupted = pair(n=20 if "dynamic" in variant else N_TOKENS, d_vocab=D_VOCAB)
    sites = [
        patching.grid(word, positions="each", layers=[0, 1]) for word in ("resid_pre", "z", "k", "mlp_out", "pattern")
    ]
    result = patching.sweep(model, clean, corrupted, sites, METRIC, progress=False)
    assert_exact(model, clean, corrupted, result, tolerance, n_cells=8)


@pytest.mark.parametrize(
    ("network", "side"),
    slow_but(
        product(["rotary", "alibi, grouped", "capped", "learned, tied"], ["left", "right"]),
        [("rotary", "left"), ("alibi, grouped", "left"), ("capped", "right"), ("learned, tied", "right")],
    ),
)
def test_padded_batches_equal_single_rows(network, side):
    model = make_model(network)
    lengths = (6, 4, 5)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(3, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], side), pad_rows(rows[1], side)
    for grid in (patching.grid("resid_pre", positions=[-1, 1]), patching.grid("v"), patching.grid("pattern")):
        result = patching.sweep(model, clean, corrupted, grid, METRIC, attention_mask=mask, progress=False)
        for i in range(3):
            alone = patching.sweep(model, rows[0][i][None], rows[1][i][None], grid, METRIC, progress=False)
            torch.testing.assert_close(result.per_pair[..., i], alone.per_pair[..., 0], rtol=0, atol=1e-10)
            assert_exact(model, rows[0][i][None], rows[1][i][None], alone, 1e-10)


@pytest.mark.parametrize("word", ["pattern", "attn_scores"])
def test_a_key_counted_from_the_end_is_each_prompts_own(word):
    """A source `-2` was counted from the end of the batch's longest prompt: the wrong key in all others, silently."""
    model = make_model("grouped")
    lengths = (6, 4, 5)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(3, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], "right"), pad_rows(rows[1], "right")
    for sources in (-2, [-1, 1], [-3, 0]):
        grid = patching.grid(word, positions=[-1, 2], sources=sources, heads=[0, 3])
        result = patching.sweep(model, clean, corrupted, grid, METRIC, attention_mask=mask, progress=False)
        for cell, values in zip(result.cells, result.per_pair.flatten(0, -2), strict=True):
            for i in range(3):
                expected = patch_naively(model, rows[0][i][None], rows[1][i][None], cell, METRIC)
                # 1e-10: float64 rounding through two layers, far below any real difference.
                torch.testing.assert_close(values[[i]], expected, rtol=0, atol=1e-10)
        estimate = patching.attribution(model, clean, corrupted, grid, METRIC, attention_mask=mask)
        for i in range(3):
            alone = patching.attribution(model, rows[0][i][None], rows[1][i][None], grid, METRIC)
            torch.testing.assert_close(estimate.per_pair[..., i], alone.per_pair[..., 0], rtol=0, atol=1e-10)


def test_padded_pairs_under_rotary_frequencies_that_depend_on_length():
    model = HookedCausalLM.from_hf(build_variant("llama-dynamic", dtype=torch.float64))
    lengths = (22, 19)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(2, 22, seed=seed).split(1), lengths, strict=True)]
        for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], "right"), pad_rows(rows[1], "right")
    grid = patching.grid("z", positions=[-1, 3])
    result = patching.sweep(model, clean, corrupted, grid, METRIC, attention_mask=mask, progress=False)
    for i in range(2):
        alone = patching.sweep(model, rows[0][i][None], rows[1][i][None], grid, METRIC, progress=False)
        torch.testing.assert_close(result.per_pair[..., i], alone.per_pair[..., 0], rtol=0, atol=1e-10)
        assert_exact(model, rows[0][i][None], rows[1][i][None], alone, 1e-10)


def test_noise_patches_the_clean_run():
    model = make_model("grouped")
    clean, corrupted = pair(batch=3)
    result = patching.sweep(model, clean, corrupted, "attn_out", METRIC, direction="noise", progress=False)
    assert_exact(model, clean, corrupted, result, 1e-10, n_cells=6, into_clean=True)


def test_zeros_and_tensors_of_ones_own_are_put_in():
    model = make_model("rotary")
    clean, corrupted = pair(batch=2)
    zeroed = patching.sweep(model, clean, corrupted, "z", METRIC, source="zero", progress=False)
    for cell, value in zip(zeroed.cells, zeroed.per_pair.flatten(0, 1), strict=True):
        expected = patch_naively(model, clean, corrupted, cell, METRIC, source="zero")
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    zeros = {f"blocks.{layer}.attn.hook_z": torch.zeros(6) for layer in range(2)}
    given = patching.sweep(model, clean, corrupted, "z", METRIC, source=zeros, progress=False)
    torch.testing.assert_close(given.per_pair, zeroed.per_pair, rtol=0, atol=0)


def test_the_whole_stream_restores_the_clean_run():
    model = make_model("alibi")
    clean, corrupted = pair()
    for word in ("resid_pre", "resid_mid", "resid_post"):
        grid = patching.grid(word, positions="all")
        result = patching.sweep(model, clean, corrupted, grid, KL(), progress=False)
        assert result.values.abs().max() < 1e-12
        assert result.corrupted > 1e-3


def test_patching_a_run_with_itself_changes_nothing():
    model = make_model("grouped", dtype=torch.float32)
    clean, _ = pair()
    result = patching.sweep(model, clean, clean, ["z", "resid_pre", "pattern"], METRIC, progress=False)
    assert bool((result.values == result.corrupted).all())
    assert result.stats.unchanged == result.stats.cells
    assert result.stats.forwards == 1


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_batch_size_changes_nothing_but_the_number_of_passes(batch_size):
    model = make_model("rotary")
    clean, corrupted = pair(batch=2)
    result = patching.sweep(model, clean, corrupted, ["resid_pre", "k"], METRIC, batch_size=batch_size, progress=False)
    whole = patching.sweep(model, clean, corrupted, ["resid_pre", "k"], METRIC, batch_size=10_000, progress=False)
    torch.testing.assert_close(result.per_pair, whole.per_pair, rtol=0, atol=1e-12)
    assert (result.stats.forwards == whole.stats.forwards) == (batch_size == "auto")


@pytest.mark.parametrize("pos", slow_but([-1, 2, [1, 4], None], [[1, 4], None]))
def test_metrics_read_where_they_say(pos):
    """Positions before a patch keep the unpatched run's logits; those after the last one read are not run."""
    model = make_model("capped")
    clean, corrupted = pair(batch=2)
    metric = LogProb(4, pos=pos)
    for grid in ("resid_pre", patching.grid("attn_scores", positions="each")):
        result = patching.sweep(model, clean, corrupted, grid, metric, progress=False)
        for cell, value in zip(result.cells, result.per_pair.flatten(0, -2), strict=True):
            expected = patch_naively(model, clean, corrupted, cell, metric)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 3])
def test_functions_of_logits_are_metrics(batch):
    model = make_model("bare")
    clean, corrupted = pair(batch=batch)
    answers = torch.arange(batch)

    def of_row(logits):
        ids = answers if batch > 1 else torch.zeros(len(logits), dtype=torch.long)
        return logits[torch.arange(len(logits)), -1, ids]

    result = patching.sweep(model, clean, corrupted, "z", of_row, progress=False)
    expected = patching.sweep(model, clean, corrupted, "z", FunctionMetric(of_row), progress=False, batch_size=1)
    torch.testing.assert_close(result.per_pair, expected.per_pair, rtol=0, atol=1e-12)
    for cell, value in zip(result.cells, result.per_pair.flatten(0, -2), strict=True):
        full = patch_naively(model, clean, corrupted, cell, of_row)
        torch.testing.assert_close(value, full, rtol=0, atol=1e-10)


def test_grad_mode_changes_nothing():
    model = make_model("grouped")
    clean, corrupted = pair()
    with torch.no_grad():
        without = patching.sweep(model, clean, corrupted, "resid_mid", METRIC, progress=False)
    with torch.inference_mode():
        inference = patching.sweep(model, clean, corrupted, "resid_mid", METRIC, progress=False)
    with_grad = patching.sweep(model, clean, corrupted, "resid_mid", METRIC, progress=False)
    assert torch.equal(with_grad.per_pair, without.per_pair)
    assert torch.equal(with_grad.per_pair, inference.per_pair)
    assert not with_grad.per_pair.requires_grad


@pytest.mark.parametrize(("batch_size", "n_batches"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_batches_are_as_large_as_they_may_be(batch_size, n_batches):
    """Four heads of one layer at one position: rows that can share a batch fill it."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(1, N_TOKENS, seed=1), random_tokens(1, N_TOKENS, seed=2)
    grid = patching.grid("z", layers=0, positions=-1)
    stats = patching.sweep(model, clean, corrupted, grid, METRIC, batch_size=batch_size, progress=False).stats
    assert (stats.cells, stats.unchanged) == (4, 0)
    unpatched = patching.sweep(model, clean, clean, grid, METRIC, batch_size=batch_size, progress=False).stats
    assert stats.forwards - unpatched.forwards == n_batches


def test_stats_count_less_than_the_naive_way():
    model = make_model("rotary")
    clean, corrupted = pair(n_shared=0)
    stats = patching.sweep(model, clean, corrupted, "resid_pre", METRIC, progress=False).stats
    assert (stats.cells, stats.pairs, stats.naive_forwards, stats.naive_tokens) == (12, 1, 14, 14 * N_TOKENS)
    assert stats.forwards == 2
    # Both unpatched prompts; 6 + 5 + ... + 1 = 21 tokens in four rows of six per layer, run through 2 and 1 layers.
    assert stats.tokens == 2 * N_TOKENS + (24 * 2 + 24) / 2


def test_model_is_left_as_it_was():
    model = make_model("grouped")
    clean, corrupted = pair()
    before = model(corrupted)
    patching.sweep(model, clean, corrupted, ["z", "ln_final.hook_scale", "pattern"], METRIC, progress=False)
    assert torch.equal(model(corrupted), before)
    assert not any(point.listening for point in model.hook_points().values())


class _Stops:
    """A metric function that fails at its n-th call."""

    def __init__(self, error, at):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, logits):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return logits[:, -1, 0]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_interrupted_sweeps_keep_what_they_have(error):
    model = make_model("bare")
    clean, corrupted = pair(n_shared=0)
    stops = _Stops(error, at=6)
    with pytest.raises(patching.SweepInterruptedError, match=r"stopped after 3 of 12 values") as caught:
        patching.sweep(model, clean, corrupted, "resid_pre", stops, batch_size=1, progress=False)
    partial = caught.value.result
    assert int((~partial.values.isnan()).sum()) == 3
    assert len(partial.to_dataframe()) == 12


class _Interrupt:
    """Ctrl-C at the n-th line of the package that runs after the first unpatched runs; later lines run as ever."""

    def __init__(self, at):
        self.at, self.lines, self.begun = at, 0, False

    def begin(self, tally, *given):
        _BEGIN(tally, *given)
        self.begun = True

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(_FOLDER):
            return None
        if event == "line" and self.begun:
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self.trace


_BEGIN = Tally.begin
_FOLDER = str(Path(patching.__file__).parent)


def _run_with_interrupt(run, at, monkeypatch):
    """How many lines a call runs after its first unpatched runs, and what it raised."""
    interrupt, caught = _Interrupt(at), None

    def begin(tally, *given):
        interrupt.begin(tally, *given)

    monkeypatch.setattr(Tally, "begin", begin)
    before = sys.gettrace()
    sys.settrace(interrupt.trace)
    try:
        run()
    except BaseException as error:
        caught = error
    finally:
        sys.settrace(before)
        monkeypatch.setattr(Tally, "begin", _BEGIN)
    return interrupt.lines, caught


def test_an_interrupt_at_any_line_keeps_what_was_measured(monkeypatch):
    """Ctrl-C between the first unpatched runs and the progress bar, or on the way out of it, lost everything."""
    model = make_model("bare")
    clean, corrupted = pair(batch=2, n_shared=0)
    monkeypatch.setattr("hooklens.patching.sweeps.run.pairs_per_group", lambda *given: 1)
    site = patching.grid("resid_pre", layers=-1, positions=3)

    def run():
        return patching.sweep(model, clean, corrupted, site, METRIC, batch_size=1, progress=False)

    whole = run()
    n_lines, _ = _run_with_interrupt(run, 0, monkeypatch)
    # A prime apart, so that each turn of a loop is met in other places; all lines take a minute.
    for at in range(1, n_lines + 1, 41):
        _, caught = _run_with_interrupt(run, at, monkeypatch)
        assert isinstance(caught, patching.SweepInterruptedError), f"line {at} of {n_lines}: {caught!r}"
        kept = caught.result.per_pair
        known = ~kept.isnan()
        assert kept.shape == whole.per_pair.shape
        assert torch.equal(kept[known], whole.per_pair[known])
    assert n_lines > 200
    assert torch.equal(run().per_pair, whole.per_pair)


def test_nan_names_the_cell():
    model = make_model("bare")
    clean, corrupted = pair(n_shared=0)

    def nan_when_far(logits):
        values = logits[:, -1, 0]
        # 1e-9: the sweep's batches round in another order.
        return torch.where((values - base).abs() < 1e-9, values, torch.nan)

    base = model(corrupted)[0, -1, 0]
    # The baseline is compared with itself, so that only cells give NaN.
    with pytest.raises(patching.SweepInterruptedError, match=r"NaN for the patch at blocks\.0\.hook_resid_pre, pos 0"):
        patching.sweep(model, corrupted, corrupted, "resid_pre", nan_when_far, source=_ones(model), progress=False)
    with pytest.raises(patching.MetricError, match="NaN for the unpatched runs of pairs \\[0\\]"):
        patching.sweep(model, clean, corrupted, "resid_pre", lambda x: x[:, 0, 0] * torch.nan, progress=False)


def _ones(model):
    return {f"blocks.{layer}.hook_resid_pre": torch.ones(model.cfg.d_model) for layer in range(model.cfg.n_layers)}


def test_bad_calls_are_refused_before_anything_is_patched():
    model = make_model("grouped")
    clean, corrupted = pair()

    def refuse(error, match, *args, **options):
        with unchecked(), pytest.raises(error, match=match):
            patching.sweep(*args, progress=False, **options)

    refuse(InputError, r"pair 0: 6 clean and 5 corrupted tokens", model, clean, corrupted[:, 1:], "z", METRIC)
    mask = torch.ones(1, N_TOKENS)
    refuse(InputError, "attention_mask goes with token ids", model, "a", "b", "z", METRIC, attention_mask=mask)
    whole = patching.Pair(clean[0], corrupted[0])
    refuse(InputError, "a prompt is a Pair; expected text", model, whole, whole, "z", METRIC)
    refuse(InputError, "1 clean prompts and 2 corrupted", model, clean, corrupted.repeat(2, 1), "z", METRIC)
    refuse(HookNameError, "Did you mean 'resid_pre'", model, clean, corrupted, "resid_pr", METRIC)
    refuse(patching.SiteError, r"positions: \[6\] out of range; there are 6 tokens", model, clean, corrupted,
           patching.grid("z", positions=[1, 6]), METRIC)  # fmt: skip
    refuse(
        patching.SiteError, r"heads: \[4\] out of range", model, clean, corrupted, patching.grid("z", heads=4), METRIC
    )
    refuse(
        patching.MetricError, r"returned shape \[\] .*one value per row, \[1\]", model, clean, corrupted, "z", torch.sum
    )
    refuse(patching.MetricError, "got int", model, clean, corrupted, "z", 3)
    refuse(patching.SiteError, r"reads positions \[9\]", model, clean, corrupted, "z", LogitDiff(3, 5, pos=9))
    refuse(InputError, r"answer: token ids \[99\] are outside", model, clean, corrupted, "z", LogitDiff(99, 5))
    refuse(InputError, "2 tokens for 1 pairs", model, clean, corrupted, "z", LogitDiff([1, 2], 5))
    refuse(
        InputError, "direction is 'both', expected 'denoise'", model, clean, corrupted, "z", METRIC, direction="both"
    )
    refuse(InputError, "batch_size is 0", model, clean, corrupted, "z", METRIC, batch_size=0)
    refuse(patching.SiteError, "has none for 'blocks.0.attn.hook_z'", model, clean, corrupted, "z", METRIC, source={})
    with model.add_hook("z", lambda tensor, hook: None):
        refuse(InputError, "hooks are attached to 2 hook points", model, clean, corrupted, "z", METRIC)
    model.train()
    refuse(InputError, r"training mode; call model.eval\(\)", model, clean, corrupted, "z", METRIC)
    patching.sweep(model, clean, corrupted, "z", METRIC, allow_training=True, progress=False)


def test_caches_of_otherwise_processed_models_are_refused():
    """The cache of the unprocessed model went into a processed one without a word."""
    model = make_model("grouped")
    processed = model.process_weights(fold_ln=True)
    clean, corrupted = pair()
    _, cache = model.run_with_cache(clean)
    for patch in (
        lambda: patching.sweep(processed, clean, corrupted, "z", METRIC, source=cache, progress=False),
        lambda: patching.get_act_patch_resid_pre(processed, corrupted, cache, METRIC),
        lambda: patching.generic_activation_patch(
            processed, corrupted, cache, METRIC, lambda old, index, new: new, "resid_pre", ["layer"]
        ),
    ):
        with pytest.raises(TransformError, match="fold_ln"):
            patch()
    assert patching.get_act_patch_resid_pre(model, corrupted, cache, METRIC).shape == (2, N_TOKENS)
