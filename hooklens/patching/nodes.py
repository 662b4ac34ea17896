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

from dataclasses import dataclass
from typing import Literal

from hooklens.config import HookedConfig
from hooklens.errors import InputError
from hooklens.patching.errors import SiteError

WriterKind = Literal["embed", "head", "mlp"]
ReaderKind = Literal["q", "k", "v", "mlp", "logits"]


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
    for layer in range(cfg.n_layers):
        writers += [Writer("head", layer, head) for head in range(cfg.n_heads)]
        writers.append(Writer("mlp", layer))
    return writers


def list_readers(cfg: HookedConfig) -> list[Reader]:
    """All readers, in the order in which they read."""
    readers: list[Reader] = []
    for layer in range(cfg.n_layers):
        readers += [Reader("q", layer, head) for head in range(cfg.n_heads)]
        readers += [Reader("k", layer, head) for head in range(cfg.n_kv_heads)]
        readers += [Reader("v", layer, head) for head in range(cfg.n_kv_heads)]
        readers.append(Reader("mlp", layer))
    return [*readers, Reader("logits", cfg.n_layers)]


def reaches(writer: Writer, reader: Reader, cfg: HookedConfig) -> bool:
    """Whether a reader's input holds a writer's output: in parallel blocks an MLP does not read its block's heads."""
    if writer.layer != reader.layer:
        return writer.layer < reader.layer
    return writer.kind == "head" and reader.kind == "mlp" and cfg.wiring == "sequential"


def parse_writer(name: str, cfg: HookedConfig) -> Writer:
    """The writer of a name.

    Raises:
        SiteError: no such writer.
    """
    found = {str(writer): writer for writer in list_writers(cfg)}.get(name)
    if found is None:
        raise SiteError(
            f"{name!r} writes nothing to the stream; writers are 'embed', heads 'a0.h0' to "
            f"'a{cfg.n_layers - 1}.h{cfg.n_heads - 1}' and MLPs 'm0' to 'm{cfg.n_layers - 1}'"
        )
    return found


def parse_reader(name: str, cfg: HookedConfig) -> Reader:
    """The reader of a name.

    Raises:
        SiteError: no such reader.
    """
    found = {str(reader): reader for reader in list_readers(cfg)}.get(name)
    if found is None:
        raise SiteError(
            f"{name!r} does not read the stream; readers are 'a{{layer}}.h{{head}}.q' (heads 0 to {cfg.n_heads - 1}), "
            f"'.k' and '.v' (key-value heads 0 to {cfg.n_kv_heads - 1}), MLPs 'm0' to 'm{cfg.n_layers - 1}', 'logits'"
        )
    return found


def check_additive(cfg: HookedConfig) -> None:
    """Refuse networks whose heads do not add to the stream one by one.

    Raises:
        InputError: a norm stands between the heads and the stream.
    """
    if cfg.norm_after:
        raise InputError(
            "edges and paths between heads need outputs that are added to the stream as they are; in this network a "
            "norm follows each branch, so a head has no output of its own. Sweep 'z' or 'attn_out' instead"
        )
