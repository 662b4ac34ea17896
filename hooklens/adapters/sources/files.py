"""A checkpoint's files, wherever they lie: what stands beside the weights is there, and is checked, before them."""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

from hooklens.adapters.conversion import TensorSource
from hooklens.adapters.files.disk import DiskTensors
from hooklens.adapters.files.folder import finish_replacement
from hooklens.adapters.formats import EARLIER

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "hooklens.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
)
"""Patterns of the files beside the weights: never code."""


@runtime_checkable
class CheckpointFiles(Protocol):
    """The files of one checkpoint."""

    @property
    def where(self) -> str:
        """What to call the place in texts of errors."""
        ...

    def config_folder(self) -> Path:
        """A local folder that holds `config.json`, and maybe more."""
        ...

    def folder(self) -> Path:
        """A local folder that holds all but the weights."""
        ...

    def weights(self) -> TensorSource:
        """The weights, fetched or read as they are asked for."""
        ...


class LocalFiles:
    """The files of a folder on this machine, memory-mapped.

    Args:
        folder: which. A save into it that was interrupted when its files were put in place is finished.
        variant: of several weights in one folder, which.
    """

    def __init__(self, folder: Path, *, variant: str | None = None) -> None:
        finish_replacement(folder)
        self._folder, self._variant = folder, variant

    @property
    def where(self) -> str:
        """The folder."""
        return str(self._folder)

    def config_folder(self) -> Path:
        """The folder."""
        return self._folder

    def folder(self) -> Path:
        """The folder."""
        return self._folder

    def names(self) -> Collection[str]:
        """The names of the files in it, and of weights of earlier in training below it."""
        folders = [folder for folder in (self._folder, self._folder / EARLIER) if folder.is_dir()]
        files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
        return [path.relative_to(self._folder).as_posix() for path in files]

    def fetch(self, names: Collection[str]) -> Path:
        """The folder."""
        return self._folder

    def companions(self) -> Path:
        """The folder."""
        return self._folder

    def weights(self) -> TensorSource:
        """The tensors of its files."""
        return DiskTensors(self._folder, variant=self._variant)
