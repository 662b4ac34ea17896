"""Strength by vector, with the effect and the damage beside each other, as a value."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_number, read_one_of, reads
from hooklens.axes import layer_of
from hooklens.display import Cell, Displayed, Listing, Picture, Summary
from hooklens.optional import import_package
from hooklens.patching.results.file import NUMBER, TEXT, WHOLE_NUMBER, Expectation, Expected, ResultFile, is_list
from hooklens.steering.errors import SteeringError
from hooklens.steering.provenance import PROVENANCE, Provenance
from hooklens.viz.charts import Backend, draw_lines
from hooklens.viz.excerpt import thumbnail

if TYPE_CHECKING:
    import pandas


class StrengthChoice(NamedTuple):
    """One cell of a table.

    Attributes:
        name: the hook point of the vector.
        strength: how many times it acts.
        effect: the metric.
        kl: the damage in nats.
        perplexity: of neutral text.
    """

    name: str
    strength: float
    effect: float
    kl: float
    perplexity: float


_SHOWN = 100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SteeringTable(Displayed):
    """What each vector does at each strength; see `hooklens.steering.strengths`.

    Attributes:
        names: the hook points of the vectors.
        strengths: how many times each acts.
        metric: the name of the effect.
        how: `"add"` or `"clamp"`.
        effect: the metric, mean over prompts.
        standard_error: of that mean; NaN for a single prompt.
        kl: on neutral text, in nats for each token.
        perplexity: of neutral text.
        plain_effect, plain_perplexity: without steering.
        n_prompts: prompts of the effect.
        n_neutral_tokens: tokens of neutral text.
        provenance: of the first vector.
    """

    names: tuple[str, ...]
    strengths: tuple[float, ...]
    metric: str
    how: str
    effect: Float[Tensor, "vectors strengths"]
    standard_error: Float[Tensor, "vectors strengths"]
    kl: Float[Tensor, "vectors strengths"]
    perplexity: Float[Tensor, "vectors strengths"]
    plain_effect: float
    plain_perplexity: float
    n_prompts: int
    n_neutral_tokens: int
    provenance: Provenance

    @reads(
        SteeringError,
        max_kl=partial(read_number, expected="a divergence in nats, >= 0", allows=lambda number: number >= 0),
        want=partial(read_one_of, options=("most", "least")),
    )
    def best(self, *, max_kl: float, want: Literal["most", "least"] = "most") -> StrengthChoice:
        """The cell with the most (or least) effect among those that damage no more than allowed.

        Args:
            max_kl: the most divergence on neutral text, in nats for each token.
            want: whether the effect is to be large or small.

        Raises:
            SteeringError: every cell damages more.
        """
        allowed = self.kl <= max_kl
        if not bool(allowed.any()):
            raise SteeringError(
                f"no vector at any strength has KL <= {max_kl:g}: the least is {float(self.kl.min()):.3g}; try smaller "
                "strengths, or allow more"
            )
        sign = 1.0 if want == "most" else -1.0
        place, strength = divmod(
            int((sign * self.effect).masked_fill(~allowed, -torch.inf).argmax()), len(self.strengths)
        )
        return StrengthChoice(
            self.names[place],
            self.strengths[strength],
            *(float(one[place, strength]) for one in (self.effect, self.kl, self.perplexity)),
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """A row for each cell: `name`, `layer`, `strength`, `effect`, `standard_error`, `kl`, `perplexity`."""
        rows = [
            {
                "name": name,
                "layer": layer_of(name),
                "strength": strength,
                **{column: float(getattr(self, column)[i, j]) for column in _TENSORS},
            }
            for i, name in enumerate(self.names)
            for j, strength in enumerate(self.strengths)
        ]
        frame: pandas.DataFrame = import_package("pandas").DataFrame(rows)
        return frame

    def plot(self, *, backend: Backend = "plotly") -> Any:
        """Effect, KL and perplexity over strengths, a line for each vector.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        titles = {"effect": self.metric, "kl": "KL on neutral text", "perplexity": "perplexity of neutral text"}
        panels = {
            title: {name: row.tolist() for name, row in zip(self.names, getattr(self, column), strict=True)}
            for column, title in titles.items()
        }
        ticks = [f"{strength:g}" for strength in self.strengths]
        return draw_lines(("strength", ticks), panels, backend=backend, title="steering")

    def save(self, path: str | Path) -> None:
        """Write the table to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        described = {
            "names": list(self.names),
            "strengths": list(self.strengths),
            **{key: getattr(self, key) for key in _SCALARS},
            "provenance": self.provenance.to_json(),
        }
        _FILE.write(path, {name: getattr(self, name) for name in _TENSORS}, described)

    @classmethod
    def load(cls, path: str | Path) -> "SteeringTable":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no table of strengths.
        """
        tensors, described = _FILE.read(path, _expect)
        values: dict[str, Any] = dict(tensors)
        return cls(
            **values,
            names=tuple(described["names"]),
            strengths=tuple(described["strengths"]),
            **{key: described[key] for key in _SCALARS},
            provenance=Provenance.from_json(described["provenance"]),
        )

    def _summary(self) -> Summary:
        rows: list[tuple[Cell, ...]] = [
            (name, f"{strength:g}", *(float(found[i, j]) for found in (self.effect, self.kl, self.perplexity)))
            for i, name in enumerate(self.names)
            for j, strength in enumerate(self.strengths)
        ]
        return Summary(
            title=f"SteeringTable: {self.metric} of {self.n_prompts:,} prompts",
            facts={
                "unsteered": f"{self.metric} {self.plain_effect:.4g}, perplexity {self.plain_perplexity:.4g} over "
                f"{self.n_neutral_tokens:,} tokens of neutral text",
                **self.provenance.facts(),
            },
            listing=Listing(
                columns=("vector", "strength", "effect", "KL", "perplexity"),
                rows=rows[:_SHOWN],
                what="cells",
                n_rows=self.effect.numel(),
            ),
            pages=[self._draw_small],
        )

    def _draw_small(self) -> Picture:
        return thumbnail(
            (self.effect - self.plain_effect)[None],
            rows=("vector", self.names),
            columns=("strength", [f"{strength:g}" for strength in self.strengths]),
            title=f"change of {self.metric}",
        )


_TENSORS = ("effect", "standard_error", "kl", "perplexity")
_SCALARS = ("metric", "how", "plain_effect", "plain_perplexity", "n_prompts", "n_neutral_tokens")

_FILE = ResultFile(
    format="hooklens steering table 1",
    contents="a table of strengths",
    writer="SteeringTable.save",
    keys={
        "names": Expected("a list of hook points", lambda found: bool(found) and is_list(found, TEXT.holds)),
        "strengths": Expected("a list of numbers", lambda found: bool(found) and is_list(found, NUMBER.holds)),
        "metric": TEXT,
        "how": TEXT,
        "plain_effect": NUMBER,
        "plain_perplexity": NUMBER,
        "n_prompts": WHOLE_NUMBER,
        "n_neutral_tokens": WHOLE_NUMBER,
        "provenance": PROVENANCE,
    },
)


def _expect(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    shape = (len(described["names"]), len(described["strengths"]))
    return {name: Expectation(shape, torch.float64) for name in _TENSORS}
