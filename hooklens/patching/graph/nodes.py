"""The nodes of the computational graph that edges and paths run between: embeddings, heads, MLPs, logits.

The stream is a sum, `embed + sum of head outputs + sum of MLP outputs`, and every head and MLP reads a partial
sum (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). So each writer is joined to each
later reader by an edge. A head reads three times: `q`, `k` and `v`; under grouped queries keys and values belong
to key-value heads.

| writer | name | reader | name |
|---|---|---|---|
| embeddings | `embed` | queries of a head | `a3.h5.q` |
| a head | `a3.h5` | keys, values of a (key-value) head | `a3.h1.k`, `a3.h1.v` |
| an MLP | `m3` | an MLP | `m3` |
| | | the final norm | `logits` |
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.arguments import show
from hooklens.config import HookedConfig
from hooklens.errors import InputError, join_names
from hooklens.patching.errors import SiteError

WriterKind = Literal["embed", "head", "mlp"]
ReaderKind = Literal["q", "k", "v", "mlp", "logits"]
Edge = tuple[str, str]
"""A writer's name and a reader's."""

Node = TypeVar("Node")

_NUMBER = "(0|[1-9][0-9]*)"
_WRITER_NAME = re.compile(rf"embed|a{_NUMBER}\.h{_NUMBER}|m{_NUMBER}")
_READER_NAME = re.compile(rf"logits|a{_NUMBER}\.h{_NUMBER}\.([qkv])|m{_NUMBER}")
_PLACE_OF_KIND = {"q": 0, "k": 1, "v": 2, "mlp": 3}


@dataclass(frozen=True)
class Writer:
    """What adds to the stream.

    Attributes:
        kind: what it is.
        layer: its block; -1 for the embeddings.
        head: the head's number; 0 for others.
    """

    kind: WriterKind
    layer: int = -1
    head: int = 0

    def __str__(self) -> str:
        return {"embed": "embed", "head": f"a{self.layer}.h{self.head}", "mlp": f"m{self.layer}"}[self.kind]

    @property
    def hook_name(self) -> str:
        """Where its output passes; for a head that of all heads of its layer."""
        if self.kind == "embed":
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.layer}." + ("attn.hook_result" if self.kind == "head" else "hook_mlp_out")


@dataclass(frozen=True)
class Reader:
    """What reads the stream.

    Attributes:
        kind: what it is.
        layer: its block; `n_layers` for the logits.
        head: the head's number, a key-value head's for `k` and `v`; 0 for others.
    """

    kind: ReaderKind
    layer: int
    head: int = 0

    def __str__(self) -> str:
        if self.kind == "logits":
            return "logits"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.h{self.head}.{self.kind}"

    @property
    def hook_name(self) -> str:
        """Where its input passes, a copy of the stream before the norm; for a head that of all heads of its layer."""
        if self.kind == "logits":
            return f"blocks.{self.layer - 1}.hook_resid_post"
        return f"blocks.{self.layer}." + ("hook_mlp_in" if self.kind == "mlp" else f"hook_{self.kind}_input")


def list_writers(cfg: HookedConfig) -> list[Writer]:
    """All writers, in the order in which they write."""
    writers = [Writer("embed")]
    for block in cfg.blocks:
        if block.attn is not None:
            writers += [Writer("head", block.layer, head) for head in range(cfg.n_heads)]
        if block.mlp is not None:
            writers.append(Writer("mlp", block.layer))
    return writers


def list_readers(cfg: HookedConfig) -> list[Reader]:
    """All readers, in the order in which they read."""
    readers: list[Reader] = []
    for block in cfg.blocks:
        if block.attn is not None:
            readers += [Reader("q", block.layer, head) for head in range(cfg.n_heads)]
            readers += [Reader("k", block.layer, head) for head in range(cfg.n_kv_heads)]
            readers += [Reader("v", block.layer, head) for head in range(cfg.n_kv_heads)]
        if block.mlp is not None:
            readers.append(Reader("mlp", block.layer))
    return [*readers, Reader("logits", cfg.n_layers)]


def reaches(writer: Writer, reader: Reader, cfg: HookedConfig) -> bool:
    """Whether a reader's input holds a writer's output: in parallel blocks an MLP does not read its block's heads."""
    if writer.layer != reader.layer:
        return writer.layer < reader.layer
    return writer.kind == "head" and reader.kind == "mlp" and cfg.wiring == "sequential"


