"""How an experiment runs: the options that all of them have, read and checked once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import read_flag, read_one_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.patching.runs.baseline import Direction
from hooklens.patching.runs.checks import check_model
from hooklens.patching.runs.edits import NO_EDITS, RunEdits
from hooklens.patching.runs.memory import BatchSize, read_batch_size

if TYPE_CHECKING:

    class RunKeywords(TypedDict, total=False):
        """Keywords that every experiment on pairs takes."""

        batch_size: BatchSize
        attention_mask: Int[Tensor, "batch pos"] | None
        edits: Sequence[Edit]
        progress: bool
        allow_training: bool


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of an experiment; `read` makes them of what a caller gave.

    Attributes:
        batch_size: patched prompts per pass, or `"auto"`: by memory.
        direction: `"denoise"` patches clean activations into the corrupted run, `"noise"` the other way.
        progress: show a progress bar.
        allow_training: accept a model in training mode.
        edits: what acts in every run.
    """

    batch_size: BatchSize = "auto"
    direction: Direction = "denoise"
    progress: bool = True
    allow_training: bool = False
    edits: RunEdits = NO_EDITS

    @classmethod
    def read(
        cls,
        model: HookedCausalLM,
        *,
        batch_size: object = "auto",
        direction: object = "denoise",
        progress: object = True,
        allow_training: object = False,
        edits: object = (),
    ) -> "RunOptions":
        """The options, and a model whose runs are the plain ones.

        Raises:
            InputError: options that are none, all of which are named; a model in training mode, or with hooks.
            HookNameError, EditError: edits that do not go with the model.
        """
        given = {
            "batch_size": batch_size,
            "direction": direction,
            "progress": progress,
            "allow_training": allow_training,
        }
        read, problems = {}, []
        for name, value in given.items():
            try:
                read[name] = _READERS[name](value)
            except InputError as problem:
                problems.append(str(problem))
        if problems:
            raise InputError("; ".join(problems))
        options = cls(**read, edits=RunEdits.read(model, edits))
        check_model(model, allow_training=options.allow_training)
        return options


_READERS: dict[str, Callable[[object], Any]] = {
    "batch_size": read_batch_size,
    "direction": lambda given: read_one_of(given, what="direction", options=("denoise", "noise")),
    "progress": lambda given: read_flag(given, what="progress"),
    "allow_training": lambda given: read_flag(given, what="allow_training"),
}


def refuse_missing(subject: str, **given: object) -> None:
    """Refuse a call without arguments that it needs; they come by name where pairs take the place of two prompts.

    Raises:
        InputError: some are None; all of them are named.
    """
    missing = [name for name, value in given.items() if value is None]
    if missing:
        positional, named = ", ".join(given), ", ".join(f"{name}=..." for name in given)
        raise InputError(
            f"{subject}: {' and '.join(missing)} missing; write {subject}(model, clean, corrupted, {positional}), or "
            f"{subject}(model, pairs, {named})"
        )
