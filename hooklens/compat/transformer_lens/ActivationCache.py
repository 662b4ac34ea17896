"""`ActivationCache` of 2.x: a dictionary and its model, whose methods are those of `hooklens.ActivationCache`."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens import activation_cache
from hooklens.activation_cache.readout import freeze_norm
from hooklens.activation_cache.stream import locate
from hooklens.compat.transformer_lens import utils
from hooklens.compat.transformer_lens.utils import Slice, SliceInput
from hooklens.config import HookedConfig
from hooklens.weights.constants import change_norms

if TYPE_CHECKING:
    from hooklens.compat.transformer_lens.HookedTransformer import HookedTransformer

Positions = Slice | SliceInput


class ActivationCache:
    """Activations by hook name, which may be changed.

    Args:
        cache_dict: them.
        model: whose they are.
        has_batch_dim: whether they have a batch axis.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: "HookedTransformer", has_batch_dim: bool = True) -> None:
        self.cache_dict, self.model, self.has_batch_dim = cache_dict, model, has_batch_dim
        self.has_embed, self.has_pos_embed = "hook_embed" in cache_dict, "hook_pos_embed" in cache_dict

    def __repr__(self) -> str:
        return f"ActivationCache with keys {list(self.cache_dict)}"

    def __getitem__(self, key: Any) -> Tensor:
        """An activation by its name or a shorthand; negative layers count from the end."""
        if isinstance(key, str):
            return self.cache_dict[key if key in self.cache_dict else utils.get_act_name(key)]
        name, *rest = key
        if rest and isinstance(rest[0], int) and rest[0] < 0:
            rest[0] += self.model.cfg.n_layers
        return self.cache_dict[utils.get_act_name(name, *rest)]

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __contains__(self, key: object) -> bool:
        return key in self.cache_dict

    def keys(self) -> Any:
        """The names."""
        return self.cache_dict.keys()

    def values(self) -> Any:
        """The tensors."""
        return self.cache_dict.values()

    def items(self) -> Any:
        """Names and tensors."""
        return self.cache_dict.items()

    def remove_batch_dim(self) -> "ActivationCache":
        """Drop the batch axis of this cache's tensors."""
        if not self.has_batch_dim:
            logging.warning("remove_batch_dim: the batch axis has been removed already")
            return self
        wrong = {name: tuple(tensor.shape) for name, tensor in self.items() if len(tensor) != 1}
        assert not wrong, f"Cannot remove a batch dimension of more than one row: {wrong}"
        for name in self.cache_dict:
            self.cache_dict[name] = self.cache_dict[name][0]
        self.has_batch_dim = False
        return self

    def to(self, device: Any, move_model: bool | None = False) -> "ActivationCache":
        """Move this cache, and the model if asked to."""
        self.cache_dict = {name: tensor.to(device) for name, tensor in self.items()}
        if move_model:
            self.model.to(device)
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Switch gradients on or off in the whole process."""
        logging.warning("Changed the global state, set autodiff to %s", mode)
        torch.set_grad_enabled(mode)

    def apply_slice_to_batch_dim(self, batch_slice: Positions) -> "ActivationCache":
        """Another cache, of some rows; an int drops the axis."""
        rows = _slice(batch_slice)
        assert self.has_batch_dim or rows.mode == "identity", "Cannot index into a cache without a batch dim"
        kept = {name: rows.apply(tensor, dim=0) for name, tensor in self.items()}
        return ActivationCache(kept, self.model, self.has_batch_dim and rows.mode != "int")

    def _ours(self) -> activation_cache.ActivationCache:
        """HookLens's cache of the same tensors, of a network as 2.x takes it.

        Norms are folded, and nothing stands between what heads write and the stream.
        """
        hooked = self.model.hooked
        return activation_cache.ActivationCache(
            self.cache_dict, cfg=_folded(hooked.cfg), weights=hooked.named_weights(), has_batch_dim=self.has_batch_dim
        )

    def _no_components(self, pos_slice: Positions, return_labels: bool) -> Any:
        none = _slice(pos_slice).apply(self["hook_embed"], dim=-2)[None][:0]
        return (none, []) if return_labels else none

    def accumulated_resid(
        self, layer: int | None = None, incl_mid: bool = False, apply_ln: bool = False, pos_slice: Positions = None,
        mlp_input: bool = False, return_labels: bool = False,
    ) -> Any:  # fmt: skip
        """The stream at the entrance of every layer."""
        return self._ours().accumulated_resid(
            layer, incl_mid=incl_mid, apply_ln=apply_ln, pos_slice=_choice(pos_slice), mlp_input=mlp_input,
            return_labels=return_labels,
        )  # fmt: skip

    def decompose_resid(
        self, layer: int | None = None, mlp_input: bool = False, mode: Any = "all", apply_ln: bool = False,
        pos_slice: Positions = None, incl_embeds: bool = True, return_labels: bool = False,
    ) -> Any:  # fmt: skip
        """Embeddings and the outputs of layers."""
        return self._ours().decompose_resid(
            layer, mlp_input=mlp_input, mode=mode, apply_ln=apply_ln, pos_slice=_choice(pos_slice),
            incl_embeds=incl_embeds and self.has_embed, return_labels=return_labels,
        )  # fmt: skip

    def compute_head_results(self) -> None:
        """Put each head's output into this cache, as `hook_result`."""
        if self._has_results():
            logging.warning("compute_head_results: they are in the cache already")
            return
        self.cache_dict.update(self._ours().compute_head_results())

    def _has_results(self) -> bool:
        return "blocks.0.attn.hook_result" in self.cache_dict

    def stack_head_results(
        self, layer: int | None = -1, return_labels: bool = False, incl_remainder: bool = False,
        pos_slice: Positions = None, apply_ln: bool = False,
    ) -> Any:  # fmt: skip
        """What each head adds to the stream; their results are in the cache then."""
        if not self._has_results():
            print("Tried to stack head results when they weren't cached. Computing head results now")
            self.compute_head_results()
        if layer == 0 and not incl_remainder:
            return self._no_components(pos_slice, return_labels)
        return self._ours().stack_head_results(
            layer, return_labels=return_labels, incl_remainder=incl_remainder, pos_slice=_choice(pos_slice),
            apply_ln=apply_ln,
        )  # fmt: skip

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Tensor:
        """One activation of every layer."""
        n_layers = self.model.cfg.n_layers if layer in (None, -1) else layer
        return torch.stack([self[activation_name, below, sublayer_type] for below in range(n_layers)])

    def get_neuron_results(self, layer: int, neuron_slice: Positions = None, pos_slice: Positions = None) -> Tensor:
        """What each neuron of a layer writes, `[*batch_pos neuron d_model]`."""
        neurons, positions = _slice(neuron_slice), _slice(pos_slice)
        acts = neurons.apply(positions.apply(self["post", layer, "mlp"], dim=-2), dim=-1)
        weights = self.model.hooked.named_weights()
        W_out = weights[f"blocks.{range(self.model.cfg.n_layers)[layer]}.mlp.W_out"]
        return acts[..., None] * neurons.apply(W_out, dim=0)

    def stack_neuron_results(
        self, layer: int | None, pos_slice: Positions = None, neuron_slice: Positions = None,
        return_labels: bool = False, incl_remainder: bool = False, apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """What each neuron adds to the stream."""
        if layer == 0 and not incl_remainder:
            return self._no_components(pos_slice, return_labels)
        return self._ours().stack_neuron_results(
            layer, pos_slice=_choice(pos_slice), neuron_slice=_choice(neuron_slice), return_labels=return_labels,
            incl_remainder=incl_remainder, apply_ln=apply_ln, project_output_onto=project_output_onto,
        )  # fmt: skip

    def apply_ln_to_stack(
        self, residual_stack: Tensor, layer: int | None = None, mlp_input: bool = False, pos_slice: Positions = None,
        batch_slice: Positions = None, has_batch_dim: bool = True, recompute_ln: bool = False,
    ) -> Tensor:  # fmt: skip
        """Vectors centred and divided by the scale that the norm at a layer had; what fits by broadcasting fits."""
        cfg = self.model.cfg
        if cfg.normalization_type is None:
            return residual_stack
        positions, rows = _slice(pos_slice), _slice(batch_slice)
        # Counted from the end, so that there may be any number of axes of components.
        row_axis = -2 if positions.mode == "int" else -3
        if has_batch_dim and rows.mode != "identity":
            assert self.has_batch_dim, f"batch_slice={rows.slice}: this cache has no batch axis"
            residual_stack = rows.apply(residual_stack, dim=row_axis)
        is_final = layer in (None, -1, cfg.n_layers)
        if recompute_ln and is_final:
            normed: Tensor = self.model.get_submodule("ln_final")(residual_stack)
            return normed
        ours = self._ours()
        name = locate(ours.cfg, layer, mlp_input=mlp_input and not is_final).norm
        if name is None:
            return residual_stack
        norm = freeze_norm(ours, name, purpose="apply_ln_to_stack")
        scale = positions.apply(norm.scale, dim=-2)
        if self.has_batch_dim:
            scale = rows.apply(scale, dim=0)
        return dataclasses.replace(norm, scale=scale).apply(residual_stack)

    def logit_attrs(
        self, residual_stack: Tensor, tokens: str | int | Tensor, incorrect_tokens: str | int | Tensor | None = None,
        pos_slice: Positions = None, batch_slice: Positions = None, has_batch_dim: bool = True,
    ) -> Tensor:  # fmt: skip
        """What each component adds to the logit of tokens, or to its difference to others'."""
        directions = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            both = [one if isinstance(one, Tensor) else torch.tensor(0) for one in (tokens, incorrect_tokens)]
            if both[0].shape != both[1].shape:
                shapes = " and ".join(str(tuple(one.shape)) for one in both)
                raise ValueError(f"tokens and incorrect_tokens must have the same shape; found {shapes}")
            directions = directions - self.model.tokens_to_residual_directions(incorrect_tokens)
        read = self.apply_ln_to_stack(residual_stack, -1, False, pos_slice, batch_slice, has_batch_dim)
        return (read * directions).sum(-1)

    def get_full_resid_decomposition(
        self, layer: int | None = None, mlp_input: bool = False, expand_neurons: bool = True, apply_ln: bool = False,
        pos_slice: Positions = None, return_labels: bool = False, project_output_onto: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Each head, each neuron or MLP, the embeddings, and the bias."""
        return self._ours().get_full_resid_decomposition(
            layer, mlp_input=mlp_input, expand_neurons=expand_neurons, apply_ln=apply_ln,
            pos_slice=_choice(pos_slice), return_labels=return_labels, project_output_onto=project_output_onto,
        )  # fmt: skip


def _slice(given: Positions) -> Slice:
    return given if isinstance(given, Slice) else Slice(given)


def _choice(given: Positions) -> Any:
    """A choice of entries as HookLens takes it."""
    chosen = _slice(given)
    return None if chosen.mode == "identity" else chosen.slice


def _folded(cfg: HookedConfig) -> HookedConfig:
    """The network with its norms taken for folded, and none behind the branches."""
    norm, last = (change_norms(one, weight=False, bias=False, unit_offset=False) for one in (cfg.norm, cfg.final_norm))
    return cfg.replace(norm=norm, final_norm=last, norm_after=False)