@dataclass(frozen=True)
class Graph:
    """All nodes of a network.

    Attributes:
        writers: in the order in which they write.
        readers: in the order in which they read.
        n_inputs: how many writers each reader reads. These are always the first ones.
    """

    writers: tuple[Writer, ...]
    readers: tuple[Reader, ...]
    n_inputs: tuple[int, ...]

    @classmethod
    def of(cls, cfg: HookedConfig) -> "Graph":
        """The nodes of a network."""
        writers, readers = tuple(list_writers(cfg)), tuple(list_readers(cfg))
        n_inputs = {
            key: sum(reaches(writer, reader, cfg) for writer in writers)
            for key, reader in {(reader.kind, reader.layer): reader for reader in readers}.items()
        }
        return cls(writers, readers, tuple(n_inputs[reader.kind, reader.layer] for reader in readers))

    def exists(self) -> Bool[Tensor, "reader writer"]:
        """Where there is an edge."""
        return torch.arange(len(self.writers)) < torch.tensor(self.n_inputs)[:, None]


def list_edges(cfg: HookedConfig) -> list[Edge]:
    """All edges, reader by reader in the order in which they read, the writers of each in the order of writing."""
    graph = Graph.of(cfg)
    writers = list(map(str, graph.writers))
    return [
        (writer, str(reader)) for reader, n in zip(graph.readers, graph.n_inputs, strict=True) for writer in writers[:n]
    ]


def inputs_of(writer: Writer, *, group_size: int) -> list[Reader]:
    """The readers from whose inputs a writer's output is made: none for the embeddings, three for a head.

    Args:
        writer: the writer.
        group_size: query heads per key-value head.
    """
    if writer.kind == "embed":
        return []
    if writer.kind == "mlp":
        return [Reader("mlp", writer.layer)]
    kv_head = writer.head // group_size
    return [
        Reader("q", writer.layer, writer.head),
        Reader("k", writer.layer, kv_head),
        Reader("v", writer.layer, kv_head),
    ]


def split_writer(name: str) -> Writer:
    """The writer of a name, in whatever network.

    Raises:
        SiteError: it is no writer's name.
    """
    match = _WRITER_NAME.fullmatch(name)
    if match is None:
        raise SiteError(f"{name!r} is no writer's name; these are 'embed', heads 'a0.h1' and MLPs 'm0'")
    layer, head, mlp = match.groups()
    if mlp is not None:
        return Writer("mlp", int(mlp))
    return Writer("embed") if layer is None else Writer("head", int(layer), int(head))


def writer_place(name: str) -> tuple[int, bool, int]:
    """Where the writer of a name stands in the order of writing.

    Raises:
        SiteError: it is no writer's name.
    """
    writer = split_writer(name)
    return writer.layer, writer.kind == "mlp", writer.head


def reader_place(name: str) -> tuple[float, int, int]:
    """Where the reader of a name stands in the order of reading.

    Raises:
        SiteError: it is no reader's name.
    """
    match = _READER_NAME.fullmatch(name)
    if match is None:
        raise SiteError(f"{name!r} is no reader's name; these are 'a0.h1.q' (or '.k', '.v'), MLPs 'm0' and 'logits'")
    layer, head, kind, mlp = match.groups()
    if mlp is not None:
        return int(mlp), _PLACE_OF_KIND["mlp"], 0
    return (float("inf"), 0, 0) if layer is None else (int(layer), _PLACE_OF_KIND[kind], int(head))


