"""The pool whose models are only their blocks."""

from typing import Any

from torch import nn

from hooklens.arguments import optional, read_flag, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names, warn_caller
from hooklens.pool.causal_lm_pool import CausalLMPool
from hooklens.pool.errors import PoolError


class CausalLMBackbonePool(CausalLMPool, target="backbone_pool"):
    """A pool whose models are only their blocks: an `nn.ModuleList`, without embedding, final norm and unembedding."""

    @reads(hooked=read_flag, lazy=optional(read_flag))
    def load_model(
        self, model_name_or_config: Any, *, hooked: bool = True, lazy: bool | None = None, **overrides: Any
    ) -> nn.ModuleList:
        """Load the blocks of a model, whatever its family.

        Args:
            model_name_or_config: see `CausalLMPool.load_model`.
            hooked: give the blocks of a `HookedCausalLM`, `model.blocks`; else those of transformers' model.
            lazy: blocks are modules and not read lazily: True is refused, and `enable_lazy_loading` of the pool gives a
                warning.
            **overrides: see there.

        Raises:
            HookLensError: see there.
        """
        if lazy:
            raise InputError("lazy=True: blocks are modules, which hold their weights; leave it out")
        if self.enable_lazy_loading and lazy is None:
            warn_caller("enable_lazy_loading: blocks are modules, which hold their weights; they are loaded with them")
        model = self._load(self._request(model_name_or_config, overrides, hooked=hooked))
        if isinstance(model, HookedCausalLM):
            return model.blocks
        return _find_blocks(model)


def _find_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformers model: of the lists of modules the one with an entry for each layer."""
    config: Any = model.config
    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    found = {
        name: one for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) == n_layers
    }
    outermost = {name: one for name, one in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    if len(outermost) != 1:
        raise PoolError(
            f"{type(model).__name__} has {len(outermost)} lists of {n_layers} modules: {join_names(list(outermost))}; "
            "expected one, its blocks. hooked=True gives the blocks of any family"
        )
    return next(iter(outermost.values()))
