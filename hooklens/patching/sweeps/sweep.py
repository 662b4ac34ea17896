"""The sweep: activation patching over a grid of sites.

Activation patching (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; Wang et al. 2022;
Heimersheim and Nanda 2024, "How to use and interpret activation patching") runs a model on one prompt and
replaces one activation by its value on another prompt:

    value(cell) = metric( model(into) with activation(cell) := activation(cell) in the other run )

With `direction="denoise"` a clean activation goes into the corrupted run, and a high value says that the site
carries enough to restore the behaviour; with `"noise"` it is the other way round, and a low value says that the
behaviour needs the site.

What is run is planned, and every shortcut gives what one full forward per cell would, up to rounding:

- cells are rows of a batch, each with its own patch;
- a row enters at the layer that it is patched in, with the unpatched run's stream (`passes`);
- only positions from the first one that the patch changes are run, on the unpatched run's keys and values, and
  rows of few positions share a row of the batch (`packing`);
- positions past the last one that the metric reads are not run, and only those it reads are unembedded;
- a patch that puts in what was there already is not run at all.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar, overload

from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import reads, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.optional import import_package
from hooklens.patching.errors import SiteError
from hooklens.patching.metrics.function import MetricFunction
from hooklens.patching.metrics.group import MetricGroup, Metrics
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, PairSource, read_source
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.results.result import SweepResult
from hooklens.patching.results.several import Results
from hooklens.patching.runs.baseline import Direction
from hooklens.patching.runs.checks import check_source
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.other_model import check_other_model
from hooklens.patching.runs.sites import CellArray, Sites, lay_out
from hooklens.patching.runs.unpatched import Source
from hooklens.patching.sweeps.ray_run import RaySweepRun
from hooklens.patching.sweeps.run import SweepRun
from hooklens.workers import Engine, check_portable, read_engine

Run = TypeVar("Run", bound=SweepRun)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hooklens.patching.runs.options import RunKeywords

    class SweepKeywords(RunKeywords, total=False):
        """The keywords of a sweep."""

        direction: Direction
        source: Source
        engine: Engine
        workers: int | None


if TYPE_CHECKING:

    @overload
    def sweep(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None = ...,
        sites: Sites | None = ...,
        metric: Metric | MetricFunction | None = ...,
        **options: Unpack[SweepKeywords],
    ) -> SweepResult: ...
    @overload
    def sweep(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None = ...,
        sites: Sites | None = ...,
        *,
        metric: Mapping[str, Metric | MetricFunction],
        **options: Unpack[SweepKeywords],
    ) -> Results[SweepResult]: ...
    @overload
    def sweep(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None,
        sites: Sites | None,
        metric: Mapping[str, Metric | MetricFunction],
        **options: Unpack[SweepKeywords],
    ) -> Results[SweepResult]: ...


@reads()
def sweep(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    sites: Sites | None = None,
    metric: Metrics | None = None,
    *,
    batch_size: BatchSize = "auto",
    direction: Direction = "denoise",
    source: Source = "other",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    engine: Engine = "local",
    workers: int | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> SweepResult | Results[SweepResult]:
    """Patch every cell of a grid and measure what it does.

    Args:
        model: the model; nothing may be attached to its hook points.
        clean: prompts whose behaviour is studied: text, a list of texts, or token ids. With `corrupted=None` a
            `Pair`, a list of pairs, or a loader of them (see `hooklens.patching.pairs.loader`), which is read group
            by group, so that thousands of pairs need no more memory than a few.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        sites: a hook word (`"resid_pre"`), a `patching.grid(...)`, or a list of these.
        metric: a value such as `patching.LogitDiff(answer, wrong)`, or a function from logits
            `[batch pos d_vocab]` to `[batch]`, see `FunctionMetric`. Or several by name, which are measured in the
            same forwards; a result for each comes back, `results[name]`.
        batch_size: patched prompts per pass; `"auto"` by memory.
        direction: `"denoise"` patches the corrupted run, `"noise"` the clean one.
        source: what is put in: the `"other"` run's activation, `"zero"`, or tensors by hook name that broadcast
            to `[pairs pos ...]`: means over a data set, or the activations of a resampled example. Or another model,
            which then makes the other run: with `"denoise"` its activations on the clean prompts go into this model's
            run on the corrupted ones (which may be the same prompts), and `result.clean` is the metric of its run.
        attention_mask: real tokens (1) of padded ids, the same for both.
        edits: values from `hooklens.edits` that act in every run, the unpatched ones included (but for that of another
            model); the patch acts last at its own hook point. `hooklens.patching.runs.edits` says what their rows and
            positions mean; `result.stats.unplanned` counts the full forwards that functions of one's own take.
        engine: `"ray"` runs the cells on workers that Ray keeps, on this machine or on many; the values are the same.
            A worker runs with as many threads as torch has here, or on a GPU of its own if the model lies on one. It
            makes the unpatched runs for itself, and has a copy of functions that are metrics or edits: what these keep
            for themselves stays there.
        workers: of Ray, how many; None: as many as it has room for.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Raises:
        InputError: prompts that do not go together, options that are none, or hooks attached to the model.
        HookNameError, SiteError: a site, layer, position or head that is not there, or a site where a source model
            has another shape.
        EditError: an edit that does not fit the model or the prompts.
        TransformError: a source that is a model with other processing, or the cache of one.
        MetricError: the metric gives another shape than one value per row, or NaN; or an unpatched run's is infinite.
        SweepInterruptedError: the sweep was stopped, or failed on the way; it holds what was measured.
        MissingDependencyError: Ray is not installed.

    Example:
        >>> result = patching.sweep(model, clean, corrupted, "resid_pre", patching.LogitDiff(" Mary", " John"))
        >>> result.top(5)
        >>> pairs = [patching.Pair.from_text(model, clean, corrupted, answer=" Mary", wrong=" John")]
        >>> result = patching.sweep(model, pairs, sites="z", metric=patching.LogitDiff())
        >>> result = patching.sweep(base, prompts, prompts, "resid_post", patching.LogitDiff(), source=tuned)

        Self-repair: with the heads that move names ablated, which heads take over?

        >>> movers = [edits.Zero("blocks.9.attn.hook_z", head=[6, 9])]
        >>> repaired = patching.sweep(model, pairs, sites="z", metric=patching.LogitDiff(), edits=movers)
        >>> (repaired.values - result.values).abs()
    """
    refuse_missing("sweep", sites=sites, metric=metric)
    options = RunOptions.read(
        model,
        batch_size=batch_size,
        direction=direction,
        progress=progress,
        allow_training=allow_training,
        edits=edits,
    )
    where, n_workers = read_engine(engine, workers, what="sweep")
    if where == "ray":
        import_package("ray")
        check_portable(model, what="sweep")
        if isinstance(source, HookedCausalLM):
            check_portable(source, what="sweep: source")
    kind = SweepRun if where == "local" else partial(RaySweepRun, workers=n_workers)
    return begin_sweep(kind, model, (clean, corrupted, attention_mask), sites, metric, options, source).finish()


def begin_sweep(
    kind: Callable[[HookedCausalLM, PairSource, CellArray, MetricGroup, RunOptions, Source], Run],
    model: HookedCausalLM,
    prompts: tuple[Pairs, Corrupted | None, Int[Tensor, "batch pos"] | None],
    sites: Sites | None,
    metric: Metrics | None,
    options: RunOptions,
    source: Source,
) -> Run:
    """A sweep that is checked and has not run.

    Args:
        kind: makes what runs it.
        model: the model.
        prompts: `clean`, `corrupted` and `attention_mask` of `sweep`.
        sites, metric, source: as of `sweep`, which says what is raised.
        options: its other keywords.
    """
    assert sites is not None
    assert metric is not None
    _check_activations(model, source)
    measured = MetricGroup.read(metric).encode(model)
    pairs = read_source(model, *prompts)
    if pairs.n_pairs is None and measured.needs_all_pairs:
        raise InputError(
            f"metric {measured.name} is a function that sees all pairs at once, so it cannot go through a loader; give "
            "the pairs as a list, or a metric such as patching.LogitDiff"
        )
    if isinstance(source, HookedCausalLM) and pairs.at_hand.noise is not None and options.direction == "noise":
        raise InputError(
            "sweep: the source model would run the corrupted prompts, which are noise on this model's embeddings; "
            "patch its clean run into the noised one (direction='denoise'), or give prompts that differ in words"
        )
    options.edits.check_pairs(pairs.at_hand.lengths, pairs.n_pairs)
    array = lay_out(sites, model, pairs.at_hand.lengths, more_follow=pairs.n_pairs is None)
    if isinstance(source, HookedCausalLM):
        check_other_model(model, source, array.names, allow_training=options.allow_training)
    return kind(model, pairs, array, measured, options, source)


def _check_activations(model: HookedCausalLM, source: Source) -> None:
    """Refuse what is no source of activations."""
    is_word = isinstance(source, str) and source in ("other", "zero")
    if not (is_word or isinstance(source, Mapping | HookedCausalLM)):
        raise SiteError(f"source is {show(source)}; expected 'other', 'zero', tensors by hook name, or another model")
    check_source(model, source)