def parse_writers(names: Sequence[str], cfg: HookedConfig) -> list[Writer]:
    """The writers of some names, each once.

    Raises:
        InputError: no list of names.
        SiteError: no such writers; all of them are named.
    """
    known = {str(writer): writer for writer in list_writers(cfg)}
    return _parse(
        names,
        known,
        "writes nothing to the stream",
        f"writers are 'embed', heads 'a0.h0' to 'a{cfg.n_layers - 1}.h{cfg.n_heads - 1}' and MLPs 'm0' to "
        f"'m{cfg.n_layers - 1}'{_describe_gaps(cfg)}",
    )


def parse_readers(names: Sequence[str], cfg: HookedConfig) -> list[Reader]:
    """The readers of some names, each once.

    Raises:
        InputError: no list of names.
        SiteError: no such readers; all of them are named.
    """
    known = {str(reader): reader for reader in list_readers(cfg)}
    return _parse(
        names,
        known,
        "does not read the stream",
        f"readers are 'a{{layer}}.h{{head}}.q' (layers 0 to {cfg.n_layers - 1}, heads 0 to {cfg.n_heads - 1}), '.k' "
        f"and '.v' (key-value heads 0 to {cfg.n_kv_heads - 1}), MLPs 'm0' to 'm{cfg.n_layers - 1}', 'logits'"
        f"{_describe_gaps(cfg)}",
    )


def parse_writer(name: str, cfg: HookedConfig) -> Writer:
    """The writer of a name.

    Raises:
        SiteError: no such writer.
    """
    return parse_writers([name], cfg)[0]


def parse_reader(name: str, cfg: HookedConfig) -> Reader:
    """The reader of a name.

    Raises:
        SiteError: no such reader.
    """
    return parse_readers([name], cfg)[0]


def _describe_gaps(cfg: HookedConfig) -> str:
    """Which layers lack heads or an MLP, as the end of a sentence."""
    lacking = {
        "heads": [block.layer for block in cfg.blocks if block.attn is None],
        "MLPs": [block.layer for block in cfg.blocks if block.mlp is None],
    }
    gaps = [f"no {what} in layers {layers}" for what, layers in lacking.items() if layers]
    return f" ({', '.join(gaps)})" if gaps else ""


def _parse(names: Sequence[str], known: Mapping[str, Node], fault: str, expected: str) -> list[Node]:
    listed = [] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    if not all(isinstance(name, str) for name in listed) or (not listed and names not in ([], ())):
        raise InputError(f"expected a list of nodes' names, got {show(names)}; {expected}")
    unknown = [name for name in dict.fromkeys(listed) if name not in known]
    if unknown:
        raise SiteError(f"{join_names(unknown)} {fault}; {expected}")
    return [known[name] for name in dict.fromkeys(listed)]


def check_additive(cfg: HookedConfig) -> None:
    """Refuse networks whose heads do not add to the stream one by one.

    Raises:
        InputError: a norm stands between the heads and the stream, or in the stream.
    """
    if cfg.norm_stream:
        raise InputError(
            "edges and paths need a stream that is the sum of what is written to it; in this network it goes through "
            "norms behind each branch (cfg.norm_stream). Sweep 'z', 'attn_out' or 'mlp_out' instead"
        )
    normed = [block.layer for block in cfg.blocks if block.norm_after]
    if normed:
        raise InputError(
            "edges and paths between heads need outputs that are added to the stream as they are; in this network a "
            f"norm follows each branch of layers {normed}, so a head there has no output of its own. Sweep 'z' or "
            "'attn_out' instead"
        )


def check_heads_apart(cfg: HookedConfig) -> None:
    """Refuse networks in which what one head reads changes what others do, past the inputs that they have as nodes.

    Raises:
        InputError: a norm goes over the queries or keys of all heads.
    """
    normed = [block.layer for block in cfg.blocks if block.attn is not None and block.qk_norm is not None]
    if normed and cfg.qk_norm_over == "all_heads":
        raise InputError(
            "circuits need heads of which each reads inputs of its own; in this network a norm goes over the queries "
            f"and keys of all heads of layers {normed} (cfg.qk_norm_over='all_heads'), so what one reads changes the "
            "others. Sweep 'z' or 'attn_out', or patch paths (path_patch), instead"
        )
