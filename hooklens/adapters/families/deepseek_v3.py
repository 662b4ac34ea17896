"""DeepSeek-V3 (Liu et al. 2024, "DeepSeek-V3 Technical Report") and DeepSeek-R1 (Guo et al. 2025).

Checkpoints: deepseek-ai/DeepSeek-V3, DeepSeek-V3-0324, DeepSeek-V3.1, DeepSeek-R1, moonshotai/Moonlight-16B-A3B (Liu
et al. 2025, "Muon is Scalable for LLM Training"), moonshotai/Kimi-K2-Base (Kimi Team 2025, `model_type` `kimi_k2`, the
same network), and every other one whose `model_type` is `deepseek_v3`.

Peculiarities:
- Latent attention as in DeepSeek-V2, with the same layout of rows. Pairs stand side by side, unless `rope_interleave`
  is false.
- Experts are scored by the sigmoid of their logit; `e_score_correction_bias` counts for the choice only. A group is as
  good as the sum of its two best, and the chosen are those of a token's best groups. Gates are divided by their sum
  (`norm_topk_prob`, true where the config is silent), then multiplied by `routed_scaling_factor`.
- Where the config is silent, three layers are dense, and experts stand in 8 groups of which a token takes 4.
- Files hold layers past `num_hidden_layers`, which predict further tokens; they are left out, with a warning.
- Weights of the published files are float8 in blocks of 128 times 128 with `weight_scale_inv`; they are dequantised.
- `topk_method` and `scoring_func` are words of the original code for what this family does anyway.
- `head_dim` says nothing, since transformers derives it, nor does a `num_key_value_heads` above the number of heads,
  which is what transformers writes where nobody gave it.
- transformers 5 holds experts stacked in memory.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    SIZE_KEYS,
    ActivationKey,
    ConfigMap,
    Key,
    LatentKeys,
    LatentPositionKeys,
    PositionKeys,
    gate_scale_key,
    late_mixture_keys,
    norm_key,
    norm_topk_key,
)
from hooklens.adapters.rules import Copy
from hooklens.adapters.tables import (
    BLOCK,
    expert_rules,
    gated_mlp_rules,
    latent_attention_rules,
    llama_rules,
    router_rules,
    shared_expert_rules,
    stacked_expert_rules,
)


def _encode_groups(n: int | None) -> int:
    # No groups are one group of all.
    return 1 if n is None else n


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        LatentKeys(),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        LatentPositionKeys(rotary=PositionKeys(default_n_ctx=4096), interleave="rope_interleave"),
        late_mixture_keys(
            gate_scale_key(default=2.5),
            norm_topk_key(default=True),
            Key("n_group", "n_groups", int, default=8, encode=_encode_groups),
            Key("topk_group", "groups_per_token", int, default=4, encode=_encode_groups),
            n_dense=3,
            experts="num_local_experts",
            router="sigmoid",
            choice_bias=True,
            group_top=2,
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False},
    pinned={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    inert=(
        *INERT_ROUTER_KEYS,
        "aux_loss_alpha",
        "ep_size",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "seq_aux",
    ),
)

_LAYER = "model.layers.{i}"
_MLP = f"{_LAYER}.mlp"

FAMILY = Family(
    name="deepseek_v3",
    model_types=("deepseek_v3", "kimi_k2"),
    architectures=("DeepseekV3ForCausalLM", "DeepseekV3Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        attention=latent_attention_rules(f"{_LAYER}.self_attn"),
        mlp=(
            *gated_mlp_rules(_MLP),
            *router_rules(f"{_MLP}.gate"),
            Copy(f"{_MLP}.gate.e_score_correction_bias", f"{BLOCK}.mlp.b_choice"),
            *expert_rules(f"{_MLP}.experts.{{e}}"),
            *shared_expert_rules(f"{_MLP}.shared_experts"),
        ),
    ),
    in_memory=stacked_expert_rules(f"{_MLP}.experts"),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    further_layers=r"model\.layers\.(\d+)\..*",
)
