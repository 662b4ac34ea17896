"""What a configuration may ask to be made: an open list of names, and nothing else that Python can import.

A configuration says `_target_: transformers.AutoModelForCausalLM.from_pretrained`. To import whatever stands there
would let a file run any code; here such a name is looked up in a table. `register_target` adds to it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hooklens.arguments import is_function, read_text, reads, refusal, show
from hooklens.errors import HookLensError, suggest_names
from hooklens.pool.errors import PoolError

Kind = Literal["pool", "backbone_pool", "checkpoint", "adapter", "tokenizer", "registered"]
"""What a name stands for."""

_IN_FUSION_BENCH = ("", "modelpool.", "modelpool.causal_lm.", "modelpool.causal_lm.causal_lm.")
_FIXED: dict[str, Kind] = {
    **{f"fusion_bench.{inside}CausalLMPool": "pool" for inside in _IN_FUSION_BENCH},
    **{f"fusion_bench.{inside}CausalLMBackbonePool": "backbone_pool" for inside in _IN_FUSION_BENCH},
    **{f"fusion_bench.{inside}load_peft_causal_lm": "adapter" for inside in _IN_FUSION_BENCH},
    "hooklens.pool.CausalLMPool": "pool",
    "hooklens.pool.ModelPool": "pool",
    "hooklens.pool.CausalLMBackbonePool": "backbone_pool",
    "hooklens.HookedCausalLM": "checkpoint",
    "hooklens.HookedCausalLM.from_pretrained": "checkpoint",
    "hooklens.pool.load_peft_causal_lm": "adapter",
}
_METHOD = r"(?:\.from_pretrained)?"
_MODEL = re.compile(rf"(transformers|fusion_bench\.models)\.(?:[a-z]\w*\.)*(\w+(?:ForCausalLM|LMHeadModel)){_METHOD}")
_TOKENIZER = re.compile(rf"transformers\.(?:[a-z]\w*\.)*(\w+Tokenizer(?:Fast)?){_METHOD}")
_AUTO_MODEL = "AutoModelForCausalLM"
# Shown in messages, where patterns would not help.
_EXAMPLES = (
    "transformers.AutoModelForCausalLM.from_pretrained",
    "transformers.AutoTokenizer.from_pretrained",
    "fusion_bench.modelpool.CausalLMPool",
    "fusion_bench.modelpool.causal_lm.load_peft_causal_lm",
    "hooklens.HookedCausalLM.from_pretrained",
    "hooklens.pool.load_peft_causal_lm",
)
_UNLISTED = "which a configuration cannot ask for"
_HYDRA = {"_args_", "_partial_", "_convert_"}

_registered: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Target:
    """What a name stands for.

    Attributes:
        name: as the configuration has it.
        kind: what is done with it.
        class_name: of a checkpoint or tokenizer, the class of transformers.
        function: of a registered one, what is called.
    """

    name: str
    kind: Kind
    class_name: str = _AUTO_MODEL
    function: Callable[..., Any] | None = None


def _read_maker(given: object, *, what: str, error: type[HookLensError]) -> Any:
    if is_function(given) or isinstance(given, type):
        return given
    raise refusal(given, what, "a function or class", error)


@reads(PoolError, name=read_text, function=_read_maker)
def register_target(name: str, function: Callable[..., Any]) -> None:
    """Let configurations name a function of yours: `_target_: NAME` in a model's entry calls it.

    It is called with the other keys of its mapping, the pool's `model_kwargs` and the arguments of `load_model`, and
    gives a `HookedCausalLM` or a transformers model; inside an argument of another entry, whatever is wanted there. A
    name that was registered before now stands for this function.

    Args:
        name: what stands behind `_target_`, as `"my_package.load_model"`.
        function: called when the model is loaded.

    Raises:
        PoolError: a name that stands for something already, or no function or class.
    """
    if _find_known(name) is not None:
        raise PoolError(f"name is {name!r}, which stands for what it says already; register another name")
    _registered[name] = function


def find_target(name: object, *, place: str) -> Target:
    """What a name stands for.

    Raises:
        PoolError: it is not on the list.
    """
    known = _find_known(name) if isinstance(name, str) else None
    if known is not None:
        return known
    if isinstance(name, str) and name in _registered:
        return Target(name, "registered", function=_registered[name])
    nearest = suggest_names(name, [*_FIXED, *_EXAMPLES, *_registered]) if isinstance(name, str) else ""
    raise PoolError(f"{place} is {show(name)}, {_UNLISTED}{nearest and '.' + nearest}")


def join_problems(problems: Iterable[str]) -> str:
    """All that is wrong with a configuration as one text, with the list of what it may ask for where that matters."""
    text = "; ".join(problems)
    if _UNLISTED not in text:
        return text
    listed = ", ".join([*_EXAMPLES, *_registered])
    return (
        f"{text.removesuffix('.')}. A configuration runs no code but what is listed: {listed}, and transformers' other "
        "classes of causal language models and tokenizers; hooklens.pool.register_target(name, function) adds to it"
    )


def _find_known(name: str) -> Target | None:
    if name in _FIXED:
        return Target(name, _FIXED[name])
    if match := _MODEL.fullmatch(name):
        return Target(name, "checkpoint", match[2] if match[1] == "transformers" else _AUTO_MODEL)
    if match := _TOKENIZER.fullmatch(name):
        return Target(name, "tokenizer", match[1])
    return None


def check_targets(value: Any, *, place: str) -> Iterator[str]:
    """What is wrong with the `_target_`s in the arguments of an entry: there only tokenizers and registered ones go."""
    if isinstance(value, list):
        for index, one in enumerate(value):
            yield from check_targets(one, place=f"{place}.{index}")
    if not isinstance(value, Mapping):
        return
    if "_target_" in value:
        yield from _check_inner(value, place)
    for key, one in value.items():
        if key != "_target_":
            yield from check_targets(one, place=f"{place}.{key}")


def _check_inner(value: Mapping[Any, Any], place: str) -> Iterator[str]:
    try:
        target = find_target(value["_target_"], place=f"{place}._target_")
    except PoolError as error:
        yield str(error)
        return
    if target.kind not in ("tokenizer", "registered"):
        yield f"{place}._target_ is {target.name!r}, expected a tokenizer or a registered function inside an argument"
    yield from refuse_hydra_keys(value, place=place)


def refuse_hydra_keys(value: Mapping[Any, Any], *, place: str) -> Iterator[str]:
    """What is wrong with the keys that steer Hydra in a mapping with a `_target_`."""
    for key in sorted(_HYDRA & value.keys()):
        yield f"{place}.{key} is Hydra's, which is not used here; give arguments by name, and leave it out"
