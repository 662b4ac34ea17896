"""Qwen1.5 and Qwen2 with a mixture of experts (Yang et al. 2024, "Qwen2 Technical Report").

Checkpoints: Qwen/Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B, their chat versions, and every other one whose `model_type` is
`qwen2_moe`.

Peculiarities:
- Biases on queries, keys and values (`qkv_bias`, true where the config is silent), never on the output.
- Beside the routed experts stands one that sees every token, `shared_expert`, times the sigmoid of its own gate.
- The gates of the chosen experts are the softmax over all experts as it is, unless `norm_topk_prob` says otherwise.
- Layers in `mlp_only_layers`, and those that `decoder_sparse_step` skips, have an MLP as wide as `intermediate_size`;
  experts are as wide as `moe_intermediate_size`, the shared one as `shared_expert_intermediate_size`.
- With `use_sliding_window`, every second layer slides: the even ones, as long as they are below `max_window_layers`
  (in Qwen2 it is all those from there on). `layer_types` wins over that. No window is written as 0.
- transformers 5 holds experts stacked in memory.
"""

from collections.abc import Sequence

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    SIZE_KEYS,
    ActivationKey,
    ConfigMap,
    ConfigReader,
    Key,
    PositionKeys,
    WindowKeys,
    norm_key,
    stepped_mixture_keys,
)
from hooklens.adapters.tables import (
    expert_rules,
    gated_mlp_rules,
    llama_rules,
    router_rules,
    shared_expert_rules,
    stacked_expert_rules,
)


def _slides(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
    n_windowed = reader.get("max_window_layers", int, 28)
    return [layer % 2 == 0 and layer < n_windowed for layer in range(n_layers)]


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        Key("qkv_bias", "qkv_bias", bool, default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=32768),
        WindowKeys(default=4096, switch="use_sliding_window", slides=_slides, slides_keys=("max_window_layers",)),
        stepped_mixture_keys(Key("shared_expert_intermediate_size", "d_shared", int), shared_gate=True),
    ),
    fixed={"gated_mlp": True, "out_bias": False, "mlp_bias": False},
    inert=INERT_ROUTER_KEYS,
)

_MLP = "model.layers.{i}.mlp"

FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        mlp=(
            *gated_mlp_rules(_MLP),
            *router_rules(f"{_MLP}.gate"),
            *expert_rules(f"{_MLP}.experts.{{e}}"),
            *shared_expert_rules(f"{_MLP}.shared_expert", gate=f"{_MLP}.shared_expert_gate"),
        )
    ),
    in_memory=stacked_expert_rules(f"{_MLP}.experts"),
)
