"""Tiny models with LoRA adapters that PEFT made and saved, every number of both random."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.adapters.families.checks import load_reference, save

IDS = torch.randint(97, (3, 14), generator=torch.Generator().manual_seed(7))
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gpt_neox": _SIZES,
    "llama": _GROUPED,
    "llama tied": {**_GROUPED, "tie_word_embeddings": True},
    "falcon": {
        **{name: size for name, size in _SIZES.items() if name != "intermediate_size"},
        "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True,
    },
    "gpt2": {
        "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "phi3": _GROUPED,
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    # Its experts are square, as the published ones' are.
    "gpt_oss": {
        **_GROUPED, "intermediate_size": 32, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}  # fmt: skip


class Pair(NamedTuple):
    """A base and an adapter, on disk.

    Attributes:
        base: folder of the base.
        adapter: folder of the adapter.
    """

    base: Path
    adapter: Path


def save_base(folder: Path, model: str) -> Path:
    """Write the base model of a name."""
    return save(folder, model.split(maxsplit=1)[0], **MODELS[model])


def adapt(model: Any, *, name: str = "default", seed: int = 1, **lora: Any) -> Any:
    """A PeftModel around a transformers model, what it adds random, and in eval mode."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **lora})
    with warnings.catch_warnings():
        # Of tied weights, and of maps that hold their weights the other way round.
        warnings.simplefilter("ignore")
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
            model.set_adapter(name)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # What DoRA holds are lengths, which are to stay positive.
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_adapter(folder: Path, model: Any, **options: Any) -> Path:
    """Write a PeftModel's adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def make_pair(folder: Path, model: str, **lora: Any) -> Pair:
    """Write a base and an adapter of it."""
    base = save_base(folder / "base", model)
    return Pair(base, save_adapter(folder / "adapter", adapt(load_reference(base, torch.float32), **lora)))


def load_adapted(pair: Pair, dtype: torch.dtype) -> Any:
    """The PeftModel that PEFT loads."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load_reference(pair.base, dtype), pair.adapter).eval()
