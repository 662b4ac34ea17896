"""A model whose circuit is known: what methods that search for circuits and variables are graded by.

`KnownCircuit` holds the model, its true edges, prompts, a metric, the algorithm that it carries out, and where each
variable of that algorithm lives. The algorithm can be asked what it would answer if variables had other values, which
is what a model's answer under an interchange intervention is compared with (Geiger et al. 2021, "Causal Abstractions of
Neural Networks").
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.arguments import read_int, read_seed, read_tensor, require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Summary
from hooklens.errors import InputError, suggest_names
from hooklens.hooks.choice import Choice
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.template import Pair

Ids = Int[Tensor, "prompt pos"]
Values = Mapping[str, Tensor]
"""Values of variables by name: `[prompt]`, or `[prompt read]` of one that has a value at each of several positions."""

Algorithm = Callable[[Tensor, Values], Tensor]
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class KnownVariable:
    """A variable of an algorithm, and where a model holds it.

    Taking the span of `basis` at `hook_name` and `pos` from another prompt's run makes the model answer as the
    algorithm does with the variable's value taken from that prompt.

    Attributes:
        name: what the algorithm calls it.
        hook_name: the hook point.
        basis: orthonormal rows that span the subspace where it lives.
        pos: the positions at which it lives, as edits take them.
        head: the head, at a hook point that has heads; None: the point has none.
        read: from tokens to values.
    """

    name: str
    hook_name: str
    basis: Float[Tensor, "direction d_model"] = field(repr=False)
    pos: Choice
    head: int | None = None
    read: Callable[[Tensor], Tensor] = field(repr=False)

    def value(self, tokens: Ids) -> Int[Tensor, "..."]:
        """The variable's value for each prompt: `[prompt]`, or `[prompt read]` where it lives at several positions.

        Raises:
            InputError: no token ids `[prompt pos]`.
        """
        return self.read(_read_ids(tokens, f"variable {self.name!r}: tokens"))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class KnownCircuit(Displayed):
    """A model, and the circuit by which it answers.

    Attributes:
        name: what the model does.
        model: the model, in evaluation mode.
        circuit: the edges that its answers depend on, and all of them.
        metric: what is measured on its pairs; answers come with the pairs.
        variables: the variables of the algorithm, by name.
        algorithm: from tokens and values of variables to answers, see `answer`.
        draw: from a number and a generator to so many prompts of the task, and as many others that positions mean the
            same in. `pairs` chooses among them; training takes all.

    Raises:
        SiteError: edges or hook points that the model has not, or a basis or head that does not go with its hook point.
    """

    name: str
    model: HookedCausalLM
    circuit: Circuit
    metric: Metric
    variables: Mapping[str, KnownVariable]
    algorithm: Algorithm
    draw: Draw

    def __post_init__(self) -> None:
        self.circuit.check(self.model.cfg)
        problems = [problem for one in self.variables.values() for problem in _find_problems(one, self.model)]
        if problems:
            raise SiteError(f"known circuit {self.name!r}: {'; '.join(problems)}")
        object.__setattr__(self, "variables", MappingProxyType(dict(self.variables)))

    def _summary(self) -> Summary:
        return Summary(
            title=f"KnownCircuit {self.name!r}: {len(self.circuit)} of {len(Circuit.full(self.model.cfg))} edges",
            facts={
                "metric": self.metric.name,
                **{f"variable {one.name!r}": _describe(one) for one in list(self.variables.values())[:_SHOWN]},
                "other variables": f"{len(self.variables) - _SHOWN}" if len(self.variables) > _SHOWN else None,
            },
            listing=self.circuit.edge_listing(),
        )

    def pairs(self, n: int, *, seed: int = 0) -> list[Pair]:
        """Pairs of prompts with different answers; the corrupted prompt's is the clean one's wrong answer.

        Each variable alone, with the corrupted prompt's value, makes the algorithm give another answer to the clean
        prompt, so that every edge of the circuit matters in every pair.

        Args:
            n: how many.
            seed: draws them; the global random state is neither read nor moved.

        Raises:
            InputError: no number of pairs, or no seed; or the task has no such pairs.
        """
        clean, corrupted = self.prompts(n, seed=seed)
        answers, wrongs = (self.answer(tokens).tolist() for tokens in (clean, corrupted))
        rows = zip(clean.cpu(), corrupted.cpu(), answers, wrongs, strict=True)
        return [Pair(one, other, answer=answer, wrong=wrong) for one, other, answer, wrong in rows]

    def prompts(self, n: int, *, seed: int = 0) -> tuple[Ids, Ids]:
        """The same pairs as two tensors of token ids on the model's device, clean and corrupted.

        Raises:
            InputError: no number of pairs, or no seed; or the task has no such pairs.
        """
        read_int(n, what=f"known circuit {self.name!r}: n", least=1)
        generator = torch.Generator().manual_seed(read_seed(seed, what=f"known circuit {self.name!r}: seed"))
        found: list[tuple[Tensor, Tensor]] = []
        missing, n_empty = n, 0
        while missing > 0:
            clean, corrupted = self.draw(4 * missing + 32, generator)
            kept = self._are_told_apart(clean, corrupted).nonzero()[:missing, 0]
            found.append((clean[kept], corrupted[kept]))
            missing, n_empty = missing - len(kept), 0 if len(kept) else n_empty + 1
            if n_empty == _EMPTY_DRAWS:
                raise InputError(
                    f"known circuit {self.name!r}: of {_EMPTY_DRAWS} draws of prompts none held a pair in which every "
                    "variable makes a difference; let draw give such pairs more often"
                )
        device = self.model.device
        return torch.cat([one for one, _ in found]).to(device), torch.cat([other for _, other in found]).to(device)

    def _are_told_apart(self, clean: Ids, corrupted: Ids) -> Bool[Tensor, " prompt"]:
        own = self.answer(clean)
        others = [self.answer(corrupted)]
        others += [self.answer(clean, {name: one.value(corrupted)}) for name, one in self.variables.items()]
        answers = torch.stack(others)
        return ((answers != own) & (answers >= 0)).all(0) & (own >= 0)

    def answer(self, tokens: Ids, values: Values | None = None) -> Int[Tensor, " prompt"]:
        """The token that the algorithm answers with; -1 where the values given leave it without an answer.

        Args:
            tokens: prompts as `pairs` draws them.
            values: variables that are set, by name; the others follow from the tokens and from these. What a variable
                is on other prompts is `variables[name].value(other_tokens)`.

        Raises:
            InputError: no token ids, unknown variables, or values of another shape than the variable's own.
        """
        tokens = _read_ids(tokens, f"known circuit {self.name!r}: tokens")
        given = require(
            {} if values is None else values,
            kind=Mapping,
            what=f"known circuit {self.name!r}: values",
            expected="values by the name of the variable",
        )
        for name, value in given.items():
            self._check_value(name, value, tokens)
        return self.algorithm(tokens, given)

    def _check_value(self, name: object, value: object, tokens: Ids) -> None:
        if not isinstance(name, str) or name not in self.variables:
            hint = suggest_names(name, list(self.variables)) if isinstance(name, str) else ""
            raise InputError(
                f"known circuit {self.name!r} has no variable {name!r}.{hint} It has {sorted(self.variables)}"
            )
        own = self.variables[name].value(tokens)
        if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
            raise InputError(
                f"known circuit {self.name!r}: the value of {name!r} is {show(value)}; expected {show(own)}, as "
                f"variables[{name!r}].value(tokens) gives it"
            )


_SHOWN = 8
_EMPTY_DRAWS = 50


def _find_problems(variable: KnownVariable, model: HookedCausalLM) -> list[str]:
    """What keeps a variable from living where it says."""
    point = model.hook_points().get(variable.hook_name)
    if point is None or point.site is None:
        return [f"variable {variable.name!r} lives at {variable.hook_name!r}, which is no hook point of the model"]
    axes = point.site.axes
    size = model.cfg.size("d_model")
    if axes[:2] != ("batch", "pos") or axes[-1] != "d_model":
        return [
            f"variable {variable.name!r} lives at {variable.hook_name!r} {list(axes)}, which is no part of the stream"
        ]
    problems = []
    if list(variable.basis.shape[1:]) != [size]:
        problems.append(
            f"the basis of variable {variable.name!r} is {show(variable.basis)}, expected one [direction, {size}]"
        )
    n_heads = model.cfg.size(axes[2]) if len(axes) == 4 else None
    if (variable.head is None) != (n_heads is None) or not 0 <= (variable.head or 0) < (n_heads or 1):
        expected = "None, for it has no heads" if n_heads is None else f"one of 0 to {n_heads - 1}"
        problems.append(f"the head of variable {variable.name!r} is {variable.head}, expected {expected}")
    return problems


def _describe(variable: KnownVariable) -> str:
    head = "" if variable.head is None else f", head {variable.head}"
    return f"{len(variable.basis)} directions of {variable.hook_name}{head}, pos {variable.pos}"


def _read_ids(given: object, what: str) -> Tensor:
    tokens = read_tensor(given, what=what, expected="token ids [prompt pos]")
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise InputError(f"{what} is {show(tokens)}; expected token ids [prompt pos]")
    return tokens
