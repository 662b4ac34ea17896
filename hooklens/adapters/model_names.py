"""Names that the field has for published models, and their checkpoints of earlier in training.

`model_names.json` is TransformerLens's table (Nanda and Bloom 2022): official names with aliases, the lengths that it
caps contexts at (by the beginning of a name), the architectures whose texts it gives no BOS, and which runs keep
checkpoints in branches of their repository (by regular expressions for the beginning of a name).
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, InputError, suggest_names
from hooklens.optional import import_package

_TABLES: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
_BUNDLED = "bundled:"
# Labels beyond it count tokens.
_MOST_STEPS = 1e9
ALIASES: dict[str, list[str]] = _TABLES["models"]
"""The aliases of each official name."""
NOT_HOSTED: list[str] = _TABLES["not_on_the_hub"]
"""Official names of models that nobody hosts."""


def _count(labels: list[Any]) -> list[int]:
    """Labels of which some are ranges."""
    return [label for one in labels for label in (range(*one) if isinstance(one, list) else [one])]


RUNS = {beginning: (one["revision"], _count(one["labels"])) for beginning, one in _TABLES["checkpoints"].items()}
"""By the beginning of a name, the form of the branches of a run that keeps its checkpoints there, and their labels."""


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """Where a model lies.

    Attributes:
        source: what `HookedCausalLM.from_pretrained` takes.
        keywords: what it takes beside that, `revision` or `variant`, for a checkpoint of earlier in training.
        n_ctx: the length that TransformerLens caps it at; None: none.
        words: fields of TransformerLens's config that say what it is.
    """

    source: str
    keywords: dict[str, str] = field(default_factory=dict)
    n_ctx: int | None = None
    words: dict[str, Any] = field(default_factory=dict)


def name_table() -> dict[str, str]:
    """The official name of each name and alias, which are in lower case."""
    return {alias.lower(): name for name, aliases in ALIASES.items() for alias in (*aliases, name)}


def official_name(name: str) -> str:
    """The official name of a model by name or alias, in whatever case.

    Raises:
        InputError: nothing is called so.
    """
    known = name_table()
    if name.lower() not in known:
        raise InputError(
            f"{name} not found.{suggest_names(name.lower(), known)} Valid official model names (excl aliases): "
            f"{list(ALIASES)}"
        )
    return known[name.lower()]


def source_name(name: str) -> str:
    """The official name of a model; a folder, a bundled model and `owner/name` of others stay as they are.

    Raises:
        InputError: it is none of these.
    """
    is_source = name.startswith(_BUNDLED) or Path(name).exists()
    return name if is_source or ("/" in name and name.lower() not in name_table()) else official_name(name)


def find_model(name: str, *, index: int | None = None, label: int | None = None) -> KnownModel:
    """Where a model lies, or a checkpoint of earlier in its training.

    Args:
        name: what `source_name` takes.
        index: which of its checkpoints; None: the one with the label, or the model as it was published.
        label: the number of steps or tokens.

    Raises:
        InputError: no such model, or no such checkpoint.
        CheckpointError: none are kept.
    """
    source = source_name(name)
    n_ctx = next((n for beginning, n in _TABLES["n_ctx"].items() if source.startswith(beginning)), None)
    words: dict[str, Any] = {"model_name": source.rpartition("/")[2], "tokenizer_name": source}
    if index is None and label is None:
        return KnownModel(source=source, n_ctx=n_ctx, words=words)
    labels, kind = checkpoint_labels(source)
    if index is not None and -len(labels) <= index < len(labels):
        label = labels[index]
    if label is None or label not in labels:
        wanted = f"the checkpoint {label}" if index is None else f"number {index}"
        raise InputError(f"{source} has {len(labels)} checkpoints, {labels[0]} to {labels[-1]}; {wanted} is not there")
    words |= {"from_checkpoint": True, "checkpoint_label_type": kind}
    words |= {"checkpoint_value": label, "checkpoint_index": labels.index(label)}
    run = _find_run(source)
    keywords = {"variant": str(label)} if run is None else {"revision": run[0].format(label)}
    return KnownModel(source=source, keywords=keywords, n_ctx=n_ctx, words=words)


def _find_run(source: str) -> tuple[str, list[int]] | None:
    return next((run for beginning, run in RUNS.items() if re.match(beginning, source)), None)


def list_files(source: str) -> Collection[str]:
    """The names of a model's files, in a folder or on the hub."""
    folder = Path(source)
    if folder.is_dir():
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files: list[str] = import_package("huggingface_hub").HfApi().list_repo_files(source)
    return files


def checkpoint_labels(name: str) -> tuple[list[int], str]:
    """The labels of a model's checkpoints of earlier in training, and what they count: `"step"` or `"token"`.

    Raises:
        InputError: no such model.
        CheckpointError: none are kept.
    """
    source = source_name(name)
    if (run := _find_run(source)) is not None:
        return run[1], "step"
    if source.startswith(tuple(_TABLES["own"])) or Path(source).is_dir():
        found = [re.fullmatch(r"checkpoints/.*_(\d+)\.pth", name) for name in list_files(source)]
        if labels := sorted(int(one[1]) for one in found if one is not None):
            return labels, "token" if labels[-1] > _MOST_STEPS else "step"
    raise CheckpointError(f"Model {source} is not checkpointed.")


def starts_with_bos(cfg: HookedConfig) -> bool:
    """Whether TransformerLens puts a BOS in front of texts of a network's architecture."""
    architectures = json.loads(cfg.origin.hub_config).get("architectures") if cfg.origin is not None else None
    return not set(architectures or ()) & set(_TABLES["starts_without_bos"])
