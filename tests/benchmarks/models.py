"""Random models of the sizes that the benchmarks speak of, in transformers and in HookLens."""

from typing import Any

import torch
import transformers

from hooklens import HookedCausalLM

FAMILIES = ("gpt_neox", "llama", "falcon")


def build_pair(
    family: str,
    *,
    n_layers: int,
    d_model: int,
    n_heads: int,
    d_vocab: int = 1000,
    n_ctx: int = 2048,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, HookedCausalLM]:
    """A transformers model (`sdpa`) and the same weights in HookLens."""
    shared: dict[str, Any] = {
        "vocab_size": d_vocab,
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "max_position_embeddings": n_ctx,
        "tie_word_embeddings": False,
        "attn_implementation": "sdpa",
    }
    if family == "gpt_neox":
        config = transformers.GPTNeoXConfig(**shared, intermediate_size=4 * d_model)
        model: Any = transformers.GPTNeoXForCausalLM(config)
    elif family == "llama":
        config = transformers.LlamaConfig(
            **shared, intermediate_size=8 * d_model // 3, num_key_value_heads=max(1, n_heads // 2)
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.FalconForCausalLM(transformers.FalconConfig(**shared))
    model = model.to(device=device, dtype=dtype).eval()
    return model, HookedCausalLM.from_hf(model)
