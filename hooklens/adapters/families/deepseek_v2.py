"""DeepSeek-V2 (Liu et al. 2024, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model").

Checkpoints: deepseek-ai/DeepSeek-V2-Lite, DeepSeek-V2, DeepSeek-V2.5, DeepSeek-Coder-V2-Lite-Base, their chat and
instruct versions, and every other one whose `model_type` is `deepseek_v2`.

Peculiarities:
- Latent attention (`MLAConfig`). `kv_a_proj_with_mqa` holds the rows of `W_DKV`, then those of `W_KR`; `kv_b_proj`
  for each head those of `W_UK`, then those of `W_UV`. In a head the entries that turn are the last ones there, the
  first ones here. Pairs stand side by side. Lite has no latent of queries (`q_lora_rank` null).
- The norms of the latents have an epsilon of 1e-6, whatever `rms_norm_eps` says.
- With YaRN's `mscale_all_dim` the factor on scores grows, too.
- The first `first_k_dense_replace` layers have an MLP as wide as `intermediate_size`. Shared experts are one MLP as
  wide as all of them, without a gate.
- `topk_method` `group_limited_greedy` chooses among the experts of a token's best groups, `greedy` among all, whatever
  `n_group` says. Gates are the softmax over all experts, times `routed_scaling_factor`; transformers never divides them
  by their sum, so `norm_topk_prob` has to be false.
- `head_dim` says nothing, since transformers derives it, nor does a `num_key_value_heads` above the number of heads,
  which is what transformers writes where nobody gave it.
- transformers 5 holds experts stacked in memory.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    SIZE_KEYS,
    ActivationKey,
    Computed,
    ConfigMap,
    ConfigReader,
    Key,
    LatentKeys,
    LatentPositionKeys,
    PositionKeys,
    gate_scale_key,
    late_mixture_keys,
    norm_key,
)
from hooklens.adapters.tables import (
    expert_rules,
    gated_mlp_rules,
    latent_attention_rules,
    llama_rules,
    router_rules,
    shared_expert_rules,
    stacked_expert_rules,
)

_METHOD, _GREEDY, _IN_GROUPS = "topk_method", "greedy", "group_limited_greedy"


def _read_choice(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    method = reader.get(_METHOD, str, _GREEDY)
    if method == _IN_GROUPS:
        return {"n_groups": reader.get("n_group", int), "groups_per_token": reader.get("topk_group", int)}
    if method != _GREEDY:
        reader.reject(_METHOD, f"{_GREEDY!r} or {_IN_GROUPS!r}")
    return {}


def _write_choice(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields["n_groups"] is None:
        return {_METHOD: _GREEDY}
    return {_METHOD: _IN_GROUPS, "n_group": fields["n_groups"], "topk_group": fields["groups_per_token"]}


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        LatentKeys(),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        LatentPositionKeys(rotary=PositionKeys()),
        late_mixture_keys(
            gate_scale_key(default=1.0),
            Computed((_METHOD, "n_group", "topk_group"), _read_choice, _write_choice),
            n_dense=0,
            experts="num_experts",
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False},
    pinned={"mlp_bias": False, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax"},
    inert=(*INERT_ROUTER_KEYS, "aux_loss_alpha", "ep_size", "seq_aux"),
)

_LAYER = "model.layers.{i}"
_MLP = f"{_LAYER}.mlp"

FAMILY = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    architectures=("DeepseekV2ForCausalLM", "DeepseekV2Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        attention=latent_attention_rules(f"{_LAYER}.self_attn"),
        mlp=(
            *gated_mlp_rules(_MLP),
            *router_rules(f"{_MLP}.gate"),
            *expert_rules(f"{_MLP}.experts.{{e}}"),
            *shared_expert_rules(f"{_MLP}.shared_experts"),
        ),
    ),
    in_memory=stacked_expert_rules(f"{_MLP}.experts"),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
