"""What lies in the folder of an activation data set, as its `manifest.json` says it.

    manifest.json               what was recorded, and a line for each shard
    shard-00000.safetensors     a tensor [token, ...] for each site, and tokens, document, position [token]
    recording.lock              held while a recording writes

A shard is in the manifest when it lies whole on the disk, so whatever the manifest lists can be read, also while a
recording goes on or after it was killed. Nothing in the folder depends on when it was written.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from hooklens.arguments import show
from hooklens.datasets.folder import Folder
from hooklens.errors import CheckpointError

FORMAT = "hooklens.activations-1"
NAME = "manifest.json"
COLUMNS = ("tokens", "document", "position")
"""What stands beside activations in a shard."""

_WAY_OUT = "record into another folder, or delete this one to start anew"


def name_shard(number: int) -> str:
    """The name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file.

    Attributes:
        name: of the file.
        tokens: kept tokens in it.
        documents: documents read up to its end, from the corpus' beginning.
        tokens_read: tokens of these, kept or not.
        digest: a hash of these documents and of which of their tokens are kept.
        sha256: of the file.
    """

    name: str
    tokens: int
    documents: int
    tokens_read: int
    digest: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds.

    Attributes:
        run: what the activations depend on: hashes of the model and its tokenizer, weight processing, edits, rows.
        sites: by hook name, the shape of what one token has there.
        dtype: of the activations, `"float32"`.
        shards: the files, in the order of the corpus.
        complete: the corpus has been read to its end, or to `max_tokens`.
    """

    run: Mapping[str, Any]
    sites: Mapping[str, tuple[int, ...]]
    dtype: str
    shards: tuple[Shard, ...] = field(default=())
    complete: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def n_tokens(self) -> int:
        """Kept tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents read up to the end of the last shard."""
        return self.shards[-1].documents if self.shards else 0

    @property
    def tokens_read(self) -> int:
        """Tokens of these, kept or not."""
        return self.shards[-1].tokens_read if self.shards else 0

    def with_shard(self, shard: Shard) -> "Manifest":
        """One more shard."""
        return replace(self, shards=(*self.shards, shard))

    def write(self, folder: Folder) -> None:
        """Write the manifest, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        contents = {
            "format": FORMAT,
            "run": dict(self.run),
            "sites": {name: list(shape) for name, shape in self.sites.items()},
            "dtype": self.dtype,
            "complete": self.complete,
            "shards": [asdict(shard) for shard in self.shards],
        }
        folder.write(NAME, (json.dumps(contents, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Folder) -> "Manifest":
        """The manifest of a folder.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = f"{folder}/{NAME}"
        try:
            found = json.loads(folder.read(NAME).decode())
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} holds no activation data set: it has no {NAME}; hooklens.datasets.record writes one"
            ) from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: it is not JSON ({error}): {_WAY_OUT}") from error
        try:
            if found["format"] != FORMAT:
                raise CheckpointError(f"{path}: its format is {show(found['format'])}, expected {FORMAT!r}")
            manifest = cls(
                run=dict(found["run"]),
                sites={name: tuple(map(int, shape)) for name, shape in found["sites"].items()},
                dtype=str(found["dtype"]),
                shards=tuple(Shard(**shard) for shard in found["shards"]),
                complete=bool(found["complete"]),
            )
            is_dtype = isinstance(getattr(torch, manifest.dtype, None), torch.dtype)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} is damaged: it lacks or misnames something ({type(error).__name__}: {error}): {_WAY_OUT}"
            ) from error
        if not is_dtype:
            raise CheckpointError(f"{path} is damaged: dtype is {show(manifest.dtype)}, which torch does not have")
        return manifest

    def check_same(self, wanted: "Manifest", folder: Folder) -> None:
        """Refuse to go on with another recording.

        Raises:
            CheckpointError: model, tokens, sites or rows are others; all differences are named.
        """
        ours = {**wanted.run, "sites": {k: list(v) for k, v in wanted.sites.items()}, "dtype": wanted.dtype}
        theirs = {**self.run, "sites": {k: list(v) for k, v in self.sites.items()}, "dtype": self.dtype}
        differing = [
            f"{key} is {show(theirs.get(key))} there and {show(ours.get(key))} here"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if differing:
            raise CheckpointError(f"{folder} holds another recording: {'; '.join(differing)}. {_WAY_OUT}")
