"""Which old format a file or folder is in."""

from collections.abc import Callable
from pathlib import Path

from hooklens.adapters.conversion import TensorSource
from hooklens.adapters.formats import meta, nanogpt, transformer_lens
from hooklens.adapters.formats.opened import OldCheckpoint, OpenedModel
from hooklens.adapters.formats.place import Place
from hooklens.arguments import show
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, InputError

SUFFIXES = (".pt", ".pth")
# Where the hub's layout is there as well, it is read.
_HUBS = tuple(whole + end for whole in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))


def find_format(
    place: Place, *, file: str | None = None, variant: str | None = None, above: Callable[[], Place] | None = None
) -> OldCheckpoint | None:
    """The checkpoint in a folder, or of one of its files, in one of the old formats; None where it is in none of them.

    Args:
        place: the folder.
        file: name of the file in it that was asked for; None: whichever holds the weights.
        variant: of several weights, which.
        above: gives the folder that this one lies in, where that may say what the file is.

    Raises:
        CheckpointError: it is in one of them, and files are missing or damaged.
        InputError: a variant of what has none.
    """
    names = place.names()
    if file is None and (
        not any(name.endswith((*SUFFIXES, "params.json")) for name in names) or set(_HUBS) & set(names)
    ):
        return None
    if file is not None and not file.endswith(SUFFIXES):
        return None
    found: OldCheckpoint | None = meta.find(place, file) or transformer_lens.find(place, file, variant, above=above)
    if found is None:
        found = nanogpt.find(place, file)
    has_variants = isinstance(found, transformer_lens.TransformerLensModel) and file is None
    if found is not None and variant is not None and not has_variants:
        raise InputError(
            f"variant={show(variant)} does not go with this source: it is a checkpoint in an old format, of which "
            "there is one. Leave it out"
        )
    return found


class OldFiles:
    """The files of a checkpoint in an old format, as `CheckpointFiles` and with what reads them.

    Args:
        old: the checkpoint.
    """

    def __init__(self, old: OldCheckpoint) -> None:
        self._old = old

    @property
    def place(self) -> Place:
        """The folder that it lies in."""
        return self._old.place

    @property
    def where(self) -> str:
        """What to call the folder."""
        return self.place.where

    def config_folder(self) -> Path:
        """A local folder that holds what stands beside the weights."""
        return self.place.companions()

    def folder(self) -> Path:
        """A local folder that holds what stands beside the weights."""
        return self.place.companions()

    def weights(self) -> TensorSource:
        """None: an old format's tensors have no names of the hub's.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.where}: is in an old format, which is read as a whole")

    def download(self) -> Path:
        """A local folder that holds all of it."""
        self.folder()
        return self.place.fetch(self._old.names)

    def read_network(self) -> HookedConfig:
        """The network."""
        return self._old.read_network()

    def open(self) -> OpenedModel:
        """The config and the tensors, held against each other."""
        return self._old.open()
