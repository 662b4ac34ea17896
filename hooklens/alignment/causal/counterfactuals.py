"""Counterfactuals: base prompts, source prompts for each variable, and the answers that a causal model gives.

A row says: run the base prompt with these variables as they are on their source prompts. A variable that a row leaves
alone has the base prompt as its source, so that an interchange changes nothing there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.alignment.causal.model import CausalModel, Ids
from hooklens.alignment.errors import AlignmentError
from hooklens.arguments import read_flag, read_int, read_number, read_seed, read_tensor, require, show
from hooklens.display import Displayed, Listing, Summary
from hooklens.patching.known.circuit import KnownCircuit
from hooklens.patching.results.file import WHOLE_NUMBER, Expectation, Expected, ResultFile, is_list

read_share = partial(read_number, expected="a share above 0 and below 1", allows=lambda share: 0 < share < 1)


_SHOWN = 20


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Counterfactuals(Displayed):
    """Interchange interventions, and the answers they should lead to.

    All prompts have as many tokens, so that positions mean the same in all of them.

    Attributes:
        base: `[row pos]`, the prompts that are run.
        sources: by variable, `[row pos]`, the prompts that its value is taken from.
        labels: `[row]`, the token that the network should answer with.
        pos: the position whose logits are the answer; negative ones count from the end.
        base_values, source_values: by variable, its values on the base and on the source prompts, where they are known.
    """

    base: Ids
    sources: Mapping[str, Ids]
    labels: Int[Tensor, " row"]
    pos: int = -1
    base_values: Mapping[str, Tensor] = field(default_factory=dict)
    source_values: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = _read_ids(self.base, "base")
        if not self.sources:
            raise AlignmentError(
                "Counterfactuals: there are no sources; give the source prompts of a variable by its name"
            )
        problems = []
        for name, tokens in self.sources.items():
            if _read_ids(tokens, f"sources[{name!r}]").shape != base.shape:
                problems.append(f"sources[{name!r}] are {show(tokens)}")
        labels = read_tensor(self.labels, what="Counterfactuals: labels", error=AlignmentError)
        if labels.shape != base.shape[:1] or labels.is_floating_point() or labels.dtype == torch.bool:
            problems.append(f"labels are {show(labels)}")
        for word, values in (("base_values", self.base_values), ("source_values", self.source_values)):
            problems += [
                f"{word}[{name!r}] are {show(one)}"
                for name, one in values.items()
                if name not in self.sources or one.shape[:1] != base.shape[:1]
            ]
        if problems:
            raise AlignmentError(
                f"Counterfactuals: {'; '.join(problems)}; base is {show(base)}: expected sources of the same shape by "
                "variable, one label for each row, and values of the same variables"
            )
        read_int(
            self.pos, what="Counterfactuals: pos", least=-base.shape[1], most=base.shape[1] - 1, error=AlignmentError
        )
        object.__setattr__(self, "base", base.long())
        object.__setattr__(self, "labels", labels.long())
        object.__setattr__(self, "sources", MappingProxyType({name: one.long() for name, one in self.sources.items()}))
        for word in ("base_values", "source_values"):
            object.__setattr__(self, word, MappingProxyType(dict(getattr(self, word))))

    @classmethod
    def of(
        cls, causal_model: CausalModel, base: Ids, sources: Mapping[str, Ids], *, pos: int = -1
    ) -> "Counterfactuals":
        """The rows of given prompts, with labels by a causal model.

        Args:
            causal_model: gives the labels.
            base: prompts `[row pos]`.
            sources: by variable, as many prompts; a row of the base's own leaves the variable alone.
            pos: the position of the answer.

        Raises:
            AlignmentError: unknown variables, prompts of other shapes, or rows that the causal model has no answer to.
        """
        _read_ids(base, "base")
        for name, tokens in sources.items():
            _read_ids(tokens, f"sources[{name!r}]")
        causal_model.check_variables(sources)
        labels = causal_model.interchange(base, sources)
        if bool((labels < 0).any()):
            rows = (labels < 0).nonzero()[:10, 0].tolist()
            raise AlignmentError(
                f"Counterfactuals: the causal model has no answer (a negative label) to rows {rows}; leave them out"
            )
        own = causal_model.run(base)
        return cls(
            base=base,
            sources=sources,
            labels=labels,
            pos=pos,
            base_values={name: own[name] for name in sources},
            source_values={name: causal_model.run(tokens)[name] for name, tokens in sources.items()},
        )

    @classmethod
    def draw(
        cls,
        causal_model: CausalModel,
        prompts: Ids,
        n: int,
        *,
        variables: Sequence[str] | None = None,
        changed: bool = True,
        pos: int = -1,
        seed: int = 0,
    ) -> "Counterfactuals":
        """Rows of prompts drawn from a pool: the base, and a source for every variable.

        Args:
            causal_model: gives the labels.
            prompts: the pool, `[prompt pos]`.
            n: how many rows.
            variables: those that are interchanged; None: all.
            changed: keep only rows whose label is not the answer to the base prompt, so that a place that keeps
                nothing has an accuracy of 0.
            pos: the position of the answer.
            seed: draws the rows; the global random state is neither read nor moved.

        Raises:
            AlignmentError: unknown variables, or a pool in which too few rows with another answer are found.
        """
        pool = _read_ids(prompts, "prompts")
        read_int(n, what="Counterfactuals.draw: n", least=1, error=AlignmentError)
        read_flag(changed, what="Counterfactuals.draw: changed", error=AlignmentError)
        names = list(causal_model.variables) if variables is None else list(variables)
        causal_model.check_variables(dict.fromkeys(names))
        generator = torch.Generator().manual_seed(
            read_seed(seed, what="Counterfactuals.draw: seed", error=AlignmentError)
        )
        kept: list[tuple[Tensor, ...]] = []
        missing, tries = n, 0
        while missing > 0:
            tries += 1
            if tries > _MOST_TRIES:
                raise AlignmentError(
                    f"Counterfactuals.draw: {n - missing} of {n} rows found in {tries - 1} rounds; interchanging "
                    f"{names} hardly ever changes the answer among these prompts, or leaves none: give others, or "
                    "changed=False"
                )
            drawn = torch.randint(len(pool), (1 + len(names), 2 * missing + 16), generator=generator).to(pool.device)
            base, sources = pool[drawn[0]], {name: pool[rows] for name, rows in zip(names, drawn[1:], strict=True)}
            labels = causal_model.interchange(base, sources)
            fits = labels >= 0
            if changed:
                fits &= labels != causal_model.run(base)["output"]
            chosen = fits.nonzero()[:missing, 0]
            kept.append((base[chosen], *(tokens[chosen] for tokens in sources.values())))
            missing -= len(chosen)
        base, *taken = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return cls.of(causal_model, base, dict(zip(names, taken, strict=True)), pos=pos)

    @classmethod
    def of_known(
        cls, known: KnownCircuit, n: int, *, variables: Sequence[str] | None = None, seed: int = 0
    ) -> "Counterfactuals":
        """Rows of a model whose circuit is known: its clean prompts, with variables taken from its corrupted ones.

        Args:
            known: the model and its algorithm, as `hooklens.patching.known` makes them.
            n: how many pairs are drawn; those to which the algorithm has no answer are left out.
            variables: those that are interchanged, all from the same prompt; None: all.
            seed: draws the pairs.

        Raises:
            AlignmentError: no known circuit, unknown variables, or no row with an answer.
            InputError: no number of pairs, or no seed.
        """
        require(
            known,
            kind=KnownCircuit,
            what="Counterfactuals.of_known: known",
            expected="a KnownCircuit",
            error=AlignmentError,
        )
        names = list(known.variables) if variables is None else list(variables)
        if unknown := [name for name in names if name not in known.variables]:
            raise AlignmentError(
                f"known circuit {known.name!r} has no variables {unknown}; it has {sorted(known.variables)}"
            )
        base, source = known.prompts(n, seed=seed)
        taken = {name: known.variables[name].value(source) for name in names}
        labels = known.answer(base, taken)
        answered = (labels >= 0).nonzero()[:, 0]
        if not len(answered):
            raise AlignmentError(
                f"known circuit {known.name!r} has no answer to any of {n} rows with {names} interchanged"
            )
        made = cls(
            base=base,
            sources=dict.fromkeys(names, source),
            # Those without an answer are left out below.
            labels=labels.clamp(min=0),
            base_values={name: known.variables[name].value(base) for name in names},
            source_values=taken,
        )
        return made.take(answered)

    def __len__(self) -> int:
        return len(self.base)

    def _summary(self) -> Summary:
        columns = {"label": self.labels, **self._shown_values()}
        rows = zip(*(column[:_SHOWN].tolist() for column in columns.values()), strict=True)
        return Summary(
            title=f"Counterfactuals({len(self)} rows of {self.base.shape[1]} tokens, variables {self.variables})",
            listing=Listing(
                columns=tuple(columns),
                rows=[tuple(map(str, row)) for row in rows],
                what="rows",
                caption="labels, and the variables' values on both prompts",
                n_rows=len(self),
                more="its tensors have all",
            ),
        )

    def _shown_values(self) -> dict[str, Tensor]:
        """The values of variables that have one for each row, on the base and on the source prompts."""
        known = {"base": self.base_values, "source": self.source_values}
        return {
            f"{name} ({where})": values[name]
            for name in self.variables[:4]
            for where, values in known.items()
            if name in values and values[name].ndim == 1
        }

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables that are interchanged."""
        return tuple(self.sources)

    def take(self, rows: Sequence[int] | Int[Tensor, " row"]) -> "Counterfactuals":
        """Some of the rows."""
        chosen = torch.as_tensor(rows, device=self.base.device)
        by_variable: dict[str, Any] = {
            word: {name: one[chosen.to(one.device)] for name, one in getattr(self, word).items()}
            for word in _BY_VARIABLE
        }
        return replace(self, base=self.base[chosen], labels=self.labels[chosen], **by_variable)

    def split(self, held_out: float = 0.25, *, seed: int = 0) -> tuple["Counterfactuals", "Counterfactuals"]:
        """Rows to train on, and rows held out; rows of the same prompts come to the same side.

        Args:
            held_out: the share that is held out.
            seed: draws them; the global random state is neither read nor moved.

        Raises:
            AlignmentError: no share, or too few different rows.
        """
        read_share(held_out, what="split: held_out", error=AlignmentError)
        generator = torch.Generator().manual_seed(read_seed(seed, what="split: seed", error=AlignmentError))
        together = torch.cat([self.base, *self.sources.values()], dim=1)
        kinds, kind_of = torch.unique(together, dim=0, return_inverse=True)
        n_out = round(held_out * len(kinds))
        if not 0 < n_out < len(kinds):
            raise AlignmentError(
                f"split: {held_out} of {len(kinds)} different rows leaves one side empty; give more rows"
            )
        out = torch.zeros(len(kinds), dtype=torch.bool)
        out[torch.randperm(len(kinds), generator=generator)[:n_out]] = True
        is_out = out.to(kind_of.device)[kind_of]
        return self.take((~is_out).nonzero()[:, 0]), self.take(is_out.nonzero()[:, 0])

    def shuffle_labels(self, *, seed: int = 0) -> "Counterfactuals":
        """The same rows with each other's labels: what can be learned from them is learned by heart."""
        generator = torch.Generator().manual_seed(read_seed(seed, what="shuffle_labels: seed", error=AlignmentError))
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        return replace(self, labels=self.labels[order])

    def save(self, path: str | Path) -> None:
        """Write the rows to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors = {"base": self.base, "labels": self.labels}
        for word in _BY_VARIABLE:
            tensors |= {f"{word}.{place}": getattr(self, word)[name] for place, name in self._held(word)}
        held = {word: [place for place, _ in self._held(word)] for word in _BY_VARIABLE}
        _FILE.write(
            path, tensors, {"variables": list(self.variables), "pos": self.pos, "held": [held[w] for w in _BY_VARIABLE]}
        )

    @classmethod
    def load(cls, path: str | Path) -> "Counterfactuals":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind.
        """
        tensors, described = _FILE.read(path, _expect)
        names = described["variables"]
        found = {
            word: {names[place]: tensors[f"{word}.{place}"] for place in places}
            for word, places in zip(_BY_VARIABLE, described["held"], strict=True)
        }
        return cls(base=tensors["base"], labels=tensors["labels"], pos=described["pos"], **found)

    def _held(self, word: str) -> list[tuple[int, str]]:
        return [(place, name) for place, name in enumerate(self.variables) if name in getattr(self, word)]


