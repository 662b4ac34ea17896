"""Shards that Ray's workers compute and write, each whole by one of them; the bytes are those of the local engine.

Where a shard ends is known without running the model: the bytes of a token's activations are. So this process reads
the corpus, chooses and cuts, and a worker is given the documents of one shard, runs the same batches that the local
engine runs, and writes the file. The manifest is written here, in the order of the corpus. A shard that was written
twice, because its worker died before it could say so, has the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hooklens.datasets.blocks import Chooser, Cut
from hooklens.datasets.capturing import Capturing
from hooklens.datasets.folder import Folder, LocalFolder
from hooklens.datasets.manifest import Manifest, Shard, name_shard
from hooklens.datasets.writing import ShardWriter
from hooklens.errors import CheckpointError
from hooklens.workers import RayWorkers, Work

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardTask:
    """The documents of a shard, small enough to travel: five bytes for each token.

    Attributes:
        name: of the file.
        first: the number of the first document in the corpus.
        tokens, chosen: of all documents, one behind the other.
        lengths: of the documents.
        in_parts: how many documents run at once.
        documents, tokens_read, digest: as of a `Shard`.
    """

    name: str
    first: int
    tokens: Numbers
    chosen: Numbers
    lengths: list[int]
    in_parts: list[int]
    documents: int
    tokens_read: int
    digest: str

    def cuts(self) -> Iterator[Cut]:
        """The documents, as many at a time as run at once."""
        # Copies, since what Ray hands over cannot be written to.
        tokens, chosen = torch.from_numpy(self.tokens.astype(np.int64)), torch.from_numpy(self.chosen.copy())
        rows = torch.split(tokens, self.lengths)
        at_document, at_token = 0, 0
        for number in self.in_parts:
            documents = rows[at_document : at_document + number]
            n_tokens = sum(map(len, documents))
            yield Cut(
                documents=documents,
                chosen=chosen[at_token : at_token + n_tokens],
                first=self.first + at_document,
            )
            at_document, at_token = at_document + number, at_token + n_tokens


@dataclass(frozen=True, eq=False)
class ShardWork(Work):
    """What a worker holds: the model, and the folder that it writes to.

    Args:
        capturing: how blocks are run.
        folder: where shards are written.
    """

    capturing: Capturing
    folder: Folder

    def begin(self, shared: Manifest) -> None:
        """See that the folder is the one that the calling process sees.

        Args:
            shared: the manifest that lay there when the workers began.

        Raises:
            CheckpointError: it is another, or none.
        """
        try:
            found = Manifest.read(self.folder)
            found.check_same(shared, self.folder)
        except CheckpointError as error:
            raise CheckpointError(f"{self._unseen()}. There, {error}") from error
        if found.shards[: len(shared.shards)] != shared.shards:
            raise CheckpointError(f"{self._unseen()}. There, the manifest has other shards")

    def _unseen(self) -> str:
        return (
            f"a worker of Ray does not see the folder {self.folder} as this process does; give a folder on a file "
            "system that all machines share, or the URL of one"
        )

    def run(self, task: ShardTask) -> Shard:
        """Compute and write a shard."""
        tensors = self.capturing.join([self.capturing.run(cut) for cut in task.cuts()])
        return Shard(
            name=task.name,
            tokens=len(tensors["tokens"]),
            documents=task.documents,
            tokens_read=task.tokens_read,
            digest=task.digest,
            sha256=self.folder.write_tensors(task.name, tensors),
        )


def run_on_ray(
    cuts: Iterator[Cut],
    capturing: Capturing,
    writer: ShardWriter,
    chooser: Chooser,
    shard_bytes: int,
    *,
    workers: int | None,
) -> Iterator[int]:
    """Record on Ray's workers; gives the tokens of each shard when it and all before it are written.

    Args:
        cuts: the documents that follow the shards that are there.
        capturing: how they are run.
        writer: has the folder and its manifest.
        chooser: which chose from them.
        shard_bytes: about how many bytes of activations a file holds.
        workers: how many; None: as many as there is room for.

    Raises:
        CheckpointError: a worker does not see the folder, or cannot write there.
        InputError, MissingDependencyError, WorkerError: as `RayWorkers` says.
    """
    folder = writer.folder
    work = ShardWork(capturing, folder.absolute() if isinstance(folder, LocalFolder) else folder)
    with RayWorkers(work, device=capturing.model.device, workers=workers, what="record") as team:
        tokens_read = writer.manifest.tokens_read
        tasks = cut_shards(cuts, capturing, writer, chooser, shard_bytes)
        try:
            for shard in team.run(tasks, shared=writer.manifest):
                writer.add(shard)
                yield shard.tokens_read - tokens_read
                tokens_read = shard.tokens_read
        except OSError as error:
            raise CheckpointError(writer.tell(error)) from error


def cut_shards(
    cuts: Iterator[Cut], capturing: Capturing, writer: ShardWriter, chooser: Chooser, shard_bytes: int
) -> Iterator[ShardTask]:
    """What shards hold: a shard ends with the documents that fill it."""
    number, documents = len(writer.manifest.shards), writer.manifest.documents
    tokens_read = writer.manifest.tokens_read
    waiting: list[Cut] = []
    nbytes = 0

    def finish() -> ShardTask:
        rows = [tokens for cut in waiting for tokens in cut.documents]
        task = ShardTask(
            name=name_shard(number),
            first=waiting[0].first,
            tokens=torch.cat(rows).int().numpy(),
            chosen=torch.cat([cut.chosen for cut in waiting]).numpy(),
            lengths=[len(tokens) for tokens in rows],
            in_parts=[len(cut.documents) for cut in waiting],
            documents=documents,
            tokens_read=tokens_read,
            digest=chooser.digest,
        )
        waiting.clear()
        return task

    for cut in cuts:
        waiting.append(cut)
        nbytes += cut.n_kept * capturing.bytes_per_token
        documents += len(cut.documents)
        tokens_read += cut.n_tokens
        if nbytes >= shard_bytes:
            yield finish()
            number, nbytes = number + 1, 0
    if nbytes:
        yield finish()
