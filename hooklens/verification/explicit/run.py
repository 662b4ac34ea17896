"""All activations of a batch, and what edits at some points make of them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks.names import is_by_name_only
from hooklens.verification.explicit.batch import Batch
from hooklens.verification.explicit.network import LOGITS, ExplicitNetwork

Edit = Callable[[Tensor], Tensor]


class ExplicitRun:
    """Every activation of a batch, computed one after another.

    Args:
        model: the network.
        batch: the sequences.
        table_dtype: in which rotary angles are made.

    Attributes:
        network: the definitions.
        values: the tensors by hook point, and the logits.

    Raises:
        Unknown: a part of the network has no definition here.
    """

    def __init__(self, model: HookedCausalLM, batch: Batch, *, table_dtype: torch.dtype = torch.float32) -> None:
        self.network = ExplicitNetwork(model, batch, table_dtype=table_dtype)
        self._readers: dict[str, set[str]] = {}
        self._points = [name for name in model.hook_points() if not is_by_name_only(name)]
        self.values: dict[str, Tensor] = {}
        self._complete(self.values, {})

    @property
    def logits(self) -> Tensor:
        """The logits, `[batch pos d_vocab]` in float64."""
        return self.values[LOGITS]

    def edited(self, edits: Mapping[str, Edit]) -> dict[str, Tensor]:
        """All activations when edits stand at some points; what depends on none of them is what it was."""
        stale = {other for name in edits for other in self._downstream_of(name)} | edits.keys()
        values = {other: value for other, value in self.values.items() if other not in stale}
        self._complete(values, edits)
        return values

    def _downstream_of(self, name: str) -> set[str]:
        reached: set[str] = set()
        waiting = [name]
        while waiting:
            for reader in self._readers.get(waiting.pop(), ()):
                if reader not in reached:
                    reached.add(reader)
                    waiting.append(reader)
        return reached

    def _complete(self, values: dict[str, Tensor], edits: Mapping[str, Edit]) -> None:
        """Compute what is missing."""

        def make(name: str) -> Tensor:
            if name not in values:

                def read(source: str) -> Tensor:
                    self._readers.setdefault(source, set()).add(name)
                    return make(source)

                made = self.network.compute(name, read)
                values[name] = edits[name](made) if name in edits else made
            return values[name]

        # Layer after layer, so that nothing is asked for from far away.
        for name in (*self._points, LOGITS):
            make(name)
