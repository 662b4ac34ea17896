"""The route of a patch: where senders enter, where receivers read the direct stream, and from where the runs differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hooklens.config import HookedConfig
from hooklens.patching.graph.nodes import Reader, Writer

Place = tuple[int, int]
"""A layer, and in it 0: what attention reads, 1: what the MLP of a sequential block reads."""

BEFORE_ATTENTION, BEFORE_MLP = 0, 1


@dataclass(frozen=True)
class Route:
    """What the receivers say about every layer.

    Attributes:
        cfg: the network's sizes.
        receivers: where the direct stream is read.
        through_mlps: whether other MLPs pass it on.
    """

    cfg: HookedConfig
    receivers: tuple[Reader, ...]
    through_mlps: bool

    def heads(self, layer: int, kind: Literal["q", "k", "v"]) -> list[int]:
        """The receiving heads of a layer (of keys and values key-value heads)."""
        return sorted({one.head for one in self.receivers if (one.layer, one.kind) == (layer, kind)})

    def has_heads(self, layer: int) -> bool:
        """Whether some head of a layer receives."""
        return any(one.layer == layer and one.kind in ("q", "k", "v") for one in self.receivers)

    def mlp_receives(self, layer: int) -> bool:
        """Whether the MLP of a layer receives."""
        return any((one.layer, one.kind) == (layer, "mlp") for one in self.receivers)

    @property
    def logits_receive(self) -> bool:
        """Whether the logits do."""
        return any(one.kind == "logits" for one in self.receivers)

    def attends_from(self, entry: Place) -> int:
        """The first layer whose attention a patch that enters somewhere can change; `n_layers` where none does."""
        reached = [one for one in self.receivers if entry <= self._read_at(one)]
        of_heads = [one.layer for one in reached if one.kind in ("q", "k", "v")]
        behind_mlps = [one.layer + 1 for one in reached if one.kind == "mlp"]
        return min([*of_heads, *behind_mlps, self.cfg.n_layers])

    def carries_from(self, entry: Place) -> int:
        """The first layer whose attention can carry a patch to another position; `n_layers` where none does.

        What changes the queries of a position changes what attention gives there, and nowhere else.
        """
        reached = [one for one in self.receivers if entry <= self._read_at(one)]
        of_keys = [one.layer for one in reached if one.kind in ("k", "v")]
        behind = [one.layer + 1 for one in reached if one.kind in ("q", "mlp")]
        return min([*of_keys, *behind, self.cfg.n_layers])

    def attends_alone(self, layer: int) -> bool:
        """Whether the first attention that a patch changes, if it is this layer's, leaves the layer's MLP as it was."""
        return self.cfg.wiring == "parallel" and self.has_heads(layer) and not self.mlp_receives(layer)

    @property
    def last(self) -> Place:
        """The last place at which the direct stream is read."""
        return max(self._read_at(receiver) for receiver in self.receivers)

    def runs_mlp(self, layer: int) -> bool:
        """Whether the MLP of a layer makes something of the direct stream."""
        if self.mlp_receives(layer):
            return True
        if self.cfg.block(layer).mlp is None:
            return False
        return self.through_mlps and self.last > (layer, BEFORE_MLP)

    def entry(self, sender: Writer) -> Place:
        """The first place at which a sender's output is read."""
        if sender.kind == "embed":
            return 0, BEFORE_ATTENTION
        if sender.kind == "head" and self.cfg.wiring == "sequential":
            return sender.layer, BEFORE_MLP
        return sender.layer + 1, BEFORE_ATTENTION

    def reaches(self, sender: Writer) -> bool:
        """Whether a path leads from a sender to a receiver."""
        return any(self.entry(sender) <= self._read_at(receiver) for receiver in self.receivers)

    def _read_at(self, receiver: Reader) -> Place:
        behind_heads = receiver.kind == "mlp" and self.cfg.wiring == "sequential"
        return receiver.layer, BEFORE_MLP if behind_heads else BEFORE_ATTENTION


def outputs_of(senders: Sequence[Writer]) -> list[str]:
    """The hook points at which senders write, each once."""
    return list(dict.fromkeys(output_of(sender) for sender in senders))


def output_of(sender: Writer) -> str:
    """The hook point at which a sender writes; heads before `W_O`, where a layer's take least memory."""
    return f"blocks.{sender.layer}.attn.hook_z" if sender.kind == "head" else sender.hook_name
