r"""What a patch of queries or keys does to attention patterns, computed; the rest of its effect estimated.

The "QK fix" of AtP* (Kramar et al. 2024, arXiv 2403.00745, sections 3.1.1 and B.1):

    effect(cell) ~ sum over queries i and keys j of (p'_ij - p_ij) * dm/dp_ij

with `p'` the pattern of the patched run. A query's patch changes one row of scores, and all cells of a layer are read
off one run in which all queries are patched. A key's patch changes one column. With `s` the old scores, `s'` those with
all keys patched and `delta = s'_ij - s_ij`, in row `i` patched at key `j`

    p'_ij = sigmoid(logit(p_ij) + delta),    p'_il = p_il (1 - p'_ij) / (1 - p_ij)   for l other than j.

Where one key has nearly all of a row, `1 - p_ij` is lost to rounding; there what the others share is taken from the
softmax without it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.hooks import HookPoint
from hooklens.hooks.call import HookFunction
from hooklens.patching.estimates.gradients import GradientRuns
from hooklens.patching.runs.baseline import Baseline
from hooklens.precision import widen

QUERIES, KEYS = ("hook_q", "hook_rot_q"), ("hook_k", "hook_rot_k")


def is_exact_site(name: str) -> bool:
    """Whether a hook point's patches change patterns alone."""
    return name.rpartition(".")[2] in (*QUERIES, *KEYS)


def pattern_name(name: str) -> str:
    """The pattern that a hook point's patches change."""
    return f"{name.rpartition('.')[0]}.hook_pattern"


@dataclass(frozen=True)
class PatchedScores:
    """The scores of one layer for some pairs, and its pattern, as they are and with all queries or keys patched.

    Attributes:
        of_keys: whether keys are patched.
        n_heads: heads of the patched tensor.
        scores, patched_scores: -inf where a key is hidden.
        pattern, patched_pattern: their softmax.
        sinks: logits that take part in the softmax, and have no value.
    """

    of_keys: bool
    n_heads: int
    scores: Float[Tensor, "pairs head query key"]
    patched_scores: Float[Tensor, "pairs head query key"]
    pattern: Float[Tensor, "pairs head query key"]
    patched_pattern: Float[Tensor, "pairs head query key"]
    sinks: Float[Tensor, " head"] | None = None

    @classmethod
    @torch.no_grad()
    def run(cls, runs: GradientRuns, baseline: Baseline, name: str) -> "PatchedScores":
        """Run one block on the unpatched stream, as it is and with a hook point patched."""
        layer = layer_of(name)
        assert layer is not None
        place = name.rpartition(".")[0]
        names = [f"{place}.hook_attn_scores", f"{place}.hook_pattern"]
        new = baseline.values[name]

        def patch(tensor: Tensor, hook: HookPoint) -> Tensor:
            return new

        plain = _run_block(runs, baseline, layer, names)
        patched = _run_block(runs, baseline, layer, names, (name, patch))
        scores, pattern, patched_scores, patched_pattern = (
            widen(captured[one]) for captured in (plain, patched) for one in names
        )
        is_key = name.rpartition(".")[2] in KEYS
        sinks = runs.model.get_submodule(place)._parameters.get("sinks")
        return cls(is_key, new.shape[2], scores, patched_scores, pattern, patched_pattern, sinks)

    def effects(
        self, slope: Float[Tensor, "pairs head query key"]
    ) -> tuple[Float[Tensor, "pairs pos patched_head"], Float[Tensor, "pairs pos patched_head"]]:
        """What patches do, given the gradient at the pattern.

        Returns:
            Of patches at one position; and of patches at all positions at once, what each position's share is, so
            that they are summed.
        """
        slope = widen(slope)
        together = ((self.patched_pattern - self.pattern) * slope).sum(-1)
        if not self.of_keys:
            by_position = together.transpose(1, 2)
            return by_position, by_position
        alone = self._of_single_keys(slope)
        n_pairs, n_query = together.shape[0], together.shape[2]
        grouped = together.view(n_pairs, self.n_heads, -1, n_query).sum(2).transpose(1, 2)
        by_key = alone.view(n_pairs, self.n_heads, -1, alone.shape[-1]).sum(2).transpose(1, 2)
        return by_key, grouped

    def _of_single_keys(self, slope: Tensor) -> Float[Tensor, "pairs head key"]:
        """What patches of one key each do, summed over queries."""
        old, hidden = self.pattern.clamp(max=1.0), self.scores.isinf()
        delta = torch.where(hidden, 0.0, self.patched_scores - self.scores)
        whole, rest = (old * slope).sum(-1, keepdim=True), 1.0 - old
        # What the other keys of a row give, were they to share all of it.
        others = torch.where(rest > 0, (whole - old * slope) / torch.where(rest > 0, rest, 1.0), 0.0)
        logits = torch.logit(old)
        largest = old.argmax(-1, keepdim=True)
        logit_of_largest, others_of_largest = self._without(largest, slope)
        logits = logits.scatter(-1, largest, logit_of_largest)
        others = others.scatter(-1, largest, others_of_largest)
        change = (torch.sigmoid(logits + delta) - old) * (slope - others)
        return torch.where(hidden, 0.0, change).sum(-2)

    def _without(self, largest: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of the key that has most of each row, and what the others give were they to share the row."""
        masked = self.scores.scatter(-1, largest, -torch.inf)
        log_rest = masked.logsumexp(-1, keepdim=True)
        if self.sinks is not None:
            log_rest = torch.logaddexp(log_rest, self.sinks[:, None, None].to(log_rest.dtype).expand_as(log_rest))
        is_alone = log_rest == -torch.inf
        weights = torch.exp(masked - torch.where(is_alone, 0.0, log_rest))
        return self.scores.gather(-1, largest) - log_rest, (weights * slope).sum(-1, keepdim=True)


@torch.no_grad()
def move_pattern(
    runs: GradientRuns,
    baseline: Baseline,
    layer: int,
    letter: Literal["q", "k"],
    change: Float[Tensor, "pairs pos d_model"] | None,
) -> Float[Tensor, "pairs head query key"]:
    """The pattern of a layer whose queries or keys read the stream moved by a change; None: as it is."""

    def move(tensor: Tensor, hook: HookPoint) -> Tensor:
        assert change is not None
        return tensor + change[:, :, None]

    name = f"blocks.{layer}.attn.hook_pattern"
    hooks = () if change is None else ((f"blocks.{layer}.hook_{letter}_input", move),)
    return widen(_run_block(runs, baseline, layer, [name], *hooks)[name])


def effect_of_pattern(
    change: Float[Tensor, "pairs head query key"], slope: Float[Tensor, "pairs head query key"], n_heads: int
) -> Float[Tensor, "patched_head pairs"]:
    """What a pattern's change does, given the gradient at it, for each of so many query or key-value heads."""
    of_heads = (change * widen(slope)).sum((-1, -2))
    return of_heads.view(len(of_heads), n_heads, -1).sum(-1).T


def _run_block(
    runs: GradientRuns, baseline: Baseline, layer: int, names: list[str], *hooks: tuple[str, HookFunction]
) -> dict[str, Tensor]:
    """Activations of one block, run on the unpatched stream."""
    model, plan = runs.model, runs.model.make_plan(runs.into, runs.mask)
    with model.hooks(hooks), model.capture(names) as captured:
        model.run(baseline.streams[layer], plan, start_at_layer=layer, stop_at_layer=layer + 1)
    return captured