_MOST_TRIES = 200
_BY_VARIABLE = ("sources", "base_values", "source_values")


def _read_ids(given: object, word: str) -> Tensor:
    what = f"Counterfactuals: {word}"
    tokens = read_tensor(given, what=what, expected="token ids [row pos]", error=AlignmentError)
    if tokens.ndim != 2 or 0 in tokens.shape or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise AlignmentError(f"{what} is {show(tokens)}; expected token ids [row pos]")
    return tokens


def _are_places(found: object) -> bool:
    return is_list(found, lambda one: is_list(one, WHOLE_NUMBER.holds)) and isinstance(found, list) and len(found) == 3


_FILE = ResultFile(
    format="hooklens.alignment.counterfactuals-1",
    contents="counterfactuals",
    writer="Counterfactuals.save",
    keys={
        "variables": Expected("a list of texts", lambda found: is_list(found, lambda one: isinstance(one, str))),
        "pos": WHOLE_NUMBER,
        "held": Expected("three lists of whole numbers", _are_places),
    },
)


def _expect(described: dict[str, object], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    expected = {"base": Expectation(("row", "pos"), torch.int64), "labels": Expectation(("row",), torch.int64)}
    held = described["held"]
    assert isinstance(held, list)
    for word, places in zip(_BY_VARIABLE, held, strict=True):
        for place in places:
            name = f"{word}.{place}"
            found = tensors.get(name)
            shape: tuple[int | str, ...] = ("row", "pos") if word == "sources" else ("row",)
            if word != "sources" and found is not None:
                shape = ("row", *found.shape[1:])
            expected[name] = Expectation(shape, torch.int64 if word == "sources" or found is None else found.dtype)
    return expected
