"""Checkpoints that nobody wrote down: a family's variants joined, and keys of its config changed, at random."""

import importlib
import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tests.adapters.families.checks import D_VOCAB

_SIZES = {"vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
# Families whose tests build their checkpoints otherwise.
_OTHERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "llama": (
        {**_SIZES, "num_key_value_heads": 2, "intermediate_size": 44, "max_position_embeddings": 64},
        [{}, {"head_dim": 12}, {"attention_bias": True, "mlp_bias": True}],
    ),
    "gpt_neox": (
        {**_SIZES, "intermediate_size": 44, "max_position_embeddings": 64},
        [{}, {"use_parallel_residual": False}, {"attention_bias": False}],
    ),
    "falcon": (
        _SIZES,
        [
            {},
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            {"alibi": True},
            {"multi_query": False, "parallel_attn": False},
            {"bias": True},
        ],
    ),
}
_ROTARY: tuple[dict[str, Any], ...] = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
)  # fmt: skip
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "relu", "gelu_pytorch_tanh", "quick_gelu", "relu2")
# What is none of the network's: how a call is made, and what only an encoder has.
_NO_OPTIONS = {
    "output_attentions", "output_hidden_states", "return_dict", "use_cache", "is_encoder_decoder", "is_decoder",
    "add_cross_attention", "chunk_size_feed_forward", "initializer_range", "transformers_version",
}  # fmt: skip


def families() -> list[str]:
    """The families that checkpoints can be drawn of."""
    named = (path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py"))
    return sorted(name for name in named if _tables(name) is not None)


def draw_config(family: str, rng: random.Random) -> dict[str, Any]:
    """The keys of a drawn config, as `checks.save` takes them.

    Raises:
        Exception: transformers refuses what was drawn, by any type of exception.
    """
    tables = _tables(family)
    assert tables is not None
    base, variants = tables
    config = dict(base)
    for variant in rng.sample(variants, k=min(len(variants), rng.choice((1, 1, 2)))):
        config.update(variant)
    changes = _changes(AutoConfig.for_model(config.pop("model_type", model_type_of(family)), **config), rng)
    config.update(rng.sample(changes, k=min(len(changes), rng.choice((0, 1, 1, 2)))))
    return config


def model_type_of(family: str) -> str:
    """The name in transformers of the family whose test file has a name."""
    return {"openai_gpt": "openai-gpt"}.get(family, family)


def spell_as_before(folder: Path, rng: random.Random) -> None:
    """Write a config's rotary positions and dtype in the keys that transformers wrote before version 5."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rotary = config.get("rope_parameters")
    if isinstance(rotary, dict) and "rope_type" in rotary:
        del config["rope_parameters"]
        rotary = dict(rotary)
        config.update({key: rotary.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rotary})
        kind = rotary.pop("rope_type")
        if kind != "default":
            config["rope_scaling"] = {rng.choice(("type", "rope_type")): kind, **rotary}
    config["torch_dtype"] = config.pop("dtype", None)
    path.write_text(json.dumps(config))


def _tables(family: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    if family in _OTHERS:
        return _OTHERS[family]
    module = importlib.import_module(f"{__package__}.test_{family}")
    if not hasattr(module, "TINY") or not hasattr(module, "VARIANTS"):
        return None
    return module.TINY, list(module.VARIANTS.values())


def _changes(config: PretrainedConfig, rng: random.Random) -> list[tuple[str, Any]]:
    """One change for each key whose meaning a name or a type tells."""
    given = config.to_dict()
    changes: list[tuple[str, Any]] = []
    for key, value in given.items():
        if key in _NO_OPTIONS or key.startswith("_"):
            continue
        if isinstance(value, bool):
            changes.append((key, not value))
        elif isinstance(value, float):
            changes.append((key, value * 1.7 or 0.3))
        elif key in ("hidden_act", "activation_function", "hidden_activation"):
            changes.append((key, rng.choice(_ACTIVATIONS)))
        elif key == "num_key_value_heads":
            changes.append((key, rng.choice((1, 2, given["num_attention_heads"]))))
        elif key == "sliding_window":
            changes.append((key, rng.choice((3, 7, None))))
        elif key == "head_dim":
            changes.append((key, rng.choice((8, 12, 16))))
        elif key == "rope_parameters" and isinstance(value, dict) and "rope_type" in value:
            kept = {name: value[name] for name in ("rope_theta", "partial_rotary_factor") if name in value}
            changes.append((key, {**rng.choice(_ROTARY), **kept}))
    return changes
