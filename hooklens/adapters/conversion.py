"""From the hub's layout to HookLens': configs and tensors checked against each other, then renamed."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.adapters.choice import find_family
from hooklens.adapters.families import load_families
from hooklens.adapters.family import BoundRule, Family
from hooklens.adapters.files.disk import TensorHeader, header_of
from hooklens.adapters.kept import Kept, KeptMaps
from hooklens.adapters.keys import BiasFlag
from hooklens.adapters.rules import DiskShapes, RowPieces, is_stacked
from hooklens.adapters.wrapping import unwrap_config, unwrap_names
from hooklens.config import HookedConfig, LearnedPositions
from hooklens.errors import CheckpointError, InputError, join_names, warn_caller
from hooklens.weights.layout import view_to_hold
from hooklens.weights.names import bare_names
from hooklens.weights.shapes import weight_shapes

_FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})
# What a value head adds to the weights of the model that it reads (`trl`); the language model is whole without it.
_VALUE_HEAD = re.compile(r"v_head\..*")
_ADAPTER = re.compile(r"(.*\.)?(base_layer|lora_[A-Za-z_]+|modules_to_save|ia3_l)\..*")
# More entries in one tensor are in no file.
_MOST_ENTRIES = 2**48


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors somewhere: in memory or on disk."""

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        ...

    def header(self, name: str) -> TensorHeader:
        """The dtype and shape of a tensor, without reading it."""
        ...

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor itself.

        Args:
            name: which.
            apart: it will be copied from and let go, so it should keep no memory that outlives it.
        """
        ...


@runtime_checkable
class PaddedSource(TensorSource, Protocol):
    """Named tensors of which some were added by the program that wrote them and change nothing."""

    def is_padding(self, name: str) -> bool:
        """Whether it is a bias of zeros where the network has none."""
        ...


class MemoryTensors:
    """Tensors of a state dict."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._state.keys()

    def header(self, name: str) -> TensorHeader:
        """The dtype and shape of a tensor."""
        return header_of(self._state[name])

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor, detached and sharing its memory."""
        return self._state[name].detach()


class HubModel:
    """A model in the hub's layout: a `config.json` and its tensors, checked against each other when made.

    Args:
        config: the contents of its `config.json`.
        source: its tensors.
        where: what to call it in texts of errors.
        family: what it is of; None: the supported family that the config names.

    Attributes:
        cfg: the network. What the config leaves to the tensors (a tied unembedding that is not, biases of some maps
            only) is settled as transformers settles it.
        is_wrapped: it lies inside of a model that also sees or hears.
    """

    def __init__(
        self, config: Mapping[str, Any], source: TensorSource, *, where: str, family: Family | None = None
    ) -> None:
        self._where = where
        self._source = source
        whole, config = config, unwrap_config(config, load_families()) if family is None else config
        self._family = find_family(config, load_families(), where=where) if family is None else family
        self.is_wrapped = is_wrapped = config is not whole
        inside, others = unwrap_names(source.names()) if is_wrapped else ({name: name for name in source.names()}, [])
        mapped = map_names(self._family, inside, where=where)
        self._stored_names = {name: inside[stored] for name, stored in mapped.items()}
        if others:
            warn_caller(
                f"{where}: {len(others)} tensors belong to other parts of the model than the language model and are "
                f"left out: {join_names(others)}"
            )
        cfg = self._family.read_config(config, where=where)
        self._check_size(cfg)
        self.cfg = _settle_biases(self._family, self._settle_tying(cfg), self._stored_names)
        self._in_memory = self._family.is_in_memory(self._stored_names)
        self._bound = list(self._family.bind_rules(self.cfg, in_memory=self._in_memory))
        # Layers are alike, so most of the answers are known already.
        self._copied: dict[str, bool] = {}
        self._rules: dict[str, BoundRule] | None = None
        self._check_tensors()

    def tensors(
        self, layers: Sequence[int] | None = None, *, n_ctx: int | None = None, let_go: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """HookLens names and tensors in their logical shapes, one by one.

        Args:
            layers: blocks to take; they become blocks 0, 1, ... in this order. None: all.
            n_ctx: how many learned positions to take. None: all.
            let_go: names of tensors that are not kept: their memory is to outlive them in no way.

        Raises:
            InputError: a layer does not exist or is given twice, or there are fewer learned positions.
        """
        # Checked at the call: a generator would not run until the first tensor is asked for.
        cfg = config_of_length(self.cfg, n_ctx)
        return self._iterate(None if layers is None else check_layers(layers, self.cfg.n_layers), cfg, set(let_go))

    def read(self, name: str) -> Tensor:
        """One tensor, by its HookLens name and in its logical shape.

        Raises:
            KeyError: the network has no such weight.
        """
        if self._rules is None:
            self._rules = {ours: bound for bound in self._bound for ours in bound.ours}
            if self.cfg.tied_unembed:
                self._rules["unembed.W_U"] = self._rules["embed.W_E"]
        return dict(self._load(self._rules[name], self.cfg, {name, "embed.W_E"}))[name]

    def kept_tensors(
        self, layers: Sequence[int] | None = None, *, n_ctx: int | None = None
    ) -> Iterator[tuple[str, Tensor | Kept]]:
        """The same, but for the weights of linear maps that are quantised: these as they are stored.

        Args:
            layers: blocks to take; they become blocks 0, 1, ... in this order. None: all.
            n_ctx: how many learned positions to take. None: all.

        Raises:
            UnsupportedModelError: no weights are quantised, or some cannot be kept as they are; all are listed.
            InputError: a layer does not exist or is given twice, or there are fewer learned positions.
        """
        cfg = config_of_length(self.cfg, n_ctx)
        kept = KeptMaps(self._bound, self._source, self._stored_names, self.cfg, where=self._where)
        return self._iterate_kept(None if layers is None else check_layers(layers, self.cfg.n_layers), cfg, kept)

    @property
    def family(self) -> str:
        """The name of the family that it is of."""
        return self._family.name

    def headers(self) -> dict[str, TensorHeader]:
        """The tensors that hold its weights, each once, under the family's names on disk in the network's order."""
        return {name: self._source.header(self._stored_names[name]) for bound in self._bound for name in bound.hubs}

    def read_stored(self, name: str) -> Tensor:
        """A tensor as the files hold it, in memory that does not outlive it.

        Args:
            name: one of `headers()`.
        """
        return self._source.read(self._stored_names[name], apart=True)

    def _iterate_kept(
        self, layers: Sequence[int] | None, cfg: HookedConfig, kept: KeptMaps
    ) -> Iterator[tuple[str, Tensor | Kept]]:
        rules = self._bound if layers is None else self._family.bind_rules(self.cfg, layers)
        for bound in rules:
            yield from kept.read(bound) if kept.holds(bound) else self._load(bound, cfg)

    def _iterate(
        self, layers: Sequence[int] | None, cfg: HookedConfig, let_go: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        whole = layers is None
        for bound in self._bound if whole else self._family.bind_rules(self.cfg, layers, in_memory=self._in_memory):
            yield from self._load(bound, cfg, let_go)

    def _load(self, bound: BoundRule, cfg: HookedConfig, let_go: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        read = partial(self._read, apart=self._is_copied(bound) or any(name in let_go for name in bound.ours))
        loaded = crop_positions(bound.ours, bound.load(read, self.cfg), cfg)
        yield from zip(bound.ours, loaded, strict=True)
        if bound.ours == ("embed.W_E",) and self.cfg.tied_unembed:
            yield "unembed.W_U", loaded[0].T

    def _is_copied(self, bound: BoundRule) -> bool:
        """Whether the tensors cannot be parameters as they lie: split or stacked, or read by no matrix product."""
        if len(bound.ours) != 1 or is_stacked(bound.rule) or isinstance(bound.rule, RowPieces):
            return True
        if bound.rule.hub not in self._copied:
            header = self._source.header(self._stored_names[bound.hubs[0]])
            weight = self.cfg.description.weights[bound.rule.ours[0].format(i=bound.source_layer)]
            (loaded,) = bound.rule.load(torch.empty(header.shape, device="meta"), self.cfg)
            self._copied[bound.rule.hub] = view_to_hold(loaded, weight.stored, weight.axes) is None
        return self._copied[bound.rule.hub]

    def _read(self, name: str, *, apart: bool) -> Tensor:
        return self._source.read(self._stored_names[name], apart=apart)

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
        if self._source.header(one) != self._source.header(other):
            return False
        first, second = self._source.read(one), self._source.read(other)
        return first.data_ptr() == second.data_ptr() or torch.equal(first, second)

    def _check_size(self, cfg: HookedConfig) -> None:
        """Refuse numbers that no such tensors could bear out, before anything is made of that size."""
        n_found = len(self._stored_names)
        if cfg.n_layers > n_found:
            raise CheckpointError(
                f"{self._where}: config.json describes {cfg.n_layers} layers, and there are {n_found} tensors in all. "
                "Check that config.json and the weights belong together and that the download is whole"
            )
        huge = [
            f"{name} {list(shape)}" for name, shape in weight_shapes(cfg).items() if math.prod(shape) > _MOST_ENTRIES
        ]
        if huge:
            raise CheckpointError(
                f"{self._where}: config.json describes weights of impossible size: {', '.join(huge[:5])}. Correct it, "
                "or download it again"
            )

    def _check_tensors(self) -> None:
        """Account for every name, shape and dtype; raise once with all that is wrong."""
        expected = {name: bound for bound in self._bound for name in bound.hubs}
        missing = [name for name in expected if name not in self._stored_names]
        extra = [name for name in self._stored_names if name not in expected and not self._family.is_weightless(name)]
        extra = self._leave_out_further_layers(extra)
        heads = [self._stored_names[name] for name in extra if _VALUE_HEAD.fullmatch(name)]
        unexpected = [self._stored_names[name] for name in extra if not _VALUE_HEAD.fullmatch(name)]
        if isinstance(self._source, PaddedSource):
            unexpected = [name for name in unexpected if not self._source.is_padding(name)]
        adapters = [name for name in unexpected if is_of_adapter(name)]
        if adapters:
            raise CheckpointError(
                f"{self._where}: holds the weights of an adapter beside those of the model: {join_names(adapters)}. "
                "Merge them first: model.merge_and_unload() of peft"
            )
        shapes = DiskShapes(weight_shapes(self.cfg), self.cfg)
        misshapen, quantised = [], []
        for name, bound in expected.items():
            if name not in self._stored_names:
                continue
            found = self._source.header(self._stored_names[name])
            right = shapes.of(bound.rule, bound.layer)
            if found.dtype not in _FLOATS:
                quantised.append(f"{self._stored_names[name]!r} is {found.dtype}")
            elif found.shape != tuple(right):
                misshapen.append(f"{self._stored_names[name]!r} is {list(found.shape)}, expected {list(right)}")
        problems = []
        if missing:
            problems.append(f"missing tensors: {join_names(missing)}")
        if unexpected:
            problems.append(f"unexpected tensors: {join_names(unexpected)}")
        if misshapen:
            problems.append(f"tensors of another shape than config.json says: {_list_some(misshapen)}")
        if quantised:
            problems.append(
                f"tensors of another dtype than float64, float32, float16 or bfloat16: {_list_some(quantised)} "
                "(HookLens computes with plain weights: dequantise them first)"
            )
        if problems:
            raise CheckpointError(
                f"{self._where}: config.json describes a {self._family.name} model with other tensors: "
                f"{'. '.join(problems)}. Check that config.json and the weights belong together and that the download "
                "is whole"
            )
        if heads:
            warnings.warn(
                f"{self._where}: {join_names(sorted(heads))} belong to a value head, which is no part of the language "
                "model; they are left out",
                stacklevel=2,
            )

    def _leave_out_further_layers(self, names: Sequence[str]) -> list[str]:
        """The names without those in layers that are no part of the language model, of which a warning tells."""
        layers = {name: self._family.find_further_layer(name, self.cfg.n_layers) for name in names}
        further = sorted(layer for layer in layers.values() if layer is not None)
        if further:
            warn_caller(
                f"{self._where}: {len(further)} tensors belong to layers {sorted(set(further))}, past the "
                f"{self.cfg.n_layers} of the language model (they predict further tokens), and are left out"
            )
        return [name for name, layer in layers.items() if layer is None]


def is_of_adapter(name: str) -> bool:
    """Whether a tensor of this name is one that PEFT has put into a model, or around one of the model's."""
    return _ADAPTER.fullmatch(name) is not None


