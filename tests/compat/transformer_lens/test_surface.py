"""Every public name of TransformerLens 2.16.1 is there, in the same module and with the same arguments."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

# Module -> name -> its arguments, of a class its methods; None: a value, a property, or a name from elsewhere. Of
# encoders the classes alone, which say that they are not there; without MLPs of four bits, which HookLens dequantises.
NAMES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "names.json").read_text(encoding="utf-8"))
# Arguments that nobody names: every conversion calls the model after its family, and calls of modules go to forward.
UNNAMED = {
    "components.mlps.can_be_used_as_mlp.CanBeUsedAsMLP.forward",
    "components.unembed.Unembed.forward",
    "hook_points.HookPoint.forward",
    "past_key_value_caching.HookedTransformerKeyValueCache.append_attention_mask",
    "utils.solu",
}
# What HookLens has none of: the parts of encoders are named, and say so when they are made.
ABSENT = {
    "loading_from_pretrained.convert_hf_model_config": "configs of transformers are read by HookLens's adapters",
    "loading_from_pretrained.convert_neel_model_config": "as above",
    "components.mlps.moe.MoEGatedMLP": "an expert is a slice of the mixture's weights, and no module",
}
_PACKAGE = "hooklens.compat.transformer_lens"


def find(module: str) -> Any:
    return importlib.import_module(_PACKAGE if module == "." else f"{_PACKAGE}.{module}")


def differs(ours: Any, wanted: list[str]) -> str | None:
    """Why a call with arguments by their place, or by name, would not be understood; None: it would."""
    if not callable(ours):
        return "is no function"
    try:
        parameters = list(inspect.signature(ours).parameters.values())
    except ValueError:
        # Torch's own, which tell no signature.
        return None
    kinds = {one.kind for one in parameters}
    named = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    named = named[1:] if named[:1] == ["self"] else named
    has_keywords = inspect.Parameter.VAR_KEYWORD in kinds
    lacking = [name for name in wanted if name not in named and not has_keywords]
    if lacking:
        return f"lacks {lacking}"
    shared = [name for name in wanted if name in named]
    if inspect.Parameter.VAR_POSITIONAL not in kinds and named[: len(shared)] != shared:
        return f"has {named}, expected {wanted}"
    return None


def compare(where: str, ours: Any, wanted: Any) -> list[str]:
    """What is missing of a name, or differs."""
    if isinstance(wanted, dict):
        found = [
            f"{where}.{name} is missing" for name in wanted if not hasattr(ours, name) and wanted[name] is not None
        ]
        methods = {name: args for name, args in wanted.items() if args is not None and hasattr(ours, name)}
        return found + [
            line for name, args in methods.items() for line in compare(f"{where}.{name}", getattr(ours, name), args)
        ]
    if where in UNNAMED or where.startswith("pretrained.weight_conversions."):
        return [] if callable(ours) else [f"{where} is no function"]
    why = None if wanted is None else differs(ours, wanted)
    return [] if why is None else [f"{where} {why}"]


@pytest.mark.parametrize("module", NAMES)
def test_names_and_arguments_are_those_of_2x(module: str) -> None:
    ours, wrong = find(module), []
    for name, wanted in NAMES[module].items():
        where = f"{module}.{name}"
        if where in ABSENT:
            assert not hasattr(ours, name)
        elif not hasattr(ours, name):
            wrong.append(f"{where} is missing")
        else:
            wrong += compare(where, getattr(ours, name), wanted)
    assert not wrong, "\n".join(wrong)
