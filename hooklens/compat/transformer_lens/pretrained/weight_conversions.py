"""`transformer_lens.pretrained.weight_conversions` of 2.x: weights of other libraries' models under 2.x's names.

HookLens's adapters read the models. Biases that a model lacks are zeros, as in 2.x.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor

from hooklens.adapters.formats.early_layouts import in_todays_layout
from hooklens.adapters.formats.nanogpt import open_tensors
from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens.HookedTransformer import HookedTransformer
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.compat.transformer_lens.loading_from_pretrained import bake

State = dict[str, Tensor]
_BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
_COMPILED, _UNBIASED = "_orig_mod.", ("wte.weight", "wpe.weight", "lm_head.weight")


def _name_weights(hooked: HookedCausalLM, cfg: HookedTransformerConfig) -> State:
    """The weights of as many layers and positions as a config has."""
    words = HookedTransformerConfig.from_hooked_config(hooked.cfg, device="cpu", dtype=hooked.dtype)
    state = HookedTransformer(words, move_to_device=False, hooked=bake(hooked)).state_dict()
    later = tuple(f"blocks.{layer}." for layer in range(cfg.n_layers, words.n_layers))
    kept = {name: one for name, one in state.items() if not name.endswith(_BUFFERS) and not name.startswith(later)}
    if "pos_embed.W_pos" in kept:
        kept["pos_embed.W_pos"] = kept["pos_embed.W_pos"][: cfg.n_ctx]
    return kept


def _convert_model(hf_model: Any, cfg: HookedTransformerConfig) -> State:
    """The weights of a model of transformers, unprocessed."""
    return _name_weights(HookedCausalLM.from_hf(hf_model, share=False), cfg)


def convert_nanogpt_weights(old_state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig) -> State:
    """The weights of a state dict of nanoGPT."""
    state = {name.removeprefix(_COMPILED): one for name, one in old_state_dict.items()}
    of_biases = {name: one for name, one in state.items() if name.endswith("weight") and not name.endswith(_UNBIASED)}
    state = {name.replace("weight", "bias"): one.new_zeros(len(one)) for name, one in of_biases.items()} | state
    sizes = {
        "n_layer": cfg.n_layers, "n_head": cfg.n_heads, "n_embd": cfg.d_model,
        "vocab_size": len(state["transformer.wte.weight"]), "block_size": len(state["transformer.wpe.weight"]),
        "bias": True,
    }  # fmt: skip
    found = open_tensors(sizes, state, where="convert_nanogpt_weights")
    return _name_weights(HookedCausalLM.from_state_dict(dict(found.tensors()), found.cfg), cfg)


def _convert_layout(state_dict: Mapping[str, Tensor], cfg: HookedTransformerConfig) -> State:
    """The weights of a state dict in a layout from before 2.x's; what it lacks is not added."""
    state = in_todays_layout(state_dict, n_heads=cfg.n_heads, n_layers=cfg.n_layers)
    return {name: one for name, one in state.items() if not name.endswith(_BUFFERS)}


def _refuse(name: str) -> Callable[..., NoReturn]:
    def convert(model: Any, cfg: Any) -> NoReturn:
        """Refuse: it is of an encoder."""
        raise NotImplementedError(f"convert_{name}_weights: HookLens has decoders only; {name} has an encoder")

    return convert


convert_apertus_weights = convert_bloom_weights = convert_coder_weights = convert_gemma_weights = _convert_model
convert_gpt2_weights = convert_gpt_oss_weights = convert_gptj_weights = convert_llama_weights = _convert_model
convert_mistral_weights = convert_mixtral_weights = convert_neo_weights = convert_neox_weights = _convert_model
convert_opt_weights = convert_phi_weights = convert_phi3_weights = convert_qwen_weights = _convert_model
convert_qwen2_weights = convert_qwen3_weights = _convert_model
convert_mingpt_weights = convert_neel_solu_old_weights = _convert_layout
convert_bert_weights, convert_hubert_weights, convert_t5_weights = map(_refuse, ("bert", "hubert", "t5"))

# There each is in a module of its own.
for _name in [name for name in globals() if name.startswith("convert_")]:
    _module = "openai" if "gpt_oss" in _name else _name.removeprefix("convert_").removesuffix("_weights")
    sys.modules[f"{__name__}.{_module}"] = sys.modules[__name__]
