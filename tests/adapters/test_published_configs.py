"""Config files in the form in which they are published: every key is known, and the network is the published one."""

import json
import warnings
from typing import Any

import pytest

from hooklens.adapters.choice import find_family
from hooklens.adapters.families import load_families
from hooklens.config import HookedConfig
from hooklens.weights.shapes import weight_shapes

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
_REFINED_WEB = {
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["RWForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": 65024,
}
# Published size in parameters, tied ones counted once.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "pythia-70m": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "gelu",
            "hidden_size": 512,
            "initializer_range": 0.02,
            "intermediate_size": 2048,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            "num_attention_heads": 8,
            "num_hidden_layers": 6,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.24.0",
            "use_cache": True,
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
        70_426_624,
    ),
    "gpt-neox-20b": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "attention_probs_dropout_prob": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "gelu_fast",
            "hidden_dropout_prob": 0,
            "hidden_size": 6144,
            "initializer_range": 0.02,
            "intermediate_size": 24576,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            "num_attention_heads": 64,
            "num_hidden_layers": 44,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.19.0.dev0",
            "use_cache": True,
            "vocab_size": 50432,
        },
        20_554_567_680,
    ),
    "h2ogpt-oasst1-512-12b": (
        {
            "architectures": ["GPTNeoXForCausalLM"],
            "bos_token_id": 0,
            "classifier_dropout": 0.1,
            # Both spellings are published.
            "custom_pipeline": {},
            "custom_pipelines": {
                "text-generation": {"impl": "h2oai_pipeline.H2OTextGenerationPipeline", "pt": "AutoModelForCausalLM"}
            },
            "eos_token_id": 0,
            "hidden_act": "gelu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 20480,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neox",
            "num_attention_heads": 40,
            "num_hidden_layers": 36,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.30.0.dev0",
            "use_cache": True,
            "use_parallel_residual": True,
            "vocab_size": 50688,
        },
        11_846_072_320,
    ),
    "Llama-3.1-8B": (
        {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        {
            **_LLAMA_3,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "granite-3b-code-base": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "hidden_act": "silu",
            "hidden_size": 2560,
            "initializer_range": 0.02,
            "intermediate_size": 10240,
            "max_position_embeddings": 2048,
            "mlp_bias": True,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "pad_token_id": 0,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.41.0.dev0",
            "use_cache": True,
            "vocab_size": 49152,
        },
        3_482_503_680,
    ),
    "falcon-7b": (
        {
            **_REFINED_WEB,
            "hidden_size": 4544,
            "model_type": "RefinedWebModel",
            "multi_query": True,
            "n_head": 71,
            "n_layer": 32,
        },
        6_921_720_704,
    ),
    "falcon-40b": (
        {**_REFINED_WEB, "hidden_size": 8192, "model_type": "RefinedWeb", "n_head": 128, "n_head_kv": 8, "n_layer": 60},
        41_303_293_952,
    ),
    "falcon-rw-1b": (
        {
            **_REFINED_WEB,
            "alibi": True,
            "architectures": ["FalconForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_falcon.FalconConfig",
                "AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM",
            },
            "bias": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 2048,
            "model_type": "falcon",
            "multi_query": False,
            "new_decoder_architecture": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 24,
            "parallel_attn": False,
            "vocab_size": 50304,
        },
        1_311_625_216,
    ),
}


def read(name: str) -> HookedConfig:
    config = json.loads(json.dumps(PUBLISHED[name][0]))
    return find_family(config, load_families(), where=name).read_config(config, where=name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_known_and_the_size_is_the_published_one(name) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfg = read(name)
    shapes = weight_shapes(cfg)
    if cfg.tied_unembed:
        del shapes["unembed.W_U"]
    size = 0
    for shape in shapes.values():
        entries = 1
        for axis in shape:
            entries *= axis
        size += entries
    assert size == PUBLISHED[name][1]


def test_structure_of_the_published_falcons() -> None:
    small, large = read("falcon-7b"), read("falcon-40b")
    assert (small.n_kv_heads, small.wiring, small.shared_norm, small.d_head) == (1, "parallel", True, 64)
    assert (large.n_kv_heads, large.wiring, large.shared_norm, large.d_head) == (8, "parallel", False, 64)
