"""The two unpatched runs of some pairs, and what patches take from them.

`into` is the run that is patched, `source` the run that activations come from, which another model may make. Prompts
are padded on the right, so that columns are positions. From `into` come the stream entering each block and every
block's keys and values, on which patched rows go on; from `source` come the values put in.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooklens.axes import EMBEDDINGS, find_site, layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig, ShortformerPositions
from hooklens.patching.errors import MetricError, SiteError
from hooklens.patching.metrics.group import MetricGroup
from hooklens.patching.metrics.metric import Ends, Metric, Runs
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.acting import GroupEdits, act_on_pairs
from hooklens.patching.runs.edits import NO_EDITS, RunEdits
from hooklens.patching.runs.sources import fit_given
from hooklens.patching.runs.unpatched import Ran, Side, Source, read_logits, run_both, run_both_alone
from hooklens.patching.runs.vocabulary import Vocabulary, find_vocabulary

Direction = Literal["denoise", "noise"]
Stage = Literal["stream", "written", "block", "head"]


@dataclass(frozen=True)
class Entry:
    """Where a patched row leaves the unpatched run.

    Attributes:
        layer: the first block that runs; `n_layers` when none does.
        stage: what is patched: the `stream` that enters that block, what heads have `written` to it, a hook point
            inside the `block`, or one in the `head` (final norm and unembedding).
    """

    layer: int
    stage: Stage


def find_entry(name: str, cfg: HookedConfig, edited: Collection[str] = ()) -> Entry:
    """Where rows patched at a hook point start: as late as the hook point allows.

    What is only added to the stream (an MLP's output, in parallel blocks also attention's, the embeddings)
    changes nothing else, so its difference is added to the stream, and the block that wrote it does not run. The
    same goes in parallel blocks for the heads' `z`, whose difference goes through `W_O` first. Where an edit acts on
    the way from there to the next block, the block runs, so that it acts on the patched tensor.

    Args:
        name: the hook point.
        cfg: the network's sizes.
        edited: hook points at which edits act in every run.

    Raises:
        SiteError: positions that enter in every layer.
    """
    layer = layer_of(name)
    word = name.rpartition(".")[2]
    if name == "hook_pos_embed" and isinstance(cfg.positions, ShortformerPositions):
        raise SiteError(
            "hook_pos_embed: shortformer positions enter the queries and keys of every layer, and no patched row can "
            "leave the unpatched run there; patch hook_q or hook_k, or run with an edit (run_with_hooks)"
        )
    if layer is None:
        return Entry(0, "stream") if word in EMBEDDINGS else Entry(cfg.n_layers, "head")
    if word == "hook_resid_pre":
        return Entry(layer, "stream")
    is_last = word == "hook_mlp_out" and not cfg.norm_stream
    if word == "hook_resid_post" or is_last or (word == "hook_attn_out" and cfg.wiring == "parallel"):
        return Entry(layer, "block") if _is_edited_behind(name, layer, edited) else Entry(layer + 1, "stream")
    if word == "hook_z" and cfg.wiring == "parallel" and not cfg.block(layer).norm_after:
        return Entry(layer, "block") if _is_edited_behind(name, layer, edited) else Entry(layer + 1, "written")
    return Entry(layer, "block")


# What attention computes before the heads' output; an edit of that does not act on a patched output.
_BEFORE_Z = ("hook_q", "hook_k", "hook_v", "hook_k_per_head", "hook_v_per_head", "hook_rot_q", "hook_rot_k", "hook_z")


def _is_edited_behind(name: str, layer: int, edited: Collection[str]) -> bool:
    """Whether an edit acts between a hook point at a block's end and the next block's beginning."""
    behind = {f"blocks.{layer}.hook_resid_post", f"blocks.{layer + 1}.hook_resid_pre"}
    if name.endswith("hook_z"):
        behind.add(f"blocks.{layer}.hook_attn_out")
        in_attention = f"blocks.{layer}.attn."
        behind |= {
            one for one in edited if one.startswith(in_attention) and one.removeprefix(in_attention) not in _BEFORE_Z
        }
    return bool((behind - {name}) & set(edited))


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The unpatched runs of a group of pairs.

    Attributes:
        pairs: which pairs of the experiment these are.
        lengths: tokens of each pair.
        into: the prompts of the run that is patched, padded on the right, and the noise on them.
        edits: what acts in every run; None: nothing does.
        is_planned: patched rows go on from these runs. If not, each is a full forward: `streams` and `keys_values`
            are empty, and `values` are activations.
        streams: the stream of `into` entering each block, and the one leaving the last, `[pairs pos d_model]`.
        keys_values: keys and values of `into` in each layer, `[pairs pos kv_head d_head]`; empty where edits need
            whole rows.
        entries: by hook name, where patched rows leave the unpatched run.
        values: by hook name, what a patch puts in: the activation's new value, or for what enters with the stream
            the stream's.
        replaced: for what heads have written, by hook name, the activation's value in `into`.
        differs: by hook name, where the new value is not the old one, `[pairs pos ...]` (query positions
            before heads and keys), the last axis of vectors reduced.
        reads: `[pairs read]`, columns whose logits the metric reads.
        into_logits: `[pairs read d_vocab]` of the unpatched run.
        kept: by hook name, activations of both runs that were asked for, `into` and then `source`.
        metrics: the metrics, prepared for these pairs.
        vocabulary: the tokens whose logits the metric takes; None: all.
        ends: the values of each metric for the clean and the corrupted run, `[pairs]`.
    """

    pairs: tuple[int, ...]
    lengths: tuple[int, ...]
    into: Side
    edits: GroupEdits | None
    is_planned: bool
    streams: list[Float[Tensor, "pairs pos d_model"]]
    keys_values: list[tuple[Tensor, Tensor]]
    entries: dict[str, Entry]
    values: dict[str, Tensor]
    replaced: dict[str, Tensor]
    differs: dict[str, Bool[Tensor, "pairs pos *rest"]]
    reads: Int[Tensor, "pairs read"]
    into_logits: Float[Tensor, "pairs read d_vocab"]
    kept: dict[str, tuple[Tensor, Tensor]]
    metrics: MetricGroup
    vocabulary: Vocabulary | None
    ends: list[Ends]

    @property
    def metric(self) -> Metric:
        """The metric, of several the first."""
        return next(iter(self.metrics.metrics.values()))

    @property
    def clean(self) -> Float[Tensor, " pairs"]:
        """The metric's values of the clean run, of several metrics the first's."""
        return self.ends[0][0]

    @property
    def corrupted(self) -> Float[Tensor, " pairs"]:
        """The same of the corrupted run."""
        return self.ends[0][1]

    @property
    def needs_whole_rows(self) -> bool:
        """Whether edits make all columns of a patched run depend on each other."""
        return self.edits is not None and self.edits.of_run.needs_whole_rows

    @property
    def is_causal(self) -> bool:
        """Whether a patch changes nothing before its position."""
        return self.edits is None or self.edits.of_run.is_causal


