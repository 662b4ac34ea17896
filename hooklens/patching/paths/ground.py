"""The ground of path patching: the unpatched runs of some pairs, cut to the columns that a patch can change."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.model.parts.part import apply_linear
from hooklens.patching.graph.nodes import Writer
from hooklens.patching.paths.route import output_of
from hooklens.patching.runs.acting import Places
from hooklens.patching.runs.baseline import Baseline


@dataclass(frozen=True, kw_only=True)
class Ground:
    """The unpatched runs of some pairs. `pos` are the columns that are run.

    Attributes:
        model: the model.
        baseline: the unpatched runs.
        rows: which pairs of the baseline these are.
        columns: the column of the prompt at each place.
        reads: the places that the metric reads.
        n_past: columns before the first one run.
        in_place: attention does not run, so `columns` are those that the metric reads, and differ by pair.
    """

    model: HookedCausalLM
    baseline: Baseline
    rows: slice
    columns: Int[Tensor, "pair pos"]
    reads: Int[Tensor, "pair read"]
    n_past: int
    in_place: bool

    @property
    def n_pairs(self) -> int:
        """Pairs on this ground."""
        return len(self.columns)

    @property
    def width(self) -> int:
        """Columns run."""
        return self.columns.shape[1]

    def stream(self, layer: int) -> Float[Tensor, "pair pos d_model"]:
        """The unpatched stream entering a block; of `n_layers` the one that leaves the last."""
        return self._cut(self.baseline.streams[layer])

    def read_by_mlp(self, layer: int) -> Float[Tensor, "pair pos d_model"]:
        """The unpatched stream that an MLP reads."""
        return self._cut(self.baseline.kept[f"blocks.{layer}.hook_mlp_in"][0])

    def written_by_mlp(self, layer: int) -> Float[Tensor, "pair pos d_model"]:
        """What an MLP writes unpatched."""
        return self._cut(self.baseline.kept[f"blocks.{layer}.hook_mlp_out"][0])

    def written_by_attention(self, layer: int) -> Float[Tensor, "pair pos d_model"]:
        """What attention writes unpatched."""
        return self._cut(self.baseline.kept[f"blocks.{layer}.hook_attn_out"][0])

    def past(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the columns before the first one run, `[pair past kv_head d_head]`."""
        keys, values = self.baseline.keys_values[layer]
        return keys[self.rows, : self.n_past], values[self.rows, : self.n_past]

    def change(self, sender: Writer) -> Float[Tensor, "pair pos d_model"]:
        """What a sender writes to the stream in the other run, minus what it writes in the one that is patched."""
        own, other = (self._cut(tensor) for tensor in self.baseline.kept[output_of(sender)])
        if sender.kind != "head":
            return other - own
        # Whatever stands in the place of `W_O` is linear, and its bias takes no part.
        of_head = torch.zeros_like(own)
        of_head[:, :, sender.head] = (other - own)[:, :, sender.head]
        o_proj = self.model.block_list()[sender.layer].attn.o_proj
        bias = apply_linear(o_proj, torch.zeros_like(own[:1, :1]).flatten(2))
        return (apply_linear(o_proj, of_head.flatten(2)) - bias) * self.model.cfg.residual_scale

    def places(self, n_senders: int, *, at_reads: bool = False) -> Places:
        """The tokens of a batch, senders times pairs: all that are run, or those that the metric reads."""
        columns = self.columns.take_along_dim(self.reads, dim=1) if at_reads else self.columns
        pairs = torch.arange(len(self.baseline.pairs), device=columns.device)[self.rows]
        return Places(pairs.repeat(n_senders), columns.repeat(n_senders, 1))

    def _cut(self, tensor: Tensor) -> Tensor:
        chosen = tensor[self.rows]
        if not self.in_place:
            return chosen[:, self.n_past : self.n_past + self.width]
        return chosen.take_along_dim(self.columns.view(*self.columns.shape, *[1] * (chosen.ndim - 2)), dim=1)


def lay_ground(
    model: HookedCausalLM,
    baseline: Baseline,
    differs: Bool[Tensor, "pairs pos"],
    rows: slice,
    *,
    in_place: bool,
    carried: bool,
) -> Ground:
    """The ground for some pairs of a baseline.

    A patch that no attention carries on stays in its positions, so the positions that the metric reads are enough: one
    by one where attention does not run, else from the first to the last of them. What it carries on is run from the
    first position in which the prompts differ. Both go on from the unpatched keys and values of the positions before.

    Args:
        model: the model.
        baseline: the unpatched runs.
        differs: where the two prompts of a pair differ, for all pairs of the baseline.
        rows: which pairs of the baseline.
        in_place: attention does not run.
        carried: attention carries the patch to other positions.
    """
    reads, n_past = baseline.reads[rows], 0
    columns = reads
    places = torch.arange(reads.shape[1], device=reads.device).expand(len(reads), -1)
    if not in_place:
        stop = differs.shape[1]
        if not model.depends_on_length(stop) and not baseline.needs_whole_rows:
            stop = int(reads.max()) + 1
            changed = differs[rows].any(0)
            first = int(changed.int().argmax()) if bool(changed.any()) else stop - 1
            n_past = min(first, int(reads.min())) if carried else int(reads.min())
        columns = torch.arange(n_past, stop, device=reads.device).expand(len(reads), -1)
        places = reads - n_past
    return Ground(
        model=model, baseline=baseline, rows=rows, columns=columns, reads=places, n_past=n_past, in_place=in_place
    )
