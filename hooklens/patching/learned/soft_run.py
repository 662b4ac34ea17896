"""Masked runs with gates in place of a circuit: differentiable, and equal to the circuit's run where gates are 0 or 1.

Every reader gets

    input(reader) = base(reader) + sum over edges (w -> reader) of gate (out(w) - ablated(w))

in the arithmetic of `MaskedRun`, with gradients to the gates, and through what writers write to those before them. With
`constants` every writer is ablated to a constant that has a gradient, too; the ground must then ablate to zero, and

    input(reader) = base(reader) + sum over edges (w -> reader) of (gate out(w) + (1 - gate) constant(w))

For the backward pass a run keeps the changes of all writers once, as for a circuit, and what its blocks keep: the
copies of the inputs that heads read apart are its largest part.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.memory.free import assume_free_bytes
from hooklens.patching.circuits.ground import Ground
from hooklens.patching.circuits.masked_run import MaskedRun
from hooklens.patching.circuits.reach import Wiring
from hooklens.patching.circuits.runner import CircuitRunner

_SHARE_OF_FREE_MEMORY = 0.25
_PAIRS_PER_UPDATE = 32

Constants = Float[Tensor, "writer some_pos d_model"]


class SoftRun(MaskedRun):
    """One run of the clean prompts with gates on all edges.

    Args:
        model: the model.
        wiring: its nodes.
        ground: the pairs; its reference is the whole network.
        gates: factors from 0 to 1, which are 0 where there is no edge.
        constants: what writers are ablated to, at each column that is run or at all alike (one column); None: as the
            ground says.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        wiring: Wiring,
        ground: Ground,
        gates: Float[Tensor, "circuit reader writer"],
        *,
        constants: Constants | None = None,
    ) -> None:
        known = gates.detach().cpu()
        # A node runs that one circuit with all edges open, and one with all that are not closed, would run.
        super().__init__(model, wiring, ground, torch.stack([(known > 0).any(0), (known == 1).all(0)]))
        self._begin(gates.to(model.device, ground.changes.dtype))
        self._noted: list[Tensor] = []
        self._constants = None if constants is None else constants.to(self._masks)

    def _note(self, node: int, change: Float[Tensor, "circuit pair pos d_model"]) -> None:
        assert self.slot[node] == len(self._noted)
        super()._note(node, change.detach())
        self._noted.append(change)

    def _add_own(
        self,
        total: Float[Tensor, "circuit reader entry"],
        masks: Float[Tensor, "circuit reader first_node"],
        index: Int[Tensor, "pair read 1"] | None,
    ) -> Float[Tensor, "circuit reader entry"]:
        n_nodes = masks.shape[-1]
        found: Tensor = _AddChanges.apply(  # type: ignore[no-untyped-call]
            total, masks, self.own[:, :n_nodes], index, *self._noted[:n_nodes]
        )
        return found

    def _inputs(
        self, readers: list[int], *, at_reads: bool = False
    ) -> Float[Tensor, "circuit reader pair some_pos d_model"]:
        inputs = super()._inputs(readers, at_reads=at_reads)
        if self._constants is None:
            return inputs
        n_writers = self.graph.n_inputs[readers[0]]
        closed = 1 - self._masks[:, readers, :n_writers]
        constants = self._constants[:n_writers]
        put_in = (closed.flatten(0, 1) @ constants.flatten(1)).view(*closed.shape[:2], 1, *constants.shape[1:])
        if at_reads and constants.shape[1] > 1:
            put_in = put_in.take_along_dim(self.ground.reads[None, None, ..., None], 3)
        return inputs + put_in


def pairs_per_step(runner: CircuitRunner) -> int:
    """How many pairs a run with gradients takes at once: as told, or as memory allows, up to those of an update."""
    if runner.batch_size != "auto":
        return runner.batch_size
    cfg, itemsize = runner.model.cfg, runner.model.dtype.itemsize
    # Of every block the inputs of heads apart with their norms and products, and the inside of attention and MLP; of
    # all writers the changes and their gradients.
    per_block = 5 * (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.d_model + 8 * cfg.n_heads * cfg.d_head + 4 * cfg.mlp_width
    per_token = cfg.n_layers * per_block + 4 * len(runner.graph.writers) * cfg.d_model
    width = max(runner.prompts.lengths)
    n_reads = width if runner.metric.positions is None else len(runner.metric.positions)
    per_pair = (width * per_token + 4 * n_reads * cfg.d_vocab) * itemsize
    limit = int(_SHARE_OF_FREE_MEMORY * assume_free_bytes(runner.model.device)) // per_pair
    return max(1, min(_PAIRS_PER_UPDATE, limit))


class _AddChanges(torch.autograd.Function):
    """`total + masks @ changes`, the changes read from the run's own table of them rather than from a stack of copies.

    The table is filled further after this, behind the rows that are read here, so autograd's count of its versions
    says nothing, and it is not saved as a tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, masks: Tensor, table: Tensor, index: Tensor | None, *changes: Tensor
    ) -> Tensor:
        ctx.save_for_backward(masks)
        ctx.table, ctx.index = table, index
        own = table if index is None else table.take_along_dim(index[None, None], 3)
        return torch.baddbmm(total, masks, own.flatten(2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *gradients)


@once_differentiable
def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (masks,) = ctx.saved_tensors
    table, index = ctx.table, ctx.index
    own = table if index is None else table.take_along_dim(index[None, None], 3)
    of_masks = grad @ own.flatten(2).mT
    of_changes = (masks.mT @ grad).view(own.shape)
    if index is not None:
        places = index.expand(*own.shape[:2], *index.shape[:2], own.shape[-1])
        of_changes = torch.zeros_like(table).scatter_(3, places, of_changes)
    return grad, of_masks, None, None, *of_changes.unbind(1)
