"""CodeGen (Nijkamp et al. 2022, "CodeGen: An Open Large Language Model for Code with Multi-Turn Program Synthesis").

Checkpoints: Salesforce/codegen-350M, -2B, -6B and -16B (nl, multi, mono), and Moyix' GPT-J-shaped relatives of them.

Peculiarities:
- GPT-J's network: parallel, one norm, the first `rotary_dim` entries of each head rotated in pairs of neighbours, no
  biases in attention, and one on the unembedding.
- Queries, values and keys, in this order, lie in one tensor in four blocks, one for each core that they were trained
  on: a block holds a quarter of the heads, so the number of heads is a multiple of four.
- transformers computes scores in float32 whatever the dtype of the model.
- Old files hold the causal mask of every layer; it is no weight.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hooklens.adapters.families.gptj import FAMILY as GPTJ
from hooklens.adapters.family import Family
from hooklens.adapters.keys import Computed, ConfigReader
from hooklens.adapters.rules import Fused
from hooklens.adapters.tables import BLOCK, Rules, decoder_rules, mlp_rules, norm_rules, out_rules

_N_BLOCKS = 4


def _check_heads(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("n_heads", 0) % _N_BLOCKS:
        reader.reject("n_head", f"a multiple of {_N_BLOCKS}: so many blocks of heads lie in one tensor")
    return {}


def _write_nothing(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {}


_LAYER = "transformer.h.{i}"

_BLOCKS: Rules = (
    *norm_rules(f"{_LAYER}.ln_1", f"{BLOCK}.ln1"),
    Fused(
        f"{_LAYER}.attn.qkv_proj.weight",
        (f"{BLOCK}.attn.W_Q", f"{BLOCK}.attn.W_V", f"{BLOCK}.attn.W_K"),
        "(b s n h) m -> s (b n) m h",
        blocks=_N_BLOCKS,
    ),
    *out_rules(f"{_LAYER}.attn.out_proj"),
    *mlp_rules(f"{_LAYER}.mlp", up="fc_in", down="fc_out"),
)

FAMILY = Family(
    name="codegen",
    model_types=("codegen",),
    architectures=("CodeGenForCausalLM", "CodeGenModel"),
    base_prefix="transformer.",
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    config=replace(GPTJ.config, parts=(*GPTJ.config.parts, Computed((), _check_heads, _write_nothing))),
    weights=decoder_rules(_BLOCKS, embed="transformer.wte", final_norm="transformer.ln_f"),
    weightless=(r"transformer\.h\.\d+\.attn\.(causal_mask|masked_bias)",),
)
