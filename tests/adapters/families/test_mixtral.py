"""Mixtral against transformers, in every variant."""

import warnings

import pytest
import torch
from safetensors.torch import load_file

from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint, read_hf_model
from hooklens.config import MoEConfig
from hooklens.errors import CheckpointError, UnsupportedModelError
from tests.adapters.families.checks import (
    D_VOCAB,
    cases,
    check,
    load_reference,
    read_config,
    read_published,
    save,
    verify_folder,
)
from tests.adapters.families.routers import check_routing
from tests.checkpoints import edit_config

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
VARIANTS = {
    "as published": {"router_jitter_noise": 0.02},
    "window": {"sliding_window": 6, "head_dim": 12, "num_experts_per_tok": 3},
    "tied": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
EIGHT_TIMES_SEVEN = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
PUBLISHED = {
    "Mixtral-8x7B-v0.1": (EIGHT_TIMES_SEVEN, 46_702_792_704),
    "Mixtral-8x7B-Instruct-v0.1": ({**EIGHT_TIMES_SEVEN, "transformers_version": "4.36.0.dev0"}, 46_702_792_704),
    "Mixtral-8x22B-v0.1": (
        {
            **EIGHT_TIMES_SEVEN,
            "hidden_size": 6144,
            "intermediate_size": 16384,
            "max_position_embeddings": 65536,
            "num_attention_heads": 48,
            "num_hidden_layers": 56,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "transformers_version": "4.38.0",
        },
        140_620_634_112,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm and the router's softmax compute in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "mixtral", **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole, float64=1e-5), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "mixtral", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    """No window, where Mistral has one, and a base of a million."""
    folder = save(tmp_path, "mixtral", **TINY)
    edit_config(folder, remove=["sliding_window", "rope_parameters", "rms_norm_eps", "head_dim"])
    cfg = open_checkpoint(folder).cfg
    assert (cfg.windows, cfg.positions.base, cfg.norm.eps) == (None, 1e6, 1e-5)


def test_the_number_of_experts_goes_by_two_names(tmp_path) -> None:
    folder = save(tmp_path, "mixtral", **TINY)
    edit_config(folder, remove=["num_local_experts"], num_experts=5)
    assert open_checkpoint(folder).cfg.mlp == MoEConfig(n_experts=5, experts_per_token=2, d_expert=24, gate_norm=1.0)


def test_a_mixture_without_its_sizes_is_refused(tmp_path) -> None:
    """transformers would take those of the first release."""
    folder = save(tmp_path, "mixtral", **TINY)
    edit_config(folder, remove=["num_local_experts", "num_experts_per_tok"])
    with pytest.raises(UnsupportedModelError, match=r"num_local_experts is missing; num_experts_per_tok is missing"):
        open_checkpoint(folder)


def test_experts_of_a_model_in_memory_are_read_without_a_copy_and_taken_over_with_one(tmp_path) -> None:
    """All experts are one tensor there, in which gate and linear half are views that no model can have as weights."""
    reference = load_reference(save(tmp_path, "mixtral", **TINY), torch.float32)
    experts = reference.model.layers[1].mlp.experts
    _, state = read_hf_model(reference)
    for name, tensor in {"W_gate": experts.gate_up_proj, "W_out": experts.down_proj}.items():
        found = state[f"blocks.1.mlp.{name}"]
        assert found.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    with pytest.raises(CheckpointError, match=r"share=True: 4 of 23 weights cannot lie .*'blocks\.0\.mlp\.gate_maps"):
        HookedCausalLM.from_hf(reference, share=True)
    model = HookedCausalLM.from_hf(reference)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_with_the_names_of_memory_are_read(tmp_path) -> None:
    """transformers 5 can be told to write the names that it uses itself."""
    folder = save(tmp_path, "mixtral", **TINY)
    load_reference(folder, torch.float32).save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj" in load_file(tmp_path / "stacked" / "model.safetensors")
    ours, theirs = (dict(open_checkpoint(one).tensors()) for one in (folder, tmp_path / "stacked"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_biases_that_llamas_keys_would_give_are_refused() -> None:
    """Merged checkpoints keep Llama's keys, and transformers builds no bias whatever they say."""
    config = {"model_type": "mixtral", **TINY}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_config({**config, "attention_bias": False, "mlp_bias": False}).qkv_bias is False
    with pytest.raises(UnsupportedModelError, match=r"attention_bias is True; expected False.*mlp_bias is True"):
        read_config({**config, "attention_bias": True, "mlp_bias": True})
