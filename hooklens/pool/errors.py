"""Errors of pools."""

from collections.abc import Collection

from hooklens.errors import HookLensError, join_names, suggest_names


class PoolError(HookLensError, ValueError):
    """A pool's configuration, or a use of the pool, that cannot be carried out."""


class ModelNameError(HookLensError, KeyError):
    """A pool has no model of that name; also a `KeyError`, as a mapping's callers expect."""

    # KeyError would show the message's repr.
    __str__ = Exception.__str__


class WeightNameError(HookLensError, KeyError):
    """A model has no weight of that name; also a `KeyError`."""

    __str__ = Exception.__str__


def unknown_model(name: str, names: Collection[str], *, more: str = "") -> ModelNameError:
    """The error for a name that a pool does not have.

    Args:
        name: what was asked for.
        names: the pool's.
        more: what else it could have been, for the message.
    """
    held = f"it has {join_names(names)}" if names else "it has no models"
    return ModelNameError(f"the pool has no model {name!r}: {held}.{suggest_names(name, names)}{more}")
