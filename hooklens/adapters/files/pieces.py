"""Writing safetensors files whose tensors come in pieces: no tensor is ever whole in memory.

Names, dtypes and shapes are known before, so the header is written first (https://github.com/huggingface/safetensors,
"Format"): its length in 8 bytes, JSON padded with spaces to a multiple of 8, then the entries of the tensors without
gaps. safetensors itself writes tensors that are all in memory.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from hooklens.adapters.files.disk import DTYPES, HEADER_DIGEST, TensorHeader, digest_headers
from hooklens.errors import CheckpointError

_NAMES = {name: stored for stored, name in DTYPES.items()}
_ALIGNED = 8


class PiecesFile:
    """A safetensors file that is being written.

    Args:
        file: open for writing.
        headers: names, dtypes and shapes of all of its tensors.

    Raises:
        CheckpointError: a dtype that the format does not have.
    """

    def __init__(self, file: BinaryIO, headers: Mapping[str, TensorHeader]) -> None:
        self._file = file
        self._starts: dict[str, int] = {}
        described: dict[str, object] = {
            "__metadata__": {"format": "pt", HEADER_DIGEST: digest_headers(headers.items())}
        }
        end = 0
        # The widest first: then each tensor begins at a multiple of the size of its entries.
        for name in sorted(headers, key=lambda name: (-_itemsize(headers[name]), name)):
            header = headers[name]
            if header.dtype not in _NAMES:
                raise CheckpointError(f"{name!r} is {header.dtype}, which safetensors files do not hold")
            self._starts[name], end = end, end + _n_bytes(header)
            described[name] = {
                "dtype": _NAMES[header.dtype],
                "shape": list(header.shape),
                "data_offsets": [self._starts[name], end],
            }
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        self._first = 8 + len(text)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(self._first + end)

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write all entries of a tensor, flat and one piece after another."""
        self._file.seek(self._first + self._starts[name])
        for piece in pieces:
            numbers = piece.detach().cpu().contiguous().view(-1)
            as_bytes = numbers.view(torch.uint8)
            if sys.byteorder != "little":
                as_bytes = as_bytes.view(-1, numbers.itemsize).flip(-1).contiguous()
            self._file.write(as_bytes.numpy().data)


@contextmanager
def open_pieces(path: Path, headers: Mapping[str, TensorHeader]) -> Iterator[PiecesFile]:
    """Gives the file to write tensors into, each once, in any order.

    Args:
        path: the file.
        headers: names, dtypes and shapes of all of its tensors.

    Raises:
        CheckpointError: a dtype that the format does not have.
    """
    with open(path, "wb") as file:
        yield PiecesFile(file, headers)


def _itemsize(header: TensorHeader) -> int:
    dtype = getattr(torch, header.dtype, None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 0


def _n_bytes(header: TensorHeader) -> int:
    size = _itemsize(header)
    for length in header.shape:
        size *= length
    return size
