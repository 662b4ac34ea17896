"""Sound networks outside the supported families, broken hook points to put into them, and shorthands."""

from typing import Any

import torch
from torch import Tensor

from hooklens import (
    AlibiPositions,
    HookedCausalLM,
    HookedConfig,
    HookPoint,
    LearnedPositions,
    MLAConfig,
    MoEConfig,
    NoPositions,
    NormConfig,
    PartConfig,
    QueryTemperature,
    RotaryPositions,
    RotaryScaling,
    ShortformerPositions,
    SinusoidalPositions,
)
from hooklens.hooks import Call
from hooklens.verification import CheckResult, VerificationReport, verify
from hooklens.verification.probe import make_probe
from hooklens.verification.stages import hook_point_stages
from hooklens.verification.watching import check_firing
from tests.annotations import unchecked

RMS = NormConfig(kind="rms", eps=1e-6, bias=False)


RMS_OFFSET = NormConfig(kind="rms", eps=1e-6, bias=False, unit_offset=True)


ROTARY = RotaryPositions(dim=6)


# Networks outside the families that have adapters: what a new adapter may ask for.
CONFIGS: dict[str, dict[str, Any]] = {
    "no-positions": {},
    "qk-rms-norm": {"positions": ROTARY, "qk_norm": RMS, "n_kv_heads": 2},
    "qk-layer-norm": {"positions": ROTARY, "qk_norm": NormConfig(kind="layer", eps=1e-5)},
    "norms-around": {"positions": ROTARY, "norm_after": True, "norm": RMS_OFFSET},
    "norms-around-parallel": {"positions": ROTARY, "norm_after": True, "wiring": "parallel"},
    "norms-after-only": {"positions": ROTARY, "norm_after": True, "norm_before": False},
    "no-norms": {"positions": ROTARY, "norm_before": False},
    "no-norms-parallel": {"positions": ROTARY, "norm_before": False, "wiring": "parallel"},
    "learned": {"positions": LearnedPositions()},
    "learned-offset-tied": {"positions": LearnedPositions(offset=2), "tied_unembed": True},
    "interleaved": {"positions": RotaryPositions(dim=4, layout="interleaved")},
    "attn-softcap": {"positions": ROTARY, "attn_softcap": 5.0, "n_kv_heads": 1},
    "alibi-softcap": {"positions": AlibiPositions(), "attn_softcap": 3.0},
    "logits-softcap": {"positions": ROTARY, "logits_softcap": 5.0},
    "windows": {"positions": ROTARY, "windows": (4, None)},
    "not-causal": {"positions": ROTARY, "causal": False, "windows": (4, None), "n_kv_heads": 2},
    "embed-scale": {"positions": ROTARY, "embed_scale": 4.9},
    "unembed-bias": {"positions": ROTARY, "unembed_bias": True},
    "relu2": {"positions": ROTARY, "act_fn": "relu2"},
    "scales": {
        "positions": ROTARY,
        "norm_after": True,
        "residual_scale": 0.6,
        "logits_scale": 1.4,
        "embed_scale": 2.5,
        "embed_norm": NormConfig(kind="layer", eps=1e-5),
        "unembed_bias": True,
        "d_vocab_out": 7,
    },
    "projected-tied": {
        "positions": LearnedPositions(),
        "d_embed": 16,
        "tied_unembed": True,
        "k_bias": False,
        "unembed_bias": True,
    },
    "norms-on-stream": {"positions": ROTARY, "norm_before": False, "norm_stream": True, "final_norm": None},
    "norms-in-branches-and-on-stream": {"norm_stream": True, "norm_after": True, "norm": RMS},
    "solu-ln": {"positions": ROTARY, "act_fn": "solu_ln"},
    "xielu": {"positions": ROTARY, "act_fn": "xielu", "mlp_in_bias": False},
    "clamped-swiglu": {"positions": ROTARY, "gated_mlp": True, "act_fn": "clamped_swiglu", "swiglu_limit": 0.5},
    "gated-sequential": {"positions": ROTARY, "gated_mlp": True, "act_fn": "silu"},
    "gated-parallel": {"positions": ROTARY, "gated_mlp": True, "act_fn": "gelu_quick", "wiring": "parallel"},
    "gated-shared-norm": {"positions": ROTARY, "gated_mlp": True, "wiring": "parallel", "shared_norm": True},
    "attention-only": {"positions": ROTARY, "attn_only": True},
    "mlps-alone-shared-norm": {"attn": None, "wiring": "parallel", "shared_norm": True},
    "norms-without-weight": {
        "positions": ROTARY,
        "norm": NormConfig(kind="layer", eps=1e-5, weight=False),
        "qk_norm": NormConfig(kind="rms", eps=1e-5, weight=False, bias=False),
    },
    "no-norm-at-all": {"positions": ROTARY, "norm": None},
    "parts-by-layer": {
        "n_layers": 4,
        "positions": (ROTARY, NoPositions(), ROTARY, ROTARY),
        "attn": (None, PartConfig(kind="attention"), None, PartConfig(kind="attention")),
        "mlp": (PartConfig(kind="mlp"), None, None, PartConfig(kind="mlp")),
        "norm": (RMS, RMS_OFFSET, None, NormConfig(kind="layer", eps=1e-5)),
        "norm_after": (True, False, False, True),
        "final_norm": None,
        "n_kv_heads": 2,
    },
    "alibi": {"positions": AlibiPositions()},
    "alibi-scaled": {"positions": AlibiPositions(scaled=True), "n_kv_heads": 2},
    "windows-of-19": {"windows": (19, 19)},
    "rotary-linear": {"positions": RotaryPositions(dim=6, scaling=RotaryScaling(kind="linear", factor=3.0))},
    "rotary-dynamic": {
        "positions": RotaryPositions(dim=6, scaling=RotaryScaling(kind="dynamic", factor=3.0, original_n_ctx=24))
    },
    "rotary-llama3": {
        "positions": RotaryPositions(
            dim=6,
            base=50.0,
            scaling=RotaryScaling(
                kind="llama3", factor=4.0, original_n_ctx=32, low_freq_factor=1.0, high_freq_factor=4.0
            ),
        )
    },
    "rotary-yarn": {
        "positions": RotaryPositions(dim=6, scaling=RotaryScaling(kind="yarn", factor=4.0, original_n_ctx=16))
    },
    # Of padded rows one is short.
    "rotary-longrope": {
        "positions": RotaryPositions(
            dim=6,
            scaling=RotaryScaling(
                kind="longrope",
                factor=4.0,
                original_n_ctx=12,
                short_factors=(1.0, 1.5, 2.0),
                long_factors=(1.5, 3.0, 6.0),
            ),
        )
    },
    "sinusoidal": {"positions": SinusoidalPositions(layout="half", includes_base=True, offset=2), "chunks": (5, None)},
    "shortformer": {"positions": ShortformerPositions(), "n_kv_heads": 2, "windows": (None, 7)},
    "qk-norm-over-all-heads": {
        "positions": ROTARY,
        "qk_norm": NormConfig(kind="layer", eps=1e-5),
        "qk_norm_over": "all_heads",
        "clip_qkv": 0.9,
        "n_kv_heads": 2,
    },
    "qk-norm-per-head-after-rotary": {
        "positions": (ROTARY, NoPositions()),
        "qk_norm": RMS_OFFSET,
        "qk_norm_per_head": True,
        "qk_norm_after_rotary": True,
        "query_temperature": (None, QueryTemperature(scale=0.3, length=3, offset=1)),
        "n_kv_heads": 1,
    },
    "sinks": {
        "positions": ROTARY,
        "attn_sinks": True,
        "windows": (4, None),
        "n_kv_heads": 2,
        "attn_scale": (0.3, None),
    },
    "mixture": {
        "n_layers": 1,
        "positions": ROTARY,
        "norm": RMS,
        "act_fn": "silu",
        "mlp": MoEConfig(
            n_experts=6,
            experts_per_token=2,
            d_expert=10,
            router="sigmoid",
            choice_bias=True,
            gate_norm=1.0,
            gate_scale=1.5,
            n_groups=3,
            groups_per_token=2,
            group_top=2,
            router_bias=True,
            expert_bias=True,
            d_shared=8,
            shared_gate=True,
        ),
    },
    "latent": {
        "positions": RotaryPositions(dim=4, layout="interleaved"),
        "norm": RMS,
        "attn": MLAConfig(q_rank=10, kv_rank=14, d_nope=5, d_rope=4, d_head_v=7),
        "attn_scale": 0.4,
    },
    "latent-in-one-layer": {
        "positions": (RotaryPositions(dim=2), NoPositions()),
        "attn": (MLAConfig(kv_rank=6, d_nope=3, d_rope=2, d_head_v=8, norm_eps=0.1), PartConfig(kind="attention")),
        "qk_norm": (None, RMS),
        "qk_norm_over": "all_heads",
        "windows": (4, None),
        "attn_softcap": 3.0,
        "attn_sinks": True,
    },
    "all-at-once": {
        "positions": ROTARY,
        "norm": RMS_OFFSET,
        "norm_after": True,
        "qk_norm": RMS_OFFSET,
        "attn_softcap": 4.0,
        "logits_softcap": 6.0,
        "windows": (3, None),
        "embed_scale": 4.9,
        "gated_mlp": True,
        "act_fn": "gelu_tanh",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "n_kv_heads": 2,
        "tied_unembed": True,
        "attn_scale": 0.3,
    },
}


