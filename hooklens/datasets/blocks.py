"""Documents in blocks: as many as run at once, packed into rows, with the tokens that are kept.

Where a block ends depends on the documents before it and on nothing else, so that a recording that goes on at the end
of a block runs the very batches that it would have run.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.arguments import show
from hooklens.documents import NO_DOCUMENT, pack
from hooklens.errors import InputError
from hooklens.hooks.choice import Index, resolve_choice

Keep = Callable[[Int[Tensor, " pos"]], Bool[Tensor, " pos"]]
"""From the tokens of a document to which of them are kept."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """Some documents, as they run.

    Attributes:
        ids, document_ids: packed rows, as `documents.pack` gives them.
        places: of each token that is kept, in the order of documents, its place in the flattened rows.
        tokens: its id.
        document: its document, counted in the corpus.
        position: its position there.
    """

    ids: Int[Tensor, "row pos"]
    document_ids: Int[Tensor, "row pos"]
    places: Int[Tensor, " kept"]
    tokens: Int[Tensor, " kept"]
    document: Int[Tensor, " kept"]
    position: Int[Tensor, " kept"]


class Chooser:
    """Which tokens of documents are kept, and a digest of all documents and choices so far.

    Args:
        positions: the tokens of each document; None: all. A document that does not reach them keeps those it has.
        keep: a function that chooses among these.
        what: for messages.
    """

    def __init__(self, positions: Index, keep: Keep | None, *, what: str) -> None:
        self._positions, self._keep, self._what = positions, keep, what
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """A hash of everything that was chosen from, and of what was chosen."""
        return self._digest.copy().hexdigest()

    def choose(self, tokens: Int[Tensor, " pos"], number: int) -> Bool[Tensor, " pos"]:
        """The tokens of a document that are kept.

        Raises:
            InputError: the function gave something else than a mask of the document.
        """
        chosen = torch.zeros(len(tokens), dtype=torch.bool)
        chosen[self._columns(len(tokens))] = True
        if self._keep is not None:
            given = self._keep(tokens.clone())
            if not isinstance(given, Tensor) or given.dtype != torch.bool or given.shape != tokens.shape:
                raise InputError(
                    f"{self._what}: keep gave {show(given)} for document {number}; expected [{len(tokens)}] booleans, "
                    "True for the tokens to keep"
                )
            chosen &= given.cpu()
        self._digest.update(len(tokens).to_bytes(8, "little"))
        self._digest.update(tokens.numpy().tobytes() + chosen.numpy().tobytes())
        return chosen

    def _columns(self, length: int) -> list[int]:
        positions = self._positions
        if isinstance(positions, tuple | int):
            numbers = (positions,) if isinstance(positions, int) else positions
            return sorted({number % length for number in numbers if -length <= number < length})
        return resolve_choice(positions, length, what=self._what, noun="tokens")


@dataclass(frozen=True, eq=False, kw_only=True)
class Cut:
    """Documents that run at once.

    Attributes:
        documents: their tokens.
        chosen: of all their tokens, one document behind the other, which are kept.
        first: the number of the first document in the corpus.
    """

    documents: Sequence[Int[Tensor, " _"]]
    chosen: Bool[Tensor, " pos"]
    first: int

    @property
    def n_kept(self) -> int:
        """How many tokens are kept."""
        return int(self.chosen.sum())

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.chosen)

    def pack(self, row_length: int) -> Block:
        """The documents in rows of so many columns; longer documents are cut into pieces."""
        documents, chosen = list(self.documents), self.chosen
        ids, document_ids = pack(documents, row_length, split=True)
        flat = document_ids.flatten()
        # In rows, pieces of a document stand in their order, so a stable sort by documents is the order of the corpus.
        places = torch.argsort(torch.where(flat == NO_DOCUMENT, len(documents), flat), stable=True)[: len(chosen)]
        lengths = torch.tensor([len(tokens) for tokens in documents])
        return Block(
            ids=ids,
            document_ids=document_ids,
            places=places[chosen],
            tokens=torch.cat(documents)[chosen],
            document=(torch.arange(len(documents)) + self.first).repeat_interleave(lengths)[chosen],
            position=torch.cat([torch.arange(len(tokens)) for tokens in documents])[chosen],
        )


def cut_documents(
    documents: Iterable[Int[Tensor, " _"]], chooser: Chooser, *, first: int, batch_tokens: int
) -> Iterator[Cut]:
    """Documents in parts of about `batch_tokens` tokens.

    Args:
        documents: their tokens.
        chooser: which of these are kept.
        first: the number of the first document in the corpus.
        batch_tokens: a part ends with the document that reaches it.
    """
    waiting: list[Tensor] = []
    n_waiting = 0
    for tokens in documents:
        waiting.append(tokens)
        n_waiting += len(tokens)
        if n_waiting >= batch_tokens:
            yield _cut(waiting, chooser, first)
            first, waiting, n_waiting = first + len(waiting), [], 0
    if waiting:
        yield _cut(waiting, chooser, first)


def _cut(documents: list[Tensor], chooser: Chooser, first: int) -> Cut:
    chosen = [chooser.choose(tokens, first + number) for number, tokens in enumerate(documents)]
    return Cut(documents=documents, chosen=torch.cat(chosen), first=first)
