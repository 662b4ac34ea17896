"""Small networks with quantised projections, whose sizes the libraries' kernels take."""

from hooklens import HookedCausalLM, MoEConfig
from hooklens.causal_lm.loading import build_from_tensors
from hooklens.causal_lm.quantising import quantise_tensors, stored_tensors
from hooklens.config import AlibiPositions, LearnedPositions, RotaryPositions
from tests.model.networks import RMS_NORM, make_config, make_model

KINDS = ("int8", "int4")
_SIZES = {"d_model": 64, "n_heads": 4, "d_head": 16, "d_mlp": 128}
NETWORKS = {
    "rotary": make_config(**_SIZES, wiring="parallel", positions=RotaryPositions(dim=8)),
    "grouped": make_config(
        **_SIZES, norm=RMS_NORM, gated_mlp=True, act_fn="silu", n_kv_heads=2, positions=RotaryPositions(dim=16),
        qk_norm=RMS_NORM, qkv_bias=False, out_bias=False, mlp_bias=False,
    ),
    "alibi": make_config(**_SIZES, positions=AlibiPositions(), unembed_bias=True),
    "mixture": make_config(
        **_SIZES, norm=RMS_NORM, act_fn="silu", positions=RotaryPositions(dim=16), qkv_bias=False, out_bias=False,
        mlp=MoEConfig(
            n_experts=5, experts_per_token=2, d_expert=64, d_shared=64, shared_gate=True, router_bias=True,
            expert_bias=True,
        ),
    ),
    "learned, tied": make_config(**_SIZES, positions=LearnedPositions(), tied_unembed=True),
}  # fmt: skip


def plain(network, *, dtype):
    """The network with weights small enough that logits stay near 1, as those of trained models do."""
    model = make_model(NETWORKS[network], dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("proj.weight", "maps.weight")):
            parameter.data.mul_(0.3)
    return model


def quantise(model, kind):
    """A model with the same weights, those of its projections quantised, each on its own."""
    made = quantise_tensors(model.named_weights().items(), model.cfg, kind, device="cpu", dtype=model.dtype)
    quantised: HookedCausalLM = build_from_tensors(
        HookedCausalLM, model.cfg, made, tokenizer=None, device="cpu", dtype=model.dtype
    )
    return quantised


def bytes_held(linear):
    """Bytes of a quantised linear map: of what torchao's tensor is made of, or of bitsandbytes' numbers and scales."""
    weight = linear.weight
    state = getattr(weight, "quant_state", None)
    tensors = list(stored_tensors(weight)) if state is None else [weight.data, state.absmax]
    return sum(one.numel() * one.element_size() for one in tensors)
