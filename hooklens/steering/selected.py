"""What was chosen from many candidate directions, and why, as a value."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import read_number, reads
from hooklens.display import Cell, Displayed, Listing, Summary
from hooklens.optional import import_package
from hooklens.patching.results.file import (
    NUMBER,
    WHOLE_NUMBER,
    Expectation,
    Expected,
    ResultFile,
    expect_numbers_of,
    is_list,
)
from hooklens.steering.errors import SteeringError
from hooklens.steering.provenance import PROVENANCE, Provenance
from hooklens.steering.vectors import SteeringVector
from hooklens.viz.charts import Backend, draw_lines

if TYPE_CHECKING:
    import pandas


_SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """What a candidate has to meet.

    Attributes:
        max_kl: its KL score is below, in nats.
        min_induce: its induce score is above, in nats.
        deepest: its layer is below this part of all.
    """

    max_kl: float
    min_induce: float
    deepest: float


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DirectionSelection(Displayed):
    """Candidate directions with their scores on held-out prompts; see `hooklens.steering.selection`.

    Attributes:
        directions: the candidates.
        means: the mean streams of the negative and the positive prompts, whose differences they are.
        layers: they are of the stream entering these blocks.
        positions: and of these tokens.
        n_layers: blocks of the model.
        bypass: log-odds of the behaviour on positive prompts while the candidate is ablated, in nats.
        induce: log-odds on negative prompts while it is added.
        kl: divergence on negative prompts while it is ablated, in nats.
        positive, negative: log-odds without any edit.
        criteria: what a candidate has to meet.
        held_out: how many positive and negative prompts scores are means of.
        provenance: of the candidates; its hash is of the held-out prompts, too.
    """

    directions: Float[Tensor, "positions layers d_model"]
    means: Float[Tensor, "2 ..."]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    n_layers: int
    bypass: Float[Tensor, "positions layers"]
    induce: Float[Tensor, "positions layers"]
    kl: Float[Tensor, "positions layers"]
    positive: float
    negative: float
    criteria: Criteria
    held_out: tuple[int, int]
    provenance: Provenance

    @property
    def admissible(self) -> Bool[Tensor, "positions layers"]:
        """Which candidates meet the criteria; one of length 0, of tokens that all prompts share, does not."""
        shallow = torch.tensor(self.layers) < self.criteria.deepest * self.n_layers
        is_usable = (self.directions != 0).any(-1)
        is_usable = is_usable & self.bypass.isfinite() & self.induce.isfinite() & self.kl.isfinite()
        return is_usable & (self.induce > self.criteria.min_induce) & (self.kl < self.criteria.max_kl) & shallow

    @property
    def chosen(self) -> tuple[int, int] | None:
        """The position and the layer of the chosen candidate; None: no candidate meets the criteria."""
        admissible = self.admissible
        if not bool(admissible.any()):
            return None
        place, layer = divmod(int(self.bypass.masked_fill(~admissible, torch.inf).argmin()), len(self.layers))
        return self.positions[place], self.layers[layer]

    @property
    def vector(self) -> SteeringVector:
        """The chosen candidate.

        Raises:
            SteeringError: no candidate meets the criteria.
        """
        if self.chosen is None:
            raise SteeringError(f"{self.why}; choose by others: selection.choose_by(max_kl=...), or `vector_at`")
        return self.vector_at(*self.chosen)

    def vector_at(self, position: int, layer: int) -> SteeringVector:
        """The candidate of a position and a layer.

        Raises:
            SteeringError: there is none.
        """
        if position not in self.positions or layer not in self.layers:
            raise SteeringError(
                f"there is no candidate of position {position} and layer {layer}; expected one of the positions "
                f"{list(self.positions)} and of the layers {list(self.layers)}"
            )
        place = self.positions.index(position), self.layers.index(layer)
        direction = self.directions[place]
        unit = torch.nn.functional.normalize(direction, dim=-1, eps=torch.finfo(direction.dtype).tiny)
        levels = self.means[(slice(None), *place)] @ unit
        provenance = replace(self.provenance, positions=str(position))
        return SteeringVector(
            name=f"blocks.{layer}.hook_resid_pre", direction=direction, levels=levels, provenance=provenance
        )

    @reads(
        SteeringError,
        max_kl=partial(read_number, expected="a divergence in nats, > 0", allows=lambda number: number > 0),
        min_induce=partial(read_number, expected="log-odds in nats"),
        deepest=partial(read_number, expected="a part of the layers, 0 to 1", allows=lambda number: 0 < number <= 1),
    )
    def choose_by(
        self, *, max_kl: float | None = None, min_induce: float | None = None, deepest: float | None = None
    ) -> "DirectionSelection":
        """The same candidates under other criteria; nothing runs.

        Raises:
            SteeringError: a criterion that is none.
        """
        given = {"max_kl": max_kl, "min_induce": min_induce, "deepest": deepest}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, criteria=replace(self.criteria, **changes))

    @property
    def why(self) -> str:
        """What was chosen and why, in a sentence or two."""
        limits = self.criteria
        n, n_left = self.bypass.numel(), int(self.admissible.sum())
        refused = (
            f"{int((self.kl >= limits.max_kl).sum())} have KL >= {limits.max_kl:g}, "
            f"{int((self.induce <= limits.min_induce).sum())} induce <= {limits.min_induce:g}, "
            f"{sum(layer >= limits.deepest * self.n_layers for layer in self.layers) * len(self.positions)} a layer "
            f"from {limits.deepest:g} of all on"
        )
        if self.chosen is None:
            return f"none of {n} candidates meets the criteria: {refused} (least KL {float(self.kl.min()):.3g})"
        position, layer = self.chosen
        place = self.positions.index(position), self.layers.index(layer)
        return (
            f"layer {layer}, position {position}: the least bypass score of the {n_left} candidates of {n} that meet "
            f"the criteria ({refused}). Ablated, the log-odds on positive prompts go from {self.positive:.3g} to "
            f"{float(self.bypass[place]):.3g}; added, on negative ones from {self.negative:.3g} to "
            f"{float(self.induce[place]):.3g}; KL {float(self.kl[place]):.3g}"
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for each candidate: `position`, `layer`, the three scores, `admissible`, `chosen`, and its `norm`."""
        rows = [
            {
                "position": position,
                "layer": layer,
                "bypass": float(self.bypass[i, j]),
                "induce": float(self.induce[i, j]),
                "kl": float(self.kl[i, j]),
                "admissible": bool(self.admissible[i, j]),
                "chosen": (position, layer) == self.chosen,
                "norm": float(self.directions[i, j].norm()),
            }
            for i, position in enumerate(self.positions)
            for j, layer in enumerate(self.layers)
        ]
        frame: pandas.DataFrame = import_package("pandas").DataFrame(rows)
        return frame

    def plot(self, *, backend: Backend = "plotly") -> Any:
        """The three scores over layers, a line for each position.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        scores = {"bypass score": self.bypass, "induce score": self.induce, "KL": self.kl}
        panels = {
            name: {f"position {position}": row.tolist() for position, row in zip(self.positions, score, strict=True)}
            for name, score in scores.items()
        }
        return draw_lines(("layer", [str(one) for one in self.layers]), panels, backend=backend, title="candidates")

    def save(self, path: str | Path) -> None:
        """Write the selection to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        described = {
            "layers": list(self.layers),
            "positions": list(self.positions),
            "n_layers": self.n_layers,
            "positive": self.positive,
            "negative": self.negative,
            "criteria": asdict(self.criteria),
            "held_out": list(self.held_out),
            "provenance": self.provenance.to_json(),
        }
        _FILE.write(path, tensors, described)

    @classmethod
    def load(cls, path: str | Path) -> "DirectionSelection":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no selection.
        """
        tensors, described = _FILE.read(path, _expect)
        return cls(
            **tensors,
            layers=tuple(described["layers"]),
            positions=tuple(described["positions"]),
            n_layers=described["n_layers"],
            positive=described["positive"],
            negative=described["negative"],
            criteria=Criteria(**described["criteria"]),
            held_out=(described["held_out"][0], described["held_out"][1]),
            provenance=Provenance.from_json(described["provenance"]),
        )

    def _summary(self) -> Summary:
        admissible, chosen = self.admissible, self.chosen
        order = self.bypass.flatten().nan_to_num(torch.inf).argsort(stable=True)[:_SHOWN].tolist()
        rows: list[tuple[Cell, ...]] = []
        for place in order:
            cell = divmod(place, len(self.layers))
            position, layer = self.positions[cell[0]], self.layers[cell[1]]
            scores = (float(found[cell]) for found in (self.bypass, self.induce, self.kl))
            verdict = "chosen" if (position, layer) == chosen else "meets them" if admissible[cell] else ""
            rows.append((str(position), str(layer), *scores, verdict))
        return Summary(
            title=f"DirectionSelection of {self.bypass.numel():,} candidates",
            facts={"found": self.why, **self.provenance.facts()},
            listing=Listing(
                columns=("pos", "layer", "bypass", "induce", "KL", "criteria"),
                rows=rows,
                what="candidates",
                caption="candidates with the least bypass scores",
                n_rows=self.bypass.numel(),
            ),
        )


_TENSORS = ("directions", "means", "bypass", "induce", "kl")
_NUMBERS = Expected("a list of whole numbers", lambda found: bool(found) and is_list(found, WHOLE_NUMBER.holds))

_FILE = ResultFile(
    format="hooklens direction selection 1",
    contents="a selection of directions",
    writer="DirectionSelection.save",
    keys={
        "layers": _NUMBERS,
        "positions": _NUMBERS,
        "n_layers": WHOLE_NUMBER,
        "positive": NUMBER,
        "negative": NUMBER,
        "criteria": expect_numbers_of(Criteria),
        "held_out": Expected("two whole numbers", lambda found: _NUMBERS.holds(found) and len(found) == 2),
        "provenance": PROVENANCE,
    },
)


def _expect(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    table = (len(described["positions"]), len(described["layers"]))
    return {
        "directions": Expectation((*table, "d_model")),
        "means": Expectation((2, *table, "d_model")),
        **{name: Expectation(table, torch.float64) for name in ("bypass", "induce", "kl")},
    }
