"""Scores of edges from gradients, for some pairs at a time.

Gradients are taken at queries, keys, values, MLP inputs and the last stream. Those at the inputs of heads follow from
them, one layer at a time, through the maps and the norm in front of them, so no graph holds a copy of the stream for
each head; and what heads write is multiplied out of `z`, one layer at a time, too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks import Call, open_call
from hooklens.hooks.foreign import Placed
from hooklens.model.attention.attention import Attention
from hooklens.model.attention.latent import LatentAttention
from hooklens.model.block import Block
from hooklens.model.norm import Norm
from hooklens.patching.estimates.exact_softmax import effect_of_pattern, move_pattern
from hooklens.patching.estimates.gradients import GradientRuns, Move, pairs_per_graph
from hooklens.patching.estimates.rules import GRADIENT, ExactSoftmax, ReadRules, join_dropped
from hooklens.patching.graph.nodes import Graph
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.baseline import Baseline, Direction, run_baseline
from hooklens.patching.runs.edits import NO_EDITS, RunEdits
from hooklens.patching.runs.memory import BatchSize

NodeVectors = Float[Tensor, "pairs node pos d_model"]


@dataclass(frozen=True)
class _Nodes:
    """Nodes of one layer and kind (the three inputs of attention are one): which rows of the table they are."""

    layer: int
    kind: str
    rows: slice
    n_inputs: int = 0


class EdgeGradients:
    """Scores the edges of some pairs.

    Args:
        model: the model.
        prompts: all pairs.
        metric: what is measured.
        moves: the runs whose gradients are averaged.
        direction: which run is patched.
        rules: how backward passes depart from the gradient.
        edits: what acts in every run.

    Attributes:
        forwards: runs of the network so far, the unpatched ones included.
        tokens: tokens run.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        metric: Metric,
        moves: Sequence[Move],
        *,
        direction: Direction,
        rules: ReadRules = GRADIENT,
        edits: RunEdits = NO_EDITS,
    ) -> None:
        self.rules, self.edits = rules, edits
        self.is_exact = rules.find(ExactSoftmax) is not None
        self.model, self.prompts, self.metric, self.moves = model, prompts, metric, moves
        self.direction: Direction = direction
        self.forwards, self.tokens = 0, 0.0
        graph = Graph.of(model.cfg)
        self.shape = (len(graph.writers), len(graph.readers))
        self.writers = _group([(writer.layer, writer.kind, 0) for writer in graph.writers])
        self.readers = _group(
            [
                (reader.layer, "attn" if reader.kind in ("q", "k", "v") else reader.kind, n_inputs)
                for reader, n_inputs in zip(graph.readers, graph.n_inputs, strict=True)
            ]
        )

    def groups(self, batch_size: BatchSize) -> Iterator[list[int]]:
        """The pairs that are run at once."""
        cfg = self.model.cfg
        of_readers, of_writers = (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_model, cfg.n_heads * cfg.d_model
        of_streams = 2 * cfg.n_layers * (2 * cfg.d_model + cfg.n_heads * cfg.d_head)
        # One layer's inputs with their copies, norms and gradients, and one layer's outputs; the baseline.
        held = 6 * of_readers + 4 * of_writers + 2 * of_streams
        size = pairs_per_graph(self.model, self.prompts, self.metric, batch_size=batch_size, held=held)
        return self.prompts.split(size)

    def run(self, group: list[int]) -> tuple[Baseline, Float[Tensor, "writer reader pair"]]:
        """The unpatched runs of some pairs, and the scores.

        Raises:
            MetricError: the metric is NaN or infinite for an unpatched run.
            InputError: it has no gradient.
        """
        with torch.no_grad():
            baseline = run_baseline(
                self.model,
                self.prompts,
                group,
                [],
                self.metric,
                direction=self.direction,
                source="other",
                keep=map(_output_name, self.writers),
                edits=self.edits,
            )
        runs = GradientRuns(self.model, self.prompts, baseline, direction=self.direction, rules=self.rules)
        graded = [name for reader in self.readers for name in _gradient_names(reader)]
        if self.is_exact:
            graded += [f"blocks.{reader.layer}.attn.hook_pattern" for reader in self.readers if reader.kind == "attn"]
        streams = [_stream_name(reader) for reader in self.readers if reader.kind == "attn"]
        differs = runs.may_differ[..., None]
        if self.model.cfg.clip_qkv is not None:
            # Where they are clipped, values pass no gradient on to what they read.
            streams += [_gradient_names(reader)[-1] for reader in self.readers if reader.kind == "attn"]
        changes = {}
        for name, (old, new) in baseline.kept.items():
            changes[name] = (new - old) * (differs if old.ndim == 3 else differs[..., None])
        found: list[Tensor] = []
        for dropped in ([], *self.rules.drops(self.model)):
            scores = changes[_output_name(self.writers[0])].new_zeros(*self.shape, len(group))
            patterns: dict[str, Tensor] = {}
            for now, gradients in runs.run(self.moves, graded, streams, drops=dropped):
                self._add_scores(scores, now, gradients, changes)
                for name in graded:
                    if name in gradients and name.endswith("hook_pattern"):
                        patterns[name] = patterns.get(name, 0.0) + gradients[name] / len(self.moves)
            scores /= len(self.moves)
            if self.is_exact:
                self._put_exact(scores, patterns, changes, runs, baseline)
            found.append(scores)
        self.forwards += 1 + runs.forwards
        self.tokens += (2 + runs.forwards) * sum(baseline.lengths)
        return baseline, join_dropped(found)

    def _add_scores(
        self,
        scores: Float[Tensor, "writer reader pair"],
        now: dict[str, Tensor],
        gradients: dict[str, Tensor],
        changes: dict[str, Tensor],
    ) -> None:
        """Add what one run's gradients make of all edges."""
        for reader in self.readers:
            felt = self._felt(reader, now, gradients)
            for writer in self.writers:
                if felt is not None and writer.rows.stop <= reader.n_inputs:
                    sent = self._sent(writer, changes)
                    products = sent.flatten(2) @ felt.flatten(2).transpose(1, 2)
                    scores[writer.rows, reader.rows] += products.permute(1, 2, 0)

    def _put_exact(
        self,
        scores: Float[Tensor, "writer reader pair"],
        slopes: dict[str, Tensor],
        changes: dict[str, Tensor],
        runs: GradientRuns,
        baseline: Baseline,
    ) -> None:
        """Put in the scores of edges into queries and keys what their patterns, computed, make of the gradient.

        One block runs for each writer below it, and each of its queries and keys.
        """
        n_heads, n_kv_heads = self.model.cfg.n_heads, self.model.cfg.n_kv_heads
        for reader in (one for one in self.readers if one.kind == "attn"):
            name = f"blocks.{reader.layer}.attn.hook_pattern"
            if name not in slopes:
                continue
            first = reader.rows.start
            places: dict[Literal["q", "k"], slice] = {
                "q": slice(first, first + n_heads),
                "k": slice(first + n_heads, first + n_heads + n_kv_heads),
            }
            plain = move_pattern(runs, baseline, reader.layer, "q", None)
            for writer in (one for one in self.writers if one.rows.stop <= reader.n_inputs):
                for row, sent in enumerate(self._sent(writer, changes).unbind(1), start=writer.rows.start):
                    for letter, columns in places.items():
                        moved = move_pattern(runs, baseline, reader.layer, letter, sent)
                        n_columns = columns.stop - columns.start
                        scores[row, columns] = effect_of_pattern(moved - plain, slopes[name], n_columns)

    def _sent(self, writer: _Nodes, changes: dict[str, Tensor]) -> NodeVectors:
        """The changes of what nodes write."""
        change = changes[_output_name(writer)]
        if writer.kind != "head":
            return change[:, None]
        W_O = self._attention(writer.layer)[0].W_O.detach() * self.model.cfg.residual_scale
        return torch.einsum("nphe,hed->nhpd", change, W_O).contiguous()

    def _felt(self, reader: _Nodes, now: dict[str, Tensor], gradients: dict[str, Tensor]) -> NodeVectors | None:
        """The gradients at what nodes read; None where the metric does not depend on them."""
        names = _gradient_names(reader)
        if reader.kind != "attn":
            return gradients[names[0]][:, None] if names[0] in gradients else None
        stream = now[_stream_name(reader)]
        attn, ln1 = self._attention(reader.layer)
        if isinstance(attn, LatentAttention):
            found = [gradients.get(name) for name in names]
            return _felt_by_latents(attn, ln1, stream, found, self._call())
        behind_norm = []
        for name, weight in zip(names, map(attn.read_weight, ("W_Q", "W_K", "W_V")), strict=True):
            if name in gradients:
                gradient = gradients[name]
                if attn.clip is not None and name in now:
                    gradient = gradient * (now[name].abs() < attn.clip)
                behind_norm.append(torch.einsum("nphe,hde->nhpd", gradient, weight.detach()))
            else:
                behind_norm.append(stream.new_zeros(len(stream), len(weight), *stream.shape[1:]))
        felt = torch.cat(behind_norm, dim=1)
        if ln1 is None:
            return felt
        with torch.enable_grad():
            copies = stream[:, None].expand_as(felt).contiguous().requires_grad_()
            normed = ln1.apply_beside(copies, self._call())
        return torch.autograd.grad(normed, copies, felt)[0]

    def _call(self) -> Call:
        """A call in which the rules act."""
        with self.model.hooks(self.rules.hooks(self.model)):
            return open_call()

    def _attention(self, layer: int) -> tuple[Attention, Norm | Placed | None]:
        """The attention of a layer, and the norm of the stream that it reads."""
        block = self.model.blocks[layer]
        assert isinstance(block, Block)
        assert isinstance(block.attn, Attention)
        return block.attn, block.ln1


def _felt_by_latents(
    attn: LatentAttention,
    ln1: Norm | Placed | None,
    stream: Tensor,
    gradients: Sequence[Tensor | None],
    call: Call,
) -> NodeVectors:
    """The gradients at heads' copies of the stream, each of which has latents of its own."""
    n_heads, felt = attn.cfg.n_heads, []
    for letter, gradient in zip("qkv", gradients, strict=True):
        if gradient is None:
            felt.append(stream.new_zeros(len(stream), n_heads, *stream.shape[1:]))
            continue
        with torch.enable_grad():
            copies = stream[:, :, None].expand(-1, -1, n_heads, -1).contiguous().requires_grad_()
            heads = attn.project_stream(letter, copies if ln1 is None else ln1.apply_beside(copies, call), call)
        felt.append(torch.autograd.grad(heads, copies, gradient)[0].transpose(1, 2))
    return torch.cat(felt, 1)


def _group(nodes: list[tuple[int, str, int]]) -> list[_Nodes]:
    """Neighbouring nodes of one layer and kind together."""
    groups: list[_Nodes] = []
    for index, (layer, kind, n_inputs) in enumerate(nodes):
        if groups and (groups[-1].layer, groups[-1].kind) == (layer, kind):
            groups[-1] = _Nodes(layer, kind, slice(groups[-1].rows.start, index + 1), n_inputs)
        else:
            groups.append(_Nodes(layer, kind, slice(index, index + 1), n_inputs))
    return groups


def _output_name(writer: _Nodes) -> str:
    """Where what nodes write passes; heads before `W_O`."""
    words = {"embed": "hook_resid_pre", "head": "attn.hook_z", "mlp": "hook_mlp_out"}
    return f"blocks.{max(writer.layer, 0)}.{words[writer.kind]}"


def _stream_name(reader: _Nodes) -> str:
    """Where the stream that heads read passes once."""
    return f"blocks.{reader.layer}.hook_resid_pre"


def _gradient_names(reader: _Nodes) -> list[str]:
    """The hook points where gradients are taken for nodes."""
    if reader.kind == "attn":
        return [f"blocks.{reader.layer}.attn.hook_{letter}" for letter in "qkv"]
    if reader.kind == "mlp":
        return [f"blocks.{reader.layer}.hook_mlp_in"]
    return [f"blocks.{reader.layer - 1}.hook_resid_post"]
