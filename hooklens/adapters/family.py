"""What a family of checkpoints is: its names, its config map and its weight map, read in both directions."""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hooklens.adapters.keys import BiasFlag, ConfigMap
from hooklens.adapters.rules import Copy, WeightRule, is_stacked, parameters_beside
from hooklens.config import HookedConfig, Origin
from hooklens.config.combinations import BY_LAYER
from hooklens.errors import ConfigError, UnsupportedModelError

Config = Mapping[str, Any]
_MLP_OUT = "blocks.{i}.mlp.W_out"


@dataclass(frozen=True)
class BoundRule:
    """A weight rule at one layer: `{i}` and `{e}` filled in.

    Attributes:
        rule: the rule.
        hubs: names of its tensors on disk, in the numbering of the checkpoint; one, but where they are stacked.
        ours: HookLens names, in the numbering of the model.
        layer: layer of the model; 0 where the rule has none.
        source_layer: layer of the checkpoint.
    """

    rule: WeightRule
    hubs: tuple[str, ...]
    ours: tuple[str, ...]
    layer: int
    source_layer: int

    def load(self, read: Callable[[str], Tensor], cfg: HookedConfig) -> tuple[Tensor, ...]:
        """The parameters named by `ours`, in their logical shapes.

        Args:
            read: gives the tensor of a name on disk.
            cfg: the whole checkpoint's config.
        """
        if not is_stacked(self.rule):
            return self.rule.load(read(self.hubs[0]), cfg)
        loaded = [self.rule.load(read(name), cfg) for name in self.hubs]
        return tuple(map(_stack, zip(*loaded, strict=True)))

    def save(self, name: str, parameters: tuple[Tensor, ...], cfg: HookedConfig) -> Tensor:
        """The tensor of one of the names on disk; need not be contiguous."""
        if is_stacked(self.rule):
            place = self.hubs.index(name)
            parameters = tuple(parameter[place] for parameter in parameters)
        return self.rule.save(parameters, cfg)


def _stack(pieces: Sequence[Tensor]) -> Tensor:
    """Tensors along a new first axis, each of them as it lies in memory: rows are copied as rows."""
    axes = range(pieces[0].ndim)
    order = sorted(axes, key=pieces[0].stride, reverse=True)
    turned = [piece.permute(order) for piece in pieces]
    return torch.stack(turned).permute(0, *(1 + order.index(axis) for axis in axes))


