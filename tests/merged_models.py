"""Checkpoints that are merged in tests: a base of a family, and models trained from it, every parameter random."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from tests.tokens.tokenizers import ALL_SPECIAL, word_tokenizer

D_VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_GQA = {**_SIZES, "num_key_value_heads": 2}
# One of each way in which layouts differ: queries, keys and values in one tensor, none, maps stored the other way round
# under a tied unembedding, experts.
FAMILIES: dict[str, Any] = {
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GQA)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=D_VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_GQA, num_local_experts=4)),
}


def build_models(family: str, n_models: int = 3, *, dtype: torch.dtype = torch.float64) -> list[PreTrainedModel]:
    """A base and models near it; entries of the task vectors are of very different sizes, and some are 0."""
    models = [FAMILIES[family]().to(dtype).eval() for _ in range(1 + n_models)]
    with torch.no_grad():
        for index, model in enumerate(models):
            generator = torch.Generator().manual_seed(index)
            start = dict(models[0].named_parameters())
            for name, parameter in model.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if index == 0:
                    parameter.copy_(0.2 * drawn)
                    continue
                delta = 0.05 * drawn * torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                delta[torch.rand(parameter.shape, generator=generator) < 0.2] = 0
                parameter.copy_(start[name] + delta)
    return models


def save_models(models: list[PreTrainedModel], place: Path) -> list[Path]:
    """Their folders, the base's with a tokenizer and settings of generation."""
    folders = [place / f"model-{index}" for index in range(len(models))]
    for index, (model, folder) in enumerate(zip(models, folders, strict=True)):
        model.generation_config.max_new_tokens = 7 + index
        # Each in shards of another size.
        model.save_pretrained(folder, max_shard_size=f"{20 + 30 * index}KB")
    word_tokenizer(**ALL_SPECIAL).save_pretrained(folders[0])
    return folders


def flatten(state: Mapping[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """All entries of some tensors."""
    return torch.cat([state[name].double().flatten() for name in names])
