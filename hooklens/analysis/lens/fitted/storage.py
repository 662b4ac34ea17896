"""The files of lenses: one safetensors file in a folder, with what describes the lens as JSON in the metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hooklens.analysis.lens.origin import Origin
from hooklens.arguments import show
from hooklens.errors import CheckpointError
from hooklens.files import read_safetensors, write_safetensors

FILE = "lens.safetensors"
_SAMPLE = "sample of the model"


def write_lens(
    folder: Path, kind: str, tensors: Mapping[str, Tensor], origin: Origin, described: Mapping[str, Any]
) -> None:
    """Write a lens into a folder, which is made where there is none.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    about = json.dumps({"kind": kind, "model": origin.describe(), **described})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(
            folder / FILE, {**tensors, _SAMPLE: origin.sample}, {"format": "hooklens lens", "lens": about}
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write a lens to {folder}: {error}") from error


def read_lens(
    folder: Path, kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], Origin, dict[str, Any]]:
    """What `write_lens` wrote: tensors, the model it was fitted on, and what describes it.

    Args:
        folder: the folder, or the file in it.
        kind: which kind of lens is expected.
        shapes: of each tensor, a negative number standing for a size; equal ones for equal sizes.

    Raises:
        CheckpointError: there is none, it is of another kind, or damaged.
    """
    path = folder / FILE if folder.is_dir() else folder
    try:
        tensors, metadata = read_safetensors(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read a lens from {path}: {error}") from error
    try:
        about: Any = json.loads(metadata.get("lens", ""))
    except ValueError:
        about = None
    if metadata.get("format") != "hooklens lens" or not isinstance(about, dict):
        raise CheckpointError(f"{path} does not hold a lens; expected a file that {kind}.save wrote")
    if about.get("kind") != kind:
        raise CheckpointError(f"{path} holds a lens of kind {show(about.get('kind'))}; expected a {kind}")
    sample, model = tensors.pop(_SAMPLE, None), about.get("model")
    if sample is None or not isinstance(model, dict):
        raise CheckpointError(f"{path} is damaged: it does not say which model it was fitted on")
    _check_shapes(path, tensors, shapes)
    return tensors, Origin.restore(model, sample, path=path), about


def _check_shapes(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    sizes: dict[int, int] = {}
    wrong = (
        [f"it holds the tensors {sorted(tensors)}, expected {sorted(shapes)}"]
        if tensors.keys() != shapes.keys()
        else []
    )
    for name, shape in shapes.items() if not wrong else ():
        found = tensors[name]
        if found.ndim == len(shape):
            for axis, size in zip(shape, found.shape, strict=True):
                sizes.setdefault(axis, size)
        expected = [sizes.get(axis, axis) for axis in shape]
        if list(found.shape) != expected or not found.is_floating_point():
            wrong.append(f"{name!r} is {show(found)}, expected {expected} of floating numbers")
    if wrong:
        raise CheckpointError(f"{path} is damaged: {'; '.join(wrong)}")
