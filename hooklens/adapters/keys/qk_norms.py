"""The config part for norms of queries and keys that a flag switches on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hooklens.adapters.keys.reader import ConfigReader
from hooklens.config import NormConfig


@dataclass(frozen=True, kw_only=True)
class QKNormFlag:
    """A flag that gives queries and keys norms of the block's kind: `qk_norm`. Comes after the part that gives `norm`.

    Attributes:
        hub: the key.
        default: what transformers takes where the key is absent.
        bias: whether these norms have a bias; None: as the block's have.
        per_head: whether each head has a weight of its own.
    """

    hub: str = "qk_layernorm"
    default: bool = False
    bias: bool | None = None
    per_head: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The key."""
        return (self.hub,)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The block's norm where the flag is on."""
        norm = fields.get("norm")
        if not reader.get(self.hub, bool, self.default) or not isinstance(norm, NormConfig):
            return {"qk_norm": None}
        qk_norm = norm if self.bias is None else replace(norm, bias=self.bias)
        return {"qk_norm": qk_norm, "qk_norm_per_head": self.per_head}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The flag is on where there are norms; others than the block's are refused when they are read back."""
        return {self.hub: fields["qk_norm"] is not None}
