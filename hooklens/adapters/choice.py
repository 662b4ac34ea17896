"""Which family a checkpoint is of, and which one a network is written as; where there is none, which comes closest."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooklens.adapters.family import Family, describe_fields, how_to_save
from hooklens.arguments import show
from hooklens.config import HookedConfig
from hooklens.errors import UnsupportedModelError, join_names

_GUIDE = "https://github.com/hooklens/hooklens/blob/main/CONTRIBUTING.md#adding-a-family"
# Of a text, so many differences are read.
_MOST_TOLD = 6
# Keys that a config has to share with a family's to be said to come close to it.
_FEWEST_SHARED = 4
# Families whose differences are listed.
_MOST_FAMILIES = 3
_NONE = "no family can express this config"


def find_family(config: Mapping[str, Any], families: Sequence[Family], *, where: str) -> Family:
    """The family of a `config.json`, by `model_type` and `architectures`, never by a model's name.

    Raises:
        UnsupportedModelError: there is none; the text names the architecture, the family that comes closest with what
            differs from it, and the supported ones.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    wrong = []
    if model_type is not None and not isinstance(model_type, str):
        wrong.append(f"model_type is {show(model_type)}; expected a text")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        wrong.append(f"architectures is {show(architectures)}; expected a list of names")
    if wrong:
        raise UnsupportedModelError(f"{where}: config.json names no architecture: {'; '.join(wrong)}")
    for family in families:
        if family.adopts is not None and family.adopts(config):
            return family
    for family in families:
        known_type = model_type is None or model_type in (*family.model_types, *family.dialects)
        known_class = not architectures or bool(set(architectures) & set(family.architectures))
        if known_type and known_class and (model_type or architectures):
            return family
    raise UnsupportedModelError(
        f"{where}: config.json: architecture {join_names(architectures) or 'not given'} with model_type "
        f"{show(model_type)} is not supported{_describe_nearest(config, model_type, families)}. Supported are "
        f"{', '.join(sorted(name for family in families for name in family.model_types))}. A family is one file: "
        f"{_GUIDE}"
    )


@dataclass(frozen=True)
class Nearness:
    """How a config differs from what a family reads.

    Attributes:
        family: the family.
        differences: values that it does not implement and keys that it misses or does not know, in words.
        n_shared: keys of the config that it knows.
    """

    family: Family
    differences: tuple[str, ...]
    n_shared: int


def find_nearest(config: Mapping[str, Any], families: Sequence[Family]) -> Nearness:
    """The family that differs least from a config; of several that knows most of its keys."""
    measured = [_measure(config, family) for family in families]
    return min(measured, key=lambda one: (len(one.differences), -one.n_shared))


def _measure(config: Mapping[str, Any], family: Family) -> Nearness:
    known, problems, unknown = family.config.survey(config)
    told = [f"{key} is a key that it does not know" for key in unknown]
    return Nearness(family, (*problems, *told), len(known))


def _describe_nearest(config: Mapping[str, Any], model_type: str | None, families: Sequence[Family]) -> str:
    same_type = [family for family in families if model_type in (*family.model_types, *family.dialects)]
    if same_type:
        (family,) = same_type
        return f"; models of {family.name} that are: {join_names(family.architectures)}"
    nearest = find_nearest(config, families)
    if nearest.n_shared < _FEWEST_SHARED:
        return ""
    told = "; ".join(nearest.differences[:_MOST_TOLD])
    left_out = len(nearest.differences) - _MOST_TOLD
    more = f" and {left_out} more" if left_out > 0 else ""
    differs = f"where its config differs: {told}{more}" if told else "of which its config has all keys, and no others"
    return f". By its config {nearest.family.name} comes closest, {differs}. What its code does may differ besides"


def choose_family(cfg: HookedConfig, families: Sequence[Family], *, transforms: Sequence[str] = ()) -> Family:
    """The family whose format `cfg` is saved in: the one it came from, or the first that can express it.

    Args:
        cfg: the network.
        families: to choose from.
        transforms: the weight-processing steps it has been through, for the advice where none can express it.

    Raises:
        UnsupportedModelError: no family can express `cfg`; the text says which fields.
    """
    if cfg.origin is not None:
        for family in families:
            if family.name == cfg.origin.family:
                return family
    differing: dict[str, list[str]] = {}
    refusals: dict[str, list[str]] = {}
    for family in families:
        try:
            fields = family.inexpressible_fields(cfg)
        except UnsupportedModelError as error:
            # Its config could not even be written; how far it is from the network cannot be counted.
            refusals[family.name] = [str(error)]
            continue
        if not fields:
            return family
        differing[family.name] = fields
    everywhere = [name for name in _fields(cfg) if differing and all(name in names for names in differing.values())]
    nearest = sorted(differing, key=lambda name: len(differing[name])) + list(refusals)
    told = {name: ", ".join({**differing, **refusals}[name]) for name in nearest[:_MOST_FAMILIES]}
    per_family = "; ".join(f"{name}: {fields}" for name, fields in told.items())
    lead = f"no family can express {describe_fields(cfg, everywhere)}" if everywhere else _NONE
    raise UnsupportedModelError(
        f"{lead}. Fields that differ, in the families that come closest: {per_family}. To save it: "
        f"{how_to_save(transforms)}"
    )


def _fields(cfg: HookedConfig) -> list[str]:
    return [spec.name for spec in dataclasses.fields(cfg) if spec.compare]
