"""The checkpoints of a run, or of a published model, as a sequence of models."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hooklens.arguments import (
    optional,
    read_device,
    read_dtype,
    read_flag,
    read_function,
    read_int,
    read_path,
    reads,
    refusal,
    require,
    show,
)
from hooklens.errors import HookLensError, InputError
from hooklens.optional import import_package
from hooklens.progress import progress_bar
from hooklens.tokens import Tokenizer, read_tokenizer
from hooklens.training.keeping.folder import RunFolder
from hooklens.training.keeping.weights import PublishedWeights, RunWeights

if TYPE_CHECKING:
    import pandas

Source = str | Path | Mapping[int, str | Path]
Revisions = Sequence[str] | Mapping[int, str] | None

_STEP_AT_THE_END = re.compile(r"(\d+)\D*$")


class CurveInterruptedError(HookLensError, RuntimeError):
    """A curve over checkpoints stopped before its end.

    Attributes:
        result: the table of the checkpoints that were measured.
    """

    def __init__(self, message: str, result: "pandas.DataFrame") -> None:
        super().__init__(message)
        self.result = result


class Checkpoints:
    """Models by step; made by `checkpoints`.

    Iterating gives pairs of step and model, loaded when their turn comes: **one** model, which gets the weights of each
    step in turn, so that hooks on it stay and memory holds one copy. `load(step)` gives a model of its own.

    Attributes:
        steps: in ascending order.
    """

    def __init__(self, weights: RunWeights | PublishedWeights, steps: Sequence[int]) -> None:
        self._weights = weights
        self.steps = tuple(sorted(steps))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        model = None
        for step in self.steps:
            model = self._weights.fill(model, step)
            yield step, model

    @reads(step=read_int)
    def load(self, step: int) -> Any:
        """The model of a step, in evaluation mode.

        Raises:
            InputError: there is no checkpoint of it.
            CheckpointError: it is damaged.
        """
        if step not in self.steps:
            raise InputError(f"there is no checkpoint of step {step}; there are {_shorten(self.steps)}")
        return self._weights.fill(None, step)

    @reads(
        fn=lambda given, *, what, error: read_function(given, what=what, expected="a function of a model", error=error),
        progress=read_flag,
    )
    def curve(self, fn: Callable[[Any], Any], *, progress: bool = True) -> "pandas.DataFrame":
        """What a function says of the models, as a table by step.

        Args:
            fn: of a model; gives a number (its column is `value`), numbers by name (a column for each), or a table
                (its rows under each other): a loss, a head's score, `analysis.heads.head_scores(model)`, the
                faithfulness of a circuit.
            progress: show a progress bar.

        Returns:
            A table with the column `step` in front.

        Raises:
            InputError: the function gives something else.
            CurveInterruptedError: it failed, or somebody pressed Ctrl-C; `.result` is the table so far.
        """
        tables: list[pandas.DataFrame] = []
        try:
            with progress_bar("checkpoints", self, unit="checkpoint", progress=progress) as bar:
                for step, model in bar:
                    tables.append(_tabulate(step, fn(model)))
        except (Exception, KeyboardInterrupt) as error:
            if not tables:
                raise
            raise CurveInterruptedError(
                f"the curve stopped after {len(tables)} of {len(self)} checkpoints ({type(error).__name__}: {error}); "
                "what was measured is in this error's .result",
                _stack(tables),
            ) from error
        return _stack(tables)


@reads()
def checkpoints(
    source: Source,
    *,
    revisions: Revisions = None,
    model: nn.Module | None = None,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Checkpoints:
    """The checkpoints over a training, as a sequence of models by step.

    Args:
        source: the folder of a run of `train`; the name of a published model, with `revisions`; or sources by step,
            each as `HookedCausalLM.from_pretrained` takes it.
        revisions: of a published model, by step, or a list of names that have the step at their end (`"step1000"`).
        model: for a run of another module than a `HookedCausalLM`: a module that the weights fit into, which is filled.
        tokenizer: of the models. None: the checkpoint's own; runs of `train` have none.
        dtype: of the weights, or its name; `"auto"`: as they were saved.
        device: where to put them.
        cache_dir: the hub's cache folder.
        local_files_only: use what the hub's cache holds, and no network.

    Raises:
        InputError: arguments that do not go together, or no checkpoints.
        CheckpointError: the folder holds no run.
    """
    read = optional(read_tokenizer)(tokenizer, what="tokenizer")
    cast_to = None if isinstance(dtype, str) and dtype == "auto" else read_dtype(dtype, what="dtype")
    place = read_device(device, what="device")
    require(model, kind=(nn.Module, type(None)), what="model", expected="a torch.nn.Module, or None")
    if revisions is None and not isinstance(source, Mapping):
        folder = RunFolder(read_path(source, what="source"))
        weights = RunWeights(folder, model, tokenizer=read, dtype=cast_to, device=place)
        steps = folder.steps()
        if not steps:
            raise InputError(f"{folder.path} holds no checkpoint yet")
        return Checkpoints(weights, steps)
    if model is not None:
        raise InputError("model is for the folder of a run; published checkpoints say what their model is")
    places = _read_places(source, revisions)
    hub = {
        "cache_dir": optional(read_path)(cache_dir, what="cache_dir"),
        "local_files_only": read_flag(local_files_only, what="local_files_only"),
    }
    return Checkpoints(PublishedWeights(places, hub, tokenizer=read, dtype=cast_to, device=place), list(places))


def _read_places(source: object, revisions: object) -> dict[int, tuple[str | Path, str | None]]:
    """Where the checkpoint of each step is: source and revision.

    Raises:
        InputError: it is not said in full, or in two ways.
    """
    if isinstance(source, Mapping):
        if revisions is not None:
            raise InputError("source gives a checkpoint for each step; leave revisions out")
        by_step: dict[int, tuple[Any, str | None]] = {step: (one, None) for step, one in source.items()}
    else:
        path = read_path(source, what="source")
        if path.is_dir():
            raise InputError(
                f"{path} is a folder, which has no revisions; give folders by step: checkpoints({{0: ..., 100: ...}})"
            )
        named = revisions if isinstance(revisions, Mapping) else _name_steps(revisions)
        by_step = {step: (source, revision) for step, revision in named.items()}
    if not by_step:
        raise InputError("there is no checkpoint: source or revisions are empty")
    for step, (one, revision) in by_step.items():
        read_int(step, what="a step", least=0)
        read_path(one, what=f"the source of step {step}")
        require(revision, kind=(str, type(None)), what=f"the revision of step {step}", expected="a name")
    return by_step


def _name_steps(revisions: object) -> dict[int, str]:
    if not isinstance(revisions, list | tuple):
        raise refusal(revisions, "revisions", "a list of names, or names by step")
    steps: dict[int, str] = {}
    for revision in revisions:
        found = _STEP_AT_THE_END.search(revision) if isinstance(revision, str) else None
        if found is None:
            raise InputError(
                f"the revision {show(revision)} has no step in its name; give revisions by step, as a dict"
            )
        if int(found.group(1)) in steps:
            raise InputError(f"the revisions {steps[int(found.group(1))]!r} and {revision!r} are of one step; give one")
        steps[int(found.group(1))] = revision
    return steps


def _tabulate(step: int, found: object) -> "pandas.DataFrame":
    """A row, or several, of one checkpoint."""
    frame: type[pandas.DataFrame] = import_package("pandas").DataFrame
    if isinstance(found, frame):
        if "step" in found:
            raise InputError("the function of a curve gave a table with a column 'step', which is the checkpoint's")
        table: pandas.DataFrame = found.copy()
        table.insert(0, "step", step)
        return table
    named: Mapping[Any, Any] = found if isinstance(found, Mapping) else {"value": found}
    wrong = {str(name): show(value) for name, value in named.items() if not _is_number(value) or name == "step"}
    if wrong or not named:
        raise InputError(
            f"the function of a curve gave {wrong or show(found)}; expected a number, numbers by name (not 'step'), or "
            "a table"
        )
    row: pandas.DataFrame = frame([{"step": step, **{str(name): _read_number(value) for name, value in named.items()}}])
    return row


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return not isinstance(value, str | bytes) and hasattr(value, "__float__")


def _read_number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)


def _stack(tables: "list[pandas.DataFrame]") -> "pandas.DataFrame":
    package = import_package("pandas")
    # Names of rows, as those of heads, stay.
    unnamed = all(isinstance(table.index, package.RangeIndex) for table in tables)
    stacked: pandas.DataFrame = package.concat(tables, ignore_index=unnamed)
    return stacked


def _shorten(steps: Sequence[int]) -> str:
    if len(steps) <= 8:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:4]))}, ..., {', '.join(map(str, steps[-3:]))}"
