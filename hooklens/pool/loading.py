"""Loading one of a pool's models: what its entry says, as a hooked model or as transformers'."""

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hooklens.arguments import show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, MissingDependencyError, suggest_names
from hooklens.optional import import_package
from hooklens.pool.arguments import Arguments, merge_arguments, to_ours, to_transformers
from hooklens.pool.config.settings import DTYPES, SOURCES
from hooklens.pool.config.targets import Target, find_target
from hooklens.pool.copying import copy_on_write
from hooklens.pool.errors import PoolError
from hooklens.pool.tokenizer import expand_source, make_tokenizer
from hooklens.tokens import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AUTO = "transformers.AutoModelForCausalLM"


@dataclass(frozen=True)
class Request:
    """One model to be loaded, with everything that is said about it.

    Attributes:
        what: what to call it in messages.
        entry: a path or hub name, a mapping of arguments, or a model.
        arguments: merged from the entry, the pool and the call.
        hooked: whether a `HookedCausalLM` is wanted, or transformers' model.
    """

    what: str
    entry: Any
    arguments: Arguments
    hooked: bool

    @property
    def target(self) -> Target:
        """What the entry names."""
        name = self.entry.get("_target_", _AUTO) if isinstance(self.entry, Mapping) else _AUTO
        return find_target(name, place=f"{self.what}._target_")

    @property
    def source(self) -> str:
        """Of a checkpoint, the path or hub name."""
        source = next(self.arguments[name] for name in SOURCES if name in self.arguments)
        if not isinstance(source, str):
            raise InputError(f"{self.what}: its path is {show(source)}, expected a path or hub name")
        return source

    def key(self) -> str | None:
        """What tells the model from others that may be asked for; None: nothing does, and it is loaded anew."""
        if isinstance(self.entry, nn.Module) or self.target.kind == "registered":
            return None
        if not _is_simple(self.arguments):
            return None
        said = json.dumps(self.arguments, default=str, sort_keys=True)
        texts = [value for value in self.arguments.values() if isinstance(value, str)]
        return f"{self.target.name} {self.hooked} {said} {[_stamp(text) for text in texts]}"


def request(entry: Any, *, pool: Mapping[str, Any], call: Mapping[str, Any], hooked: bool, what: str) -> Request:
    """Put together what an entry, the pool and the call say.

    Raises:
        InputError: arguments that contradict each other, or that a model in memory does not take.
    """
    if isinstance(entry, nn.Module):
        wrong = sorted(call.keys() - {*DTYPES, "device"})
        if wrong:
            raise InputError(f"{what} is a model in memory, which takes dtype and device only, not {', '.join(wrong)}")
        return Request(what, entry, merge_arguments({}, {}, call, what=what), hooked)
    own = {SOURCES[0]: entry} if isinstance(entry, str) else entry
    return Request(what, entry, merge_arguments(own, pool, call, what=what), hooked)


def load(asked: Request, *, fallback_tokenizer: Callable[[], Tokenizer | None]) -> Any:
    """The model.

    Args:
        asked: which.
        fallback_tokenizer: gives the tokenizer of a model that has none.

    Raises:
        InputError: arguments that this kind of entry does not take; before anything is loaded.
        PoolError: what a registered function gave is no model, or transformers has no such class.
        HookLensError: what loading raises.
    """
    if isinstance(asked.entry, nn.Module):
        model: Any = _copy_of(asked)
    else:
        model = _LOADERS[asked.target.kind](asked)
    model = _as_wanted(model, asked)
    if isinstance(model, HookedCausalLM) and model.tokenizer is None:
        model.tokenizer = fallback_tokenizer()
    return model


def _copy_of(asked: Request) -> Any:
    """A copy of a model in memory, to be changed without changing the pool's."""
    model = copy_on_write(asked.entry)
    dtype = next((asked.arguments[name] for name in DTYPES if name in asked.arguments), None)
    wanted = {"dtype": None if dtype == "auto" else dtype, "device": asked.arguments.get("device")}
    return model.to(**{name: value for name, value in wanted.items() if value is not None})


def _load_checkpoint(asked: Request) -> Any:
    class_name = asked.target.class_name
    if asked.hooked:
        return HookedCausalLM.from_pretrained(**to_ours(asked.arguments, what=asked.what))
    theirs, device = to_transformers(asked.arguments, what=asked.what)
    source = expand_source(asked.source)
    kind = getattr(import_package("transformers"), class_name, None)
    if kind is None:
        raise PoolError(f"{asked.what}: transformers has no class {class_name!r}")
    model = kind.from_pretrained(source, **{name: value for name, value in theirs.items() if name not in SOURCES})
    return model if device is None else model.to(device)


def _load_adapted(asked: Request) -> Any:
    """A base model with an adapter, by `hooklens.pool.load_peft_causal_lm`."""
    try:
        function = import_package(_PEFT).load_peft_causal_lm
    except MissingDependencyError as error:
        raise PoolError(
            f"{asked.what}: this version of HookLens loads no adapters from a pool; merge the adapter with peft "
            "(merge_and_unload), save the model, and give its folder"
        ) from error
    taken = inspect.signature(function).parameters
    arguments = dict(asked.arguments)
    if "dtype" in arguments and "dtype" not in taken:
        arguments["torch_dtype"] = arguments.pop("dtype")
    arguments.pop("trust_remote_code", None)
    wrong = [name for name in arguments if name not in taken]
    if wrong:
        nearest = "".join(suggest_names(name, taken) for name in wrong)
        raise InputError(
            f"{asked.what}: load_peft_causal_lm takes no {', '.join(wrong)}.{nearest} It takes {', '.join(taken)}"
        )
    return function(**arguments, hooked=asked.hooked)


def _load_registered(asked: Request) -> Any:
    function = asked.target.function
    assert function is not None
    return function(**{name: _make(value, what=f"{asked.what}.{name}") for name, value in asked.arguments.items()})


def _make(value: Any, *, what: str) -> Any:
    """An argument, with what a `_target_` in it names made."""
    if isinstance(value, list):
        return [_make(one, what=what) for one in value]
    if not isinstance(value, Mapping):
        return value
    made = {key: _make(one, what=f"{what}.{key}") for key, one in value.items() if key != "_target_"}
    if "_target_" not in value:
        return made
    target = find_target(value["_target_"], place=f"{what}._target_")
    if target.kind == "registered":
        assert target.function is not None
        return target.function(**made)
    return make_tokenizer(target.class_name, None, merge_arguments(made, {}, {}, what=what))


def _as_wanted(model: "HookedCausalLM | PreTrainedModel", asked: Request) -> Any:
    """A model as a hooked one or as transformers', whatever it came as."""
    if isinstance(model, HookedCausalLM):
        return model if asked.hooked else model.to_hf()
    if isinstance(model, nn.Module):
        return HookedCausalLM.from_hf(model) if asked.hooked else model
    raise PoolError(f"{asked.what}: its function gave {show(model)}, expected a HookedCausalLM or a transformers model")


def _is_simple(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_simple, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | bool | int | float | torch.dtype | torch.device)


def _stamp(path: str) -> list[tuple[str, int, int]]:
    """The files in a folder with their times and sizes, so that a folder that was written anew is loaded anew."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return []
    return sorted((entry.name, entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(folder))


_PEFT = "hooklens.pool.peft"
_LOADERS: dict[str, Callable[[Request], Any]] = {
    "checkpoint": _load_checkpoint,
    "adapter": _load_adapted,
    "registered": _load_registered,
}
