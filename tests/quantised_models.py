"""Small networks with quantised projections, whose sizes the libraries' kernels take."""

from hooklens import HookedCausalLM
from hooklens.causal_lm.loading import build_from_tensors
from hooklens.causal_lm.quantising import quantise_tensors
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
    "learned, tied": make_config(**_SIZES, positions=LearnedPositions(), tied_unembed=True),
}  # fmt: skip


def plain(network, *, dtype):
    """The network with weights small enough that logits stay near 1, as those of trained models do."""
    model = make_model(NETWORKS[network], dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data.mul_(0.3)
    return model


def quantise(model, kind):
    """A model with the same weights, those of its projections quantised, each on its own."""
    made = quantise_tensors(model.named_weights().items(), model.cfg, kind, device="cpu", dtype=model.dtype)
    quantised: HookedCausalLM = build_from_tensors(
        HookedCausalLM, model.cfg, made, tokenizer=None, device="cpu", dtype=model.dtype
    )
    return quantised
