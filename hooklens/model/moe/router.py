"""Which experts see a token, and what each counts.

From the logits come three things, one after another, each at a hook point that an edit can take hold of:

    logits [batch pos expert] -> choice [batch pos choice] -> gates, shown as weights [batch pos expert]

An expert whose logit is -inf is not chosen (unless fewer than `experts_per_token` are left, and then its gate is 0):
an edit of `hook_logits` that puts -inf at an expert forbids it, exactly as a router bias of -inf would. An edit of
`hook_choice` forces experts; their gates follow from the logits. An edit of `hook_weights` sets the gates; an expert
that was not chosen and gets one other than 0 sees the token after all.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.config import BlockConfig, MoEConfig
from hooklens.errors import HookOutputError
from hooklens.hooks import Call, HookPoint
from hooklens.model.moe.spec import mixture_of
from hooklens.model.parts.declared import point
from hooklens.model.parts.part import Part
from hooklens.precision import widen

Logits = Float[Tensor, "batch pos expert"]
Choice = Int[Tensor, "batch pos choice"]
Gates = Float[Tensor, "batch pos choice"]
# Keeps a division by gates that are all 0 a number; no sum of gates feels it.
_TINY = 1e-20
_NEVER = float("-inf")


class Routing(NamedTuple):
    """Which experts see a token, and what each counts.

    Attributes:
        choice: the experts of each token, different ones.
        gates: of these.
        added: which others were given a weight by an edit; None: none were.
        weights: what each of those counts, `[batch pos expert]`.
    """

    choice: Choice
    gates: Gates
    added: Bool[Tensor, "batch pos expert"] | None = None
    weights: Float[Tensor, "batch pos expert"] | None = None


class Router(Part, place="blocks.{i}.mlp.router"):
    """The choice among experts; softmax and sigmoid in float32 for half-precision logits.

    `hook_weights` shows a side tensor, made where somebody listens. Its gradient at an expert that was not chosen is
    what that expert would have changed, so whoever asks for gradients there has all experts run on all tokens.
    """

    can_be_replaced = False

    hook_logits: HookPoint = point("batch pos expert", "the router's logits; an edit to -inf forbids an expert")
    hook_choice: HookPoint = point(
        "batch pos choice", "numbers of the chosen experts (int64); an edit forces experts", discrete=True
    )
    hook_weights: HookPoint = point("batch pos expert", "gates of the chosen experts, 0 for all others")

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        self.mixture = mixture_of(block)

    def forward(
        self, logits: Logits, b_choice: Float[Tensor, " expert"] | None, dtype: torch.dtype, call: Call
    ) -> Routing:
        """The experts that each token is sent to, and what each counts.

        Args:
            logits: of all experts.
            b_choice: added to the scores for the choice only.
            dtype: of the gates.
            call: who listens.

        Raises:
            HookOutputError: an edit of `hook_choice` left what is no choice of different experts.
        """
        wide = widen(self.hook_logits(logits, call))
        choice = choose_experts(wide, self.mixture, b_choice)
        if self.hook_choice.listens(call):
            choice, edited = self.hook_choice.watch(choice, call)
            if edited and not torch.compiler.is_compiling():
                self._check_choice(choice)
        gates = weigh_experts(wide, choice, self.mixture).to(dtype)
        if not self.hook_weights.listens(call):
            return Routing(choice, gates)
        weights = torch.zeros_like(wide, dtype=dtype).scatter(-1, choice, gates)
        weights, edited = self.hook_weights.watch(weights, call)
        return _read_weights(weights, choice) if edited else Routing(choice, gates)

    def _check_choice(self, choice: Choice) -> None:
        n_experts = self.mixture.n_experts
        ordered = choice.sort(-1).values
        outside = choice[(choice < 0) | (choice >= n_experts)]
        if outside.numel():
            raise HookOutputError(
                f"an edit at {self.hook_choice.describe(choice)} chose experts {sorted(set(outside.tolist()))}; the "
                f"layer has {n_experts}, 0 to {n_experts - 1}"
            )
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise HookOutputError(
                f"an edit at {self.hook_choice.describe(choice)} chose an expert twice for a token; expected different "
                "ones. Set the gates at hook_weights to make one count more"
            )


def choose_experts(logits: Logits, mixture: MoEConfig, b_choice: Tensor | None = None) -> Choice:
    """The experts with the highest scores, the highest first.

    Softmax and sigmoid keep the order of logits, so these are compared where nothing is added to the scores.
    """
    scores = logits
    if b_choice is not None or mixture.group_top > 1:
        scores = logits.softmax(-1) if mixture.router == "softmax" else logits.sigmoid()
    if b_choice is not None:
        scores = (scores + b_choice).masked_fill(logits == _NEVER, _NEVER)
    if mixture.n_groups is not None and mixture.groups_per_token is not None:
        grouped = torch.unflatten(scores, -1, (mixture.n_groups, -1))
        of_groups = grouped.topk(mixture.group_top, dim=-1).values.sum(-1)
        best = of_groups.topk(mixture.groups_per_token, dim=-1).indices
        left_out = torch.ones_like(of_groups, dtype=torch.bool).scatter(-1, best, value=False)
        scores = grouped.masked_fill(left_out[..., None], _NEVER).flatten(-2)
    return scores.topk(mixture.experts_per_token, dim=-1).indices


def weigh_experts(logits: Logits, choice: Choice, mixture: MoEConfig) -> Gates:
    """The gates of chosen experts."""
    if mixture.router == "sparsemixer":
        gates = _mix_sparsely(logits, choice, mixture.nearness)
    elif mixture.router != "softmax":
        gates = logits.gather(-1, choice).sigmoid()
    elif mixture.gate_norm == 1.0:
        # The softmax over all, divided by its sum over the chosen, where both could be too small for a number.
        gates = logits.gather(-1, choice).softmax(-1)
    else:
        gates = logits.softmax(-1).gather(-1, choice)
    if mixture.gate_norm is not None and not (mixture.router == "softmax" and mixture.gate_norm == 1.0):
        gates = gates / (torch.linalg.vector_norm(gates, ord=mixture.gate_norm, dim=-1, keepdim=True) + _TINY)
    return gates if mixture.gate_scale is None else gates * mixture.gate_scale


def _mix_sparsely(logits: Logits, choice: Choice, nearness: float) -> Gates:
    """For each of the chosen, the softmax over the experts not chosen before whose logits are near the best of these.

    An expert that an edit forces, and that is not near, has the gate 0.
    """
    left, gates = logits, []
    for one in torch.split(choice, 1, dim=-1):
        best = left.detach().amax(-1, keepdim=True)
        distance = (best - logits.detach()) / torch.maximum(logits.detach().abs(), best)
        nobody = best == _NEVER
        near = left.masked_fill(distance > nearness, _NEVER).masked_fill(nobody, 0.0)
        gates.append(near.softmax(-1).gather(-1, one).masked_fill(nobody, 0.0))
        left = left.scatter(-1, one, _NEVER)
    return torch.cat(gates, -1)


def _read_weights(weights: Float[Tensor, "batch pos expert"], choice: Choice) -> Routing:
    """The routing that edited weights say."""
    asks_gradient = weights.requires_grad and (weights.is_leaf or weights.retains_grad or bool(weights._backward_hooks))
    given = torch.ones_like(weights, dtype=torch.bool) if asks_gradient else weights.detach() != 0
    added = given.scatter(-1, choice, value=False)
    return Routing(choice, weights.gather(-1, choice), added, weights)
