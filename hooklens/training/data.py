"""Batches one after another, and the place in them, to which a later process can return.

**What an exact resume asks of data.** In a new process, the data made anew gives the same batches in the same order.
That holds of lists and other sequences of batches, and of a torch `DataLoader`, shuffling or not, with workers or
without, whose data set and sampler draw random numbers from torch's, numpy's or Python's global generators, from the
loader's `generator`, or from nothing. Data draws from states of these generators of its own, which no dropout moves.
To return, the epoch is begun as it was begun, and its batches are read again up to the place. A digest of all of them
tells whether they are the same; if not, the run is refused rather than gone on with other data.

Data that can say where it stands is not read again: whatever has `state_dict()` and `load_state_dict(...)`, as the
`StatefulDataLoader` of torchdata, is asked.

An iterator or generator gives its batches once: a new process has to be given a new one, which begins at the beginning.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooklens.arguments import refusal, show
from hooklens.errors import CheckpointError, InputError
from hooklens.progress import progress_bar
from hooklens.training.keeping.randomness import (
    States,
    capture_random,
    restore_random,
    seed_random,
    states_from_plain,
    states_to_plain,
)

Place = Mapping[str, Any]
"""A place in the data."""

_BATCHES = "an iterable of batches: a torch DataLoader, a list of token tensors [batch, pos], ..."


def check_data(data: object, what: str) -> Iterable[Any]:
    """Data that can be iterated over.

    Raises:
        InputError: it cannot be, or is itself a batch, which would be iterated over row by row.
    """
    if isinstance(data, Tensor) and data.ndim < 3:
        raise InputError(
            f"{what} is {show(data)}: one batch, or rows that are not in batches yet; expected {_BATCHES} "
            "(torch.utils.data.DataLoader(rows, batch_size=...) makes batches)"
        )
    if isinstance(data, Mapping | str | bytes) or (isinstance(data, tuple) and hasattr(data, "_fields")):
        raise InputError(f"{what} is {show(data)}: one batch, not several; expected {_BATCHES}")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise refusal(data, what, _BATCHES)
    return data  # type: ignore[return-value]


def gives_once(data: Iterable[Any]) -> bool:
    """Whether data is an iterator, which cannot be begun anew."""
    return isinstance(data, Iterator)


class DataStream:
    """The batches of data, begun anew when they end.

    Args:
        data: checked data.
        digests: keep a digest of what was read; off where nobody will return.
    """

    def __init__(self, data: Iterable[Any], *, digests: bool) -> None:
        self._data = data
        self._digests = digests
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._batch, self._digest = 0, 0, b""
        self._random: States | None = None
        self._begun: tuple[States, list[Tensor]] | None = None
        self.says_where = all(callable(getattr(data, name, None)) for name in ("state_dict", "load_state_dict"))

    def seed(self, seed: int) -> None:
        """Where the random numbers of data start."""
        with self._own_random():
            seed_random(seed)

    def read(self) -> Any:
        """The next batch.

        Raises:
            InputError: there is none.
        """
        with self._own_random():
            if self._iterator is None:
                self._begin()
            try:
                batch = self._read_on()
            except StopIteration:
                batch = self._read_first_of_next()
        return batch

    def _read_first_of_next(self) -> Any:
        if self._batch and gives_once(self._data):
            raise InputError(
                f"the data ended after {self._batch} batches, and training needs more; an iterator cannot be begun "
                "anew: give a list or a DataLoader, or fewer steps"
            )
        if self._batch:
            self._epoch, self._batch, self._digest = self._epoch + 1, 0, b""
            self._begin()
            try:
                return self._read_on()
            except StopIteration:
                pass
        hint = "; it is an iterator that something has used up" if gives_once(self._data) else ""
        raise InputError(f"the data gives no batch{hint}")

    def _begin(self) -> None:
        for part in _parts(self._data):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self._epoch)
        self._begun = (capture_random(devices=False), [one.get_state() for one in _generators(self._data)])
        self._iterator = iter(self._data)

    def _read_on(self) -> Any:
        assert self._iterator is not None
        batch = next(self._iterator)
        self._batch += 1
        if self._digests:
            digest = hashlib.blake2b(self._digest, digest_size=16)
            _digest(batch, digest.update)
            self._digest = digest.digest()
        return batch

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """In the block the global generators stand where those of the data stand."""
        outside = capture_random(devices=False)
        if self._random is not None:
            restore_random(self._random)
        try:
            yield
        finally:
            self._random = capture_random(devices=False)
            restore_random(outside)

    def place(self) -> Place:
        """Where the stream stands, for `go_to`."""
        own = {"state": self._data.state_dict()} if self.says_where else {}  # type: ignore[attr-defined]
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "digest": self._digest,
            "random": self._random,
            "begun": self._begun,
            "length": _length(self._data),
            **own,
        }

    def go_to(self, place: Place, *, progress: bool) -> None:
        """Return to a place, in data made anew.

        Raises:
            CheckpointError: the data cannot say where it stands and did, or gives other batches than it gave.
        """
        if self.says_where != ("state" in place):
            raise CheckpointError(
                "the data of this run " + ("does not say" if "state" in place else "says") + " where it stands "
                "(state_dict), and that of the run so far "
                + ("did" if "state" in place else "did not")
                + "; give the same data"
            )
        if place["length"] != (length := _length(self._data)):
            raise CheckpointError(
                f"the data has {length} batches, that of the run so far had {place['length']}; give the same data"
            )
        self._epoch, self._random = place["epoch"], place["random"]
        if self.says_where:
            self._data.load_state_dict(place["state"])  # type: ignore[attr-defined]
            self._batch, self._begun = place["batch"], place["begun"]
        elif place["begun"] is not None:
            self._read_again(place, progress=progress)
        self._random = place["random"]

    def _read_again(self, place: Place, *, progress: bool) -> None:
        begun, generators = place["begun"]
        ours = _generators(self._data)
        if len(ours) != len(generators):
            raise CheckpointError(
                f"the data has {len(ours)} generators of random numbers, that of the run so far {len(generators)}; "
                "give the same data"
            )
        self._random = begun
        for one, state in zip(ours, generators, strict=True):
            one.set_state(state)
        with self._own_random():
            self._begin()
            try:
                with progress_bar("reading data again", total=place["batch"], unit="batch", progress=progress) as bar:
                    for _ in range(place["batch"]):
                        self._read_on()
                        bar.update()
            except StopIteration:
                self._refuse_other(place)
        if self._digest != place["digest"]:
            self._refuse_other(place)

    def _refuse_other(self, place: Place) -> None:
        hint = (
            "It is an iterator: give one that begins at the beginning."
            if gives_once(self._data)
            else "Whatever draws random numbers in it has to draw them from the global generators of torch, numpy and "
            "Python, or from the DataLoader's generator; or data says where it stands (state_dict, load_state_dict)."
        )
        raise CheckpointError(
            f"the data gives other batches than in the run so far, among the first {place['batch']} of epoch "
            f"{place['epoch']}, so the run cannot go on as it would have. {hint}"
        )

    def close(self) -> None:
        """Let go of the iterator, and of its workers."""
        self._iterator = None


def place_to_plain(place: Place) -> dict[str, Any]:
    """A place as a file can hold it."""
    begun, random = place["begun"], place["random"]
    return {
        **place,
        "digest": place["digest"].hex(),
        "random": None if random is None else states_to_plain(random),
        "begun": None if begun is None else (states_to_plain(begun[0]), begun[1]),
    }


def place_from_plain(plain: Mapping[str, Any]) -> Place:
    """A place from what `place_to_plain` gave."""
    begun, random = plain["begun"], plain["random"]
    return {
        **plain,
        "digest": bytes.fromhex(plain["digest"]),
        "random": None if random is None else states_from_plain(random),
        "begun": None if begun is None else (states_from_plain(begun[0]), list(begun[1])),
    }


def _parts(data: object) -> list[object]:
    """Data, and what a DataLoader is made of."""
    batch_sampler = getattr(data, "batch_sampler", None)
    inner = [getattr(data, "dataset", None), getattr(data, "sampler", None), batch_sampler]
    inner.append(getattr(batch_sampler, "sampler", None))
    seen: dict[int, object] = {id(one): one for one in (data, *inner) if one is not None}
    return list(seen.values())


def _length(data: object) -> int | None:
    """How many batches data has, where it says so."""
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def _generators(data: object) -> list[torch.Generator]:
    """The generators that data draws from beside the global ones."""
    found = [getattr(part, "generator", None) for part in _parts(data)]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _digest(batch: object, update: Callable[[bytes], None]) -> None:
    """Feed the contents of a batch to a hash."""
    if isinstance(batch, Tensor):
        flat = batch.detach().cpu().contiguous()
        update(f"{flat.dtype}{list(flat.shape)}".encode())
        update(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(batch, np.ndarray):
        update(f"{batch.dtype}{batch.shape}".encode() + batch.tobytes())
    elif isinstance(batch, Mapping):
        for name in batch:
            update(f"{name!r}:".encode())
            _digest(batch[name], update)
    elif isinstance(batch, list | tuple):
        update(f"{len(batch)}[".encode())
        for one in batch:
            _digest(one, update)
    elif isinstance(batch, str | bytes | int | float | bool | None):
        update(repr(batch).encode())
    else:
        update(type(batch).__qualname__.encode())
