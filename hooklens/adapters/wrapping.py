"""Language models inside of models that also see or hear: their config, and their tensors among the others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hooklens.adapters.family import Family

_INSIDE = "text_config"
_SEGMENT = "language_model"
# What the whole says for the language model, where that is silent.
_INHERITED = ("tie_word_embeddings", "dtype", "torch_dtype")


def unwrap_config(config: Mapping[str, Any], families: Sequence[Family]) -> Mapping[str, Any]:
    """The config of the language model inside, where the whole is of no family and that is; else the config itself.

    Args:
        config: contents of a `config.json`.
        families: the supported ones.
    """
    text = config.get(_INSIDE)
    if not isinstance(text, Mapping):
        return config
    known = {name: family for family in families for name in (*family.model_types, *family.dialects)}
    outer, inner = config.get("model_type"), text.get("model_type")
    if not isinstance(inner, str) or inner not in known or (isinstance(outer, str) and outer in known):
        return config
    inherited = {key: config[key] for key in _INHERITED if key in config and text.get(key) is None}
    return {**text, **inherited, "architectures": [known[inner].architectures[0]]}


def untie_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with an unembedding of its own, for the language model inside as well."""
    inside = config.get(_INSIDE)
    untied = {**config, "tie_word_embeddings": False}
    return {**untied, _INSIDE: {**inside, "tie_word_embeddings": False}} if isinstance(inside, Mapping) else untied


def unwrap_names(names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Names of the language model's tensors as it has them alone, with those given; and the names of all others.

    Args:
        names: of all tensors of the whole.
    """
    ours: dict[str, str] = {}
    others = []
    for name in names:
        path = name.split(".")
        if _SEGMENT in path[:-1]:
            path.remove(_SEGMENT)
            ours[".".join(path)] = name
        elif path[0] == "lm_head":
            ours[name] = name
        else:
            others.append(name)
    return ours, others