def run_baseline(
    model: HookedCausalLM,
    prompts: PromptPairs,
    pairs: Sequence[int],
    names: Iterable[str],
    metric: Metric | MetricGroup,
    *,
    direction: Direction,
    source: Source,
    keep: Iterable[str] = (),
    answers_only: bool = False,
    edits: RunEdits = NO_EDITS,
) -> Baseline:
    """Run both prompts of some pairs.

    Args:
        model: the model.
        prompts: all pairs.
        pairs: the pairs to run.
        names: the hook points to be patched.
        metric: says which positions are read; several are a group.
        direction: `"denoise"` patches clean activations into the corrupted run, `"noise"` the other way.
        source: what is put in: the other run's activation, zeros, or tensors by hook name; or a model, which then
            makes the other run.
        keep: hook points whose activations in both runs are given back.
        answers_only: unembed only the tokens that the metrics read, where these are few; `baseline.metrics` are then
            for logits of `baseline.vocabulary`.
        edits: what acts in both runs, but for that of another model.

    Raises:
        EditError: an edit does not fit the model's activations.
        SiteError: a source lacks a hook point or has another shape.
        InputError: a position that the metric reads is outside a prompt.
        MetricError: the metric of a run is NaN or infinite.
    """
    names, keep = list(dict.fromkeys(names)), list(dict.fromkeys(keep))
    chosen = list(pairs)
    lengths = tuple(prompts.lengths[pair] for pair in chosen)
    width = max(lengths)
    into, other = take_sides(model, prompts, chosen, width, direction)
    metrics = metric if isinstance(metric, MetricGroup) else MetricGroup.read(metric)
    acting = act_on_pairs(model, prompts, chosen, edits)
    is_planned = edits.is_planned(names)
    reads = torch.tensor(metrics.find_reads(lengths, width), device=model.device)
    if is_planned:
        ran = run_both(model, source, into, other, lengths, [*names, *keep], acting)
    else:
        ran = run_both_alone(model, source, into, other, lengths, [*names, *keep], acting, reads)

    n_pairs = len(chosen)
    unread = ran.other_last.new_empty(*reads.shape, 0, device=model.device, dtype=model.dtype)
    runs = _describe_runs(model, prompts, chosen, into.tokens, unread=unread)
    metrics = metrics.encode(model)
    vocabulary = None
    if answers_only and is_planned:
        vocabulary = find_vocabulary(metrics, runs, [*names, *edits.names])
    if vocabulary is not None:
        metrics, runs = vocabulary.narrow(metrics, runs)
    into_logits, other_logits = read_logits(model, source, ran, reads, vocabulary, acting)
    ends = (other_logits, into_logits) if direction == "denoise" else (into_logits, other_logits)
    runs = replace(runs, clean_logits=ends[0], corrupted_logits=ends[1])
    measured = metrics.measure_ends(runs)
    for one, both in zip(metrics.metrics.values(), measured, strict=True):
        _check_ends(one, runs.pairs, torch.stack(both))
    entries = {name: find_entry(name, model.cfg, edits.names) for name in names}
    values, replaced, differs = {}, {}, {}
    for name, entry in entries.items():
        current = ran.into[name]
        new = _put_in(name, ran, source, chosen, prompts, is_causal=edits.is_causal)
        differs[name] = _find_differences(name, current, new)
        is_added = is_planned and _is_added(name, entry)
        values[name] = ran.streams[entry.layer] + (new - current) if is_added else new
        if entry.stage == "written":
            replaced[name] = current
    return Baseline(
        pairs=runs.pairs,
        lengths=lengths,
        into=into,
        edits=acting,
        is_planned=is_planned,
        streams=ran.streams,
        keys_values=[(entry.past_keys[:n_pairs], entry.past_values[:n_pairs]) for entry in ran.cached],
        entries=entries,
        values=values,
        replaced=replaced,
        differs=differs,
        reads=reads,
        into_logits=into_logits,
        kept={name: (ran.into[name], ran.other[name]) for name in keep},
        metrics=metrics.prepare(runs),
        vocabulary=vocabulary,
        ends=measured,
    )


