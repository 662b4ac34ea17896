"""A mixture of experts as it is defined: every expert asked for every token, weighed with a table of gates."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.config import Activation, MoEConfig
from hooklens.verification.explicit.activations import activate, clamped_swiglu
from hooklens.verification.explicit.weights import ExplicitWeights

_NEVER = -torch.inf


class Mixture:
    """The definitions of one layer's mixture.

    Args:
        mixture: its description.
        weights: the network's parameters.
        place: where the layer's MLP stands.
        act_fn: the network's activation.
        at: what a point below that place shows.
    """

    def __init__(
        self,
        mixture: MoEConfig,
        weights: ExplicitWeights,
        place: str,
        act_fn: Activation,
        at: Callable[[str], Tensor],
    ) -> None:
        self.mixture, self.weights, self.place, self.at = mixture, weights, place, at
        self.act_fn: Activation = act_fn if mixture.act_fn is None else mixture.act_fn
        self.gates_input = mixture.router == "sigmoid_input"

    def formulas(self, read: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
        """What each point shows, and `"out"`, what the layer gives, by name below its place.

        Args:
            read: what the layer reads.
        """
        apply, place = self.weights.apply, self.place
        return {
            "router.hook_logits": lambda: apply(f"{place}.router_proj", read()),
            "router.hook_choice": self._choose,
            "router.hook_weights": self._weigh,
            "experts.hook_pre": lambda: self._of_chosen("gate", read()),
            "experts.hook_pre_linear": lambda: self._of_chosen("in", read()),
            "experts.hook_post": lambda: self._neurons(self.at("experts.hook_pre"), self.at("experts.hook_pre_linear")),
            "experts.hook_result": self._results,
            "experts.hook_out": lambda: self._sum(read()),
            "shared.hook_pre": lambda: apply(f"{place}.shared.gate_proj", read()),
            "shared.hook_pre_linear": lambda: apply(f"{place}.shared.in_proj", read()),
            "shared.hook_post": lambda: self._neurons(self.at("shared.hook_pre"), self.at("shared.hook_pre_linear")),
            "shared.hook_gate": lambda: 1 / (1 + torch.exp(-apply(f"{place}.shared.shared_gate_proj", read()))),
            "shared.hook_out": self._shared,
            "out": lambda: self._out(read),
        }

    def _scores(self, logits: Tensor) -> Tensor:
        if self.mixture.router == "softmax":
            exponentials = torch.exp(logits - logits.amax(-1, keepdim=True))
            return exponentials / exponentials.sum(-1, keepdim=True)
        return 1 / (1 + torch.exp(-logits))

    def _choose(self) -> Tensor:
        """The experts in the order of what they are chosen by, in float64 like all that is computed here."""
        logits, mixture = self.at("router.hook_logits"), self.mixture
        # The order of the logits is that of their softmax or sigmoid, which may round two of them to one number.
        worth = logits
        added = self.weights.find(f"{self.place}.b_choice")
        if added is not None or mixture.group_top > 1:
            worth = self._scores(logits)
        if added is not None:
            worth = torch.where(logits == _NEVER, _NEVER, worth + added)
        if mixture.n_groups is not None:
            worth = self._in_best_groups(worth)
        return worth.topk(mixture.experts_per_token, dim=-1).indices.double()

    def _in_best_groups(self, worth: Tensor) -> Tensor:
        mixture = self.mixture
        assert mixture.n_groups is not None
        assert mixture.groups_per_token is not None
        groups = worth.reshape(*worth.shape[:-1], mixture.n_groups, -1)
        of_groups = groups.sort(dim=-1, descending=True).values[..., : mixture.group_top].sum(-1)
        best = of_groups.topk(mixture.groups_per_token, dim=-1).indices
        kept = (best[..., None] == torch.arange(mixture.n_groups, device=worth.device)).any(-2)
        return torch.where(kept[..., None], groups, _NEVER).reshape(worth.shape)

    def _chosen(self) -> Int[Tensor, "batch pos choice"]:
        return self.at("router.hook_choice").round().long()

    def _is_chosen(self) -> Tensor:
        return (self._chosen()[..., None] == torch.arange(self.mixture.n_experts, device=self._chosen().device)).any(-2)

    def _weigh(self) -> Float[Tensor, "batch pos expert"]:
        logits, mixture, chosen = self.at("router.hook_logits"), self.mixture, self._is_chosen()
        if mixture.router == "sparsemixer":
            gates = self._mix(logits)
        elif mixture.router == "softmax" and mixture.gate_norm == 1.0:
            gates = self._scores(torch.where(chosen, logits, _NEVER))
        else:
            gates = torch.where(chosen, self._scores(logits), 0.0)
        if mixture.gate_norm is not None and not (mixture.router == "softmax" and mixture.gate_norm == 1.0):
            norm = (gates**mixture.gate_norm).sum(-1, keepdim=True) ** (1 / mixture.gate_norm)
            gates = gates / torch.where(norm == 0, 1.0, norm)
        return gates * (1.0 if mixture.gate_scale is None else mixture.gate_scale)

    def _mix(self, logits: Tensor) -> Tensor:
        """One chosen expert after another: the softmax over those left whose logits are near the best one left."""
        gates, left = torch.zeros_like(logits), logits
        numbers = torch.arange(self.mixture.n_experts, device=logits.device)
        for chosen in self._chosen().unbind(-1):
            best = left.amax(-1, keepdim=True)
            far = (best - logits) / torch.maximum(logits.abs(), best) > self.mixture.nearness
            exponentials = torch.where(far | (left == _NEVER), 0.0, torch.exp(left - best))
            total = exponentials.sum(-1, keepdim=True)
            is_chosen = chosen[..., None] == numbers
            gates = torch.where(is_chosen, exponentials / torch.where(total == 0, 1.0, total), gates)
            left = torch.where(is_chosen, _NEVER, left)
        return gates

    def _of_all(self, half: str, x: Float[Tensor, "batch pos into"]) -> Float[Tensor, "batch pos expert out_of"]:
        """What a map of every expert makes of every token; with gates on the input, of the token times its gate."""
        made = torch.einsum("bpm,efm->bpef", x, self.weights[f"{self.place}.{half}_maps.weight"])
        if self.gates_input:
            made = made * self.at("router.hook_weights")[..., None]
        bias = self.weights.find(f"{self.place}.{half}_maps.bias")
        return made if bias is None else made + bias

    def _of_chosen(self, half: str, x: Tensor) -> Float[Tensor, "batch pos choice d_expert"]:
        return self._take(self._of_all(half, x))

    def _take(self, of_all: Float[Tensor, "batch pos expert *d"]) -> Float[Tensor, "batch pos choice *d"]:
        """The entries of the chosen experts, in their order."""
        chosen = self._chosen()
        return of_all.take_along_dim(chosen.reshape(*chosen.shape, *[1] * (of_all.ndim - chosen.ndim)), dim=2)

    def _neurons(self, gate: Tensor, linear: Tensor) -> Tensor:
        if self.act_fn == "clamped_swiglu":
            limit, alpha = self.mixture.limit_and_alpha
            return clamped_swiglu(gate, linear, limit, alpha)
        return activate(gate, self.act_fn) * linear

    def _results(self) -> Float[Tensor, "batch pos choice d_model"]:
        post, chosen = self.at("experts.hook_post"), self._chosen()
        made = torch.einsum("bpkf,bpkmf->bpkm", post, self.weights[f"{self.place}.out_maps.weight"][chosen])
        bias = self.weights.find(f"{self.place}.out_maps.bias")
        made = made if bias is None else made + bias[chosen]
        return made if self.gates_input else made * self._take(self.at("router.hook_weights"))[..., None]

    def _sum(self, x: Tensor) -> Tensor:
        """What the chosen experts add, and others that an edit gave a weight."""
        written, gates = self.at("experts.hook_result").sum(2), self.at("router.hook_weights")
        others = torch.where(self._is_chosen(), 0.0, gates)
        if not others.any():
            return written
        post = self._neurons(self._of_all("gate", x), self._of_all("in", x))
        made = torch.einsum("bpef,emf->bpem", post, self.weights[f"{self.place}.out_maps.weight"])
        bias = self.weights.find(f"{self.place}.out_maps.bias")
        made = made if bias is None else made + bias
        weighed = torch.where(others[..., None] == 0, 0.0, made if self.gates_input else made * others[..., None])
        return written + weighed.sum(2)

    def _shared(self) -> Tensor:
        made = self.weights.apply(f"{self.place}.shared.out_proj", self.at("shared.hook_post"))
        return made * self.at("shared.hook_gate") if self.mixture.shared_gate else made

    def _out(self, read: Callable[[], Tensor]) -> Tensor:
        if self.mixture.d_shared is None:
            return self._sum(read())
        return self.at("experts.hook_out") + self.at("shared.hook_out")