def _shape_in(cfg: HookedConfig, rule: WeightRule, layer: int) -> tuple[int, ...] | None:
    """The shape of the rule's first parameter in a layer of the network; None where the network lacks one of them."""
    weights = cfg.description.weights
    names = [name.format(i=layer) for name in parameters_beside(rule)]
    if not all(name in weights for name in names) or (cfg.tied_unembed and "unembed.W_U" in names):
        return None
    if rule.part is not None and getattr(cfg.block(layer).mlp, "kind", None) != rule.part:
        return None
    return tuple(weights[names[0]].shape)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of checkpoints, as data.

    Attributes:
        name: the family's name.
        model_types: values of `model_type` in `config.json`; the first is written on save.
        architectures: values of `architectures`; the first is written on save.
        base_prefix: what the base model's parameter names begin with. A file saved from the base model alone
            lacks it; transformers reads those too.
        embedding, head: names on disk of the token embedding and the unembedding.
        config: the config map.
        weights: the weight map.
        in_memory: rules of parameters that transformers holds otherwise in memory than on disk (experts); they have a
            rule in `weights`, too.
        turned_experts: transformers says of its experts that it holds their maps as `[in, out]` (`is_transposed`).
        weightless: patterns of names on disk that hold no weight (masks and tables in old checkpoints).
        further_layers: a pattern of the names of tensors in layers, whose first group is the layer, where files have
            layers past those that the config counts, which are no part of the language model. None: they have none.
        renamed: names that transformers uses in memory, with the names on disk.
        dialects: older `model_type`s, each with the function that rewrites its config; the family's own one, where
            there are files of it that are written in another way.
        adopts: tells whether a config in another family's words is of this one all the same; None: none is.
        peculiar: what of transformers' modules is not what their weights tell, as `"<module>.input"` or `.output` with
            `{i}` in the place of the layer, with the reason in a clause.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    base_prefix: str
    embedding: str
    head: str
    config: ConfigMap
    weights: tuple[WeightRule, ...]
    in_memory: tuple[WeightRule, ...] = ()
    turned_experts: bool = False
    weightless: tuple[str, ...] = ()
    further_layers: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    dialects: Mapping[str, Callable[[Config], dict[str, Any]]] = field(default_factory=dict)
    adopts: Callable[[Config], bool] | None = None
    peculiar: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_conv1d(self) -> bool:
        """Whether linear maps lie on disk as `[in, out]` (transformers' `Conv1D`), as those of its MLPs do."""
        return any(
            isinstance(rule, Copy) and rule.name == _MLP_OUT and rule.pattern is None and rule.part == "mlp"
            for rule in self.weights
        )

    def read_config(self, config: Config, *, where: str, warn: bool = True) -> HookedConfig:
        """The network that `config` describes, with the family and `config` as its origin.

        Raises:
            UnsupportedModelError: a key is missing, or holds a value that is not implemented.
        """
        origin = Origin(family=self.name, hub_config=json.dumps(dict(config), default=str))
        try:
            fields = self.config.read(self._translate(config), where=where, warn=warn)
            return HookedConfig(origin=origin, **fields)
        except ConfigError as error:
            raise UnsupportedModelError(
                f"{where}: {self.config.called} describes a network that cannot be: {error}"
            ) from error

    def write_config(self, cfg: HookedConfig, *, transforms: Sequence[str] = ()) -> dict[str, Any]:
        """The `config.json` of `cfg`: the keys it was read from, with what has changed since, or new ones.

        Args:
            cfg: the network.
            transforms: the weight-processing steps it has been through, for the advice where it cannot be written.

        Raises:
            UnsupportedModelError: no config of this family describes the network; the fields are listed.
        """
        written, differing = self._write_config(cfg)
        if differing:
            raise UnsupportedModelError(
                f"a {self.name} checkpoint cannot express {describe_fields(cfg, differing)}; {how_to_save(transforms)}"
            )
        return written

    def inexpressible_fields(self, cfg: HookedConfig) -> list[str]:
        """The fields of `cfg` that a checkpoint of this family cannot express."""
        return self._write_config(cfg)[1]

    def bind_rules(
        self, cfg: HookedConfig, layers: Sequence[int] | None = None, *, in_memory: bool = False
    ) -> Iterator[BoundRule]:
        """All rules that apply to `cfg`, layer by layer: those whose parameters the network has.

        Args:
            cfg: the whole checkpoint's config.
            layers: checkpoint layers to take, in this order; they become layers 0, 1, ... None: all.
            in_memory: as transformers holds the tensors in memory, in place of on disk.
        """
        taken = range(cfg.n_layers) if layers is None else layers
        applying = [rule for rule in (self._rules_in_memory() if in_memory else self.weights) if rule.when(cfg)]
        for is_layered, group in groupby(applying, lambda rule: "{i}" in rule.hub):
            rules = list(group)
            for new, old in enumerate(taken) if is_layered else [(0, 0)]:
                for rule in rules:
                    shape = _shape_in(cfg, rule, old)
                    if shape is not None:
                        pieces = range(shape[0]) if is_stacked(rule) else (0,)
                        hubs = tuple(rule.hub.format(i=old, e=piece) for piece in pieces)
                        yield BoundRule(rule, hubs, tuple(name.format(i=new) for name in rule.ours), new, old)

    def is_in_memory(self, names: Collection[str]) -> bool:
        """Whether tensors have the names that transformers uses in memory, where it holds them otherwise than on disk.

        Args:
            names: of all tensors.
        """
        first_layer = {rule.hub.format(i=0) for rule in self.in_memory}
        patterns = [re.escape(name).replace("0", "[0-9]+") for name in first_layer]
        return any(re.fullmatch(pattern, name) for pattern in patterns for name in names)

    def _rules_in_memory(self) -> tuple[WeightRule, ...]:
        replaced = {name for rule in self.in_memory for name in rule.ours}
        kept = (rule for rule in self.weights if not replaced.issuperset(rule.ours) or rule.part == "mlp")
        return (*kept, *self.in_memory)

    def is_weightless(self, name: str) -> bool:
        """Whether a tensor of this name on disk holds no weight."""
        return any(re.fullmatch(pattern, name) for pattern in self.weightless)

    def find_further_layer(self, name: str, n_layers: int) -> int | None:
        """The layer of a tensor of this name on disk where it lies past those of the language model, else None."""
        found = None if self.further_layers is None else re.fullmatch(self.further_layers, name)
        return int(found[1]) if found is not None and int(found[1]) >= n_layers else None

    def _translate(self, config: Config) -> Config:
        dialect = self.dialects.get(str(config.get("model_type")))
        return config if dialect is None else dialect(config)

    def _write_config(self, cfg: HookedConfig) -> tuple[dict[str, Any], list[str]]:
        """The config, and the fields that reading it back would not give again."""
        fields, original = _fields_of(cfg), self._original_config(cfg)
        if original is None:
            # Left out, transformers takes that of the family's first checkpoint, which may lie past the vocabulary.
            written = {**self.config.write(fields), "pad_token_id": None}
        else:
            known = _fields_of(self.read_config(original, where="the original config", warn=False))
            written = self.config.update(original, known, fields)
            # The files it names are not part of what HookLens writes.
            written.pop("auto_map", None)
        written |= {"architectures": [self.architectures[0]], "model_type": self.model_types[0]}
        try:
            read_back = self.read_config(written, where=f"config of a {self.name} model", warn=False)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"a {self.name} checkpoint cannot hold this network: {error}") from error
        return written, self._differing_fields(cfg, read_back)

    def _original_config(self, cfg: HookedConfig) -> Config | None:
        if cfg.origin is None or cfg.origin.family != self.name:
            return None
        return self._translate(json.loads(cfg.origin.hub_config))

    def _differing_fields(self, cfg: HookedConfig, read_back: HookedConfig) -> list[str]:
        ours, theirs = _fields_of(cfg), _fields_of(read_back)
        differing = [name for name in ours if _differ(ours[name], theirs[name], name, cfg.n_layers)]
        # Which biases of a flag that is on are there is told by the tensors, not by the config.
        told_by_tensors = {
            name
            for part in self.config.parts
            if isinstance(part, BiasFlag) and any(ours[name] for name in part.names)
            for name in part.names
        }
        return [name for name in differing if name not in told_by_tensors]