def _put_in(
    name: str, ran: Ran, source: Source, pairs: list[int], prompts: PromptPairs, *, is_causal: bool
) -> Shaped[Tensor, "pairs pos *rest"]:
    """The activations that patches at a hook point put in."""
    current, new = ran.into[name], ran.other[name]
    if isinstance(source, HookedCausalLM):
        return new
    if isinstance(source, str) and source == "other":
        may_differ = prompts.differ(pairs, max(prompts.lengths[pair] for pair in pairs)).cumsum(1) > 0
        return _keep_agreeing(name, current, new, may_differ) if is_causal else new
    return _value_of(source, name, current, pairs, prompts)


def take_sides(
    model: HookedCausalLM, prompts: PromptPairs, pairs: Sequence[int], width: int, direction: Direction
) -> tuple[Side, Side]:
    """The prompts of the run that is patched and of the other one, for some pairs, padded to a width."""
    chosen = list(pairs)
    clean = Side(prompts.clean[chosen, :width])
    corrupted = Side(prompts.corrupted[chosen, :width], prompts.draw_noise(chosen, width, model.dtype))
    return (corrupted, clean) if direction == "denoise" else (clean, corrupted)


def _check_ends(metric: Metric, pairs: Sequence[int], ends: Float[Tensor, "two pairs"]) -> None:
    """Refuse pairs whose unpatched runs have no value to compare with.

    Raises:
        MetricError: the metric is NaN or infinite for some; they are named.
    """
    found = (("NaN", ends.isnan()), ("infinite", ends.isinf()))
    broken = [
        f"{word} for the unpatched runs of pairs {[pairs[place] for place in where.any(0).nonzero()[:, 0].tolist()]}"
        for word, where in found
        if where.any()
    ]
    if broken:
        raise MetricError(f"metric {metric.name} is {' and '.join(broken)}; nothing could be compared")