def _list_some(problems: Sequence[str]) -> str:
    left_out = len(problems) - 20
    return "; ".join(problems[:20]) + (f" and {left_out} more" if left_out > 0 else "")


def check_layers(layers: Sequence[int], n_layers: int) -> list[int]:
    """Check a choice of a checkpoint's layers.

    Raises:
        InputError: a layer does not exist or is given twice; all are listed.
    """
    chosen = list(layers)
    outside = [layer for layer in chosen if not 0 <= layer < n_layers]
    repeated = sorted(layer for layer, times in Counter(chosen).items() if times > 1)
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
    return cfg.take_layers(check_layers(layers, cfg.n_layers))


def config_of_length(cfg: HookedConfig, n_ctx: int | None) -> HookedConfig:
    """The config of a model that takes sequences of another length; None keeps the length.

    Positions that are computed (rotary, ALiBi) go on past the checkpoint's length, and how they are scaled stays as it
    is. Of learned positions there are only those that were learned.

    Raises:
        InputError: there are fewer learned positions.
    """
    if n_ctx is None or n_ctx == cfg.n_ctx:
        return cfg
    if n_ctx > cfg.n_ctx and isinstance(cfg.positions, LearnedPositions):
        raise InputError(
            f"n_ctx={n_ctx}: the checkpoint has learned {cfg.n_ctx} positions and none past them; expected at most "
            f"{cfg.n_ctx}"
        )
    return cfg.replace(n_ctx=n_ctx)


