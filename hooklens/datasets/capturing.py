"""The activations of one block, run by whichever process computes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.datasets.blocks import Block, Cut
from hooklens.datasets.manifest import COLUMNS
from hooklens.hooks import HookPoint
from hooklens.hooks.edits import Edit
from hooklens.hooks.vectors import stop_behind

Part = dict[str, Tensor]
"""What is kept of one block, `[token, ...]` by site and column."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Capturing:
    """How blocks are run, and what of them is kept.

    Attributes:
        model: the model.
        sites: by hook name, the shape of what one token has there.
        dtype: of what is kept.
        edits: what acts while it runs.
        batch_tokens: about how many tokens run at once.
        row_length: columns of a row.
    """

    model: HookedCausalLM
    sites: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    edits: Sequence[Edit]
    batch_tokens: int
    row_length: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the activations of one token that is kept."""
        return sum(torch.Size(shape).numel() for shape in self.sites.values()) * self.dtype.itemsize

    def run(self, cut: Cut) -> Part:
        """What is kept of some documents, in the order of the corpus, on the CPU."""
        block = cut.pack(self.row_length)
        columns = {"tokens": block.tokens.int(), "document": block.document, "position": block.position.int()}
        return self._capture(block) | columns

    def join(self, parts: Sequence[Part]) -> Part:
        """What a shard holds, of the parts in it."""
        return {name: torch.cat([part[name] for part in parts]) for name in (*self.sites, *COLUMNS)}

    @torch.no_grad()
    def _capture(self, block: Block) -> Part:
        rows_at_once = max(1, self.batch_tokens // self.row_length)
        n_kept, width = len(block.places), block.ids.shape[1]
        kept = {name: torch.empty(n_kept, *shape, dtype=self.dtype) for name, shape in self.sites.items()}
        for first in range(0, len(block.ids), rows_at_once):
            rows = slice(first, first + rows_at_once)
            begins, ends = first * width, (first + rows_at_once) * width
            where = ((block.places >= begins) & (block.places < ends)).nonzero()[:, 0]
            if len(where):
                self._run_rows(block.ids[rows], block.document_ids[rows], block.places[where] - begins, where, kept)
        return kept

    def _run_rows(self, ids: Tensor, document_ids: Tensor, places: Tensor, where: Tensor, kept: Part) -> None:
        device = self.model.device
        chosen = places.to(device)

        def take(tensor: Tensor, hook: HookPoint) -> None:
            # Taken here, so that no more than these tokens outlives the pass.
            kept[str(hook.name)][where] = tensor.flatten(0, 1)[chosen.to(tensor.device)].to("cpu", self.dtype)

        self.model.run_with_hooks(
            ids.to(device),
            document_ids=document_ids.to(device),
            fwd_hooks=[(name, take) for name in self.sites],
            edits=self.edits,
            return_type=None,
            stop_at_layer=stop_behind(list(self.sites)),
        )
