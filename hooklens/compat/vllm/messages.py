"""What goes between the driver and the workers: plain values and tensors in bytes, read without running any code."""

import dataclasses
import io
from typing import Any

import torch
from torch import Tensor

from hooklens.errors import EditError
from hooklens.hooks.edits import Add, Edit, Interchange, Project, Replace, Scale, SetComponents, Zero

# Those whose new value of a token follows from this token alone, and that are no code of the user's.
KINDS: dict[str, type[Edit]] = {
    kind.__name__: kind for kind in (Add, Interchange, Project, Replace, Scale, SetComponents, Zero)
}


def pack(content: Any) -> bytes:
    """Plain values and tensors (anywhere) as bytes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def unpack(content: bytes) -> Any:
    """What `pack` made bytes of, its tensors on the CPU."""
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def edit_to_plain(edit: Edit) -> dict[str, Any]:
    """The class and fields of an edit whose name is one hook point's.

    Raises:
        EditError: an edit that cannot act on tokens as an engine runs them.
    """
    kind = type(edit).__name__
    if KINDS.get(kind) is not type(edit):
        raise EditError(
            f"edit {kind}({edit.name!r}) cannot be used on a served model: an engine runs the tokens of a batch in "
            f"parts, and functions do not travel to its workers; use one of {', '.join(KINDS)}"
        )
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(edit):
        value: Any = getattr(edit, field.name)
        if isinstance(value, slice):
            value = {"slice": [value.start, value.stop, value.step]}
        # Copied, since of a view the whole storage would be sent.
        fields[field.name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value
    return {"kind": kind, "fields": fields}


def edit_from_plain(plain: dict[str, Any], device: torch.device) -> Edit:
    """The edit again, with its tensors on the model's device."""
    fields: dict[str, Any] = {}
    for name, value in plain["fields"].items():
        if isinstance(value, dict):
            fields[name] = slice(*value["slice"])
        else:
            fields[name] = value.to(device) if isinstance(value, Tensor) and name != "pos" else value
    return KINDS[plain["kind"]](**fields)
