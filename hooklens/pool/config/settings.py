"""A pool's configuration: which keys there are, what each may hold, and all that is wrong with one, at once."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hooklens.arguments import show
from hooklens.errors import suggest_names
from hooklens.pool.config.document import Document, Keys, as_plain
from hooklens.pool.config.dtypes import read_pool_dtype
from hooklens.pool.config.interpolation import find_references, resolve
from hooklens.pool.config.targets import check_targets, find_target, join_problems, refuse_hydra_keys
from hooklens.pool.errors import PoolError
from hooklens.tokens import Tokenizer

DATASETS = ("train_datasets", "val_datasets", "test_datasets")
NOTES = ("_recursive_", "_usage_", "_version_")
KEYS = ("_target_", *NOTES, "models", "tokenizer", "model_kwargs", "enable_lazy_loading", *DATASETS)
"""The keys of a pool's configuration. Data sets and notes are kept and written back, and do nothing here."""

SOURCES = ("pretrained_model_name_or_path", "source")
DTYPES = ("torch_dtype", "dtype")
# FusionBench keeps a pool in a larger configuration under this key.
_AROUND = "modelpool"
_BLANK = "???"


@dataclass
class Settings:
    """What a pool was told.

    Attributes:
        models: by name, a path or hub name, a mapping of arguments, or a model.
        tokenizer: a path or hub name, a mapping of arguments, a tokenizer, or None.
        model_kwargs: arguments of every load.
        enable_lazy_loading: give tensors by name, read when asked for, in place of models.
        others: what is kept to be written back: data sets and notes.
        target: the name of the pool's class in the configuration, if any.
    """

    models: dict[str, Any]
    tokenizer: Any = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    enable_lazy_loading: bool = False
    others: dict[str, Any] = field(default_factory=dict)
    target: str | None = None

    def as_config(self) -> dict[str, Any]:
        """The settings under the keys of a configuration, those that say something; dtypes by name."""
        config: dict[str, Any] = {"models": self.models}
        if self.tokenizer is not None:
            config["tokenizer"] = self.tokenizer
        if self.model_kwargs:
            config["model_kwargs"] = self.model_kwargs
        if self.enable_lazy_loading:
            config["enable_lazy_loading"] = True
        named: dict[str, Any] = _with_named_dtypes({**config, **self.others})
        return named


def is_special(name: str) -> bool:
    """Whether a name is one of those that start and end with `_`: what other models are compared with or made into."""
    return name.startswith("_") and name.endswith("_")


def read_document(document: Document, *, resolvers: Collection[str] = ()) -> Settings:
    """The settings that a configuration holds.

    Args:
        document: the configuration, or one that has it under `modelpool`.
        resolvers: see `resolve`.

    Raises:
        PoolError: unknown keys, values that cannot be, names that stand for nothing; all of them, with file and line.
    """
    if not isinstance(document.content, Mapping):
        raise PoolError(f"{document.where}: is {show(document.content)}, expected a mapping with the key 'models'")
    references = find_references(document.content)
    document = resolve(document, resolvers=resolvers)
    if "models" not in document.content and isinstance(document.content.get(_AROUND), Mapping):
        document, references = document.inside(_AROUND), {keys[1:] for keys in references if keys[:1] == (_AROUND,)}
    content = document.content
    problems = [*_unknown_keys(document, {keys[0] for keys in references if keys}), *_find_problems(document)]
    if problems:
        raise PoolError(join_problems(problems))
    settings = Settings(
        models=_list_models(content["models"]),
        tokenizer=content.get("tokenizer"),
        model_kwargs=content.get("model_kwargs") or {},
        enable_lazy_loading=content.get("enable_lazy_loading", False),
        others={key: content[key] for key in (*NOTES, *DATASETS) if content.get(key) is not None},
        target=content.get("_target_"),
    )
    return settings


def _unknown_keys(document: Document, referred: Collection[str]) -> Iterator[str]:
    for key in document.content:
        if key in KEYS or key in referred:
            continue
        where = document.at((str(key),))
        yield (
            f"{where} is no key of a pool, and nothing refers to it.{suggest_names(str(key), KEYS)} There are "
            f"{', '.join(KEYS)}"
        )


def _list_models(models: Any) -> Any:
    """Models by name: those of a list are called "0", "1" and so on."""
    return {str(place): one for place, one in enumerate(models)} if isinstance(models, list) else models


def _find_problems(document: Document) -> Iterator[str]:
    """All that is wrong with the values of a configuration, before any of it is used."""
    content = document.content
    models = _list_models(content.get("models"))
    if isinstance(models, Mapping):
        for name, entry in models.items():
            yield from entry_problems(name, entry, document)
    elif "models" in content:
        yield f"{document.at(('models',))} is {show(models)}, expected a mapping from names, or a list"
    else:
        yield f"{document.at(())}: has no key 'models'; expected a mapping from names to paths or hub names"
    if content.get("_target_") is not None:
        yield from _pool_problems(content["_target_"], document.at(("_target_",)))
    yield from _tokenizer_problems(content.get("tokenizer"), document)
    if content.get("model_kwargs") is not None:
        yield from _argument_problems(content["model_kwargs"], document, ("model_kwargs",))
    lazy = content.get("enable_lazy_loading", False)
    if not isinstance(lazy, bool):
        yield f"{document.at(('enable_lazy_loading',))} is {show(lazy)}, expected true or false"


