"""Scores of units, which circuits are chosen by and which can be checked against units that are ablated one by one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_int, read_one_of, read_seed
from hooklens.display import Displayed, Listing, Summary
from hooklens.errors import HookLensError, InputError
from hooklens.optional import import_package
from hooklens.patching.estimates.check import EstimateCheck
from hooklens.patching.estimates.estimate import Chosen, RunExactly
from hooklens.patching.results.file import TEXT, Expectation, ResultFile
from hooklens.patching.units.circuit import UnitCircuit, UnitName

if TYPE_CHECKING:
    import pandas

_LISTED = 100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class UnitScores(Displayed):
    """The score of every unit, averaged over pairs.

    Attributes:
        scores: by hook name, `[unit]`: by how much a unit moves the metric to the clean run's side when it is not
            ablated. Above 0 it works for the behaviour, below against.
        metric: the metric's name.
        method: how units were scored: `"atp"` or `"exact"`.
        rules: the named set of gradient rules, or the rules themselves.
        ablation: what stood in the place of a unit's own value.
        checked: what the last `check` has found; None before the first.
        run_exactly: ablates units one by one, on the model and the prompts, which it holds; None where the scores are
            exact themselves, and in what a file held.
    """

    scores: Mapping[str, Float[Tensor, " unit"]]
    metric: str
    method: str
    rules: str
    ablation: str
    checked: EstimateCheck | None = field(default=None, init=False, compare=False)
    run_exactly: RunExactly | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return sum(map(len, self.scores.values()))

    def __getitem__(self, unit: UnitName) -> float:
        name, entry = unit
        if name not in self.scores or not 0 <= entry < len(self.scores[name]):
            raise InputError(f"no unit {unit!r}; units were scored at {', '.join(self.scores)}")
        return float(self.scores[name][entry])

    def _summary(self) -> Summary:
        return Summary(
            title=f"UnitScores({len(self)} units of {len(self.scores)} hook points, {self.metric}, {self.method})",
            facts={"scored": self._how, "ablation": self.ablation, "known": self._known},
            listing=Listing(
                columns=("hook point", "entry", "score"),
                rows=[(name, str(entry), self[name, entry]) for name, entry in self.top(_LISTED)],
                what="units",
                caption="units with the largest scores",
                n_rows=len(self),
                more="scores.top(k) has more",
            ),
        )

    @property
    def _how(self) -> str:
        return self.method if self.method == "exact" else f"{self.method}, rules {self.rules}"

    @property
    def _known(self) -> str:
        if self.checked is not None:
            return self.checked.summary
        if self.method == "exact":
            return "exact"
        return "not checked: .check(k) ablates the strongest units one by one"

    def check(self, k: int | None = 20, *, sample: int = 20, seed: int = 0, progress: bool = True) -> EstimateCheck:
        """Ablate some units one by one, and see how far the scores can be trusted.

        The result is kept in `checked`, and the display of this value tells it.

        Args:
            k: how many of the units with the largest scores by magnitude to run; None: all there are.
            sample: how many of the others, drawn at random.
            seed: of the draw.
            progress: show a progress bar.

        Raises:
            InputError: no numbers of units.
            HookLensError: the scores are exact, or were read from a file, which holds no model.

        Warns:
            EstimateWarning: the correlation of estimated and exact scores is below 0.9.
        """
        if self.method == "exact":
            raise HookLensError("check: these scores are exact; there is nothing to compare them with")
        if self.run_exactly is None:
            raise HookLensError(
                "check: these scores were read from a file, which holds neither model nor prompts, so nothing can be "
                "run; estimate anew with patching.score_units"
            )
        chosen = Chosen.of(torch.cat(list(self.scores.values())), k, sample, seed)
        cells = [{"name": name, "unit": entry} for name, entry in self._units()]
        instead = "other rules (rules=...), or score_units(..., method='exact')"
        return chosen.keep(self, cells, self.run_exactly, method=self._how, progress=progress, instead=instead)

    def _units(self) -> list[UnitName]:
        return [(name, entry) for name, scores in self.scores.items() for entry in range(len(scores))]

    def top(self, k: int, *, by: Literal["absolute", "signed"] = "absolute") -> list[UnitName]:
        """The `k` units with the largest scores, by absolute value or by those that work for the behaviour.

        Raises:
            InputError: no number of units, or an unknown order.
        """
        size = read_int(k, what="UnitScores.top: k", least=0)
        order = read_one_of(by, what="UnitScores.top: by", options=("absolute", "signed"))
        together = torch.cat(list(self.scores.values()))
        strength = together if order == "signed" else together.abs()
        chosen = strength.argsort(descending=True, stable=True)[:size].tolist()
        units = self._units()
        return [units[index] for index in chosen]

    def circuit(self, k: int, *, by: Literal["absolute", "signed"] = "absolute") -> UnitCircuit:
        """The circuit of the `k` strongest units.

        Raises:
            InputError: as `top`.
        """
        return self._circuit_of(self.top(k, by=by))

    def random_circuit(self, k: int, *, seed: int = 0) -> UnitCircuit:
        """A circuit of `k` units drawn at random, to compare those that scores choose with.

        Raises:
            InputError: no number of units, or no seed.
        """
        size = read_int(k, what="UnitScores.random_circuit: k", least=0, most=len(self))
        generator = torch.Generator().manual_seed(read_seed(seed, what="UnitScores.random_circuit: seed"))
        units = self._units()
        return self._circuit_of([units[index] for index in torch.randperm(len(units), generator=generator)[:size]])

    def _circuit_of(self, units: list[UnitName]) -> UnitCircuit:
        kept: dict[str, list[int]] = {name: [] for name in self.scores}
        for name, entry in units:
            kept[name].append(entry)
        return UnitCircuit({name: tuple(entries) for name, entries in kept.items()})

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per unit, the strongest first: hook name, entry, score."""
        rows = [(*unit, self[unit]) for unit in self.top(len(self))]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=["name", "unit", "score"])
        return table

    def save(self, path: str | Path) -> None:
        """Write the scores to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        _FILE.write(path, dict(self.scores), {name: getattr(self, name) for name in _FILE.keys})

    @classmethod
    def load(cls, path: str | Path) -> "UnitScores":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        tensors, described = _FILE.read(path, _expect_tensors)
        return cls(scores=tensors, **described)


_FILE = ResultFile(
    format="hooklens.patching.unit-scores-2",
    contents="scores of units",
    writer="UnitScores.save",
    keys={"metric": TEXT, "method": TEXT, "rules": TEXT, "ablation": TEXT},
)


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    return {name: Expectation((len(tensor) if tensor.ndim else 0,)) for name, tensor in tensors.items()}
