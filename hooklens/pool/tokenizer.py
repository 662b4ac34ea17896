"""The tokenizer of a pool."""

from collections.abc import Mapping
from typing import Any

from hooklens.arguments import show
from hooklens.bundled import bundled_path
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.pool.arguments import merge_arguments
from hooklens.pool.config.settings import SOURCES
from hooklens.pool.config.targets import find_target
from hooklens.pool.errors import PoolError
from hooklens.tokens import Tokenizer

_BUNDLED = "bundled:"
_AUTO = "transformers.AutoTokenizer"


def expand_source(source: str) -> str:
    """A path or hub name as transformers takes it."""
    return str(bundled_path(source.removeprefix(_BUNDLED))) if source.startswith(_BUNDLED) else source


def load_tokenizer(given: Any, call: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a configuration names, or holds.

    Args:
        given: a path or hub name, a mapping of arguments, or a tokenizer.
        call: arguments of the call.

    Raises:
        PoolError: transformers cannot make it.
        InputError: arguments for a tokenizer that is there already; or a configuration that allows code to be run.
    """
    if not isinstance(given, str | Mapping):
        if call:
            raise InputError(f"the pool holds its tokenizer itself, which takes no arguments: {', '.join(call)}")
        tokenizer: Tokenizer = given
        return tokenizer
    own = {SOURCES[0]: given} if isinstance(given, str) else given
    target = find_target(own.get("_target_", _AUTO), place="tokenizer._target_")
    arguments = merge_arguments(own, {}, call, what="the pool's tokenizer")
    return make_tokenizer(target.class_name, target.function, arguments)


def make_tokenizer(class_name: str, function: Any, arguments: dict[str, Any]) -> Tokenizer:
    """A tokenizer of a class of transformers, or from a registered function.

    Raises:
        PoolError: it cannot be made.
    """
    if function is not None:
        made = function(**arguments)
        what = f"the registered function {getattr(function, '__name__', function)}"
    else:
        rest = dict(arguments)
        source = rest.pop(SOURCES[0], None)
        if not isinstance(source, str):
            raise PoolError(f"the tokenizer's {SOURCES[0]} is {show(source)}, expected a path or hub name")
        kind = getattr(import_package("transformers"), class_name, None)
        if kind is None:
            raise PoolError(f"transformers has no tokenizer {class_name!r}; expected AutoTokenizer, or another of its")
        try:
            made = kind.from_pretrained(expand_source(source), **rest)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise PoolError(f"the tokenizer {source!r} cannot be loaded: {error}") from error
        what = f"transformers.{class_name}"
    if not isinstance(made, Tokenizer):
        raise PoolError(f"{what} gave {show(made)}, expected a tokenizer")
    return made
