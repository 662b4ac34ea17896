"""Record activations of a corpus into a folder of shards, in one pass that goes on after an interruption."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooklens.arguments import optional, read_flag, read_function, read_int, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.datasets.blocks import Block, Chooser, Keep, make_blocks
from hooklens.datasets.corpus import Corpus, check_corpus, read_documents
from hooklens.datasets.dataset import ActivationDataset
from hooklens.datasets.folder import open_folder
from hooklens.datasets.manifest import COLUMNS, Manifest
from hooklens.datasets.writing import Filled, ShardWriter
from hooklens.errors import CheckpointError, InputError
from hooklens.evaluation.fingerprint import describe_precision, model_fingerprint, tokenizer_fingerprint
from hooklens.evaluation.interventions import find_interventions
from hooklens.hooks import HookPoint
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.choice import Choice, read_choice
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.vectors import choose_vectors, stop_behind
from hooklens.progress import progress_bar

_ROW_LENGTH = 1024


@reads(
    edits=read_edits,
    progress=read_flag,
    keep=optional(partial(read_function, expected="a function from a document's tokens to booleans")),
)
def record(
    model: HookedCausalLM,
    corpus: Corpus,
    sites: NamesFilter,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    positions: Choice = None,
    keep: Keep | None = None,
    text_key: str = "text",
    prepend_bos: bool | None = None,
    max_tokens: int | None = None,
    row_length: int | None = None,
    batch_tokens: int = 8192,
    shard_bytes: int = 2**28,
    edits: Sequence[Edit] = (),
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ActivationDataset:
    """Run a model on a corpus and keep the activations of some hook points, all of them in one pass.

    Documents are packed into rows, in which none sees another; what a token's activations are does not depend, beyond
    rounding, on what stands beside its document. Blocks above the last site do not run. Tokens are kept in the order
    of the corpus. A shard is written while the model runs on, and only what is kept stays in memory: a batch,
    and at most four times `shard_bytes` (a shard that is written, one that waits, one that fills and is put together).

    The same call again goes on where an interrupted one stopped, reading the corpus again from its beginning up to
    there; what lies in the folder in the end is byte for byte what an uninterrupted recording leaves, on the same
    machine and versions. A call on a complete recording runs nothing.

    Args:
        model: the model; it is run without gradients.
        corpus: the documents, see `hooklens.datasets.corpus`.
        sites: hook points with a vector for each token: a word (`"resid_post"`), a name, a glob, or a list of these.
        out: the folder, made if it is not there; or the URL of one (`s3://...`, `gs://...`; what fsspec reaches), where
            a shard is put together on this machine and then uploaded.
        dtype: of what is kept; None: the model's.
        positions: tokens of each document to keep, negative ones from its end; those that a document does not have are
            passed over. None: all.
        keep: a function from a document's tokens `[pos]` to booleans `[pos]`, which chooses among these.
        text_key: where mappings of the corpus have their text.
        prepend_bos: the BOS rule for text, as for a call of the model.
        max_tokens: read no further document once so many tokens have been read, kept or not.
        row_length: columns of a row, at most the model's context; longer documents are cut into pieces, which do not
            see each other. None: the model's context, at most 1,024.
        batch_tokens: about how many tokens run at once.
        shard_bytes: about how many bytes of activations a file holds.
        edits: values from `hooklens.edits` that act while it runs.
        storage_options: of a URL, what its file system is made with (credentials, endpoint); see fsspec.
        progress: show a progress bar.

    Returns:
        What the folder holds.

    Raises:
        HookNameError: a site that is not there.
        InputError: a site without a vector for each token, a corpus that is none, options that are none, functions that
            act on the model, or dropout in training mode.
        CheckpointError: the folder holds something else or another recording, or the corpus has changed since; another
            process writes there; or the disk is full. Shards that are written are kept.
        MissingDependencyError: the package of a URL's file system is not installed.

    Example:
        >>> texts = [" ".join(["When Mary and John went to the store , John gave a drink to Mary ."] * 8)] * 100
        >>> recorded = hl.datasets.record(model, texts, ["resid_post"], "activations")
        >>> recorded.site("blocks.2.hook_resid_post")[:1000]
    """
    what = "record"
    check_corpus(corpus, what=f"{what}: corpus")
    names = choose_vectors(model, sites, what=f"{what}: sites")
    chooser = Chooser(read_choice(positions, what=f"{what}: positions"), keep, what=what)
    limit = None if max_tokens is None else read_int(max_tokens, what=f"{what}: max_tokens", least=1)
    at_once = read_int(batch_tokens, what=f"{what}: batch_tokens", least=1)
    width = read_int(
        min(_ROW_LENGTH, model.cfg.n_ctx) if row_length is None else row_length,
        what=f"{what}: row_length",
        least=1,
        most=model.cfg.n_ctx,
    )
    size = read_int(shard_bytes, what=f"{what}: shard_bytes", least=1)
    kept_as = model.dtype if dtype is None else dtype
    if not isinstance(kept_as, torch.dtype) or not kept_as.is_floating_point:
        raise InputError(f"{what}: dtype is {dtype!r}; expected a floating dtype of torch, such as torch.float16")
    folder = open_folder(out, what=f"{what}: out", storage_options=storage_options)

    acting = find_interventions(model, edits)
    if acting.functions:
        raise InputError(
            f"{what}: functions act on the model: {', '.join(acting.functions[:5])}. Whether they are the same when a "
            "recording goes on cannot be told; give values from hooklens.edits"
        )
    if model.drops:
        raise InputError(
            f"{what}: the model is in training mode with dropout, so no two runs are alike, and one that goes on would "
            "record another model; call model.eval() first"
        )
    wanted = Manifest(
        run={
            "model": model_fingerprint(model),
            "tokenizer": tokenizer_fingerprint(model.tokenizer),
            "transforms": list(map(str, model.transforms)),
            "edits": acting.fingerprint,
            "precision": f"{str(model.dtype).removeprefix('torch.')}, {describe_precision()}",
            "prepend_bos": model.bos_rule(prepend_bos=prepend_bos),
            "row_length": width,
            "batch_tokens": at_once,
            "shard_bytes": size,
            "max_tokens": limit,
        },
        sites={name: _shape_of(model, name) for name in names},
        dtype=str(kept_as).removeprefix("torch."),
    )
    with ShardWriter(folder, wanted) as writer:
        if not writer.manifest.complete:
            documents = read_documents(
                model, corpus, text_key=text_key, prepend_bos=prepend_bos, what=f"{what}: corpus"
            )
            recording = _Recording(model, names, kept_as, edits, writer, chooser, size)
            with progress_bar("recording", total=limit, unit="token", progress=progress) as bar:
                for done in recording.run(_limit(documents, limit), at_once, width):
                    bar.update(done)
            writer.finish()
    return ActivationDataset(out, storage_options=storage_options)


def _shape_of(model: HookedCausalLM, name: str) -> tuple[int, ...]:
    """The shape of what one token has at a hook point."""
    site = model.hook_points()[name].site
    assert site is not None
    return tuple(model.cfg.size(axis) for axis in site.axes[2:])


def _limit(documents: Iterator[Tensor], most: int | None) -> Iterator[Tensor]:
    """Documents until they have so many tokens together."""
    read = 0
    for tokens in documents:
        yield tokens
        read += len(tokens)
        if most is not None and read >= most:
            return


class _Recording:
    """A recording in progress: what has been kept and not yet handed to the writer."""

    def __init__(
        self,
        model: HookedCausalLM,
        names: Sequence[str],
        dtype: torch.dtype,
        edits: Sequence[Edit],
        writer: ShardWriter,
        chooser: Chooser,
        shard_bytes: int,
    ) -> None:
        self.model, self.names, self.dtype, self.edits = model, list(names), dtype, edits
        self.writer, self.chooser, self.shard_bytes = writer, chooser, shard_bytes
        self.stop = stop_behind(self.names)
        shards = writer.manifest.shards
        self.documents = shards[-1].documents if shards else 0
        self.tokens_read = shards[-1].tokens_read if shards else 0
        self.parts: list[dict[str, Tensor]] = []
        self.nbytes = 0

    def run(self, documents: Iterator[Tensor], batch_tokens: int, row_length: int) -> Iterator[int]:
        """Record what follows the shards that are there; gives the tokens of each step."""
        yield self._skip(documents)
        blocks = make_blocks(
            documents, self.chooser, first=self.documents, batch_tokens=batch_tokens, row_length=row_length
        )
        for block in blocks:
            part = self._capture(block, max(1, batch_tokens // row_length))
            part |= {"tokens": block.tokens.int(), "document": block.document, "position": block.position.int()}
            self.parts.append(part)
            self.nbytes += sum(part[name].nbytes for name in self.names)
            self.documents += block.n_documents
            self.tokens_read += block.n_tokens
            if self.nbytes >= self.shard_bytes:
                self._hand_over()
            yield block.n_tokens
        if any(len(part["tokens"]) for part in self.parts):
            self._hand_over()

    def _skip(self, documents: Iterator[Tensor]) -> int:
        """Read the documents of the shards that are there again.

        Raises:
            CheckpointError: they are others.
        """
        shards = self.writer.manifest.shards
        if not shards:
            return 0
        n_read = 0
        for number in range(shards[-1].documents):
            tokens = next(documents, None)
            if tokens is None:
                break
            self.chooser.choose(tokens, number)
            n_read += len(tokens)
        if self.chooser.digest != shards[-1].digest:
            raise CheckpointError(
                f"{self.writer.folder} holds {shards[-1].documents:,} documents of this recording, and the corpus, or "
                "which of its tokens are kept, is no longer the same up to there; record into another folder"
            )
        return n_read

    def _hand_over(self) -> None:
        names = [*self.names, *COLUMNS]
        tensors = {name: torch.cat([part[name] for part in self.parts]) for name in names}
        self.parts, self.nbytes = [], 0
        self.writer.put(
            Filled(
                tensors=tensors,
                documents=self.documents,
                tokens_read=self.tokens_read,
                digest=self.chooser.digest,
            )
        )

    @torch.no_grad()
    def _capture(self, block: Block, rows_at_once: int) -> dict[str, Tensor]:
        """The activations of the tokens that are kept, in the order of the corpus, on the CPU."""
        n_kept, width = len(block.places), block.ids.shape[1]
        kept = {name: torch.empty(n_kept, *self.writer.manifest.sites[name], dtype=self.dtype) for name in self.names}
        for first in range(0, len(block.ids), rows_at_once):
            rows = slice(first, first + rows_at_once)
            begins, ends = first * width, (first + rows_at_once) * width
            where = ((block.places >= begins) & (block.places < ends)).nonzero()[:, 0]
            if len(where):
                self._run(block.ids[rows], block.document_ids[rows], block.places[where] - begins, where, kept)
        return kept

    def _run(self, ids: Tensor, document_ids: Tensor, places: Tensor, where: Tensor, kept: dict[str, Tensor]) -> None:
        device = self.model.device
        chosen = places.to(device)

        def take(tensor: Tensor, hook: HookPoint) -> None:
            # Taken here, so that no more than these tokens outlives the pass.
            kept[str(hook.name)][where] = tensor.flatten(0, 1)[chosen.to(tensor.device)].to("cpu", self.dtype)

        self.model.run_with_hooks(
            ids.to(device),
            document_ids=document_ids.to(device),
            fwd_hooks=[(name, take) for name in self.names],
            edits=self.edits,
            return_type=None,
            stop_at_layer=self.stop,
        )
