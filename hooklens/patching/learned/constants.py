"""Optimal ablation: constants to ablate to, fitted so that ablating costs least.

What a loss under ablation says about a node is mixed with what the ablated value does to the rest of the network:
zeros, means and other prompts' outputs can each mislead it. The constant under which the loss is smallest takes that
part away as far as any constant can (Li and Janson 2024, "Optimal Ablation for Interpretability"):

    a* = argmin over a of the mean over prompts of loss(the circuit's run with every edge outside it carrying a)

with one constant for each writer, or one for each writer and position. It is fitted for a circuit, on prompts, and
minimal for these; constants of another circuit are just constants. `"resample"`, whose values follow the prompt, can
cost less than any constant, since it keeps what both prompts of a pair share.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.display import Displayed, Listing, Summary, format_shape, merge_layers
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import Writer
from hooklens.patching.results.file import TEXT, Expectation, Expected, ResultFile, is_list
from hooklens.viz.charts import Backend, draw_lines

if TYPE_CHECKING:
    import pandas

_SHOWN_STEPS = 25
_ENDS = ("zero", "mean", "resample", "optimal")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class OptimalAblation(Displayed, Mapping[str, Tensor]):
    """Constants by hook name, which `ablation=` takes wherever it takes tensors by hook name.

    Attributes:
        outputs: by hook name, `[1 pos ...]`, with one position where constants are the same at all.
        circuit: what they were fitted for.
        losses: on the fitting prompts, in the metric's units, by what edges outside the circuit carry: `"zero"`,
            `"mean"` (of the corrupted prompts; at each position where constants differ by position), `"resample"`,
            `"optimal"`.
        history: the loss of each step's pairs.
        metric: the metric's name.
    """

    outputs: Mapping[str, Tensor]
    circuit: Circuit
    losses: Mapping[str, float]
    history: Float[Tensor, " step"]
    metric: str

    name = "optimal"
    """What a result calls the ablation."""

    def __getitem__(self, name: str) -> Tensor:
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def _summary(self) -> Summary:
        where = "each position" if self.each_position else "all positions alike"
        kinds = merge_layers((name, format_shape(tensor.shape)) for name, tensor in self.outputs.items())
        return Summary(
            title=(
                f"OptimalAblation(constants at {len(self)} hook points, {where}, for a circuit of {len(self.circuit)} "
                "edges)"
            ),
            facts={
                f"loss ({self.metric})": ", ".join(f"{name} {loss:.4g}" for name, loss in self.losses.items()),
                "steps": f"{len(self.history):,}",
            },
            listing=Listing(
                columns=("hook point", "shape"),
                rows=[(name, shape) for name, shape, _ in kinds],
                what="kinds of hook points",
                more="it is a mapping from hook name to tensor",
            ),
        )

    @property
    def each_position(self) -> bool:
        """Whether positions have constants of their own."""
        return any(tensor.shape[1] > 1 for tensor in self.outputs.values())

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per ablation: its name, and its loss on the fitting prompts."""
        rows = list(self.losses.items())
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=["ablation", "loss"])
        return table

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """The loss over the steps, and those of the other ablations as level lines.

        Args:
            backend: the package that draws.
            title: what stands above; None: the metric.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend, or no step to draw.
        """
        n_steps = len(self.history)
        if not n_steps:
            raise HookLensError("plot: the constants were fitted in no steps, so there is nothing to draw")
        shown = sorted({round(place) for place in torch.linspace(0, n_steps - 1, min(n_steps, _SHOWN_STEPS)).tolist()})
        lines = {name: [self.losses[name]] * len(shown) for name in _ENDS[:-1]}
        panels = {"loss": {"fitted": self.history[shown].tolist(), **lines}}
        heading = f"{self.metric}: optimal ablation" if title is None else title
        return draw_lines(("step", [str(step) for step in shown]), panels, backend=backend, title=heading)

    def save(self, path: str | Path) -> None:
        """Write the constants to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        described = {
            "names": list(self.outputs),
            "circuit": self.circuit.edges,
            "losses": dict(self.losses),
            "metric": self.metric,
        }
        _FILE.write(
            path, {**{f"outputs.{name}": self.outputs[name] for name in self}, "history": self.history}, described
        )

    @classmethod
    def load(cls, path: str | Path) -> "OptimalAblation":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no constants.
        """
        tensors, described = _FILE.read(path, _expect_tensors)
        try:
            circuit = Circuit(tuple(edge) for edge in described["circuit"])
        except SiteError as error:
            raise _FILE.damage(path, [f"key 'circuit' holds something else than edges ({error})"]) from error
        return cls(
            outputs={name: tensors[f"outputs.{name}"] for name in described["names"]},
            circuit=circuit,
            losses=described["losses"],
            history=tensors["history"],
            metric=described["metric"],
        )


def constants_of(outputs: Mapping[str, Tensor], writers: tuple[Writer, ...], scale: float) -> Tensor:
    """What each writer adds to the stream, `[writer some_pos d_model]`, from means by hook name."""
    return torch.stack(
        [
            outputs[writer.hook_name][0, :, writer.head] * scale
            if writer.kind == "head"
            else outputs[writer.hook_name][0]
            for writer in writers
        ]
    )


def outputs_of(
    constants: Float[Tensor, "writer some_pos d_model"], writers: tuple[Writer, ...], scale: float
) -> dict[str, Tensor]:
    """The inverse of `constants_of`."""
    rows: dict[str, list[Tensor]] = {}
    for writer, constant in zip(writers, constants, strict=True):
        rows.setdefault(writer.hook_name, []).append(constant / scale if writer.kind == "head" else constant)
    heads = {writer.hook_name for writer in writers if writer.kind == "head"}
    return {
        name: (torch.stack(found, dim=1) if name in heads else found[0])[None].contiguous()
        for name, found in rows.items()
    }


_FILE = ResultFile(
    format="hooklens.patching.optimal-ablation-1",
    contents="an optimal ablation",
    writer="OptimalAblation.save",
    keys={
        "names": Expected("a list of texts", lambda found: is_list(found, TEXT.holds)),
        "circuit": Expected(
            "a list of edges",
            lambda found: is_list(found, lambda edge: is_list(edge, TEXT.holds) and len(edge) == 2),
        ),
        "losses": Expected(
            f"the numbers {', '.join(_ENDS)}",
            lambda found: (
                isinstance(found, dict)
                and tuple(found) == _ENDS
                and all(isinstance(loss, float) for loss in found.values())
            ),
        ),
        "metric": TEXT,
    },
)


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    expected = {
        f"outputs.{name}": Expectation(
            (1, "pos", "head", "d_model") if name.endswith("hook_result") else (1, "pos", "d_model")
        )
        for name in described["names"]
    }
    return expected | {"history": Expectation(("step",), torch.float64)}
