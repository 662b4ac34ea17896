"""Mixture of experts: which experts see a token, how they are weighed, what an expert is."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from hooklens.config.activations import SWIGLU_ALPHA, SWIGLU_LIMIT
from hooklens.config.block import Option, PartConfig
from hooklens.config.checks import check_choice, check_counts, check_flags, check_numbers, check_present, refuse

if TYPE_CHECKING:
    from hooklens.config.network import HookedConfig

Router = Literal["softmax", "sigmoid", "sigmoid_input", "sparsemixer"]
ExpertActivation = Literal["relu", "relu2", "gelu", "gelu_tanh", "gelu_quick", "silu", "clamped_swiglu"]
_COUNTS = ("n_experts", "experts_per_token", "d_expert", "n_groups", "groups_per_token", "group_top", "d_shared")
_FLAGS = ("choice_bias", "router_bias", "router_float32", "expert_bias", "shared_gate")
_NUMBERS = ("gate_norm", "gate_scale", "sparsemixer_eps", "swiglu_limit", "swiglu_alpha")
_EPS = 0.01


@dataclass(frozen=True, kw_only=True)
class MoEConfig(PartConfig, kind="moe"):
    """A mixture of experts at the MLP's place: `HookedConfig(mlp=MoEConfig(...))`.

    A router gives every expert a logit, `l = x W_router`, and sends each token to the few experts that it scores
    highest; these are gated MLPs, whose sum weighed by gates `g` is what the layer adds:

        sum over chosen e of  g_e * expert_e(x)        (+ shared(x), which sees every token)

    Where dense layers come first, or in between, `mlp` is a tuple: `(PartConfig(kind="mlp"), MoEConfig(...), ...)`.

    Attributes:
        n_experts: experts in the layer, without the shared one.
        experts_per_token: how many of them see a token.
        d_expert: neurons of an expert.
        router: how the experts are scored, and what a gate is.
            `"softmax"`: the score is the softmax of the logits over all experts, the gate the score; with
            `gate_norm=1.0` the softmax over the chosen (Shazeer et al. 2017).
            `"sigmoid"`: both are the sigmoid of the logit (Liu et al. 2024, arXiv:2412.19437).
            `"sigmoid_input"`: the same, but the gate multiplies what the expert reads: `expert_e(g_e * x)`.
            `"sparsemixer"`: the gates of two experts, each the softmax over those whose logit is near its own (Liu et
            al. 2024, arXiv:2409.12136, as it is run for inference).
        gate_norm: the p of the p-norm that the gates of the chosen are divided by; 1.0: they sum to one. None: they
            stay as they are.
        gate_scale: a factor on the gates, after that.
        choice_bias: a learned number for each expert is added to its score for the choice only, not for the gate.
        n_groups: experts stand in so many groups of neighbours, and only those of a token's best groups can be chosen.
        groups_per_token: how many these are.
        group_top: a group is as good as the sum of so many of its best scores; 1: as its best one.
        sparsemixer_eps: half of how far a logit may be from the chosen one, in relation to the larger of the two, to
            count as near. None: 0.01.
        router_bias: the router has a bias, and the shared expert's gate.
        router_float32: logits are computed in float32 whatever the dtype of the weights. The softmax or sigmoid
            always is.
        expert_bias: the maps of the experts and of the shared expert have biases.
        act_fn: activation of the experts. None: the network's. `"clamped_swiglu"`: with the gate at
            most the limit and the linear half within it on both sides, a neuron is
            `gate * sigmoid(alpha * gate) * (linear + 1)`.
        swiglu_limit, swiglu_alpha: of `act_fn="clamped_swiglu"`. None: 7 and 1.702.
        d_shared: neurons of the shared expert. Several shared experts are one as wide as all of them. None: none.
        shared_gate: what the shared expert writes is multiplied by `sigmoid(x W_shared_gate)`, one number per token.

    Raises:
        ConfigError: values of a wrong kind, or a combination that is no layer, with all reasons.
    """

    kind: str = field(default="moe", init=False, repr=False)
    options: Mapping[str, Option] = field(default_factory=dict, init=False, repr=False)
    n_experts: int
    experts_per_token: int
    d_expert: int
    router: Router = "softmax"
    gate_norm: float | None = None
    gate_scale: float | None = None
    choice_bias: bool = False
    n_groups: int | None = None
    groups_per_token: int | None = None
    group_top: int = 1
    sparsemixer_eps: float | None = None
    router_bias: bool = False
    router_float32: bool = False
    expert_bias: bool = False
    act_fn: ExpertActivation | None = None
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    d_shared: int | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        given = vars(self)
        owner = "config: mixture of experts"
        check_present(owner, {name: given[name] for name in (*_COUNTS[:3], "group_top")})
        check_counts(owner, {name: given[name] for name in _COUNTS})
        check_flags(owner, {name: given[name] for name in _FLAGS})
        check_numbers(owner, {name: given[name] for name in _NUMBERS})
        check_choice(f"{owner}: router", self.router, get_args(Router))
        if self.act_fn is not None:
            check_choice(f"{owner}: act_fn", self.act_fn, get_args(ExpertActivation))
        refuse([*self._choice_problems(), *self._router_problems(), *self._expert_problems()], owner)
        own = [spec.name for spec in dataclasses.fields(self) if spec.init]
        object.__setattr__(self, "options", {name: given[name] for name in own})
        super().__post_init__()

    def __hash__(self) -> int:
        return hash((self.kind, tuple(self.options.values())))

    def _choice_problems(self) -> list[str]:
        problems = []
        candidates, among = self.n_experts, "experts"
        if (self.n_groups is None) != (self.groups_per_token is None):
            problems.append("n_groups and groups_per_token go together; give both or neither")
        elif self.n_groups is None and self.group_top != 1:
            problems.append(f"group_top={self.group_top} without n_groups: there are no groups to score")
        elif self.n_groups is not None and self.groups_per_token is not None:
            if self.n_experts % self.n_groups:
                problems.append(f"n_experts={self.n_experts} is not a multiple of n_groups={self.n_groups}")
            size = self.n_experts // self.n_groups
            if self.groups_per_token > self.n_groups:
                problems.append(f"groups_per_token={self.groups_per_token} of n_groups={self.n_groups}")
            if self.group_top > size:
                problems.append(f"group_top={self.group_top} of the {size} experts of a group")
            candidates, among = self.groups_per_token * size, "experts in a token's groups"
        if self.experts_per_token > candidates:
            problems.append(f"experts_per_token={self.experts_per_token} of {candidates} {among}")
        return problems

    def _router_problems(self) -> list[str]:
        problems = []
        if self.router in ("sparsemixer", "sigmoid_input"):
            extra = {"gate_norm": self.gate_norm, "choice_bias": self.choice_bias, "n_groups": self.n_groups}
            if set_ones := [f"{name}={value!r}" for name, value in extra.items() if value]:
                problems.append(f"router={self.router!r} chooses by its logits alone: {', '.join(set_ones)} go without")
        if self.router == "sparsemixer" and self.experts_per_token != 2:
            problems.append(f"router='sparsemixer' chooses two experts, experts_per_token={self.experts_per_token}")
        if self.router != "sparsemixer" and self.sparsemixer_eps is not None:
            problems.append(f"sparsemixer_eps={self.sparsemixer_eps} with router={self.router!r}")
        if self.router == "sigmoid_input" and self.expert_bias:
            problems.append(
                "expert_bias with router='sigmoid_input': the gate would not weigh the biases, and an expert with the "
                "gate 0 would write all the same"
            )
        return problems

    def _expert_problems(self) -> list[str]:
        problems = []
        unused = [name for name in ("swiglu_limit", "swiglu_alpha") if getattr(self, name) is not None]
        if self.act_fn != "clamped_swiglu" and unused:
            problems.append(f"{', '.join(unused)} belong to act_fn='clamped_swiglu', and act_fn is {self.act_fn!r}")
        if self.shared_gate and self.d_shared is None:
            problems.append("shared_gate without a shared expert; give d_shared")
        return problems

    @property
    def sizes(self) -> Mapping[str, Option]:
        """The sizes of axes that the part brings."""
        own = {"expert": self.n_experts, "choice": self.experts_per_token, "d_expert": self.d_expert}
        return own if self.d_shared is None else {**own, "d_shared": self.d_shared}

    @property
    def limit_and_alpha(self) -> tuple[float, float]:
        """The bound, and the factor inside the sigmoid, of the clamped SwiGLU."""
        return self.swiglu_limit or SWIGLU_LIMIT, self.swiglu_alpha or SWIGLU_ALPHA

    @property
    def nearness(self) -> float:
        """How far a logit may be from the chosen one, in relation to the larger of the two, for the sparsemixer."""
        return 2 * (_EPS if self.sparsemixer_eps is None else self.sparsemixer_eps)

    def with_biases(self) -> "MoEConfig":
        """The same layer with biases, where it can have them."""
        return dataclasses.replace(self, router_bias=True, expert_bias=self.router != "sigmoid_input")


def mlp_width(cfg: "HookedConfig") -> int:
    """How many numbers a part at the MLP's place makes of a token at once: neurons, and what each expert writes."""
    parts = cfg.mlp if isinstance(cfg.mlp, tuple) else (cfg.mlp,)
    widths = [
        part.experts_per_token * (part.d_expert + cfg.d_model) + (part.d_shared or 0)
        for part in parts
        if isinstance(part, MoEConfig)
    ]
    return max([*widths, 0 if widths and len(widths) == len(parts) else cfg.d_mlp])


def mixture_problems(cfg: "HookedConfig") -> list[str]:
    """Mixtures of experts that do not go with the rest of a network, in words."""
    parts = cfg.mlp if isinstance(cfg.mlp, tuple) else (cfg.mlp,)
    asking = any(isinstance(part, MoEConfig) and part.act_fn is None for part in parts)
    if not asking or cfg.act_fn in get_args(ExpertActivation)[:-1]:
        return []
    return [f"act_fn={cfg.act_fn!r} is not one that experts take from the network; give MoEConfig(act_fn=...)"]
