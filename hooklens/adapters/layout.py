"""From HookLens' layout to the hub's: the names, shapes and tensors that a family's checkpoints hold."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooklens.adapters.choice import choose_family
from hooklens.adapters.families import load_families
from hooklens.adapters.family import BoundRule, Family
from hooklens.adapters.rules import DiskShapes, parameters_beside
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, UnsupportedModelError, join_names
from hooklens.weights.shapes import weight_shapes


class HubLayout:
    """How a HookLens state is laid out on disk: names, shapes and a way to make each tensor when it is written.

    Args:
        cfg: the network.
        state: its parameters under HookLens names.
        transforms: the weight-processing steps it has been through, for the advice where it cannot be written.

    Raises:
        UnsupportedModelError: no family can express `cfg`; the text says which fields, and what to do.
        CheckpointError: the state is not that of `cfg`.
    """

    def __init__(self, cfg: HookedConfig, state: Mapping[str, Tensor], *, transforms: Sequence[str] = ()) -> None:
        family = choose_family(cfg, load_families(), transforms=transforms)
        self._cfg = cfg
        self._state = state
        self.config = family.write_config(cfg, transforms=transforms)
        self._shapes = weight_shapes(cfg)
        self._disk_shapes = DiskShapes(self._shapes, cfg)
        self._check_state()
        bound = list(family.bind_rules(cfg))
        self._check_written(family, bound)
        self._bound = {name: rule for rule in bound for name in rule.hubs}

    def names(self) -> list[str]:
        """Names on disk, in the order of the network."""
        return list(self._bound)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor on disk."""
        return self._disk_shapes.of(self._bound[name].rule, self._bound[name].layer)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        bound = self._bound[name]
        return self._state[parameters_beside(bound.rule)[0].format(i=bound.layer)].dtype

    def make(self, name: str) -> Tensor:
        """The tensor as it stands on disk, contiguous; memory is shared where the layout allows."""
        bound = self._bound[name]
        parameters = tuple(self._state[ours].detach() for ours in bound.ours)
        tensor = bound.save(name, parameters, self._cfg)
        return (tensor if parameters else tensor.to(self.dtype(name))).contiguous()

    def _check_written(self, family: Family, bound: Sequence[BoundRule]) -> None:
        """Refuse to write a network of which a parameter has no place in the family's checkpoints."""
        written = {name for rule in bound for name in rule.ours}
        tied = {"unembed.W_U"} if self._cfg.tied_unembed else set()
        lost = [name for name in self._shapes if name not in written and name not in tied]
        if lost:
            raise UnsupportedModelError(
                f"a {family.name} checkpoint has no place for {join_names(lost)}; keep the model in HookLens' own "
                "format (state_dict and cfg.to_json())"
            )

    def _check_state(self) -> None:
        tied = self._cfg.tied_unembed
        missing = [name for name in self._shapes if name not in self._state and not (tied and name == "unembed.W_U")]
        unexpected = [name for name in self._state if name not in self._shapes]
        misshapen = [
            f"{name!r} is {list(self._state[name].shape)}, expected {list(shape)}"
            for name, shape in self._shapes.items()
            if name in self._state and tuple(self._state[name].shape) != shape
        ]
        problems = [f"missing: {join_names(missing)}"] if missing else []
        problems += [f"unexpected: {join_names(unexpected)}"] if unexpected else []
        problems += [f"of the wrong shape: {'; '.join(misshapen)}"] if misshapen else []
        if problems:
            raise CheckpointError(
                f"the state is not that of the network its config describes; {'. '.join(problems)}. "
                "Give the state_dict of the model that cfg belongs to"
            )
        if tied and "unembed.W_U" in self._state:
            unembed, embed = self._state["unembed.W_U"], self._state["embed.W_E"]
            if unembed.data_ptr() != embed.data_ptr() and not torch.equal(unembed.T, embed):
                raise CheckpointError(
                    "cfg.tied_unembed is true, but unembed.W_U differs from embed.W_E transposed; saving would lose "
                    "one of them. Set tied_unembed=False in the config to keep both"
                )


def to_hub(
    cfg: HookedConfig, state: Mapping[str, Tensor], *, transforms: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `config.json` and the tensors under their names on disk, in the format that `cfg` came from.

    Tensors share memory with `state` where the layout allows. A config without an origin takes the first family that
    can express it.

    Args:
        cfg: the network.
        state: its parameters under HookLens names; a tied `unembed.W_U` may be left out.
        transforms: the weight-processing steps it has been through, for the advice where it cannot be written.

    Raises:
        UnsupportedModelError: no family can express `cfg`; the text says which fields, and what to do.
        CheckpointError: the state is not that of `cfg`.
    """
    layout = HubLayout(cfg, state, transforms=transforms)
    dtype = str(state["embed.W_E"].dtype).removeprefix("torch.")
    return with_dtype(layout.config, dtype), {name: layout.make(name) for name in layout.names()}


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with the dtype of its weights, under the key it uses for that already."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {**config, key: dtype}
