"""What the harness' class is made of, as its command line writes it: model, steering, rows at once."""

from typing import Any, Literal

import torch

from hooklens.arguments import MOST_ENTRIES, read_int, refusal
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.evaluation.batching import BatchSize
from hooklens.hooks.edits import Edit
from hooklens.steering import SteeringVectors

# What the harness' command line gives where nobody names a device.
_DEFAULT_DEVICE = "cuda:0"


def read_batch_size(given: object, most: object) -> BatchSize:
    """A batch size as the harness writes it: a number, also as text, `auto`, or `auto:N`.

    Raises:
        InputError: anything else, or a bound for a search that is not made.
    """
    if most is not None:
        raise InputError(
            f"max_batch_size is {most!r}: 'auto' asks the memory, with no search to bound; leave it out, or give a "
            "number as batch_size"
        )
    if isinstance(given, str) and given.partition(":")[0] == "auto":
        return "auto"
    number = int(given) if isinstance(given, str) and given.isdecimal() else given
    try:
        return read_int(number, what="batch_size", least=1, most=MOST_ENTRIES)
    except InputError:
        raise refusal(given, "batch_size", "'auto' or a whole number >= 1") from None


def load_model(given: object, device: torch.device | str | None, loading: dict[str, Any]) -> HookedCausalLM:
    """The model that a caller gave, or one that is loaded.

    Raises:
        InputError: a model, with keywords for loading one.
    """
    if isinstance(given, HookedCausalLM):
        named = [*(["device"] if device is not None else []), *loading]
        if named:
            raise InputError(f"{', '.join(named)}: these say how to load a model, and one was given; load it with them")
        return given
    source: Any = given
    if device == _DEFAULT_DEVICE and ("device_map" in loading or not torch.cuda.is_available()):
        device = None
    if device is None and "device_map" not in loading:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place: dict[str, Any] = {} if device is None else {"device": device}
    return HookedCausalLM.from_pretrained(source, **place, **loading)


def make_steering(
    model: HookedCausalLM,
    vectors: SteeringVectors,
    at: str | None,
    strength: float | None,
    how: Literal["add", "ablate", "clamp"] | None,
) -> list[Edit]:
    """The edits that steer.

    Raises:
        SteeringError: there is no such vector, or it does not fit the model.
    """
    chosen = vectors if at is None else vectors[at]
    chosen.check(model)
    return chosen.edits(strength=1.0 if strength is None else strength, how=how or "add", dtype=model.dtype)
