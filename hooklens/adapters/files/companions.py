"""What stands in a checkpoint folder beside config, weights and tokenizer: generation settings, HookLens' record.

`hooklens.json` says which weight-processing steps the weights have been through, with a digest, so that a damaged
record is told from another one. `generation_config.json` is kept as it is and written back; of its values HookLens
reads the end tokens and the padding token.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hooklens.adapters.files.disk import read_json
from hooklens.arguments import show
from hooklens.errors import CheckpointError, join_names

RECORD = "hooklens.json"
GENERATION = "generation_config.json"


def read_transforms(folder: Path) -> tuple[str, ...]:
    """The weight-processing steps that a folder's weights have been through; none where there is no record.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return ()
    record = read_json(path)
    steps = record.get("transforms")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise CheckpointError(
            f"{path}: 'transforms' is {show(steps)}, expected a list of names; it is the record of weight processing, "
            "so save the model again"
        )
    unknown = sorted(record.keys() - {"transforms", "digest"})
    # Records of HookLens 0.1 have no digest.
    if unknown or record.get("digest", _digest(steps)) != _digest(steps):
        raise CheckpointError(
            f"{path}: holds {join_names(sorted(record))}, and 'digest' is to be that of 'transforms' {show(steps)}, "
            "with nothing beside; the record of weight processing is damaged, so save the model again"
        )
    return tuple(steps)


def write_transforms(folder: Path, steps: Sequence[str]) -> None:
    """Write the record, where weights have been processed."""
    if steps:
        record = {"transforms": list(steps), "digest": _digest(steps)}
        (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _digest(steps: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(steps)).encode()).hexdigest()[:16]


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The contents of `generation_config.json`; empty where there is none.

    Raises:
        CheckpointError: it is damaged, or its end tokens or padding token are no token ids.
    """
    path = folder / GENERATION
    return check_generation_config(read_json(path), where=str(path)) if path.exists() else {}


def check_generation_config(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Settings of generation whose end tokens and padding token can be used.

    Raises:
        CheckpointError: they are no token ids; both are named.
    """
    end, padding = config.get("eos_token_id"), config.get("pad_token_id")
    wrong = []
    if not (end is None or _is_id(end) or (isinstance(end, list) and all(map(_is_id, end)))):
        wrong.append(f"'eos_token_id' is {show(end)}, expected a token id, a list of them, or null")
    if not (padding is None or _is_id(padding)):
        wrong.append(f"'pad_token_id' is {show(padding)}, expected a token id or null")
    if wrong:
        raise CheckpointError(f"{where}: {'; '.join(wrong)}. Correct the file, or remove it")
    return dict(config)


def write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `generation_config.json`, where there are settings.

    Raises:
        CheckpointError: values that JSON does not have, or end tokens that are no token ids.
    """
    if config:
        where = "model.generation_config"
        try:
            text = json.dumps(check_generation_config(config, where=where), indent=2, sort_keys=True)
        except TypeError as error:
            raise CheckpointError(f"{where}: cannot be written as JSON ({error}); give plain values") from error
        (folder / GENERATION).write_text(text + "\n", encoding="utf-8")


def _is_id(value: object) -> bool:
    return type(value) is int