def build(name: str = "learned") -> HookedCausalLM:
    """A small model whose every parameter is random."""
    sizes = {
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 4,
        "d_vocab": 53,
        "n_ctx": 40,
        "d_mlp": 40,
        "positions": NoPositions(),
    }
    torch.manual_seed(0)
    model = HookedCausalLM(HookedConfig(**{**sizes, **CONFIGS[name]}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def verify_points(model: HookedCausalLM, **options: Any) -> VerificationReport:
    """The checks that need no transformers model, without those of annotations, which take as long again."""
    with unchecked():
        return verify(model, **{"logits": False, "gradients": False, "progress": False, **options})


# The checks without edits of single entries and gradients, which take three quarters of the time.
OF_THE_WHOLE = ("shown tensors", "explicit logits", "positions and layers", "loss", "caches", "watching")


def verify_whole(model: HookedCausalLM) -> VerificationReport:
    """Every hook point fires once and shows what its sources make, and the logits are those of explicit arithmetic."""
    with unchecked(), torch.no_grad():
        probe = make_probe(model)
        results = check_firing(probe)
        for name, run in hook_point_stages(probe, gradients=False):
            if name in OF_THE_WHOLE:
                results += run()
    return VerificationReport("the whole network", results, [])


def failures_at(report: VerificationReport, subject: str) -> dict[str, CheckResult]:
    return {result.check: result for result in report.failures if result.subject == subject}


class NeverFires(HookPoint):
    def __call__(self, tensor: Tensor, call: Call | None = None) -> Tensor:
        return tensor


class FiresTwice(HookPoint):
    def __call__(self, tensor: Tensor, call: Call | None = None) -> Tensor:
        return super().__call__(super().__call__(tensor, call), call)


class ShowsOtherAxes(HookPoint):
    def __call__(self, tensor: Tensor, call: Call | None = None) -> Tensor:
        return super().__call__(tensor.transpose(1, 2), call).transpose(1, 2)


class LosesEdits(HookPoint):
    def __call__(self, tensor: Tensor, call: Call | None = None) -> Tensor:
        super().__call__(tensor.clone(), call)
        return tensor


class ChangesWhatItWatches(HookPoint):
    def __call__(self, tensor: Tensor, call: Call | None = None) -> Tensor:
        assert call is not None
        return super().__call__(tensor, call) * 1.001 if self.listens(call) else tensor


class Detaches(HookPoint):
    """Hands the right values on, but gradients go past what listeners see."""

    def __call__(self, tensor: Tensor, call: Call | None = None) -> Tensor:
        return super().__call__(tensor.clone(), call).detach() + (tensor - tensor.detach())


class LeaksUpstream(HookPoint):
    """Edits reach the tensor that the skip connection reads, too."""

    def watch(self, tensor: Tensor, call: Call) -> tuple[Tensor, bool]:
        edited, changed = super().watch(tensor.clone(), call)
        return tensor.copy_(edited), changed
