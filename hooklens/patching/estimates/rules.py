r"""Gradient rules: how a backward pass departs from the gradient, so that it tells better what a patch does.

A patch is a large step, and a gradient tells of an infinitely small one. Where the network bends in between (a norm
whose scale the patch changes, a saturated activation, a product both of whose factors move), another slope than the
tangent's is nearer to what happens. Each rule replaces the slope of one kind of operation; the values of the forward
pass stay what they are, and a rule costs no further run but where it says so.

| rule | operation | backward pass |
|---|---|---|
| `HoldNormScale` | norms | the denominator is a constant |
| `LinearizeActivations` | activation functions | `a(x)` is `x` times the constant `a(x) / x` |
| `HalveProducts` | gated MLPs; attention's two products | each factor gets half of the gradient |
| `HoldPattern` | attention | the pattern is a constant |
| `SoftenSoftmax` | attention's softmax | that of a softmax at a higher temperature |
| `ExactSoftmax` | patches of queries and keys | none: the new pattern is computed |
| `GradDrop` | layers | one layer at a time passes nothing on; magnitudes are averaged |

Sets of them have names (`RULE_SETS`):

- `"gradient"`: none, the gradient itself (attribution patching; Nanda 2023, Syed et al. 2023);
- `"norms"`: `HoldNormScale` alone;
- `"linear"`: `HoldNormScale` and `LinearizeActivations`: but for attention the network is then a linear map;
- `"relp"`: relevance patching (Rezaei Jafari et al. 2025, arXiv 2508.21258): the LN-rule, the identity rule and the
  half rule of layer-wise relevance propagation, as its authors' code has them;
- `"gim"`: gradient interaction modifications (Edin et al. 2025, arXiv 2505.17630): norms held, a softmax at temperature
  2, and products halved, those of attention, too;
- `"atp*"`: AtP* (Kramar et al. 2024, arXiv 2403.00745): `ExactSoftmax` and `GradDrop`.

None is best everywhere, which is why results have `.check`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_flag, show
from hooklens.axes import is_below_blocks, layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks import HookPoint
from hooklens.model.attention.attend import compute_pattern
from hooklens.model.norm import hold_scale

RuleHook = tuple[Sequence[str], Callable[[Tensor, HookPoint], Tensor | None]]
"""Hook points, and the function that acts there."""


@dataclass(frozen=True)
class GradientRule:
    """How a backward pass departs from the gradient."""

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """What acts in one run; fresh for each, since it may keep what passed.

        Raises:
            InputError: the network has a part that the rule does not know.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class HoldNormScale(GradientRule):
    """The denominator of every norm is a constant (the LN-rule of Ali et al. 2022, arXiv 2202.07304).

    Patches of streams of different size are then told apart by their direction. The mean that a LayerNorm subtracts
    is linear, and is differentiated.
    """

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """Cut the graph at the scale of every norm, the final one and those of queries and keys included."""
        return [(_points(model, "hook_scale"), hold_scale)]


@dataclass(frozen=True)
class HoldPattern(GradientRule):
    """Attention patterns are constants: queries and keys get no gradient (the AH-rule of Ali et al. 2022)."""

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """Cut the graph at every pattern."""
        return [(_points(model, "hook_pattern"), lambda tensor, hook: tensor.detach())]


@dataclass(frozen=True)
class LinearizeActivations(GradientRule):
    """An activation function is the line through 0 and its value: slope `a(x) / x`, and 0 where `x` is 0.

    The identity rule of layer-wise relevance propagation. In gated MLPs it holds for the gate; the linear half keeps
    its gradient. The neurons' own norm (`solu_ln`) is a norm.
    """

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """Put, behind each activation, what has its value and the line's slope."""
        return [
            hook
            for place, part in _neuron_parts(model, self).items()
            for hook in _Line(place, part, model.hook_points()).hooks()
        ]


