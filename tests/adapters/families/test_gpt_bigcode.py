"""GPTBigCode against transformers, in every variant."""

import pytest

from tests.adapters.families.checks import D_VOCAB, cases, check, read_published, save, verify_folder

TINY = {
    "vocab_size": D_VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 56,
    "n_positions": 40,
}
VARIANTS = {
    "multi-query": {},
    "multi-head untied": {"multi_query": False, "tie_word_embeddings": False, "n_inner": None},
    "unscaled": {"scale_attn_weights": False, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
}
STARCODER = {
    "activation_function": "gelu",
    "architectures": ["GPTBigCodeForCausalLM"],
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "bos_token_id": 0,
    "embd_pdrop": 0.1,
    "eos_token_id": 0,
    "inference_runner": 0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_batch_size": None,
    "max_sequence_length": None,
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 6144,
    "n_head": 48,
    "n_inner": 24576,
    "n_layer": 40,
    "n_positions": 8192,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "resid_pdrop": 0.1,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "transformers_version": "4.28.1",
    "use_cache": True,
    "validate_runner_input": True,
    "vocab_size": 49152,
}
RUNNER = (
    "inference_runner",
    "max_batch_size",
    "max_sequence_length",
    "pad_key_length",
    "pre_allocate_kv_cache",
    "validate_runner_input",
)
PUBLISHED = {
    "starcoder": (STARCODER, 15_517_456_384),
    "starcoderbase-1b": (
        {**STARCODER, "n_embd": 2048, "n_head": 16, "n_inner": 8192, "n_layer": 24},
        1_137_207_296,
    ),
    "gpt_bigcode-santacoder": (
        {
            **{key: value for key, value in STARCODER.items() if key not in RUNNER},
            "activation_function": "gelu_pytorch_tanh",
            "bos_token_id": 49152,
            "eos_token_id": 49152,
            "n_embd": 2048,
            "n_head": 16,
            "n_inner": 8192,
            "n_layer": 24,
            "n_positions": 2048,
            "runner_max_sequence_length": None,
            "transformers_version": "4.28.0.dev0",
            "vocab_size": 49280,
        },
        1_124_886_528,
    ),
    "tiny_starcoder_py": (
        {
            **STARCODER,
            "_name_or_path": "/fsx/bigcode/tinystarcoder/saves/large-model",
            "activation_function": "gelu_pytorch_tanh",
            "n_embd": 768,
            "n_head": 12,
            "n_inner": 3072,
            "n_layer": 20,
            "torch_dtype": "float32",
        },
        164_144_128,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    check(save(tmp_path, "gpt_bigcode", **{**TINY, **VARIANTS[variant]}), whole=whole)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "gpt_bigcode", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])