def _pool_problems(name: Any, place: str) -> Iterator[str]:
    try:
        target = find_target(name, place=place)
    except PoolError as error:
        yield str(error)
        return
    if target.kind not in ("pool", "backbone_pool"):
        yield f"{place} is {name!r}, expected a pool of causal language models"


def entry_problems(name: Any, entry: Any, document: Document) -> Iterator[str]:
    """What is wrong with one of the models."""
    keys = ("models", str(name))
    place = document.at(keys)
    if not isinstance(name, str) or not name.strip():
        yield f"{place}: its name is {show(name)}, expected a text that is not empty; put quotes around a number"
    if isinstance(entry, nn.Module):
        return
    if isinstance(entry, str):
        yield from _path_problems(entry, place)
    elif isinstance(entry, Mapping):
        yield from mapping_problems(entry, document, keys)
    else:
        yield f"{place} is {show(entry)}, expected a path or hub name, a mapping of arguments, or a model"


def mapping_problems(entry: Mapping[Any, Any], document: Document, keys: Keys) -> Iterator[str]:
    """What is wrong with a model that is a mapping of arguments."""
    place = document.at(keys)
    yield from _argument_problems(entry, document, keys)
    kind = "checkpoint"
    if "_target_" in entry:
        try:
            target = find_target(entry["_target_"], place=document.at((*keys, "_target_")))
        except PoolError as error:
            yield str(error)
            return
        kind = target.kind
        if kind not in ("checkpoint", "adapter", "registered"):
            yield f"{document.at((*keys, '_target_'))} is {target.name!r}, which loads no model"
    if kind == "registered":
        return
    wanted = SOURCES if kind == "checkpoint" else ("base_model_path", "peft_model_path")
    given = [key for key in wanted if key in entry]
    if kind == "checkpoint" and len(given) != 1:
        found = f"has {' and '.join(given)}" if given else "has no path"
        yield f"{place}: {found}; expected pretrained_model_name_or_path"
    elif kind == "adapter" and len(given) < len(wanted):
        yield f"{place}: expected {' and '.join(wanted)}"
    for key in given:
        yield from _path_problems(entry[key], document.at((*keys, key)))


def _argument_problems(arguments: Any, document: Document, keys: Keys) -> Iterator[str]:
    place = document.at(keys)
    if not isinstance(arguments, Mapping):
        yield f"{place} is {show(arguments)}, expected a mapping of arguments"
        return
    for key, value in arguments.items():
        inside = document.at((*keys, str(key)))
        if not isinstance(key, str):
            yield f"{inside}: the name of an argument is {show(key)}, expected a text"
        elif key in DTYPES:
            try:
                read_pool_dtype(value, what=inside, error=PoolError)
            except PoolError as error:
                yield str(error)
        yield from check_targets(value, place=inside)
    yield from refuse_hydra_keys(arguments, place=place)


def _tokenizer_problems(tokenizer: Any, document: Document) -> Iterator[str]:
    keys = ("tokenizer",)
    place = document.at(keys)
    if isinstance(tokenizer, str):
        yield from _path_problems(tokenizer, place)
    elif isinstance(tokenizer, Mapping):
        yield from _argument_problems(tokenizer, document, keys)
        name = tokenizer.get("_target_", "transformers.AutoTokenizer")
        try:
            target = find_target(name, place=document.at((*keys, "_target_")))
        except PoolError as error:
            yield str(error)
            return
        if target.kind not in ("tokenizer", "registered"):
            yield f"{document.at((*keys, '_target_'))} is {target.name!r}, which loads no tokenizer"
        if target.kind == "tokenizer":
            yield from _path_problems(tokenizer.get(SOURCES[0]), document.at((*keys, SOURCES[0])))
    elif tokenizer is not None and (isinstance(tokenizer, type) or not isinstance(tokenizer, Tokenizer)):
        yield f"{place} is {show(tokenizer)}, expected a path or hub name, a mapping of arguments, or a tokenizer"


def _path_problems(path: Any, place: str) -> Iterator[str]:
    if not isinstance(path, str) or not path.strip():
        yield f"{place} is {show(path)}, expected a path or hub name"
    elif path == _BLANK:
        yield f"{place} is '???', which is to be filled in; expected a path or hub name"


def _with_named_dtypes(value: Any) -> Any:
    """A copy in which dtypes are texts."""
    if isinstance(value, Mapping):
        return {key: _with_named_dtypes(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_named_dtypes(one) for one in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def list_objects(value: Any, keys: Keys = ()) -> Iterator[str]:
    """Where nested values hold what YAML has not, and what it is."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from list_objects(one, (*keys, str(key)))
    elif isinstance(value, list):
        for place, one in enumerate(value):
            yield from list_objects(one, (*keys, str(place)))
    elif not (value is None or isinstance(value, str | bool | int | float)):
        yield f"{'.'.join(keys)} ({type(value).__name__})"


def copy_settings(settings: Settings) -> Settings:
    """Settings in mappings and lists of their own."""
    return dataclasses.replace(
        settings,
        models=as_plain(settings.models),
        tokenizer=as_plain(settings.tokenizer) if isinstance(settings.tokenizer, Mapping) else settings.tokenizer,
        model_kwargs=as_plain(settings.model_kwargs),
        others=as_plain(settings.others),
    )
