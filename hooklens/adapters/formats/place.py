"""Where checkpoints in old formats lie: a folder whose files are listed, and fetched as they are asked for."""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

# The folder below a place in which a run of training has kept its weights of earlier.
EARLIER = "checkpoints"


@runtime_checkable
class Place(Protocol):
    """A folder on this machine, on the hub, or in a repository."""

    @property
    def where(self) -> str:
        """What to call it in texts of errors."""
        ...

    def names(self) -> Collection[str]:
        """The names of its files, with `/` between folders; on this machine of those in it and in `EARLIER`."""
        ...

    def fetch(self, names: Collection[str]) -> Path:
        """A local folder that holds the files of these names."""
        ...

    def companions(self) -> Path:
        """A local folder that holds what stands beside the weights (a tokenizer's files)."""
        ...
