"""The three architectures of the bundled checkpoints, in transformers' own classes.

All have 4 layers, d_model 128, 4 heads of 32 and room for 256 tokens; they differ in what makes their
families differ.
"""

from typing import TYPE_CHECKING, Any

import torch

from hooklens.bundled.words import END_OF_TEXT, PAD, VOCABULARY
from hooklens.errors import UnsupportedModelError, join_names, suggest_names
from hooklens.optional import import_package

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_CTX = 256

_SHARED: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": N_CTX,
    "initializer_range": 0.02,
    "bos_token_id": VOCABULARY.index(END_OF_TEXT),
    "eos_token_id": VOCABULARY.index(END_OF_TEXT),
    "pad_token_id": VOCABULARY.index(PAD),
}

# Name -> config class, model class, what the family does its own way, the same in words.
_ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "tiny-gpt-neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            "intermediate_size": 512,
            "use_parallel_residual": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": False,
        },
        "attention and MLP in parallel behind a LayerNorm each, rotary positions on half of each head, biases, "
        "untied unembedding",
    ),
    "tiny-llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "intermediate_size": 344,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
        "attention, then a gated MLP, RMSNorm, rotary positions, 2 key-value heads for 4 query heads, no biases, "
        "untied unembedding",
    ),
    "tiny-falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {
            "ffn_hidden_size": 512,
            "new_decoder_architecture": False,
            "multi_query": True,
            "num_kv_heads": 1,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "tie_word_embeddings": True,
        },
        "attention and MLP in parallel behind one shared LayerNorm, rotary positions, 1 key-value head for 4 query "
        "heads, no biases in the linear maps, tied unembedding (as Falcon-7B)",
    ),
}


def build_model(name: str) -> "PreTrainedModel":
    """Build the named checkpoint's network with fresh weights, drawn from torch's global generator.

    An untied unembedding starts as a copy of the embedding: writing out a word that attention has read is
    then in reach from the first step on, and induction forms several times sooner.

    Raises:
        UnsupportedModelError: no architecture has that name.
    """
    config_class, model_class, own, _ = _find(name)
    transformers = import_package("transformers")
    config = getattr(transformers, config_class)(**_SHARED, **own)
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    if not config.tie_word_embeddings:
        unembed = model.get_output_embeddings()
        assert unembed is not None
        with torch.no_grad():
            unembed.weight.copy_(model.get_input_embeddings().weight)
    return model


def describe(name: str) -> str:
    """The named architecture in a line, for the model card.

    Raises:
        UnsupportedModelError: no architecture has that name.
    """
    return _find(name)[3]


def _find(name: str) -> tuple[str, str, dict[str, Any], str]:
    if name not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"no bundled architecture is called {name!r}.{suggest_names(name, _ARCHITECTURES)} "
            f"There are {join_names(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[name]
