"""Hunyuan, dense (Tencent 2025).

Checkpoints: tencent/Hunyuan-0.5B-Pretrain, 1.8B, 4B, 7B and their Instruct versions, Hunyuan-MT-7B, HY-MT1.5-1.8B.

Peculiarities:
- Queries and keys are normed head by head after the rotation (`query_layernorm`, `key_layernorm`), so that attention
  depends on positions themselves, not only on their differences.
- `rope_scaling` of `type` `dynamic` with an `alpha` is a larger base, whatever the sequence's length; without `alpha`
  it is what it says.
- Many keys are leftovers of multimodal and mixture-of-experts relatives.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import QK_NORM, SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import attention_rules, llama_rules, qk_norm_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        QK_NORM,
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(alpha=True),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False, "qk_norm_after_rotary": True},
    pinned={
        "enable_attention_fp32_softmax": False,
        "mlp_bias": False,
        "num_experts": 1,
        "position_embedding_xdrope": False,
        "use_cla": False,
        "use_mla": False,
        "use_qk_norm": True,
        "use_rotary_pos_emb": True,
    },
    inert=(
        "add_classification_head",
        "anyres_pooling_size",
        "anyres_vit_max_image_size",
        "anyres_vit_two_views",
        "attention_head_dim",
        "cla_share_factor",
        "class_num",
        "dense_list",
        "enable_lm_head_fp32",
        "eod_token_id",
        "group_limited_greedy",
        "im_end_id",
        "im_newline_id",
        "im_start_id",
        "image_token_id",
        "kv_lora_rank",
        "mask_init_id",
        "max_seq_length",
        "moe_drop_tokens",
        "moe_intermediate_size",
        "moe_layer_num_skipped",
        "moe_random_routing_dropped_token",
        "moe_topk",
        "n_group",
        "norm_topk_prob",
        "norm_type",
        "num_media_embeds",
        "num_shared_expert",
        "org_vocab_size",
        "pad_id",
        "pool_type",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "routed_scaling_factor",
        "skip_cls_token",
        "text_end_id",
        "text_start_id",
        "topk_group",
        "use_mixed_mlp_moe",
        "v_head_dim",
        "video_end_id",
        "video_start_id",
        "vit_add_patchemb_bias",
        "vit_input_resolution",
        "vit_mapping_type",
        "vit_norm_type",
        "vit_patch",
        "vit_path",
        "vit_remove_prenorm",
        "vit_token",
        "vit_type",
        "vit_used_rms_norm",
        "xdrope_section",
    ),
)

_ATTENTION = "model.layers.{i}.self_attn"

FAMILY = Family(
    name="hunyuan_v1_dense",
    model_types=("hunyuan_v1_dense",),
    architectures=("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        attention=(
            *attention_rules(_ATTENTION),
            *qk_norm_rules(_ATTENTION, q="query_layernorm", k="key_layernorm"),
        )
    ),
)