class _Line:
    """The activation of one part as a line, in one run."""

    def __init__(self, place: str, make: Callable[[Tensor, Tensor | None], Tensor], points: dict[str, HookPoint]):
        self.make, self.kept = make, dict[str, Tensor]()
        self.before = [name for word in ("pre", "pre_linear") if (name := f"{place}.hook_{word}") in points]
        behind = f"{place}.hook_mid"
        self.behind = behind if behind in points else f"{place}.hook_post"

    def hooks(self) -> list[RuleHook]:
        return [(self.before, self._keep), ([self.behind], self._replace)]

    def _keep(self, tensor: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None
        self.kept[hook.name] = tensor

    def _replace(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        pre, *linear = (self.kept.pop(name) for name in self.before)
        held = pre.detach()
        # In the linear half the gradient is the true one, with the gate's activation held.
        neurons = self.make(held, linear[0] if linear else None)
        ratio = torch.where(held == 0, 0.0, neurons.detach() / torch.where(held == 0, 1.0, held))
        slope = (pre - held) * ratio
        return tensor.detach() + (neurons - neurons.detach()) + slope


@dataclass(frozen=True)
class HalveProducts(GradientRule):
    """Each factor of a product gets half of the gradient, so that both together account for the product once.

    The half rule of layer-wise relevance propagation (Rezaei Jafari et al. 2025), and the gradient normalisation of
    Edin et al. 2025.

    Attributes:
        mlp: gate times linear half, in gated MLPs and experts.
        attention: pattern times values, and query times key; values then get a half, queries and keys a quarter.
    """

    mlp: bool = True
    attention: bool = False

    def __post_init__(self) -> None:
        read_flag(self.mlp, what="HalveProducts: mlp")
        read_flag(self.attention, what="HalveProducts: attention")

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """Halve the gradient where each product is known."""
        points, places = model.hook_points(), list[str]()
        if self.mlp:
            gated = [place for place in _neuron_parts(model, self) if f"{place}.hook_pre_linear" in points]
            places += [f"{place}.hook_post" for place in gated]
        if self.attention:
            places += [*_points(model, "hook_attn_scores"), *_points(model, "hook_z")]
        return [(places, lambda tensor, hook: tensor / 2 + (tensor / 2).detach())]


@dataclass(frozen=True)
class SoftenSoftmax(GradientRule):
    r"""The softmax of attention passes gradients back as one at a higher temperature does (Edin et al. 2025).

        d p_i / d s_j := p^T_i (\delta_ij - p^T_j)    with p^T = softmax(s / T)

    so that the redundant keys of a saturated softmax are seen.

    Attributes:
        temperature: `T`, 1 for the gradient itself.
    """

    temperature: float = 2.0

    def __post_init__(self) -> None:
        is_number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not is_number or not 0 < self.temperature < float("inf"):
            raise InputError(f"SoftenSoftmax: temperature is {show(self.temperature)}; expected a number above 0")

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """Put in each pattern's place what has its value and the softer gradient."""
        kept: dict[str, Tensor] = {}

        def keep(scores: Tensor, hook: HookPoint) -> None:
            assert hook.name is not None
            kept[_place(hook.name)] = scores

        def replace(pattern: Tensor, hook: HookPoint) -> Tensor:
            assert hook.name is not None
            logits = model.get_submodule(_place(hook.name))._parameters.get("sinks")
            scores = kept.pop(_place(hook.name)) / self.temperature
            sinks = None if logits is None else logits.detach() / self.temperature
            soft = self.temperature * compute_pattern(scores, can_hide_all=True, sinks=sinks)
            return pattern.detach() + (soft - soft.detach())

        return [(_points(model, "hook_attn_scores"), keep), (_points(model, "hook_pattern"), replace)]


@dataclass(frozen=True)
class ExactSoftmax(GradientRule):
    """What a patch of queries or keys does to the pattern is computed, and only what follows is estimated.

    The "QK fix" of Kramar et al. 2024: where a softmax is saturated its gradient is 0, whatever a patch would do.
    Where queries and keys are not patched it changes nothing. It costs one run of the patched layers.
    """

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """Nothing: gradients stay what they are."""
        return []


@dataclass(frozen=True)
class GradDrop(GradientRule):
    """One run for each layer, in which this layer passes no gradient on (Kramar et al. 2024).

    An effect whose direct and indirect part cancel in the gradient, and would not in a patch, shows where one of the
    two is left out. Of a cell's estimates the magnitudes are averaged,

        |effect| = 1 / (n_layers - 1) sum over layers |effect with this layer left out|

    for each pair; the sign is the plain estimate's.
    """

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """Nothing in all runs; see `drop`."""
        return []

    def drop(self, model: HookedCausalLM, layer: int) -> list[RuleHook]:
        """Cut the graph where a layer adds to the stream."""
        places = [
            name for word in ("attn_out", "mlp_out") if (name := f"blocks.{layer}.hook_{word}") in model.hook_points()
        ]
        return [(places, lambda tensor, hook: tensor.detach())]


RuleSet = Literal["gradient", "norms", "linear", "relp", "gim", "atp*"]
RULE_SETS: dict[RuleSet, tuple[GradientRule, ...]] = {
    "gradient": (),
    "norms": (HoldNormScale(),),
    "linear": (HoldNormScale(), LinearizeActivations()),
    "relp": (HoldNormScale(), LinearizeActivations(), HalveProducts()),
    "gim": (HoldNormScale(), SoftenSoftmax(2.0), HalveProducts(attention=True)),
    "atp*": (ExactSoftmax(), GradDrop()),
}
"""The rules of each named set."""

Rules = RuleSet | Sequence[GradientRule]

# A product of an activation is halved behind the line, and a softmax reads the scores that are halved already.
_ORDER: list[type[GradientRule]] = [HoldNormScale, LinearizeActivations, HalveProducts, SoftenSoftmax, HoldPattern]


@dataclass(frozen=True)
class ReadRules:
    """Rules as a call asked for them.

    Attributes:
        rules: those that act.
        name: how results call them: a set's name, or the rules' own.
    """

    rules: tuple[GradientRule, ...]
    name: str

    def hooks(self, model: HookedCausalLM) -> list[RuleHook]:
        """What acts in one run, those of one point in the order in which they go together."""
        ranked = sorted(self.rules, key=lambda rule: _ORDER.index(type(rule)) if type(rule) in _ORDER else len(_ORDER))
        return [hook for rule in ranked for hook in rule.hooks(model) if hook[0]]

    def find(self, kind: type[GradientRule]) -> GradientRule | None:
        """The rule of a kind, if it is among them."""
        return next((rule for rule in self.rules if isinstance(rule, kind)), None)

    def drops(self, model: HookedCausalLM) -> list[list[RuleHook]]:
        """What acts besides in each of the runs of `GradDrop`, none where it does not act."""
        rule = self.find(GradDrop)
        return [] if rule is None else [rule.drop(model, layer) for layer in range(model.cfg.n_layers)]  # type: ignore[attr-defined]


GRADIENT = ReadRules((), "gradient")
"""No rule: the gradient itself."""


def read_rules(model: HookedCausalLM, rules: object, *, what: str, default: RuleSet) -> ReadRules:
    """Rules that a caller named or gave, for a network; None: the default.

    Raises:
        InputError: no set has the name, something is no rule, a rule is there twice, two contradict each other, or one
            does not go with the network.
    """
    rules = default if rules is None else rules
    if isinstance(rules, str):
        if rules not in RULE_SETS:
            raise InputError(
                f"{what}: rules is {rules!r}; expected one of {', '.join(map(repr, get_args(RuleSet)))}, or a list of "
                "rules such as [patching.HoldNormScale()]"
            )
        read = ReadRules(RULE_SETS[rules], rules)
    else:
        read = ReadRules(_read_list(rules, what=what), "")
        read = ReadRules(read.rules, " + ".join(map(str, read.rules)) or "gradient")
    if read.find(HoldPattern) is not None and read.find(SoftenSoftmax) is not None:
        raise InputError(f"{what}: HoldPattern lets no gradient through a softmax that SoftenSoftmax changes; keep one")
    if read.find(GradDrop) is not None and model.cfg.n_layers < 2:
        raise InputError(f"{what}: GradDrop leaves out one layer of several, and this network has one; leave it out")
    read.hooks(model)
    return read


def _read_list(rules: object, *, what: str) -> tuple[GradientRule, ...]:
    if not isinstance(rules, Sequence) or not all(isinstance(rule, GradientRule) for rule in rules):
        raise InputError(
            f"{what}: rules is {show(rules)}; expected a list of rules such as [patching.HoldNormScale()], or one of "
            f"{', '.join(map(repr, get_args(RuleSet)))}"
        )
    kinds = [type(rule) for rule in rules]
    if twice := sorted({kind.__name__ for kind in kinds if kinds.count(kind) > 1}):
        raise InputError(f"{what}: rules has {', '.join(twice)} more than once; give each rule once")
    return tuple(rules)


def join_dropped(found: Sequence[Float[Tensor, "*cells pair"]]) -> Float[Tensor, "*cells pair"]:
    """The effects of the plain run, the first; with the magnitudes of the runs of `GradDrop`, where there are any."""
    plain, *dropped = found
    if not dropped:
        return plain
    magnitude = torch.stack(dropped).abs().sum(0) / (len(dropped) - 1)
    return torch.where(plain < 0, -magnitude, magnitude)


def split_at_head(hooks: Sequence[RuleHook]) -> tuple[list[RuleHook], list[RuleHook]]:
    """The same hooks, for points in and below the blocks, and for those behind them."""
    below, behind = [], []
    for names, function in hooks:
        in_head = [name for name in names if layer_of(name) is None and not is_below_blocks(name)]
        below.append(([name for name in names if name not in in_head], function))
        behind.append((in_head, function))
    return [hook for hook in below if hook[0]], [hook for hook in behind if hook[0]]


def _points(model: HookedCausalLM, word: str) -> list[str]:
    return [name for name in model.hook_points() if name.rpartition(".")[2] == word]


def _place(name: str) -> str:
    return name.rpartition(".")[0]


def _neuron_parts(model: HookedCausalLM, rule: GradientRule) -> dict[str, Callable[[Tensor, Tensor | None], Tensor]]:
    """The parts with neurons by their place, and what each makes of its preactivations.

    Raises:
        InputError: a layer has an MLP of another kind, whose neurons are not known.
    """
    points = model.hook_points()
    parts = {}
    for place in map(_place, _points(model, "hook_post")):
        part = model.get_submodule(place)
        if f"{place}.hook_pre" in points and callable(make := getattr(part, "make_neurons", None)):
            parts[place] = make
    known = {layer_of(f"{place}.hook_post") for place in parts}
    unknown = [
        layer for layer in range(model.cfg.n_layers) if f"blocks.{layer}.hook_mlp_out" in points and layer not in known
    ]
    if unknown:
        kind = type(model.get_submodule(f"blocks.{unknown[0]}.mlp")).__name__
        raise InputError(
            f"{rule}: layers {unknown} have a {kind}, whose neurons this rule does not know; a part tells them by "
            "hook_pre, hook_post and a method make_neurons(pre, linear). Leave the rule out, or write one"
        )
    return parts