def _describe_runs(
    model: HookedCausalLM,
    prompts: PromptPairs,
    chosen: list[int],
    into: Int[Tensor, "pairs pos"],
    *,
    unread: Float[Tensor, "pairs read none"],
) -> Runs:
    """What a metric gets to see of some pairs before their logits are there."""
    width = into.shape[1]
    return Runs(
        model=model,
        pairs=tuple(prompts.first + pair for pair in chosen),
        n_pairs=prompts.n_pairs,
        width=max(prompts.lengths),
        tokens=into,
        clean_tokens=prompts.clean[chosen, :width],
        corrupted_tokens=prompts.corrupted[chosen, :width],
        lengths=tuple(prompts.lengths[pair] for pair in chosen),
        clean_logits=unread,
        corrupted_logits=unread,
        answers=None if prompts.answers is None else prompts.answers.take(chosen),
        wrongs=None if prompts.wrongs is None else prompts.wrongs.take(chosen),
    )


def _value_of(
    source: str | Mapping[str, Tensor], name: str, like: Tensor, pairs: list[int], prompts: PromptPairs
) -> Shaped[Tensor, "pairs pos *rest"]:
    if isinstance(source, str):
        return torch.zeros_like(like)
    if name not in source:
        raise SiteError(f"the source of activations has none for {name!r}; it has {sorted(source)[:5]} ...")
    return fit_given(name, source[name], like, pairs, n_pairs=prompts.n_pairs, width=max(prompts.lengths))


def _is_added(name: str, entry: Entry) -> bool:
    return entry.stage == "stream" and not name.endswith(("hook_resid_pre", "hook_resid_post"))


def _keep_agreeing(name: str, current: Tensor, new: Tensor, may_differ: Bool[Tensor, "pairs pos"]) -> Tensor:
    """The new values, with the old ones where the prompts have agreed so far.

    There the activations are the same, but rows of one batch need not round alike.
    """
    shape = [len(new), *[1] * (new.ndim - 1)]
    axis = _position_axis(name)
    shape[axis] = new.shape[axis]
    return torch.where(may_differ.view(shape), new, current)


def _position_axis(name: str) -> int:
    site = find_site(name)
    assert site is not None
    return site.axes.index("query" if "query" in site.axes else "pos")


def _find_differences(name: str, current: Tensor, new: Tensor) -> Bool[Tensor, "pairs pos *rest"]:
    site = find_site(name)
    assert site is not None
    differs = current != new
    return differs.transpose(1, 2) if "key" in site.axes else differs.any(-1)
