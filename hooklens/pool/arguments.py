"""Arguments of loading: whose word counts, and what transformers' arguments are here.

Three places give arguments: a model's own entry, the pool's `model_kwargs`, and the call. As in FusionBench a later one
takes the place of an earlier one. None of them is changed by that.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hooklens.arguments import show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, suggest_names
from hooklens.pool.config.dtypes import read_pool_dtype
from hooklens.pool.config.settings import DTYPES, SOURCES

Arguments = dict[str, Any]

# Names of one argument.
_ALIASES = ({*DTYPES}, {*SOURCES}, {"device", "device_map"})
_STEERING = ("_target_", "_recursive_")
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_TRUST = "trust_remote_code"


def merge_arguments(
    own: Mapping[str, Any], pool: Mapping[str, Any], call: Mapping[str, Any], *, what: str
) -> Arguments:
    """The arguments of one load, dtypes read.

    Args:
        own: of the model's entry.
        pool: `model_kwargs`.
        call: of the call.
        what: what is loaded, for messages.

    Raises:
        InputError: `torch_dtype` and `dtype` in one place, no dtype, or a configuration that allows the checkpoint's
            code to be run, which only a call can.
    """
    merged: Arguments = {}
    for place in (own, pool, call):
        _refuse_twins(place, what)
        if place is not call and place.get(_TRUST) not in (None, False) and _TRUST not in call:
            raise InputError(
                f"{what}: trust_remote_code is {show(place[_TRUST])} in the configuration, and no file can allow code "
                "to be run: pass trust_remote_code=True to the call, or False, with which most models load"
            )
        for names in _ALIASES:
            if names & place.keys():
                merged = {name: value for name, value in merged.items() if name not in names}
        merged.update({name: value for name, value in place.items() if name not in _STEERING})
    if not isinstance(merged.get(_TRUST, False), bool):
        raise InputError(f"{what}: trust_remote_code is {show(merged[_TRUST])}, expected True or False")
    for name in DTYPES:
        if name in merged:
            merged[name] = read_pool_dtype(merged[name], what=f"{what}: {name}")
    return merged


def _refuse_twins(place: Mapping[str, Any], what: str) -> None:
    for names in ({*DTYPES}, {*SOURCES}):
        both = sorted(names & place.keys())
        if len(both) > 1 and place[both[0]] != place[both[1]]:
            given = " and ".join(f"{name}={show(place[name])}" for name in both)
            raise InputError(f"{what}: {given} say one thing in two ways; give one of them")


def to_ours(arguments: Mapping[str, Any], *, what: str) -> Arguments:
    """Arguments of `AutoModelForCausalLM.from_pretrained` as those of `HookedCausalLM.from_pretrained`.

    Raises:
        InputError: what has no counterpart, each with what to do instead.
    """
    taken = inspect.signature(HookedCausalLM.from_pretrained).parameters
    ours: Arguments = {}
    problems = []
    for name, value in arguments.items():
        if name in _TRANSLATED:
            ours.update(_TRANSLATED[name](value))
        elif name in taken:
            ours[name] = value
        elif name in _WITHOUT_COUNTERPART:
            holds, advice = _WITHOUT_COUNTERPART[name]
            if value is not None and value not in holds:
                problems.append(f"{name}={show(value)}: {advice}")
        elif value is not None:
            problems.append(f"{name}={show(value)} is no argument of loading.{suggest_names(name, taken)}")
    if problems:
        raise InputError(
            f"{what}: {'; '.join(problems)}. None in the call leaves an argument out; hooked=False hands all to "
            "transformers"
        )
    return ours


def to_transformers(arguments: Mapping[str, Any], *, what: str) -> tuple[Arguments, torch.device | None]:
    """Arguments for transformers' `from_pretrained`, and where to put the model then.

    Raises:
        InputError: arguments that only HookLens has.
    """
    own = inspect.signature(HookedCausalLM.from_pretrained).parameters.keys() - _SHARED
    wrong = sorted(name for name in own & arguments.keys() if arguments[name] is not None)
    if wrong:
        raise InputError(f"{what}: transformers has no {', '.join(wrong)}; leave it out with hooked=False")
    theirs = {name: value for name, value in arguments.items() if name not in own and name != "device"}
    if "torch_dtype" in theirs:
        theirs["dtype"] = theirs.pop("torch_dtype")
    if theirs.get("dtype", "auto") is None:
        del theirs["dtype"]
    device = arguments.get("device")
    return theirs, None if device is None else torch.device(device)


_SHARED = frozenset(
    {
        *SOURCES,
        *DTYPES,
        "revision",
        "subfolder",
        "variant",
        "token",
        "device",
        "device_map",
        "max_memory",
        "offload_folder",
        "cache_dir",
        "local_files_only",
    }
)
"""Arguments that both libraries have, and mean the same by."""


def _to_dtype(value: Any) -> Arguments:
    return {"dtype": "auto" if value is None else value}


def _to_source(value: Any) -> Arguments:
    return {"source": value}


def _to_place(value: Any) -> Arguments:
    """What transformers takes as `device_map` can be one device."""
    if value is None or value in _AUTOMATIC or isinstance(value, Mapping):
        return {"device_map": value}
    return {"device": value}


def _to_nothing(value: Any) -> Arguments:
    return {}


_TRANSLATED: dict[str, Callable[[Any], Arguments]] = {
    **dict.fromkeys(DTYPES, _to_dtype),
    **dict.fromkeys(SOURCES, _to_source),
    "device_map": _to_place,
    # Nothing that comes with a checkpoint is ever run.
    _TRUST: _to_nothing,
}
_QUANTISED = "say quantize='int8', 'int4' or 'keep'"
_WITHOUT_COUNTERPART: dict[str, tuple[tuple[Any, ...], str]] = {
    "attn_implementation": (
        ("sdpa",),
        "a hooked model attends with PyTorch's sdpa, and explicitly where somebody listens; leave it out",
    ),
    "low_cpu_mem_usage": ((True, False), ""),
    "use_safetensors": (
        (),
        "safetensors files are taken where there are some, and others read without running what is in them; leave it "
        "out",
    ),
    "use_cache": ((False,), "a hooked model keeps keys and values in the cache that a call gets, past_kv_cache=; leave "
                            "it out"),
    "quantization_config": ((), _QUANTISED),
    "load_in_8bit": ((False,), _QUANTISED),
    "load_in_4bit": ((False,), _QUANTISED),
    "output_attentions": ((False,), "run_with_cache gives the patterns; leave it out"),
    "output_hidden_states": ((False,), "run_with_cache gives them; leave it out"),
    "offload_state_dict": ((False,), "weights are read one by one; leave it out"),
    "config": ((), "the checkpoint's own config is read; leave it out"),
    "force_download": ((False,), "delete the copy in the hub's cache instead"),
}  # fmt: skip
"""Arguments of transformers': values that say what holds here anyway, and what to do about others."""
