"""Readers and writers of other libraries' formats, imported when they are asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hooklens.adapters.sources import Repository
from hooklens.config import HookedConfig
from hooklens.optional import import_package

if TYPE_CHECKING:
    from hooklens.adapters.lora import LoraAdapter

_XLSTM, _LORA = "hooklens.adapters.xlstm", "hooklens.adapters.lora"


def read_xlstm(
    params: Mapping[Any, Any], config: Mapping[str, Any] | str, *, n_ctx: int
) -> tuple[HookedConfig, dict[str, Tensor]]:
    """See `hooklens.adapters.xlstm.read_xlstm`."""
    read: tuple[HookedConfig, dict[str, Tensor]] = import_package(_XLSTM).read_xlstm(params, config, n_ctx=n_ctx)
    return read


def write_xlstm(cfg: HookedConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """See `hooklens.adapters.xlstm.write_xlstm`."""
    tree: dict[str, Any] = import_package(_XLSTM).write_xlstm(cfg, state)
    return tree


def open_adapter(source: "str | Path | Repository", **options: Any) -> "LoraAdapter":
    """See `hooklens.adapters.lora.open_adapter`."""
    adapter: LoraAdapter = import_package(_LORA).open_adapter(source, **options)
    return adapter
