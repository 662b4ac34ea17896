"""Small networks with quantised projections, whose sizes the libraries' kernels take."""

import torch

from hooklens import HookedCausalLM, MoEConfig
from hooklens.adapters.kept import keep_scaled
from hooklens.causal_lm.loading import build_from_tensors
from hooklens.causal_lm.quantising import build_kept, is_projection, quantise_tensors, stored_tensors
from hooklens.config import AlibiPositions, LearnedPositions, RotaryPositions
from hooklens.model.parts.scaled import ScaledLinear
from hooklens.weights.layout import stored_view
from tests.model.networks import RMS_NORM, make_config, make_model

KINDS = ("int8", "int4", "scaled")
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
    weights = model.named_weights().items()
    if kind == "scaled":
        made = build_kept(
            ((name, _round(model.cfg, name, one)) for name, one in weights), device="cpu", dtype=model.dtype
        )
    else:
        made = quantise_tensors(weights, model.cfg, kind, device="cpu", dtype=model.dtype)
    quantised: HookedCausalLM = build_from_tensors(
        HookedCausalLM, model.cfg, made, tokenizer=None, device="cpu", dtype=model.dtype
    )
    return quantised


def _round(cfg, name, weight):
    """A weight as a checkpoint may hold it: 4-bit numbers, scales and zero points for each 16 inputs."""
    declared = cfg.description.weights[name]
    if not is_projection(declared):
        return weight
    stored = stored_view(weight, declared.stored, declared.axes)
    return round_to_groups(stored) if stored.ndim == 2 else tuple(map(round_to_groups, stored))


def round_to_groups(weight, size=16):
    d_out, d_in = weight.shape
    groups = weight.detach().float().reshape(d_out, -1, size)
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    numbers = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).view(d_out, d_in)
    first, second = numbers.to(torch.uint8).view(d_out, -1, 2).unbind(2)
    return keep_scaled("uint4", first | second << 4, scales, d_in, zeros=zeros.to(torch.uint8))


def bytes_held(linear):
    """Bytes of a quantised linear map: of what torchao's tensor is made of, or of numbers and scales beside them."""
    weight = linear.weight
    if isinstance(linear, ScaledLinear):
        return sum(one.numel() * one.element_size() for one in (weight, *linear.buffers()))
    state = getattr(weight, "quant_state", None)
    tensors = list(stored_tensors(weight)) if state is None else [weight.data, state.absmax]
    return sum(one.numel() * one.element_size() for one in tensors)
