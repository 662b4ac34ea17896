"""Tiny random models with adapters of peft's, whose every parameter is random, and both saved in folders."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from hooklens import HookedCausalLM
from tests.checkpoints import D_VOCAB, VARIANTS, _randomise

TOKENS = torch.randint(D_VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=D_VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return _randomise(GPT2LMHeadModel._from_config(config, attn_implementation="sdpa"), 1)


def _phi3() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = Phi3Config(vocab_size=D_VOCAB, max_position_embeddings=64, **sizes, **heads, **ids)
    return _randomise(Phi3ForCausalLM._from_config(config, attn_implementation="sdpa"), 2)


def _deepseek() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 12, "q_lora_rank": 16}
    widths = {"qk_rope_head_dim": 8, "v_head_dim": 6, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = DeepseekV3Config(
        vocab_size=D_VOCAB, max_position_embeddings=64, **sizes, **heads, **widths, **experts, **ids
    )
    return _randomise(DeepseekV3ForCausalLM._from_config(config, attn_implementation="sdpa"), 3)


class Case(NamedTuple):
    """A base, and the maps that an adapter changes, by their names in transformers."""

    build: Any
    targets: tuple[str, ...]
    unembedding: str
    embedding: str


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
CASES = {
    "neox": Case(VARIANTS["neox-parallel"], _FUSED, "embed_out", "embed_in"),
    "llama": Case(VARIANTS["llama-biases"], _LLAMA, "lm_head", "embed_tokens"),
    "falcon": Case(VARIANTS["falcon-11b"], _FUSED, "lm_head", "word_embeddings"),
    "gpt2": Case(_gpt2, ("c_attn", "c_proj", "c_fc"), "lm_head", "wte"),
    "tied": Case(VARIANTS["llama-tied"], _LLAMA, "lm_head", "embed_tokens"),
    "latent": Case(
        _deepseek, ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), "lm_head", "embed_tokens"
    ),
    "phi3": Case(_phi3, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), "lm_head", "embed_tokens"),
}


class Adapted(NamedTuple):
    """A model of peft's, not merged, and the folders of its base and its adapter."""

    theirs: peft.PeftModel
    base: Path
    adapter: Path


def make_adapted(
    case: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    unembedding: bool = False,
    embedding: bool = False,
    base_seed: int | None = None,
    **settings: Any,
) -> Adapted:
    """A base and an adapter, saved by transformers and peft.

    Args:
        case: which of `CASES`.
        folder: where to save.
        dtype: of the base; adapters are float32 beside half precision, as peft has them.
        seed: of the adapter.
        unembedding, embedding: change these, too.
        base_seed: draw the base anew.
        **settings: of `peft.LoraConfig`.
    """
    kind = CASES[case]
    base = kind.build()
    if base_seed is not None:
        _randomise(base, base_seed)
    base = base.to(dtype).eval()
    base.save_pretrained(folder / "base")
    targets = [*kind.targets, *[kind.unembedding] * unembedding, *[kind.embedding] * embedding]
    settings = {
        "r": 3, "lora_alpha": 5, "target_modules": targets, "fan_in_fan_out": case == "gpt2", **settings
    }  # fmt: skip
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    randomise_adapter(theirs, seed)
    theirs.save_pretrained(folder / "adapter")
    return Adapted(theirs.eval(), folder / "base", folder / "adapter")


def randomise_adapter(model: peft.PeftModel, seed: int) -> None:
    """Draw all that an adapter has anew: peft begins with `B` of 0, with which nothing would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                # Lengths of rows stay lengths.
                scaled = parameter * (1 + 0.2 * noise) if parameter.ndim == 1 and (parameter > 0).all() else 0.3 * noise
                parameter.copy_(scaled)


def load(adapted: Adapted, name: str = "one", **options: Any) -> HookedCausalLM:
    """The same model of ours, with the adapter acting."""
    model = HookedCausalLM.from_pretrained(adapted.base, **options)
    model.add_adapter(name, adapted.adapter)
    model.set_adapter(name)
    return model


def gradients(adapted: Adapted, tokens: torch.Tensor = TOKENS) -> dict[str, torch.Tensor]:
    """peft's gradients of the next token's loss, under the names that it saves parameters with."""
    theirs = copy.deepcopy(adapted.theirs)
    # Not their own loss, which is computed in float32.
    logits = theirs(tokens).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    named = dict(theirs.named_parameters())
    found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    return {_name_on_disk(name): gradient for name, gradient in found.items()}


def _name_on_disk(name: str) -> str:
    for word in (".default", ".modules_to_save"):
        name = name.replace(word, "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
