"""An adapter held against the model that it is to change: its modules become tensors of the base checkpoint."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from hooklens.adapters.conversion import TensorSource, map_names
from hooklens.adapters.family import BoundRule, Family
from hooklens.adapters.lora.adapter import LoraAdapter, LoraModule
from hooklens.adapters.rules import DiskShapes
from hooklens.adapters.wrapping import unwrap_names
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, join_names
from hooklens.weights.shapes import weight_shapes


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """A change of one tensor of a checkpoint: what it holds is a linear map, or one for each expert.

    Attributes:
        tensor: its name on disk, as the family's rules have it; that in transformers' memory where experts that are
            several tensors on disk are one there.
        A, B: the two matrices, with an axis for experts where the tensor has one.
        scale: what their product is multiplied by.
        turned: the tensor holds the map as `[in, out]`: an embedding, transformers' `Conv1D`, some experts.
        magnitude: DoRA's lengths, `[d_out]`; None: plain LoRA.
    """

    tensor: str
    A: Float[Tensor, "*expert rank d_in"]
    B: Float[Tensor, "*expert d_out rank"]
    scale: float
    turned: bool = False
    magnitude: Tensor | None = None


@dataclass(frozen=True, eq=False)
class BoundAdapter:
    """An adapter in the names of the base checkpoint's family.

    Attributes:
        changes: of tensors on disk, by name. One of the unembedding may be there where it is tied to the embedding.
        in_memory: the same of tensors that only transformers' memory holds so, with the rule that takes them apart.
        biases: what is added to biases, by name, and what that is multiplied by.
        whole: what takes the place of tensors, by name.
    """

    changes: Mapping[str, LowRankChange]
    in_memory: Mapping[str, tuple[LowRankChange, BoundRule]]
    biases: Mapping[str, tuple[Tensor, float]]
    whole: Mapping[str, Tensor]

    def names(self) -> set[str]:
        """Names of all tensors that it changes or replaces."""
        return {*self.changes, *self.in_memory, *self.biases, *self.whole}


def name_tensors(family: Family, names: Collection[str], *, where: str) -> dict[str, str]:
    """The names of the family's rules, with those that a checkpoint has for them.

    Args:
        family: what the checkpoint is of.
        names: of all its tensors.
        where: what to call it in texts of errors.
    """
    inside, _ = unwrap_names(names)
    # A language model alone has no segment that says so.
    is_wrapped = any(name != stored for name, stored in inside.items())
    given = inside if is_wrapped else {name: name for name in names}
    return {name: given[found] for name, found in map_names(family, given, where=where).items()}


def bind_adapter(
    adapter: LoraAdapter, family: Family, cfg: HookedConfig, source: TensorSource, *, where: str
) -> BoundAdapter:
    """An adapter in the names of a checkpoint.

    Args:
        adapter: the adapter.
        family: what the checkpoint is of.
        cfg: its network.
        source: its tensors.
        where: what to call it in texts of errors.

    Raises:
        CheckpointError: tensors of the adapter are those of no tensor of the checkpoint, or do not fit it; all are
            listed.
    """
    return _Binding(adapter, family, cfg, source, where=where).bind()


class _Binding:
    """One adapter and one checkpoint, while they are held against each other."""

    def __init__(
        self, adapter: LoraAdapter, family: Family, cfg: HookedConfig, source: TensorSource, *, where: str
    ) -> None:
        self._adapter, self._family, self._cfg, self._where = adapter, family, cfg, where
        stored = name_tensors(family, source.names(), where=where)
        self._shapes: dict[str, Callable[[], tuple[int, ...]]] = {}
        self._memory_rules: dict[str, BoundRule] = {}
        is_in_memory = family.is_in_memory(stored)
        for rule in family.bind_rules(cfg, in_memory=is_in_memory):
            for name in rule.hubs:
                if name in stored:
                    self._shapes[name] = _shape_reader(source, stored[name])
        if cfg.tied_unembed:
            # One tensor lies on disk, under either name, for the two that an adapter may tell apart.
            ends = (family.embedding, family.head)
            found = [stored[name] for name in ends if name in stored]
            for name in ends if found else ():
                self._shapes.setdefault(name, _shape_reader(source, stored.get(name, found[0])))
        shapes = DiskShapes(weight_shapes(cfg), cfg)
        for rule in family.bind_rules(cfg, in_memory=True) if family.in_memory and not is_in_memory else ():
            for name in rule.hubs:
                if name not in self._shapes:
                    self._memory_rules[name] = rule
                    self._shapes[name] = _rule_shape_reader(shapes, rule)
        self._parameters: dict[str, list[str]] = {}
        for name in self._shapes:
            module, _, parameter = name.rpartition(".")
            self._parameters.setdefault(module, []).append(parameter)
        self._unmatched: list[str] = []
        self._problems: list[str] = []

    def bind(self) -> BoundAdapter:
        changes: dict[str, LowRankChange] = {}
        in_memory: dict[str, tuple[LowRankChange, BoundRule]] = {}
        biases: dict[str, tuple[Tensor, float]] = {}
        known = self._known_names()
        for module in self._adapter.modules:
            change = self._bind(module, known[f"{module.name}.weight"].removesuffix(".weight"))
            if change is None:
                continue
            if change.tensor in self._memory_rules:
                in_memory[change.tensor] = (change, self._memory_rules[change.tensor])
            else:
                changes[change.tensor] = change
            biases |= self._bind_bias(module, change)
        whole = dict(self._bind_whole(known))
        self._refuse()
        return BoundAdapter(changes=changes, in_memory=in_memory, biases=biases, whole=whole)

    def _known_names(self) -> dict[str, str]:
        """The names of the adapter's tensors, with those of the family."""
        given = dict.fromkeys([*(f"{one.name}.weight" for one in self._adapter.modules), *self._adapter.whole])
        found = {stored: name for name, stored in name_tensors(self._family, given, where=self._adapter.where).items()}
        # Of what belongs to other parts than the language model nothing is known.
        return {name: found.get(name, name) for name in given}

    def _bind(self, module: LoraModule, known: str) -> LowRankChange | None:
        settings = self._adapter.settings
        parameters = self._parameters.get(known, [])
        targeted = [one for one in parameters if settings.targets(f"{module.name}.{one}")]
        if targeted and module.outside < len(targeted):
            # The first of a module's parameters is changed innermost.
            parameter = targeted[len(targeted) - 1 - module.outside]
            key = f"{module.name}.{parameter}"
        elif not targeted and module.outside == 0 and "weight" in parameters:
            parameter, key = "weight", module.name
        else:
            self._unmatched.append(module.name)
            return None
        name = f"{known}.{parameter}"
        shape, rank = self._shapes[name](), settings.rank_of(key)
        if len(shape) == 3 and targeted:
            return self._bind_experts(module, name, shape, key)
        turned = module.is_embedding or (not targeted and self._family.is_conv1d and name != self._family.head)
        expected = shape[::-1] if turned else shape
        if len(shape) != 2 or (module.B.shape[0], module.A.shape[1]) != expected or module.A.shape[0] != rank:
            self._refuse_shapes(module, name, shape, rank)
            return None
        return LowRankChange(name, module.A, module.B, settings.scale_of(key), turned, module.magnitude)

    def _bind_experts(self, module: LoraModule, name: str, shape: tuple[int, ...], key: str) -> LowRankChange | None:
        """A change of a tensor with a map for each expert; its matrices are those of all of them in one."""
        settings, (n_experts, first, last) = self._adapter.settings, shape
        rank, found = settings.rank_of(key), (module.B.shape[0], module.A.shape[1])
        fitting = [turned for turned, size in ((False, (first, last)), (True, (last, first))) if found == size]
        if not fitting or module.A.shape[0] != rank * n_experts:
            self._refuse_shapes(module, name, shape, rank * n_experts)
            return None
        is_turned = settings.turns_experts or self._family.turned_experts
        turned = is_turned if len(fitting) == 2 else fitting[0]
        # As PEFT has them: experts stand before the rank in one, and behind it in the other.
        A = module.A.reshape(n_experts, rank, -1)
        B = module.B.reshape(-1, rank, n_experts).permute(2, 0, 1)
        return LowRankChange(name, A, B, settings.scale_of(key), turned)

    def _bind_bias(self, module: LoraModule, change: LowRankChange) -> dict[str, tuple[Tensor, float]]:
        if module.bias is None:
            return {}
        name = change.tensor.removesuffix("weight") + "bias"
        if name in self._shapes and self._shapes[name]() == tuple(module.bias.shape):
            return {name: (module.bias, change.scale)}
        self._problems.append(f"lora_bias of {module.name!r}: the base has no bias there, or one of another size")
        return {}

    def _bind_whole(self, known: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._adapter.whole.items():
            if self._family.is_weightless(known[name]):
                continue
            if known[name] not in self._shapes or known[name] in self._memory_rules:
                self._unmatched.append(name)
            elif self._shapes[known[name]]() != tuple(tensor.shape):
                self._problems.append(
                    f"{name!r} is {list(tensor.shape)}, and the base's {list(self._shapes[known[name]]())}"
                )
            else:
                yield known[name], tensor

    def _refuse_shapes(self, module: LoraModule, name: str, shape: tuple[int, ...], rank: int) -> None:
        self._problems.append(
            f"{module.name!r}: lora_A is {list(module.A.shape)} and lora_B {list(module.B.shape)}, and the base's "
            f"{name!r} {list(shape)}, with rank {rank}"
        )

    def _refuse(self) -> None:
        """Raise with all that is wrong."""
        problems = list(self._problems)
        if self._unmatched:
            problems.insert(0, f"no tensor of the base is that of {join_names(self._unmatched)}")
        if problems:
            left_out = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(
                f"{self._adapter.where}: the adapter does not fit {self._where}: {'; '.join(problems[:20])}{left_out}. "
                f"Take the base that it was made for, {self._adapter.settings.base!r} by its adapter_config.json, of "
                "which the vocabulary may have been resized"
            )


def _shape_reader(source: TensorSource, name: str) -> Callable[[], tuple[int, ...]]:
    return lambda: tuple(source.header(name).shape)


def _rule_shape_reader(shapes: DiskShapes, rule: BoundRule) -> Callable[[], tuple[int, ...]]:
    return lambda: tuple(shapes.of(rule.rule, rule.layer))
