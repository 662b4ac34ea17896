"""What training directions gives: a basis for each variable, and how often the model then answers as it should."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from hooklens.alignment.basis import Basis, are_details
from hooklens.alignment.errors import AlignmentError
from hooklens.alignment.site import Site
from hooklens.display import Listing, Summary
from hooklens.hooks.edits import Interchange
from hooklens.optional import import_package
from hooklens.patching.results.file import (
    NUMBER,
    TEXT,
    WHOLE_NUMBER,
    Expectation,
    Expected,
    ResultFile,
    expect_numbers_of,
    is_list,
)
from hooklens.patching.results.over_pairs import Compute, OverPairs
from hooklens.viz.charts import Backend, draw_lines

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class Step:
    """A look at the validation rows while training.

    Attributes:
        step: how many steps had been done.
        loss: the cross-entropy of the last step's rows, in nats.
        validation_loss: that of the validation rows.
        validation_accuracy: the share of these that were answered as they should.
    """

    step: int
    loss: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DasResult(OverPairs):
    """Trained directions.

    Attributes:
        site: where.
        bases: by variable; they are orthogonal to each other.
        margins: `[row]`, of the held-out rows, by how much the label's logit leads the best other one.
        unpatched_margins: `[row]`, the same without an interchange.
        training_accuracy: the interchange accuracy on the rows trained on.
        history: looks at the validation rows.
        stopped: why training ended.
    """

    site: Site
    bases: Mapping[str, Basis]
    margins: Float[Tensor, " row"]
    unpatched_margins: Float[Tensor, " row"]
    training_accuracy: float
    history: tuple[Step, ...]
    stopped: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "bases", MappingProxyType(dict(self.bases)))

    def _summary(self) -> Summary:
        sizes = ", ".join(f"{name!r}: {len(basis)} of {basis.rows.shape[1]}" for name, basis in self.bases.items())
        last = self.history[-1].step if self.history else 0
        return Summary(
            title=f"DasResult at {self.site}",
            facts={
                "dimensions": sizes,
                "interchange accuracy": f"{self.accuracy:.3f} on {len(self.margins)} held-out rows "
                f"({self.training_accuracy:.3f} on those trained on, {self.unpatched_accuracy:.3f} without any)",
                "training": f"{last} steps: {self.stopped}",
            },
            listing=Listing(
                columns=("step", "loss", "validation loss", "validation accuracy"),
                # The last looks tell how training ended.
                rows=[(one.step, one.loss, one.validation_loss, one.validation_accuracy) for one in self.history[::-1]],
                what="looks at the validation rows",
                caption="looks at the validation rows, the last first",
                more="history has all",
            ),
        )

    @property
    def accuracy(self) -> float:
        """The interchange accuracy: the share of held-out rows whose label has the largest logit of all."""
        return float((self.margins > 0).double().mean())

    @property
    def unpatched_accuracy(self) -> float:
        """The share of held-out rows whose label the model answers with anyway."""
        return float((self.unpatched_margins > 0).double().mean())

    @property
    def basis(self) -> Basis:
        """The basis of the only variable.

        Raises:
            AlignmentError: there are several.
        """
        if len(self.bases) != 1:
            raise AlignmentError(f"DasResult.basis: there are bases of {sorted(self.bases)}; take bases[...]")
        [basis] = self.bases.values()
        return basis

    def interchange(self, sources: Mapping[str, Tensor]) -> list[Interchange]:
        """The edits that take variables from other runs.

        Args:
            sources: by variable, the source run's vectors at the site's positions, `[row position d]`.

        Raises:
            AlignmentError: unknown variables.
        """
        unknown = sorted(sources.keys() - self.bases.keys())
        if unknown:
            raise AlignmentError(f"DasResult.interchange: no variables {unknown}; there are {sorted(self.bases)}")
        at: dict[str, Any] = {"pos": self.site.pos} | ({} if self.site.head is None else {"head": self.site.head})
        return [self.bases[name].interchange(source, **at) for name, source in sources.items()]

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per look: step, loss, validation_loss, validation_accuracy."""
        table: pandas.DataFrame = import_package("pandas").DataFrame([asdict(one) for one in self.history])
        return table

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """Loss and accuracy over steps.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        steps = [str(one.step) for one in self.history]
        loss = {
            "training": [one.loss for one in self.history],
            "validation": [one.validation_loss for one in self.history],
        }
        panels = {
            "cross-entropy (nats)": loss,
            "accuracy": {"validation": [one.validation_accuracy for one in self.history]},
        }
        heading = f"directions at {self.site}" if title is None else title
        return draw_lines(("step", steps), panels, backend=backend, title=heading)

    def save(self, path: str | Path) -> None:
        """Write the result to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors = {"margins": self.margins, "unpatched_margins": self.unpatched_margins}
        tensors |= {f"basis.{place}": basis.rows for place, basis in enumerate(self.bases.values())}
        described = {
            "name": self.site.name,
            "pos": list(self.site.pos) if isinstance(self.site.pos, tuple) else [],
            "head": self.site.head,
            "bases": [[name, basis.describe()] for name, basis in self.bases.items()],
            "training_accuracy": self.training_accuracy,
            "history": [asdict(one) for one in self.history],
            "stopped": self.stopped,
        }
        _FILE.write(path, tensors, described)

    @classmethod
    def load(cls, path: str | Path) -> "DasResult":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind.
        """
        tensors, described = _FILE.read(path, _expect)
        return cls(
            site=Site(described["name"], tuple(described["pos"]), described["head"]),
            bases=read_bases(described["bases"], tensors, "basis"),
            margins=tensors["margins"],
            unpatched_margins=tensors["unpatched_margins"],
            training_accuracy=described["training_accuracy"],
            history=tuple(Step(**one) for one in described["history"]),
            stopped=described["stopped"],
        )

    def _over_pairs(self, compute: Compute) -> tuple[Tensor, ...]:
        return compute((self.margins > 0).double(), (self.unpatched_margins > 0).double())


def read_bases(described: list[list[Any]], tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Basis]:
    """Bases by variable, as a file holds them."""
    return {
        name: Basis(one["name"], tensors[f"{prefix}.{place}"], one["origin"], one["details"])
        for place, (name, one) in enumerate(described)
    }


def are_bases(found: object) -> bool:
    """Whether JSON gave descriptions of bases by variable."""

    def is_one(one: Any) -> bool:
        return (
            isinstance(one, list)
            and len(one) == 2
            and isinstance(one[0], str)
            and isinstance(one[1], dict)
            and one[1].keys() == {"name", "origin", "details"}
            and TEXT.holds(one[1]["name"])
            and TEXT.holds(one[1]["origin"])
            and are_details(one[1]["details"])
        )

    return is_list(found, is_one)


BASES = Expected("a list of [variable, basis]", are_bases)

_FILE = ResultFile(
    format="hooklens.alignment.das-1",
    contents="trained directions",
    writer="DasResult.save",
    keys={
        "name": TEXT,
        "pos": Expected("a list of whole numbers", lambda found: is_list(found, WHOLE_NUMBER.holds)),
        "head": Expected("a whole number or nothing", lambda found: found is None or WHOLE_NUMBER.holds(found)),
        "bases": BASES,
        "training_accuracy": NUMBER,
        "history": Expected("a list of looks", lambda found: is_list(found, expect_numbers_of(Step).holds)),
        "stopped": TEXT,
    },
)


def _expect(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    expected = {name: Expectation(("row",)) for name in ("margins", "unpatched_margins")}
    return expected | {f"basis.{place}": Expectation((f"k{place}", "d")) for place in range(len(described["bases"]))}
