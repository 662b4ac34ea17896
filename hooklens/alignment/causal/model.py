"""Causal models: the algorithm that a network is held against, as plain functions of named variables.

A causal model says what each variable is, given the tokens and other variables, and what the answer is, given them.
It can be run with some variables set from elsewhere, which gives the answer that a network has to give under an
interchange intervention if it keeps that variable where one looks (Geiger et al. 2021, "Causal Abstractions of Neural
Networks").
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.alignment.errors import AlignmentError
from hooklens.arguments import is_function, show
from hooklens.display import Displayed, Listing, Summary, one_line
from hooklens.errors import suggest_names

TOKENS = "tokens"
Ids = Int[Tensor, "row pos"]


@dataclass(frozen=True, eq=False, repr=False)
class CausalModel(Displayed):
    """Variables, and the answer they lead to.

    Every function takes what its parameters name: `tokens`, the ids `[row pos]`, or another variable; and gives a
    tensor with one entry for each row (more axes are allowed).

    Attributes:
        variables: by name, the function that gives the variable.
        output: the function that gives the answer, a token id for each row.

    Raises:
        AlignmentError: what is no function, a parameter that names nothing, or variables that depend on each other in
            a circle; all that is wrong is named.

    Example:
        >>> CausalModel(
        ...     {"sum": lambda tokens: tokens[:, 0] + tokens[:, 1], "rest": lambda sum: sum % 10},
        ...     lambda rest: rest,
        ... )
    """

    variables: Mapping[str, Callable[..., Tensor]]
    output: Callable[..., Tensor]

    def __post_init__(self) -> None:
        given = dict(self.variables)
        wrong = [
            f"{name!r} is {show(one)}" for name, one in {**given, "output": self.output}.items() if not is_function(one)
        ]
        if wrong:
            raise AlignmentError(f"CausalModel: {', '.join(wrong)}; expected functions of tokens and variables")
        if taken := [name for name in given if name in (TOKENS, "output")]:
            raise AlignmentError(f"CausalModel: no variable can be called {taken}, which mean the input and the answer")
        object.__setattr__(self, "variables", MappingProxyType(given))
        parents = {name: _parents(function) for name, function in given.items()}
        parents["output"] = _parents(self.output)
        unknown = [
            f"{name!r} asks for {parent!r}.{suggest_names(parent, [*given, TOKENS])}"
            for name, asked in parents.items()
            for parent in asked
            if parent not in given and parent != TOKENS
        ]
        if unknown:
            raise AlignmentError(
                f"CausalModel: {'; '.join(unknown)} There are 'tokens' and the variables {sorted(given)}; a parameter "
                "is called what it takes"
            )
        object.__setattr__(self, "_parents", parents)
        object.__setattr__(self, "_order", _order(parents))

    def __repr__(self) -> str:
        arrows = [f"{name}({', '.join(self._parents_of(name))})" for name in self._in_order()]
        return one_line(f"CausalModel({'; '.join(arrows)})")

    def _summary(self) -> Summary:
        return Summary(
            title=f"CausalModel of {len(self.variables)} variables",
            listing=Listing(
                columns=("variable", "from"),
                rows=[(name, ", ".join(self._parents_of(name))) for name in self._in_order()],
                what="variables",
                caption="variables in the order of the computation, and what each is made from",
                more="model.variables has all",
            ),
        )

    def run(self, tokens: Ids, interventions: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The values of all variables, and the answer under `"output"`.

        Args:
            tokens: prompts.
            interventions: variables that are set, whatever their functions would give.

        Raises:
            AlignmentError: an unknown variable, or a value of another shape or dtype than the variable's own.
        """
        self.check_variables(interventions or {})
        values: dict[str, Tensor] = {TOKENS: tokens}
        for name in self._in_order():
            own = self._compute(name, values, len(tokens))
            values[name] = (
                own if interventions is None or name not in interventions else _fit(name, interventions[name], own)
            )
        del values[TOKENS]
        return values

    def interchange(self, base: Ids, sources: Mapping[str, Ids]) -> Int[Tensor, " row"]:
        """The answers to the base prompts with variables as they are on source prompts, each on its own.

        Raises:
            AlignmentError: an unknown variable, or other shapes.
        """
        self.check_variables(sources)
        taken = {name: self.run(tokens)[name] for name, tokens in sources.items()}
        return self.run(base, taken)["output"]

    def check_variables(self, names: Mapping[str, Any]) -> None:
        """Refuse names that are no variables.

        Raises:
            AlignmentError: some are not.
        """
        unknown = [
            f"{name!r}.{suggest_names(name, list(self.variables))}" for name in names if name not in self.variables
        ]
        if unknown:
            raise AlignmentError(
                f"the causal model has no variable {', '.join(unknown)} It has {sorted(self.variables)}"
            )

    def _compute(self, name: str, values: Mapping[str, Tensor], n_rows: int) -> Tensor:
        function = self.output if name == "output" else self.variables[name]
        found: Any = function(**{parent: values[parent] for parent in self._parents_of(name)})
        if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != n_rows:
            raise AlignmentError(
                f"causal model: {name!r} gave {show(found)}; expected a tensor [{n_rows}], one for each row"
            )
        if name == "output" and (found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool):
            raise AlignmentError(f"causal model: the output is {show(found)}; expected token ids [{n_rows}]")
        return found

    def _parents_of(self, name: str) -> tuple[str, ...]:
        found: tuple[str, ...] = self._parents[name]  # type: ignore[attr-defined]
        return found

    def _in_order(self) -> tuple[str, ...]:
        found: tuple[str, ...] = self._order  # type: ignore[attr-defined]
        return found


def _parents(function: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters without a default: what a function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as reason:
        raise AlignmentError(f"CausalModel: the parameters of {show(function)} cannot be read: {reason}") from reason
    return tuple(
        one.name
        for one in parameters
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    )


def _order(parents: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The variables, each behind those it depends on, and the output last."""
    done: list[str] = []
    waiting = [name for name in parents if name != "output"]
    while waiting:
        ready = [name for name in waiting if all(one in done or one == TOKENS for one in parents[name])]
        if not ready:
            raise AlignmentError(f"CausalModel: the variables {sorted(waiting)} depend on each other in a circle")
        done += ready
        waiting = [name for name in waiting if name not in ready]
    return (*done, "output")


def _fit(name: str, given: Any, own: Tensor) -> Tensor:
    if not isinstance(given, Tensor) or given.shape != own.shape or given.dtype != own.dtype:
        raise AlignmentError(
            f"causal model: the value of {name!r} is {show(given)}; expected {show(own)}, as its own is"
        )
    return given.to(own.device)
