"""The modules in which transformers holds a network, each with what stands there in HookLens' words.

Read off the family's weight map: a tensor's name begins with its module's, and the parameters that it holds say which
map or norm that is. Modules above those hold all of attention, of an MLP, of a block.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from hooklens.adapters.choice import choose_family
from hooklens.adapters.families import load_families
from hooklens.adapters.family import BoundRule, Family
from hooklens.adapters.rules import Copy, is_stacked
from hooklens.config import HookedConfig

ROOT = ""
"""The place of the base model, which stops before the unembedding."""

_PART_OF_BLOCK = re.compile(r"(blocks\.\d+\.(?:attn|mlp))\.(?:[Wb]_|(?:router|experts)\.)")


@dataclass(frozen=True, kw_only=True)
class HubModule:
    """What stands in a module.

    Attributes:
        places: names in HookLens of the maps (by their weights, `"blocks.3.attn.W_Q"`), the norm, the part, the block
            or the base model (`""`) that it is; several where one module is several maps.
        reorders: the entries that it gives stand in another order than in HookLens, heads and pieces of heads.
        is_piece: it is one of several that are the place together, as experts with a module each are.
    """

    places: tuple[str, ...]
    reorders: bool = False
    is_piece: bool = False


@dataclass(frozen=True, kw_only=True)
class HubModules:
    """The modules of a network in transformers.

    Attributes:
        family: the family's name.
        prefix: what the names of the base model's modules begin with, `"model."`.
        modules: by their paths below the whole model, `"model.layers.3.mlp.down_proj"`.
        peculiar: see `hooklens.adapters.family.Family`.
    """

    family: str
    prefix: str
    modules: Mapping[str, HubModule]
    peculiar: Mapping[str, str]

    def why_peculiar(self, path: str, word: str) -> str | None:
        """Why what a module sees or gives (`"input"`, `"output"`) is not what its weights tell; None where it is."""
        found = (
            reason
            for template, reason in self.peculiar.items()
            if re.fullmatch(re.escape(template).replace(r"\{i\}", r"\d+"), f"{path}.{word}")
        )
        return next(found, None)


def read_modules(cfg: HookedConfig) -> HubModules:
    """The modules of a network in transformers 5, and after them those that have other names on disk, as they had in 4.

    Raises:
        UnsupportedModelError: no family can express the network.
    """
    family = choose_family(cfg, load_families())
    modules: dict[str, HubModule] = {family.base_prefix.removesuffix("."): HubModule(places=(ROOT,))}
    for in_memory in (True, False):
        for path, module in _find_modules(family, cfg, in_memory=in_memory):
            modules.setdefault(path, module)
    return HubModules(family=family.name, prefix=family.base_prefix, modules=modules, peculiar=family.peculiar)


def _find_modules(family: Family, cfg: HookedConfig, *, in_memory: bool) -> Iterator[tuple[str, HubModule]]:
    bound = list(family.bind_rules(cfg, in_memory=in_memory))
    held: dict[str, list[BoundRule]] = {}
    for rule in bound:
        for hub in rule.hubs:
            path, _, tensor = hub.rpartition(".")
            if tensor in ("weight", "bias"):
                held.setdefault(path, []).append(rule)
    of_bias = {weight.bias: name for name, weight in cfg.description.weights.items() if weight.bias is not None}
    for path, rules in held.items():
        places = dict.fromkeys(_place_of(of_bias.get(name, name)) for rule in rules for name in rule.ours)
        if places:
            reorders = not all(isinstance(rule.rule, Copy) for rule in rules)
            is_piece = any(is_stacked(rule.rule) for rule in rules)
            yield path, HubModule(places=tuple(places), reorders=reorders, is_piece=is_piece)
    # A tied one has no tensor of its own.
    for head in (family.head, *(there for there, here in family.renamed.items() if here == family.head)):
        yield head.rpartition(".")[0], HubModule(places=("unembed.W_U",))
    yield from _find_parts(bound, held)


def _place_of(name: str) -> str:
    """The norm of a norm's parameter, the name of a map's weight as it is."""
    return re.sub(r"\.[wb]$", "", name)


def _find_parts(bound: Iterable[BoundRule], held: Mapping[str, list[BoundRule]]) -> Iterator[tuple[str, HubModule]]:
    """The modules that hold whole parts, and blocks."""
    inside: dict[str, list[str]] = {}
    blocks: dict[str, str] = {}
    for rule in bound:
        if "{i}" not in rule.rule.hub:
            continue
        block = rule.rule.hub.partition("{i}")[0] + str(rule.source_layer)
        blocks[block] = f"blocks.{rule.layer}"
        parts = {match[1] for name in rule.ours if (match := _PART_OF_BLOCK.match(name))}
        if len(parts) == 1:
            inside.setdefault(parts.pop(), []).extend(rule.hubs)
    for part, hubs in inside.items():
        own = _common_path(hubs)
        block = next(path for path, place in blocks.items() if part.startswith(f"{place}."))
        # A module around the part's is the part, too, where it holds nothing else.
        while own.startswith(f"{block}."):
            if own not in held:
                yield own, HubModule(places=(part,))
            own = own.rpartition(".")[0]
            if not all(any(hub.startswith(f"{path}.") for hub in hubs) for path in held if path.startswith(f"{own}.")):
                break
    for path, place in blocks.items():
        yield path, HubModule(places=(place,))


def _common_path(names: list[str]) -> str:
    """The module in which all of several tensors lie."""
    apart = [name.split(".")[:-1] for name in names]
    common = apart[0]
    for parts in apart[1:]:
        n_alike = next((n for n, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)
        common = common[: min(len(common), len(parts)) if n_alike is None else n_alike]
    return ".".join(common)
