"""Which old format a file or folder is in."""

from pathlib import Path

from hooklens.adapters.conversion import TensorSource
from hooklens.adapters.formats import meta, nanogpt, transformer_lens
from hooklens.adapters.formats.opened import OldCheckpoint, OpenedModel
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError

# What one finds, those behind it are not asked for.
_FORMATS = (meta, transformer_lens, nanogpt)
_SUFFIXES = (".pt", ".pth")
# Where the hub's layout is there as well, it is read.
_HUBS = tuple(whole + end for whole in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))


def find_format(path: Path) -> OldCheckpoint | None:
    """The checkpoint at a file, or in a folder, in one of the old formats; None where it is in none of them.

    Raises:
        CheckpointError: it is in one of them, and files are missing or damaged.
    """
    if path.is_dir() and any((path / name).is_file() for name in _HUBS):
        return None
    files = path.iterdir() if path.is_dir() else [path]
    if not any(file.suffix in _SUFFIXES or file.name == "params.json" for file in files):
        return None
    found = (one.find(path) for one in _FORMATS)
    return next((one for one in found if one is not None), None)


class OldFiles:
    """The files of a checkpoint in an old format, as `CheckpointFiles` and with what reads them.

    Args:
        path: the file or folder.
        old: the checkpoint.
    """

    def __init__(self, path: Path, old: OldCheckpoint) -> None:
        self._path, self._old = path, old

    @property
    def where(self) -> str:
        """The file or folder."""
        return str(self._path)

    def config_folder(self) -> Path:
        """The folder."""
        return self._old.folder

    def folder(self) -> Path:
        """The folder."""
        return self._old.folder

    def weights(self) -> TensorSource:
        """None: an old format's tensors have no names of the hub's.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.where}: is in an old format, which is read as a whole")

    def read_network(self) -> HookedConfig:
        """The network."""
        return self._old.read_network()

    def open(self) -> OpenedModel:
        """The config and the tensors, held against each other."""
        return self._old.open()
