"""Options that no bundled family has, against tiny random transformers models whose weights are copied by hand."""

import torch
import transformers
from torch import Tensor, nn

from hooklens import HookedCausalLM
from hooklens.config import AlibiPositions, HookedConfig, LearnedPositions, NormConfig, RotaryPositions
from hooklens.model.mlp import MLP
from tests.annotations import unchecked
from tests.model.networks import make_config

TOKENS = torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {"d_model": 12, "n_layers": 2, "n_heads": 4, "d_head": 3, "d_mlp": 20, "d_vocab": 23, "n_ctx": 16}
HUB_SIZES = {"vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_BIASES = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}


@torch.no_grad()
def randomise(module: nn.Module) -> nn.Module:
    """Float64 weights that are all random, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    module = module.double().eval()
    for parameter in module.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def build(cls: str, config: transformers.PretrainedConfig, *, attention: str = "eager") -> nn.Module:
    config._attn_implementation = attention
    return randomise(getattr(transformers, cls)(config))


def compare(theirs: nn.Module, cfg: HookedConfig, state: dict[str, Tensor], *, tolerance: float) -> None:
    ours = HookedCausalLM.from_state_dict(state, cfg)
    with unchecked(), torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=tolerance, atol=tolerance)


def llama_names(theirs: nn.Module, *, norms: tuple[str, ...]) -> dict[str, Tensor]:
    """The state of a model with Llama's names, ours to theirs."""
    state = {"embed.table.weight": theirs.model.embed_tokens.weight, "ln_final.w": theirs.model.norm.weight}
    for i, layer in enumerate(theirs.model.layers):
        block = f"blocks.{i}"
        for ln, name in zip(("ln1", "ln2"), norms, strict=False):
            state[f"{block}.{ln}.w"] = getattr(layer, name).weight
        for letter in "qkvo":
            state[f"{block}.attn.{letter}_proj.weight"] = getattr(layer.self_attn, f"{letter}_proj").weight
        for ours, name in (("in", "up"), ("gate", "gate"), ("out", "down")):
            state[f"{block}.mlp.{ours}_proj.weight"] = getattr(layer.mlp, f"{name}_proj").weight
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def test_scales_of_branches_logits_and_embedding():
    """Granite. Its norms are float32 in every dtype."""
    config = transformers.GraniteConfig(
        **{**HUB_SIZES, "hidden_size": 16}, num_key_value_heads=2, intermediate_size=20, max_position_embeddings=16,
        rms_norm_eps=1e-6, embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.3,
        logits_scaling=2.5,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    theirs = build("GraniteForCausalLM", config)
    state = llama_names(theirs, norms=("input_layernorm", "post_attention_layernorm"))
    state["unembed.proj.weight"] = theirs.lm_head.weight.detach().clone()
    cfg = HookedConfig(
        **{**SIZES, "d_model": 16, "d_head": 4}, **NO_BIASES, n_kv_heads=2, act_fn="silu", gated_mlp=True,
        positions=RotaryPositions(dim=4), norm=NormConfig(kind="rms", eps=1e-6, bias=False), embed_scale=3.0,
        residual_scale=0.6, attn_scale=0.3, logits_scale=1 / 2.5,
    )  # fmt: skip
    compare(theirs, cfg, state, tolerance=2e-5)


def test_scale_of_the_logits():
    """Cohere, with Llama's names, parallel branches and one norm for both, which is float32 in every dtype."""
    sizes = {**HUB_SIZES, "hidden_size": 16}
    config = transformers.CohereConfig(
        **sizes, num_key_value_heads=2, intermediate_size=20, max_position_embeddings=16, layer_norm_eps=1e-5,
        logit_scale=0.7, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    theirs = build("CohereForCausalLM", config)
    state = llama_names(theirs, norms=("input_layernorm",))
    cfg = HookedConfig(
        **{**SIZES, "d_model": 16, "d_head": 4}, **NO_BIASES, n_kv_heads=2, act_fn="silu", gated_mlp=True,
        wiring="parallel", shared_norm=True, norm=NormConfig(kind="layer", eps=1e-5, bias=False), tied_unembed=True,
        positions=RotaryPositions(dim=4, layout="interleaved", base=float(config.rope_parameters["rope_theta"])),
        logits_scale=0.7,
    )  # fmt: skip
    compare(theirs, cfg, state, tolerance=2e-5)


def test_projections_of_a_narrow_embedding():
    """OPT with `word_embed_proj_dim`, whose logits are read through the tied embedding."""
    config = transformers.OPTConfig(
        **HUB_SIZES, ffn_dim=20, word_embed_proj_dim=6, max_position_embeddings=16, activation_function="relu",
        do_layer_norm_before=True, tie_word_embeddings=True,
    )  # fmt: skip
    # Whose eager softmax is float32 in every dtype.
    theirs = build("OPTForCausalLM", config, attention="sdpa")
    decoder = theirs.model.decoder
    state = {
        "embed.table.weight": decoder.embed_tokens.weight,
        "embed.proj_in.weight": decoder.project_in.weight,
        "pos_embed.table.weight": decoder.embed_positions.weight,
        "ln_final.w": decoder.final_layer_norm.weight,
        "ln_final.b": decoder.final_layer_norm.bias,
        "unembed.proj_out.weight": decoder.project_out.weight,
    }
    for i, layer in enumerate(decoder.layers):
        parts = {f"attn.{letter}_proj": getattr(layer.self_attn, f"{letter}_proj") for letter in "qkv"}
        parts |= {"attn.o_proj": layer.self_attn.out_proj, "mlp.in_proj": layer.fc1, "mlp.out_proj": layer.fc2}
        for name, module in parts.items():
            state |= {f"blocks.{i}.{name}.weight": module.weight, f"blocks.{i}.{name}.bias": module.bias}
        for ln, norm in (("ln1", layer.self_attn_layer_norm), ("ln2", layer.final_layer_norm)):
            state |= {f"blocks.{i}.{ln}.w": norm.weight, f"blocks.{i}.{ln}.b": norm.bias}
    cfg = HookedConfig(
        **SIZES, act_fn="relu", positions=LearnedPositions(offset=2), d_embed=6, tied_unembed=True,
        norm=NormConfig(kind="layer", eps=1e-5),
    )  # fmt: skip
    # Both sum in float64, in another order.
    compare(theirs, cfg, {name: tensor.detach().clone() for name, tensor in state.items()}, tolerance=1e-10)


def test_norm_of_the_embedding():
    """Bloom, whose linear biases and softmax are float32 in every dtype."""
    config = transformers.BloomConfig(
        vocab_size=23, hidden_size=16, n_layer=2, n_head=4, layer_norm_epsilon=1e-5, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = build("BloomForCausalLM", config)
    body = theirs.transformer
    state = {"embed.table.weight": body.word_embeddings.weight}
    norms = {"embed.ln": body.word_embeddings_layernorm, "ln_final": body.ln_f}
    for i, layer in enumerate(body.h):
        fused = layer.self_attention.query_key_value
        weight, bias = fused.weight.view(4, 3, 4, 16), fused.bias.view(4, 3, 4)
        for place, letter in enumerate("qkv"):
            state[f"blocks.{i}.attn.{letter}_proj.weight"] = weight[:, place].reshape(16, 16)
            state[f"blocks.{i}.attn.{letter}_proj.bias"] = bias[:, place].flatten()
        parts = {
            "attn.o_proj": layer.self_attention.dense,
            "mlp.in_proj": layer.mlp.dense_h_to_4h,
            "mlp.out_proj": layer.mlp.dense_4h_to_h,
        }
        for name, module in parts.items():
            state |= {f"blocks.{i}.{name}.weight": module.weight, f"blocks.{i}.{name}.bias": module.bias}
        norms |= {f"blocks.{i}.ln1": layer.input_layernorm, f"blocks.{i}.ln2": layer.post_attention_layernorm}
    for name, norm in norms.items():
        state |= {f"{name}.w": norm.weight, f"{name}.b": norm.bias}
    layer_norm = NormConfig(kind="layer", eps=1e-5)
    cfg = HookedConfig(
        **{**SIZES, "d_model": 16, "d_head": 4, "d_mlp": 64}, act_fn="gelu_tanh", positions=AlibiPositions(),
        tied_unembed=True, norm=layer_norm, embed_norm=layer_norm,
    )  # fmt: skip
    compare(theirs, cfg, {name: tensor.detach().clone() for name, tensor in state.items()}, tolerance=2e-5)


def test_clamped_swiglu():
    """The only expert of a gpt-oss layer is a dense MLP; a small limit, so that it acts."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = transformers.GptOssConfig(hidden_size=12, intermediate_size=20, num_local_experts=1)
    theirs = randomise(GptOssExperts(config))
    theirs.limit = 0.5
    ours = MLP(make_config(act_fn="clamped_swiglu", gated_mlp=True, swiglu_limit=0.5).block(0)).double()
    halves = theirs.gate_up_proj[0].T, theirs.gate_up_proj_bias[0]
    state = {"out_proj.weight": theirs.down_proj[0].T, "out_proj.bias": theirs.down_proj_bias[0]}
    for start, name in enumerate(("gate_proj", "in_proj")):
        state |= {f"{name}.weight": halves[0][start::2], f"{name}.bias": halves[1][start::2]}
    ours.load_state_dict(state)
    x = 2 * torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        gates = {"router_indices": torch.zeros(9, 1, dtype=torch.long), "routing_weights": torch.ones(9, 1).double()}
        expected = theirs(x[0], **gates)
        torch.testing.assert_close(ours(x)[0], expected, rtol=1e-10, atol=1e-10)


def test_the_option_fields_of_a_network_are_in_its_config_text():
    cfg = make_config(
        d_embed=5, embed_norm=NormConfig(kind="layer", eps=1e-5), residual_scale=0.5, act_fn="solu_ln", q_bias=False
    )
    assert HookedConfig.from_json(cfg.to_json()) == cfg
