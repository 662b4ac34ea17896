"""The reference for path patching: the network unrolled into the tree of its paths, in plain torch.

A path is a sender and the readers that it meets, `("a0.h1", "m0", "a1.h2.q", "logits")` for the one from head 1 of
block 0 through two others. Every copy of a node knows the path from it to the logits, and computes its output from
inputs of its own. Were no two copies to share anything, the number of runs would grow with the number of paths; but a
path from the sender is chosen or not by its first nodes, and where these leave it open, by the rest alone. So copies
of a node differ only in whether the path onward from them chooses such a path, and there are two of each.
"""

import math

import torch
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.config import RotaryPositions
from hooklens.patching.graph.nodes import Reader, Writer, inputs_of, list_readers, list_writers, reaches


def is_chosen(path: tuple[str, ...], receivers: list[str], *, through_mlps: bool) -> bool:
    """Whether a path goes over MLPs only (or nothing) to a receiver."""
    for node in path[1:]:
        if node in receivers:
            return True
        if not (node.startswith("m") and through_mlps):
            return False
    return False


class PathTree:
    """A network of whatever wiring, evaluated path by path on unpadded prompts `[pair pos]`.

    `is_shared=False` evaluates each copy anew.
    """

    def __init__(self, model: HookedCausalLM, into: Tensor, other: Tensor, *, is_shared: bool = True) -> None:
        self.model, self.cfg, self.is_shared = model, model.cfg, is_shared
        self.writers = list_writers(model.cfg)
        self.last = list_readers(model.cfg)[-1]
        self.embedded = self.embed(into)
        self.patched = self.outputs_of(self.embed(other))

    def embed(self, tokens: Tensor) -> Tensor:
        _, cache = self.model.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")
        return cache["resid_pre", 0]

    def outputs_of(self, embedded: Tensor) -> dict[str, Tensor]:
        """What every node writes in a plain run."""
        written: dict[str, Tensor] = {"embed": embedded}
        for writer in self.writers[1:]:
            inputs = {reader.kind: self.sum_into(reader, written) for reader in self.inputs_of(writer)}
            written[str(writer)] = self.evaluate(writer, inputs)
        return written

    def sum_into(self, reader: Reader, written: dict[str, Tensor]) -> Tensor:
        read = [written[str(writer)] for writer in self.writers if reaches(writer, reader, self.cfg)]
        return torch.stack(read).sum(0) + self.biases(reader)

    def biases(self, reader: Reader) -> Tensor:
        """What attention adds that belongs to no head."""
        total = torch.zeros(self.cfg.d_model, dtype=self.model.dtype)
        for layer, block in enumerate(self.model.blocks):
            below = layer < reader.layer
            beside = layer == reader.layer and reader.kind == "mlp" and self.cfg.wiring == "sequential"
            if self.cfg.out_bias and block.attn is not None and (below or beside):
                total = total + block.attn.b_O
        return total

    def inputs_of(self, writer: Writer) -> list[Reader]:
        return inputs_of(writer, group_size=self.cfg.n_heads // self.cfg.n_kv_heads)

    @torch.no_grad()
    def logits(self, sender: str, receivers: list[str], *, through_mlps: bool = True) -> Tensor:
        """`[pair pos d_vocab]` of the run in which the sender's part of every chosen path is the other run's."""
        made: dict[tuple[str, bool], Tensor] = {}

        def output(writer: Writer, onward: tuple[str, ...]) -> Tensor:
            copy = str(writer), is_chosen(("", *onward), receivers, through_mlps=through_mlps)
            if copy not in made or not self.is_shared:
                made[copy] = compute(writer, onward)
            return made[copy]

        def compute(writer: Writer, onward: tuple[str, ...]) -> Tensor:
            if str(writer) == sender and is_chosen((sender, *onward), receivers, through_mlps=through_mlps):
                return self.patched[sender]
            if writer.kind == "embed":
                return self.embedded
            inputs = {reader.kind: read(reader, onward) for reader in self.inputs_of(writer)}
            return self.evaluate(writer, inputs)

        def read(reader: Reader, onward: tuple[str, ...]) -> Tensor:
            total = self.biases(reader)
            for writer in self.writers:
                if reaches(writer, reader, self.cfg):
                    total = total + output(writer, (str(reader), *onward))
            return total

        return self.unembed(read(self.last, ()))

    def unembed(self, stream: Tensor) -> Tensor:
        logits = self.norm(self.model.ln_final, stream) @ self.model.W_U
        return logits + self.model.b_U

    def evaluate(self, writer: Writer, inputs: dict[str, Tensor]) -> Tensor:
        block = self.model.blocks[writer.layer]
        norm = block.ln2 if writer.kind == "mlp" and not self.cfg.shared_norm else block.ln1
        normed = {kind: self.norm(norm, stream) for kind, stream in inputs.items()}
        if writer.kind == "mlp":
            return self.mlp(block.mlp, normed["mlp"])
        return self.head(block.attn, writer.head, normed)

    def norm(self, norm, x: Tensor) -> Tensor:
        if norm is None:
            return x
        kind = norm.norm
        if kind.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + kind.eps).sqrt()
        x = x * norm.w if kind.weight else x
        return x + norm.b if kind.bias else x

    def mlp(self, mlp, x: Tensor) -> Tensor:
        linear = x @ mlp.W_in + (mlp.b_in if self.cfg.mlp_bias else 0.0)
        if self.cfg.gated_mlp:
            neurons = torch.nn.functional.silu(x @ mlp.W_gate) * linear
        else:
            neurons = torch.nn.functional.gelu(linear)
        return neurons @ mlp.W_out + (mlp.b_out if self.cfg.mlp_bias else 0.0)

    def head(self, attn, head: int, normed: dict[str, Tensor]) -> Tensor:
        kv_head = head // (self.cfg.n_heads // self.cfg.n_kv_heads)
        q, k, v = (
            normed[kind] @ weight[index] + (bias[index] if self.cfg.qkv_bias else 0.0)
            for kind, weight, bias, index in (
                ("q", attn.W_Q, getattr(attn, "b_Q", None), head),
                ("k", attn.W_K, getattr(attn, "b_K", None), kv_head),
                ("v", attn.W_V, getattr(attn, "b_V", None), kv_head),
            )
        )
        scores = self.rotate(q) @ self.rotate(k).transpose(1, 2) / math.sqrt(self.cfg.d_head)
        n = scores.shape[-1]
        future = torch.ones(n, n, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(-1) @ v @ attn.W_O[head]

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions (Su et al. 2021) of the first `dim` entries."""
        rotary = self.cfg.positions
        if not isinstance(rotary, RotaryPositions):
            return x
        half = rotary.dim // 2
        # Angles are float32 in every dtype, as in Hugging Face's models.
        angles = torch.arange(x.shape[1])[:, None] * (1 / rotary.base ** (torch.arange(half) / half))
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        out = x.clone()
        if rotary.layout == "interleaved":
            first, second = slice(0, rotary.dim, 2), slice(1, rotary.dim, 2)
        else:
            first, second = slice(0, half), slice(half, rotary.dim)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
        return out
