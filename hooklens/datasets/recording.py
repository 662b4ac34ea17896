"""Record activations of a corpus into a folder of shards, in one pass that goes on after an interruption."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooklens.arguments import optional, read_flag, read_function, read_int, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.datasets.blocks import Chooser, Cut, Keep, cut_documents
from hooklens.datasets.capturing import Capturing, Part
from hooklens.datasets.corpus import Corpus, check_corpus, read_documents
from hooklens.datasets.dataset import ActivationDataset
from hooklens.datasets.folder import open_folder
from hooklens.datasets.manifest import Manifest
from hooklens.datasets.sharding import run_on_ray
from hooklens.datasets.writing import Filled, ShardWriter
from hooklens.errors import CheckpointError, InputError
from hooklens.evaluation.fingerprint import describe_precision, model_fingerprint, tokenizer_fingerprint
from hooklens.evaluation.interventions import find_interventions
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.choice import Choice, read_choice
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.vectors import choose_vectors
from hooklens.optional import import_package
from hooklens.progress import progress_bar
from hooklens.workers import Engine, check_portable, read_engine

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
    engine: Engine = "local",
    workers: int | None = None,
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
        engine: `"ray"` computes on workers that Ray keeps, on this machine or on many, which write the shards;
            the folder in the end holds the same bytes. A worker runs with as many threads as torch has here, or on a
            GPU of its own if the model lies on one. It is `keep` and the corpus that stay in this process.
        workers: of Ray, how many; None: as many as it has room for.
        progress: show a progress bar.

    Returns:
        What the folder holds.

    Raises:
        HookNameError: a site that is not there.
        InputError: a site without a vector for each token, a corpus that is none, options that are none, functions that
            act on the model, or dropout in training mode.
        CheckpointError: the folder holds something else or another recording, or the corpus has changed since; another
            process writes there; or the disk is full. Shards that are written are kept.
        MissingDependencyError: the package of a URL's file system is not installed, or Ray.
        WorkerError: workers of Ray died at the same shard again and again; shards before it are kept.

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
    where, n_workers = read_engine(engine, workers, what=what)
    if where == "ray":
        import_package("ray")
        check_portable(model, what=what)
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
    sites_of = {name: _shape_of(model, name) for name in names}
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
        sites=sites_of,
        dtype=str(kept_as).removeprefix("torch."),
    )
    with ShardWriter(folder, wanted) as writer:
        if not writer.manifest.complete:
            documents = read_documents(
                model, corpus, text_key=text_key, prepend_bos=prepend_bos, what=f"{what}: corpus"
            )
            capturing = Capturing(
                model=model, sites=sites_of, dtype=kept_as, edits=edits, batch_tokens=at_once, row_length=width
            )
            limited = _limit(documents, limit)
            with progress_bar("recording", total=limit, unit="token", progress=progress) as bar:
                bar.update(_skip(limited, chooser, writer))
                cuts = cut_documents(limited, chooser, first=writer.manifest.documents, batch_tokens=at_once)
                steps = (
                    _run_here(cuts, capturing, writer, chooser, size)
                    if where == "local"
                    else run_on_ray(cuts, capturing, writer, chooser, size, workers=n_workers)
                )
                for done in steps:
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


def _skip(documents: Iterator[Tensor], chooser: Chooser, writer: ShardWriter) -> int:
    """Read the documents of the shards that are there again; gives how many tokens these are.

    Raises:
        CheckpointError: they are others.
    """
    manifest = writer.manifest
    if not manifest.shards:
        return 0
    n_read = 0
    for number in range(manifest.documents):
        tokens = next(documents, None)
        if tokens is None:
            break
        chooser.choose(tokens, number)
        n_read += len(tokens)
    if chooser.digest != manifest.shards[-1].digest:
        raise CheckpointError(
            f"{writer.folder} holds {manifest.documents:,} documents of this recording, and the corpus, or which of "
            "its tokens are kept, is no longer the same up to there; record into another folder"
        )
    return n_read


def _run_here(
    cuts: Iterator[Cut], capturing: Capturing, writer: ShardWriter, chooser: Chooser, shard_bytes: int
) -> Iterator[int]:
    """Record in this process, a block at a time; gives the tokens of each."""
    documents, tokens_read = writer.manifest.documents, writer.manifest.tokens_read
    parts: list[Part] = []

    def hand_over() -> None:
        tensors = capturing.join(parts)
        parts.clear()
        writer.put(Filled(tensors=tensors, documents=documents, tokens_read=tokens_read, digest=chooser.digest))

    nbytes = 0
    for cut in cuts:
        parts.append(capturing.run(cut))
        nbytes += cut.n_kept * capturing.bytes_per_token
        documents += len(cut.documents)
        tokens_read += cut.n_tokens
        if nbytes >= shard_bytes:
            hand_over()
            nbytes = 0
        yield cut.n_tokens
    if nbytes:
        hand_over()
