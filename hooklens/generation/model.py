"""What generation asks of a model."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.point import HookPoint
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.tokens import Tokenizer


@runtime_checkable
class GeneratingModel(Protocol):
    """A network with hook points that can plan a call and run it; `HookedCausalLM` is one."""

    cfg: HookedConfig
    tokenizer: Tokenizer | None
    transforms: tuple[str, ...]
    generation_config: dict[str, Any]

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The adapters beside the weights that act."""
        ...

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        ...

    @property
    def cache_device(self) -> torch.device | tuple[torch.device, ...]:
        """Where keys and values lie, on several devices for each layer."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        ...

    @property
    def make_plan(self) -> Callable[..., Any]:
        """`make_plan(ids, attention_mask, positions, past_kv_cache, phase=...)` checks a call and places its tokens."""
        ...

    @property
    def run(self) -> Callable[..., Tensor]:
        """`run(ids, plan, listeners=..., past_kv_cache=..., logits_at=...)` gives logits `[batch chosen d_vocab]`."""
        ...

    @property
    def bos_rule(self) -> Callable[..., bool | None]:
        """`bos_rule(prepend_bos=..., begins=...)`: what the argument is for a text, whatever a caller said."""
        ...

    def depends_on_length(self, n_tokens: int) -> bool:
        """Whether a sequence of this length has rotary frequencies of its own."""
        ...

    @property
    def fits_past(self) -> Callable[[Any], bool]:
        """`fits_past(plan)`: whether the cached keys turned at the frequencies of the sequences' lengths."""
        ...

    def hook_points(self) -> dict[str, HookPoint]:
        """All hook points by name."""
        ...

    def select_hook_points(self, names_filter: NamesFilter) -> dict[str, HookPoint]:
        """The hook points a filter selects, by name."""
        ...

    def find_edit_points(self, edit: Edit) -> dict[str, HookPoint]:
        """The hook points at which an edit acts, by name."""
        ...

    def named_weights(self) -> Mapping[str, Tensor]:
        """The weights by name, shared."""
        ...


def init_cache(model: GeneratingModel, batch_size: int) -> HookedKeyValueCache:
    """An empty key-value cache for a model."""
    return HookedKeyValueCache.init_cache(model.cfg, model.device, batch_size, dtype=model.dtype)
