"""Loading checkpoints of families whose tensors lie otherwise than ours: transposed, fused, an expert each."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hooklens import HookedCausalLM
from tests.adapters.families.checks import save
from tests.benchmarks.alternate import time_alternating
from tests.benchmarks.peak import run_fresh
from tests.benchmarks.test_memory import LOAD

_D, _D_MLP, _HEADS, _LAYERS, _VOCAB = 768, 2560, 12, 5, 4000
_LIKE_LLAMA = {
    "hidden_size": _D,
    "intermediate_size": _D_MLP,
    "num_attention_heads": _HEADS,
    "num_hidden_layers": _LAYERS,
    "num_key_value_heads": 4,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}
_MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": _D, "n_head": _HEADS, "n_layer": _LAYERS, "n_positions": 512, "vocab_size": _VOCAB},
    "bloom": {"hidden_size": _D, "n_head": _HEADS, "n_layer": _LAYERS, "vocab_size": _VOCAB},
    "qwen2": _LIKE_LLAMA,
    "phi3": _LIKE_LLAMA,
    "gemma2": {**_LIKE_LLAMA, "head_dim": 64},
    "mixtral": {**_LIKE_LLAMA, "intermediate_size": 640, "num_local_experts": 8, "num_experts_per_tok": 2},
}


def _tiny(config: dict[str, Any]) -> dict[str, Any]:
    """The same family, next to nothing in size."""
    small = {_D: 32, _D_MLP: 48, 640: 24, _HEADS: 4, _LAYERS: 1, _VOCAB: 50, 4: 2, 64: 8}
    return {key: small.get(value, value) for key, value in config.items()}


def _read(model: torch.nn.Module) -> float:
    return sum(float(parameter.detach().sum()) for parameter in model.parameters())


@pytest.mark.parametrize("family", _MODELS)
def test_loading(family: str, record: Any, tmp_path: Path) -> None:
    """Some 120 MB, every weight read, against transformers: time, and resident memory of a fresh process."""
    save(tmp_path / "big", family, **_MODELS[family])
    save(tmp_path / "small", family, **_tiny(_MODELS[family]))
    seconds = time_alternating(
        {
            "transformers": lambda: _read(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "big")),
            "hooklens": lambda: _read(HookedCausalLM.from_pretrained(tmp_path / "big")),
        },
        rounds=5,
        warm_up=1,
    )
    record(f"load time, {family}: / transformers", seconds["hooklens"] / seconds["transformers"], at_most=1.0)
    code = LOAD.format(source=str(tmp_path / "big"), first=str(tmp_path / "small"))
    record(f"peak resident memory of loading, {family}: / bytes", float(run_fresh(code).splitlines()[-1]), at_most=1.05)
