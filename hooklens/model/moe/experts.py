"""The experts' own work: each a gated MLP on the tokens that were sent to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.config import BlockConfig
from hooklens.hooks import Call, HookPoint
from hooklens.hooks.foreign import Placed
from hooklens.model.moe.groups import ExpertGroups
from hooklens.model.moe.router import Routing
from hooklens.model.moe.spec import SHARES, gating_of, mixture_of
from hooklens.model.moe.traced import declare_operations
from hooklens.model.parts.declared import point
from hooklens.model.parts.part import Part
from hooklens.model.parts.stacked import QuantisedStack, StackedLinear

_NEURONS = "batch pos choice d_expert"
Pairs = Float[Tensor, "pair d_expert"]


Maps = StackedLinear | QuantisedStack


class ExpertMaps(NamedTuple):
    """The maps of all experts."""

    gate: Maps
    linear: Maps
    out: Maps


class Experts(Part, place="blocks.{i}.mlp.experts"):
    """`sum over a token's experts e of g_e * expert_e(x)`, only for the tokens that see an expert.

    Hook points show the neurons of a token's experts side by side, `[batch pos choice d_expert]`: what stands at place
    `c` of the axis `choice` belongs to the expert `hook_choice[..., c]`. So they have the rows and positions of any
    other activation, and nothing is computed that no token is sent to:

        post, choice = cache["blocks.0.mlp.experts.hook_post"], cache["blocks.0.mlp.router.hook_choice"]
        post[choice == 5]        # [token d_expert]: the neurons of expert 5, for the tokens that it sees

    These are side tensors (the experts run on tokens sorted by expert). What an expert makes of a token for which it
    was not chosen, and that an edit of `hook_weights` sent to it all the same, is in the layer's output only.
    """

    can_be_replaced = False

    hook_pre: HookPoint = point(_NEURONS, "gates of the neurons of each token's experts, before the activation")
    hook_pre_linear: HookPoint = point(_NEURONS, "the linear half of the neurons of each token's experts")
    hook_post: HookPoint = point(_NEURONS, "neurons of each token's experts: the input of their W_out")
    hook_result: HookPoint = point(
        "batch pos choice d_model", "what each of a token's experts adds, weighed by its gate", on_request=True
    )
    hook_out: HookPoint = point("batch pos d_model", "what a token's experts add together", when=SHARES)

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        declare_operations()
        mixture = mixture_of(block)
        self.n_experts = mixture.n_experts
        self.gates_input = mixture.router == "sigmoid_input"
        self.make_neurons = gating_of(block)
        self.is_shown = SHARES.holds(block)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], routing: Routing, maps: ExpertMaps, call: Call
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the experts of each token add together.

        Args:
            x: what they read.
            routing: the experts of each token, and what each counts.
            maps: their weights.
            call: who listens.
        """
        choice = routing.choice
        groups = ExpertGroups.of_choice(choice.flatten(0, 1), self.n_experts)

        def show(where: HookPoint | Placed, neurons: Pairs) -> Pairs:
            """Neurons sorted by expert, as listeners leave them, who see them by token."""
            if not where.listens(call):
                return neurons
            by_token, changed = where.watch(torch.unflatten(groups.restore(neurons), 0, choice.shape), call)
            return groups.sort(by_token.flatten(0, 2)) if changed else neurons

        made = self._run(x.flatten(0, 1), groups, groups.sort(routing.gates.flatten()), maps, show)
        results = self.hook_result(torch.unflatten(groups.restore(made), 0, choice.shape), call)
        out = results.sum(2).to(x.dtype)
        if routing.added is not None and routing.weights is not None:
            out = self._add_others(out, x.flatten(0, 1), routing.added, routing.weights, maps)
        return self.hook_out(out, call) if self.is_shown else out

    def _run(
        self,
        x: Float[Tensor, "token d_model"],
        groups: ExpertGroups,
        gates: Float[Tensor, " pair"],
        maps: ExpertMaps,
        show: Callable[[HookPoint, Pairs], Pairs],
    ) -> Float[Tensor, "pair d_model"]:
        """What the experts make of sorted pairs, weighed; `show` hands their neurons to listeners."""
        read = x.index_select(0, groups.tokens)
        if self.gates_input:
            read = read * gates[:, None]
        gate = show(self.hook_pre, _apply(groups, read, maps.gate))
        linear = show(self.hook_pre_linear, _apply(groups, read, maps.linear))
        del read
        post = show(self.hook_post, self.make_neurons(gate, linear))
        del gate, linear
        made = _apply(groups, post, maps.out)
        return made if self.gates_input else made * gates[:, None]

    def _add_others(
        self,
        out: Float[Tensor, "batch pos d_model"],
        x: Float[Tensor, "token d_model"],
        added: Bool[Tensor, "batch pos expert"],
        weights: Float[Tensor, "batch pos expert"],
        maps: ExpertMaps,
    ) -> Float[Tensor, "batch pos d_model"]:
        """What is in `out`, and what experts make of tokens for which they were not chosen."""
        tokens, experts = added.flatten(0, 1).nonzero(as_tuple=True)
        if not tokens.numel():
            return out
        groups = ExpertGroups(tokens, experts, self.n_experts)
        gates = weights.flatten(0, 1)[groups.tokens, groups.experts]
        made = self._run(x, groups, gates, maps, lambda where, neurons: neurons)
        return out.flatten(0, 1).index_add(0, groups.tokens, made.to(out.dtype)).view_as(out)


def _apply(groups: ExpertGroups, x: Float[Tensor, "pair into"], maps: Maps) -> Float[Tensor, "pair out_of"]:
    """What sorted pairs become under the maps of their experts."""
    if isinstance(maps, QuantisedStack):
        return groups.apply_each(x, maps.maps, maps.bias)
    return groups.apply(x, maps.weight, maps.bias)
