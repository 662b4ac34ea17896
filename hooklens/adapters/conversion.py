"""From the hub's layout to HookLens' and back: configs and tensors checked against each other, then renamed."""

import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.adapters.config_map import BiasFlag
from hooklens.adapters.families import load_families
from hooklens.adapters.family import Family, choose_family, find_family
from hooklens.adapters.rules import DiskShapes
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, InputError, join_names
from hooklens.weights.shapes import weight_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors somewhere: in memory or on disk."""

    def names(self) -> Collection[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor itself.

        Args:
            name: which.
            apart: it will be copied from and let go, so it should keep no memory that outlives it.
        """


class MemoryTensors:
    """Tensors of a state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._state.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._state[name].shape)

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor, detached and sharing its memory."""
        return self._state[name].detach()


class HubModel:
    """A model in the hub's layout: a `config.json` and its tensors, checked against each other when made.

    Attributes:
        cfg: the network. What the config leaves to the tensors (a tied unembedding that is not, biases of some maps
            only) is settled as transformers settles it.
    """

    def __init__(self, config: Mapping[str, Any], source: TensorSource, *, where: str) -> None:
        self._where = where
        self._source = source
        self._family = find_family(config, load_families(), where=where)
        self._stored_names = _map_names(self._family, source.names())
        cfg = self._family.read_config(config, where=where)
        self.cfg = _settle_biases(self._family, self._settle_tying(cfg), self._stored_names)
        self._bound = list(self._family.bind_rules(self.cfg))
        self._check_tensors()

    def tensors(self, layers: Sequence[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """HookLens names and tensors in their logical shapes, one by one.

        Args:
            layers: blocks to take; they become blocks 0, 1, ... in this order. None: all.

        Raises:
            InputError: a layer does not exist or is given twice.
        """
        # Checked at the call: a generator would not run until the first tensor is asked for.
        return self._iterate(None if layers is None else check_layers(layers, self.cfg.n_layers))

    def _iterate(self, layers: Sequence[int] | None) -> Iterator[tuple[str, Tensor]]:
        for bound in self._bound if layers is None else self._family.bind_rules(self.cfg, layers):
            stored = self._source.read(self._stored_names[bound.hub], apart=len(bound.ours) > 1)
            loaded = bound.rule.load(stored, self.cfg)
            yield from zip(bound.ours, loaded, strict=True)
            if bound.hub == self._family.embedding and self.cfg.tied_unembed:
                yield "unembed.W_U", loaded[0].T

    def _settle_tying(self, cfg: HookedConfig) -> HookedConfig:
        """Compare a tied unembedding that is stored all the same: unequal ones are two weights."""
        names, embedding, head = self._stored_names, self._family.embedding, self._family.head
        if not cfg.tied_unembed or head not in names:
            return cfg
        if embedding not in names:
            names[embedding] = names[head]
        elif not self._are_equal(names[embedding], names[head]):
            warnings.warn(
                f"{self._where}: tie_word_embeddings is true, but {names[head]!r} and {names[embedding]!r} differ; "
                "both are kept, untied, as transformers does. Set tie_word_embeddings to false to say so",
                stacklevel=2,
            )
            return cfg.replace(tied_unembed=False)
        del names[head]
        return cfg

    def _are_equal(self, one: str, other: str) -> bool:
        if self._source.shape(one) != self._source.shape(other):
            return False
        first, second = self._source.read(one), self._source.read(other)
        return first.data_ptr() == second.data_ptr() or torch.equal(first, second)

    def _check_tensors(self) -> None:
        """Account for every name and shape; raise once with all that is wrong."""
        expected = {bound.hub: bound for bound in self._bound}
        missing = [name for name in expected if name not in self._stored_names]
        unexpected = [
            stored
            for name, stored in self._stored_names.items()
            if name not in expected and not self._family.is_weightless(name)
        ]
        shapes = DiskShapes(weight_shapes(self.cfg), self.cfg)
        misshapen = []
        for name, bound in expected.items():
            if name not in self._stored_names:
                continue
            found = self._source.shape(self._stored_names[name])
            right = shapes.of(bound.rule, bound.layer)
            if found != tuple(right):
                misshapen.append(f"{self._stored_names[name]!r} is {list(found)}, expected {list(right)}")
        problems = []
        if missing:
            problems.append(f"missing tensors: {join_names(missing)}")
        if unexpected:
            problems.append(f"unexpected tensors: {join_names(unexpected)}")
        if misshapen:
            problems.append(f"tensors of another shape than config.json says: {'; '.join(misshapen)}")
        if problems:
            raise CheckpointError(
                f"{self._where}: config.json describes a {self._family.name} model with other tensors: "
                f"{'. '.join(problems)}. Check that config.json and the weights belong together and that the download "
                "is whole"
            )


def check_layers(layers: Sequence[int], n_layers: int) -> list[int]:
    """Check a choice of a checkpoint's layers.

    Raises:
        InputError: a layer does not exist or is given twice; all are listed.
    """
    chosen = list(layers)
    outside = [layer for layer in chosen if not 0 <= layer < n_layers]
    repeated = sorted({layer for layer in chosen if chosen.count(layer) > 1})
    if outside or repeated:
        found = [f"{outside} are not layers of the checkpoint"] if outside else []
        found += [f"{repeated} are given more than once"] if repeated else []
        raise InputError(f"layers={chosen}: {' and '.join(found)}; expected distinct layers from 0 to {n_layers - 1}")
    return chosen


def config_of_layers(cfg: HookedConfig, layers: Sequence[int] | None) -> HookedConfig:
    """The config of a model that keeps only some of the blocks, in the order given; None keeps all.

    Raises:
        InputError: a layer does not exist or is given twice.
    """
    if layers is None:
        return cfg
    chosen = check_layers(layers, cfg.n_layers)
    windows = None if cfg.windows is None else tuple(cfg.windows[layer] for layer in chosen)
    return cfg.replace(n_layers=len(chosen), windows=windows)


def _map_names(family: Family, stored: Collection[str]) -> dict[str, str]:
    """Names on disk by the family's rules, with the names under which the source has them."""
    is_base_model = not any(name.startswith(family.base_prefix) for name in stored)
    names = {}
    for name in stored:
        known = family.renamed.get(name, name)
        if is_base_model and known != family.head:
            known = family.base_prefix + known
        names[known] = name
    return names


def _settle_biases(family: Family, cfg: HookedConfig, names: Collection[str]) -> HookedConfig:
    """Where one flag stands for the biases of several maps and only some are stored, keep those."""
    for part in family.config.parts:
        if not isinstance(part, BiasFlag) or len(part.names) == 1 or not all(getattr(cfg, n) for n in part.names):
            continue
        with_all = {bound.hub for bound in family.bind_rules(cfg)}
        absent = {}
        for field_name in part.names:
            without = {bound.hub for bound in family.bind_rules(cfg.replace(**{field_name: False}))}
            if not (with_all - without) & set(names):
                absent[field_name] = False
        if len(absent) < len(part.names):
            cfg = cfg.replace(**absent)
    return cfg


def read_hf_model(hf_model: "PreTrainedModel") -> tuple[HookedConfig, dict[str, Tensor]]:
    """The config and parameters of a transformers model in memory.

    Parameters share the model's memory wherever the layout allows: all but the queries, keys and values of a
    fused tensor with several key-value heads.

    Raises:
        UnsupportedModelError: the architecture or a config value is not implemented.
        CheckpointError: the tensors are not those that the config promises.
    """
    # Through JSON, so that dtypes and the like are plain values as in a file.
    config = json.loads(json.dumps(hf_model.config.to_dict(), default=str))
    model = HubModel(config, MemoryTensors(hf_model.state_dict()), where=type(hf_model).__name__)
    return model.cfg, dict(model.tensors())


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
        self._bound = {bound.hub: bound for bound in family.bind_rules(cfg)}

    def names(self) -> list[str]:
        """Names on disk, in the order of the network."""
        return list(self._bound)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor on disk."""
        return self._disk_shapes.of(self._bound[name].rule, self._bound[name].layer)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._state[self._bound[name].ours[0]].dtype

    def make(self, name: str) -> Tensor:
        """The tensor as it stands on disk, contiguous; memory is shared where the layout allows."""
        bound = self._bound[name]
        parameters = tuple(self._state[ours].detach() for ours in bound.ours)
        return bound.rule.save(parameters, self._cfg).contiguous()

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
