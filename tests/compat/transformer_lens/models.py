"""Small networks in TransformerLens's words, with all parameters random."""

from typing import Any

import torch

from hooklens.compat.transformer_lens import HookedTransformer, HookedTransformerConfig

BASE: dict[str, Any] = {
    "n_layers": 2, "d_model": 16, "n_ctx": 16, "d_head": 4, "n_heads": 4, "d_vocab": 30, "act_fn": "gelu_new",
    "dtype": torch.float64, "device": "cpu",
}  # fmt: skip
LLAMA = {
    "normalization_type": "RMS", "positional_embedding_type": "rotary", "gated_mlp": True, "act_fn": "silu",
    "final_rms": True, "n_key_value_heads": 2,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA,
    "neox": {"positional_embedding_type": "rotary", "rotary_dim": 2, "parallel_attn_mlp": True},
    "attn_only": {"attn_only": True, "d_mlp": None},
    "solu": {"act_fn": "solu_ln"},
    "bracket": {"attention_dir": "bidirectional", "d_vocab_out": 2},
}


def build(name: str = "gpt2", **more: Any) -> HookedTransformer:
    """A network of `NETWORKS`."""
    model = HookedTransformer(HookedTransformerConfig(**{**BASE, **NETWORKS[name], **more}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise + (1 if own.endswith(".w") else 0))
    return model


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Ids of the networks' vocabulary."""
    return torch.randint(1, 30, (rows, length), generator=torch.Generator().manual_seed(2))
