"""The catalogue of checkpoint variants: tiny transformers models whose every parameter is random.

All tests that need a checkpoint take it from here, so that each one is tried on every architecture variant
that public checkpoints have. Models are seeded, in eval mode, float32, and attend with `sdpa` (transformers'
`eager` Falcon adds ALiBi twice).
"""

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

D_VOCAB = 97
N_CTX = 64

_NEOX = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": N_CTX,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
_LLAMA = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": N_CTX,
}
_FALCON = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
}
_RW = {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}


def _randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw every parameter anew: norm weights around 1, all else around 0, wide enough to reach the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * noise if is_norm_weight else 0.25 * noise)
    return model.eval()


def _neox(seed: int, **config: Any) -> PreTrainedModel:
    return _randomise(
        GPTNeoXForCausalLM._from_config(GPTNeoXConfig(**{**_NEOX, **config}), attn_implementation="sdpa"), seed
    )


def _llama(seed: int, **config: Any) -> PreTrainedModel:
    return _randomise(
        LlamaForCausalLM._from_config(LlamaConfig(**{**_LLAMA, **config}), attn_implementation="sdpa"), seed
    )


def _falcon(seed: int, **config: Any) -> PreTrainedModel:
    return _randomise(
        FalconForCausalLM._from_config(FalconConfig(**{**_FALCON, **config}), attn_implementation="sdpa"), seed
    )


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_BUILDERS: dict[str, Callable[..., PreTrainedModel]] = {
    "neox-parallel": _neox,
    "neox-sequential": partial(_neox, use_parallel_residual=False),
    "neox-no-attention-bias": partial(_neox, attention_bias=False),
    "neox-tied": partial(_neox, tie_word_embeddings=True),
    "neox-gelu-fast": partial(_neox, hidden_act="gelu_fast"),
    "neox-gelu-new": partial(_neox, hidden_act="gelu_new"),
    "neox-full-rotary": partial(_neox, **_rope("default", partial_rotary_factor=1.0)),
    "neox-linear": partial(_neox, **_rope("linear", factor=2.0, partial_rotary_factor=0.5)),
    "llama-mha": partial(_llama, num_key_value_heads=4),
    "llama-gqa": _llama,
    "llama-mqa": partial(_llama, num_key_value_heads=1),
    "llama-head-dim": partial(_llama, head_dim=12),
    "llama-biases": partial(_llama, attention_bias=True, mlp_bias=True),
    "llama-mlp-bias": partial(_llama, mlp_bias=True),
    "llama-tied": partial(_llama, tie_word_embeddings=True),
    "llama-theta": partial(_llama, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "llama-linear": partial(_llama, **_rope("linear", factor=4.0)),
    # Half the length, so that a test's sequence passes the point where the frequencies begin to move.
    "llama-dynamic": partial(_llama, max_position_embeddings=16, **_rope("dynamic", factor=4.0)),
    "llama-llama3": partial(
        _llama,
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama-yarn": partial(_llama, **_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn-mscale": partial(
        _llama,
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.7,
            mscale_all_dim=1.0,
            beta_fast=16.0,
            beta_slow=2.0,
            truncate=False,
        ),
    ),
    "falcon-7b": _falcon,
    "falcon-7b-untied": partial(_falcon, tie_word_embeddings=False),
    "falcon-rw": partial(_falcon, **_RW),
    # Six heads: not a power of two, so the slopes come from two series.
    "falcon-rw-6-heads": partial(_falcon, num_attention_heads=6, hidden_size=36, **_RW),
    "falcon-alibi-parallel-mqa": partial(_falcon, alibi=True),
    "falcon-40b": partial(_falcon, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": partial(
        _falcon,
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500042.0},
    ),
    "falcon-sequential-mqa": partial(_falcon, parallel_attn=False),
    "falcon-sequential-mha": partial(_falcon, parallel_attn=False, multi_query=False),
    "falcon-parallel-mha": partial(_falcon, multi_query=False, bias=True),
    "falcon-ffn-size": partial(_falcon, ffn_hidden_size=40, activation="gelu_pytorch_tanh"),
}

# Name -> a function of no arguments that builds the model; the same weights on every call.
VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(builder, seed) for seed, (name, builder) in enumerate(_BUILDERS.items())
}
NEOX_VARIANTS = [name for name in VARIANTS if name.startswith("neox-")]
LLAMA_VARIANTS = [name for name in VARIANTS if name.startswith("llama-")]
FALCON_VARIANTS = [name for name in VARIANTS if name.startswith("falcon-")]


def build_variant(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The variant's model in `dtype`, with the same random weights on every call."""
    return VARIANTS[name]().to(dtype)


def save_variant(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> Path:
    """Write the variant to `folder` as transformers does, and give the folder back."""
    build_variant(name, dtype=dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit_config(folder: Path, *, remove: Iterable[str] = (), **changes: Any) -> Path:
    """Change keys of the folder's `config.json`, and give the folder back."""
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in set(remove)}
    path.write_text(json.dumps({**config, **changes}))
    return folder


def load_apart(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file in memory of their own: it may be written over, which old safetensors do in place."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}