def crop_positions(names: Sequence[str], tensors: Sequence[Tensor], cfg: HookedConfig) -> tuple[Tensor, ...]:
    """Tensors as they are, but of a table of learned positions only the rows that `cfg` has."""
    if "pos_embed.W_pos" not in names:
        return tuple(tensors)
    rows = cfg.size("position")
    return tuple(
        tensor[:rows] if name == "pos_embed.W_pos" else tensor for name, tensor in zip(names, tensors, strict=True)
    )


def map_names(family: Family, stored: Collection[str], *, where: str) -> dict[str, str]:
    """Names on disk by the family's rules, with the names under which the source has them.

    What wrappers of the model put into names is taken out.

    Raises:
        CheckpointError: a weight is there under two names.
    """
    bare = bare_names(stored)
    is_base_model = not any(name.startswith(family.base_prefix) for name in bare.values())
    names: dict[str, str] = {}
    doubled = []
    for name in stored:
        known = family.renamed.get(bare[name], bare[name])
        if is_base_model and known != family.head:
            known = family.base_prefix + known
        if known in names:
            doubled.append(f"{names[known]!r} and {name!r}")
        names[known] = name
    if doubled:
        raise CheckpointError(f"{where}: two names of one weight: {_list_some(doubled)}; keep one of each")
    return names


def _settle_biases(family: Family, cfg: HookedConfig, names: Collection[str]) -> HookedConfig:
    """Where one flag stands for the biases of several maps and only some are stored, keep those."""
    for part in family.config.parts:
        if not isinstance(part, BiasFlag) or len(part.names) == 1 or not all(getattr(cfg, n) for n in part.names):
            continue
        with_all = _names_of(family, cfg)
        if with_all.issubset(names):
            continue
        absent = {}
        for field_name in part.names:
            without = _names_of(family, cfg.replace(**{field_name: False}))
            if not (with_all - without) & set(names):
                absent[field_name] = False
        if len(absent) < len(part.names):
            cfg = cfg.replace(**absent)
    return cfg


def _names_of(family: Family, cfg: HookedConfig) -> set[str]:
    return {name for bound in family.bind_rules(cfg) for name in bound.hubs}
