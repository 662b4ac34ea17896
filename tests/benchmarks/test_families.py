"""Loading checkpoints of families whose tensors lie otherwise than ours: transposed, fused, an expert each."""

import importlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hooklens import HookedCausalLM
from hooklens.adapters.families import load_families
from tests.adapters.families.checks import save
from tests.benchmarks.alternate import time_alternating
from tests.benchmarks.peak import run_fresh
from tests.benchmarks.test_memory import LOAD

# Sizes by the names that configs have for them, and those of the tests' tiny networks that stay.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 768),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "n_inner", "ffn_dim"), 2560),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 640),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 12),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads", "num_kv_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 512),
    "head_dim": 64,
    "vocab_size": 4000,
}
_EXPERTS = ("num_local_experts", "num_experts", "moe_num_experts")
_LIKE_LLAMA = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40,
               "vocab_size": 97, "max_position_embeddings": 64}  # fmt: skip
# Families whose own tests make their networks elsewhere, or in sizes of which others do not follow.
_TINY: dict[str, dict[str, Any]] = {
    "llama": {**_LIKE_LLAMA, "num_key_value_heads": 2},
    "gpt_neox": _LIKE_LLAMA,
    "falcon": {**_LIKE_LLAMA, "num_kv_heads": 2, "new_decoder_architecture": True},
    "helium": {**_LIKE_LLAMA, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 56,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 2]],
    },
}
_FAMILIES = {family.name: family.model_types[0] for family in load_families()}


def _tiny(family: str) -> dict[str, Any]:
    """The config of a network of next to no size."""
    if family in _TINY:
        return _TINY[family]
    config: dict[str, Any] = importlib.import_module(f"tests.adapters.families.test_{family}").TINY
    return config


def _large(config: dict[str, Any]) -> dict[str, Any]:
    """The same network with 100 to 250 MB of weights."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        is_expert = key == "intermediate_size" and any(name in config for name in _EXPERTS)
        if isinstance(value, dict):
            made[key] = _large(value)
        elif value is None or key not in _SIZES:
            made[key] = value
        else:
            made[key] = 640 if is_expert and "moe_intermediate_size" not in config else _SIZES[key]
    if "kv_lora_rank" in made:
        # Keys of all heads are made of one latent.
        made["num_key_value_heads"] = made["num_attention_heads"]
    return made


def _read(model: torch.nn.Module) -> float:
    return sum(float(parameter.detach().sum()) for parameter in model.parameters())


@pytest.mark.parametrize("family", _FAMILIES)
def test_loading(family: str, record: Any, tmp_path: Path) -> None:
    """Some 150 MB, every weight read, against transformers: time, and resident memory of a fresh process."""
    save(tmp_path / "big", _FAMILIES[family], **_large(_tiny(family)))
    save(tmp_path / "small", _FAMILIES[family], **_tiny(family))
    loads = {
        "transformers": lambda: _read(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "big")),
        "hooklens": lambda: _read(HookedCausalLM.from_pretrained(tmp_path / "big")),
    }
    seconds = time_alternating(loads, rounds=5, warm_up=1)
    cpu = time_alternating(loads, rounds=5, warm_up=0, clock=time.process_time)
    record(f"load time, {family}: / transformers", seconds["hooklens"] / seconds["transformers"], at_most=1.0)
    record(f"processor time of loading, {family}: / transformers", cpu["hooklens"] / cpu["transformers"])
    code = LOAD.format(source=str(tmp_path / "big"), first=str(tmp_path / "small"), adapter=None)
    record(f"peak resident memory of loading, {family}: / bytes", float(run_fresh(code).splitlines()[-1]), at_most=1.05)