def _fields_of(cfg: HookedConfig) -> dict[str, Any]:
    return {spec.name: getattr(cfg, spec.name) for spec in dataclasses.fields(cfg) if spec.compare}


def _differ(ours: Any, theirs: Any, name: str, n_layers: int) -> bool:
    """Whether a field has two values; that all layers are alike can be said in two ways."""
    if name in BY_LAYER and isinstance(ours, tuple) != isinstance(theirs, tuple):
        ours, theirs = (one if isinstance(one, tuple) else (one,) * n_layers for one in (ours, theirs))
    return bool(ours != theirs)


def describe_fields(cfg: HookedConfig, names: Iterable[str]) -> str:
    """Fields of a config with their values, as they are given."""
    return ", ".join(f"{name}={getattr(cfg, name)!r}" for name in names)


def how_to_save(transforms: Sequence[str]) -> str:
    """What to do with a network that cannot be written; what weight processing brought cannot be changed back."""
    if not transforms:
        return (
            "change these fields back before saving, or keep the model in HookLens' own format "
            "(state_dict and cfg.to_json())"
        )
    return (
        f"its weights were processed ({', '.join(transforms)}): save the unprocessed model and take these steps after "
        "loading it, with model.process_weights(...), or keep the model in HookLens' own format (state_dict, "
        "cfg.to_json() and transforms)"
    )
