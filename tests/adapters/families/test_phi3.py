"""Phi-3 and Phi-4 against transformers, in every variant."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

from hooklens import HookedCausalLM
from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.checks import (
    D_VOCAB,
    cases,
    check,
    check_defaults,
    load_reference,
    read_config,
    read_published,
    save,
    verify_folder,
)

_SHORT = [1.0, 1.1, 1.3, 1.7, 2.3, 3.1]
_LONG = [1.0, 1.9, 3.2, 6.5, 11.0, 24.0]
TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VARIANTS = {
    "window": {"sliding_window": 6, "num_key_value_heads": None},
    "tied, part of each head": {
        "tie_word_embeddings": True,
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.75},
    },
    "longrope, all short": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": _SHORT,
            "long_factor": _LONG,
        },
        "original_max_position_embeddings": 32,
    },
    "longrope, all long": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": _SHORT,
            "long_factor": _LONG,
        },
        "original_max_position_embeddings": 8,
    },
    "longrope with factors": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": _SHORT,
            "long_factor": _LONG,
            "factor": 3.0,
            "attention_factor": 1.4,
        },
        "original_max_position_embeddings": 8,
    },
    "longrope on part of each head": {
        "hidden_size": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": _SHORT,
            "long_factor": _LONG,
            "factor": 5.0,
            "partial_rotary_factor": 0.75,
        },
        "original_max_position_embeddings": 8,
        "sliding_window": 9,
    },
}
PUBLISHED = {
    "Phi-3-mini-4k-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "bos_token_id": 1,
            "embd_pdrop": 0.0,
            "eos_token_id": 32000,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "model_type": "phi3",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.2",
            "use_cache": True,
            "vocab_size": 32064,
        },
        3_821_079_552,
    ),
    "Phi-3-mini-128k-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "bos_token_id": 1,
            "embd_pdrop": 0.0,
            "eos_token_id": 32000,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "model_type": "phi3",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + 0.5 * i for i in range(48)],
            },
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.2",
            "use_cache": True,
            "vocab_size": 32064,
        },
        3_821_079_552,
    ),
    "Phi-3-medium-4k-instruct": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "bos_token_id": 1,
            "embd_pdrop": 0.0,
            "eos_token_id": 32000,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 17920,
            "max_position_embeddings": 4096,
            "model_type": "phi3",
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.2",
            "use_cache": True,
            "vocab_size": 32064,
        },
        13_960_238_080,
    ),
    "phi-4": (
        {
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            },
            "bos_token_id": 1,
            "embd_pdrop": 0.0,
            "eos_token_id": 32000,
            "hidden_act": "silu",
            "hidden_size": 5120,
            "initializer_range": 0.02,
            "intermediate_size": 17920,
            "max_position_embeddings": 16384,
            "model_type": "phi3",
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 10,
            "original_max_position_embeddings": 16384,
            "pad_token_id": 32000,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 250000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.40.2",
            "use_cache": True,
            "vocab_size": 100352,
        },
        14_659_507_200,
    ),
    "Phi-4-mini-instruct": (
        {
            "_name_or_path": "Phi-4-mini-instruct",
            "architectures": ["Phi3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_phi3.Phi3Config",
                "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
                "AutoTokenizer": "Xenova/gpt-4o",
            },
            "bos_token_id": 199999,
            "embd_pdrop": 0.0,
            "eos_token_id": 199999,
            "full_attn_mod": 1,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "phi3",
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 199999,
            "partial_rotary_factor": 0.75,
            "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + 0.5 * i for i in range(48)],
            },
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0",
            "use_cache": True,
            "vocab_size": 200064,
        },
        3_836_021_760,
    ),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm computes in float32 in transformers, whatever the model's dtype.
    check(save(tmp_path, "phi3", **{**TINY, **VARIANTS[variant]}), whole=whole, float64=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "phi3", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    read_published(*PUBLISHED[name])


def test_silent_config_means_what_transformers_takes_it_for() -> None:
    check_defaults("phi3", **TINY)


def read_scaling(**config) -> RotaryScaling:
    """The stretch of the rotation that a config of the tiny sizes describes."""
    positions = read_config({"model_type": "phi3", **TINY, **config}).positions
    assert isinstance(positions, RotaryPositions)
    assert positions.scaling is not None
    return positions.scaling


@pytest.mark.parametrize(("flat", "original"), [({}, 4096), ({"original_max_position_embeddings": 32}, 32)])
def test_flat_original_length_ranks_before_that_of_the_object(flat, original) -> None:
    """It has a default, so the object's entry never counts."""
    rope = {"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG, "original_max_position_embeddings": 8}
    config = {**TINY, "rope_scaling": rope, **flat}
    assert read_scaling(**config).original_n_ctx == original
    assert AutoConfig.for_model("phi3", **config).rope_parameters["original_max_position_embeddings"] == original


def test_old_names_of_longrope_mean_the_same() -> None:
    scalings = {
        read_scaling(rope_scaling={"type": name, "short_factor": _SHORT, "long_factor": _LONG}, **flat)
        for name in ("longrope", "su", "yarn")
        for flat in ({"original_max_position_embeddings": 16},)
    }
    assert len(scalings) == 1


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
def test_other_scalings_are_refused(kind) -> None:
    """transformers refuses them, too."""
    rope = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(UnsupportedModelError, match="expected one of 'default', 'longrope'"):
        read_scaling(rope_parameters=rope)
    with pytest.raises(StrictDataclassClassValidationError, match="type field must be one of"):
        AutoConfig.for_model("phi3", rope_parameters=rope)


def test_sequence_that_grows_past_the_original_length_turns_otherwise_from_there_on(tmp_path) -> None:
    """Frequencies are those of the whole sequence's length, at all positions: no cached key fits any more there."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": _SHORT, "long_factor": _LONG}
    folder = save(tmp_path, "phi3", **{**TINY, "rope_parameters": rope, "original_max_position_embeddings": 12})
    model, reference = HookedCausalLM.from_pretrained(folder), load_reference(folder, torch.float32)
    ids = 1 + torch.arange(20)[None] * 5 % (D_VOCAB - 1)
    with torch.no_grad():
        for length in (12, 13, 20):
            expected = reference(ids[:, :length], use_cache=False).logits
            torch.testing.assert_close(model(ids[:, :length]), expected, atol=2e-5 * expected.std().item(), rtol=0)
    options = {"max_new_tokens": 9, "do_sample": False}
    theirs = reference.generate(ids[:, :9], eos_token_id=None, pad_token_id=0, **options)
    ours = model.generate(ids[:, :9], stop_at_eos=False, verbose=False, **options)
    assert torch.equal(ours, theirs)
