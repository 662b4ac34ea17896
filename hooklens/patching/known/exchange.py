"""One forward in which parts of a run come from another one: variables, and what edges carry.

Both runs keep their graph, so that a model can be trained through them. Each row has exchanges of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks import HookPoint
from hooklens.hooks.call import HookFunction
from hooklens.patching.graph.nodes import Reader, Writer, check_additive, list_readers, list_writers
from hooklens.patching.known.circuit import Ids, KnownVariable

Edges = Bool[Tensor, "row reader writer"]
Stream = Float[Tensor, "row pos d_model"]
Rows = Bool[Tensor, " row"]
Hooks = list[tuple[str, HookFunction]]


@dataclass(frozen=True, eq=False)
class SourceRun:
    """A run that parts are taken from.

    Attributes:
        logits: of the last position.
        written: what each writer adds to the stream.
        at: what passes the hook points of variables.
    """

    logits: Float[Tensor, "row d_vocab"]
    written: list[Tensor]
    at: Mapping[str, Tensor]


class Exchange:
    """A model's graph, and forwards of it with exchanges.

    Args:
        model: the model.
        variables: the variables that can be exchanged.

    Raises:
        InputError: heads do not add to the stream one by one.
    """

    def __init__(self, model: HookedCausalLM, variables: Mapping[str, KnownVariable]) -> None:
        check_additive(model.cfg)
        self.model, self.variables = model, variables
        self._writers = _group(list_writers(model.cfg))
        self._readers = _group(list_readers(model.cfg))

    def take(self, tokens: Ids) -> SourceRun:
        """Run prompts, and note what can be taken from them."""
        written: list[Tensor] = []
        at: dict[str, Tensor] = {}

        def note(tensor: Tensor, hook: HookPoint) -> None:
            at[str(hook.name)] = tensor

        points = sorted({variable.hook_name for variable in self.variables.values()})
        hooks: Hooks = [*((name, note) for name in points), *self._note_writers(written)]
        return SourceRun(self._run(tokens, hooks), written, at)

    def run(
        self, tokens: Ids, source: SourceRun, edges: Edges | None = None, exchanged: Mapping[str, Rows] | None = None
    ) -> Float[Tensor, "row d_vocab"]:
        """The logits of the last position, with parts of each row's run taken from the source's row.

        Args:
            tokens: prompts, of the source's shape.
            source: the run that parts are taken from.
            edges: which edges carry what their writer writes there; all others carry what it writes in this run.
            exchanged: by name, the rows in which a variable has the source's value.
        """
        hooks: Hooks = []
        for name, rows in (exchanged or {}).items():
            variable = self.variables[name]
            hooks.append((variable.hook_name, partial(_exchange, source=source, variable=variable, rows=rows)))
        if edges is not None:
            # A writer is noted behind the variables exchanged in it.
            written: list[Tensor] = []
            hooks += self._note_writers(written)
            carried = edges.to(self.model.dtype)
            for name, readers in self._readers.items():
                hooks.append((name, partial(_give, carried=carried[:, readers], source=source, written=written)))
        return self._run(tokens, hooks)

    def _run(self, tokens: Ids, hooks: Hooks) -> Tensor:
        logits = self.model.run_with_hooks(tokens, fwd_hooks=hooks, logits_at=[-1])
        assert isinstance(logits, Tensor)
        return logits[:, 0]

    def _note_writers(self, written: list[Tensor]) -> Hooks:
        """Hooks that append what writers write, in the order of the network."""

        def note(tensor: Tensor, hook: HookPoint) -> None:
            is_of_heads = tensor.ndim == 4
            written.extend((tensor * self.model.cfg.residual_scale).unbind(2) if is_of_heads else [tensor])

        return [(name, note) for name in self._writers]


def _give(tensor: Tensor, hook: HookPoint, *, carried: Tensor, source: SourceRun, written: list[Tensor]) -> Tensor:
    """What readers at a hook point get, `[row pos d_model]` or `[row pos head d_model]`."""
    changes = torch.stack([theirs - own for theirs, own in zip(source.written, written, strict=False)], -2)
    added = torch.einsum("brw,bpwd->bprd", carried[:, :, : changes.shape[-2]], changes)
    return tensor + (added if tensor.ndim == 4 else added[:, :, 0])


def _exchange(own: Tensor, hook: HookPoint, *, source: SourceRun, variable: KnownVariable, rows: Rows) -> Tensor:
    """A tensor with a variable taken from the source, in some rows."""
    moved = own + (source.at[variable.hook_name] - own) @ variable.basis.T @ variable.basis
    chosen = torch.zeros(own.shape[:-1], dtype=torch.bool, device=own.device)
    places = chosen if variable.head is None else chosen[:, :, variable.head]
    places[:, slice(None) if variable.pos is None else variable.pos] = True
    return torch.where((chosen & rows.view(-1, *[1] * (chosen.ndim - 1)))[..., None], moved, own)


def _group(nodes: Sequence[Writer | Reader]) -> dict[str, list[int]]:
    """The numbers of nodes by hook point, in their order."""
    groups: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        groups.setdefault(node.hook_name, []).append(number)
    return groups
