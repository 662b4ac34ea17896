"""The weights of circuits, from one copy of the stream to the next, with the norms on the way folded in.

A norm's weight and the mean that a LayerNorm takes out are linear and belong to the map behind it; its denominator
depends on the run and is left out, and so are biases. Everything is at least in float32.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.model.norm import Norm
from hooklens.precision import widen
from hooklens.weights.factored import FactoredMatrix


def ov_circuit(model: HookedCausalLM, layer: int, head: int) -> FactoredMatrix:
    """What a head writes to the stream of what it reads there, `W_V W_O`, `[d_model d_model]`."""
    block = model.block_list()[layer]
    reads = fold_norm(block.ln1, block.attn.W_V[_kv_head(model, head)])
    return FactoredMatrix(reads, _behind_norm(block.ln1_post, widen(block.attn.W_O[head])))


def qk_circuit(model: HookedCausalLM, layer: int, head: int) -> FactoredMatrix:
    """What a query in the stream scores with a key there at distance 0, `W_Q W_K^T` scaled, `[d_model d_model]`.

    Rotations cancel at distance 0. Query and key norms count with their weights.
    """
    block = model.block_list()[layer]
    attn = block.attn
    W_Q = _behind_norm(attn.q_norm, fold_norm(block.ln1, attn.W_Q[head]))
    W_K = _behind_norm(attn.k_norm, fold_norm(block.ln1, attn.W_K[_kv_head(model, head)]))
    return FactoredMatrix(W_Q * model.cfg.score_scale, W_K.mT)


def mlp_reader(model: HookedCausalLM, layer: int) -> Float[Tensor, "d_model d_mlp"]:
    """What an MLP's neurons, or their gates where it has such, read of the stream."""
    block = model.block_list()[layer]
    reader = block.mlp.W_gate if model.cfg.gated_mlp else block.mlp.W_in
    return fold_norm(block.ln1 if block.ln2 is None else block.ln2, reader)


def mlp_writer(model: HookedCausalLM, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """What an MLP's neurons write to the stream."""
    block = model.block_list()[layer]
    return _behind_norm(block.ln2_post, widen(block.mlp.W_out))


def unembedding(model: HookedCausalLM) -> Float[Tensor, "d_model d_vocab"]:
    """What the logits read of the stream."""
    return fold_norm(model.ln_final, model.W_U)


def fold_norm(norm: Norm | None, reader: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
    """A map that reads the stream with the weight and the centring of the norm before it."""
    reader = widen(reader)
    if norm is None:
        return reader
    gain = _gain(norm)
    folded = reader if gain is None else gain[:, None] * reader
    return folded - folded.mean(0, keepdim=True) if norm.norm.kind == "layer" else folded


def _behind_norm(norm: Norm | None, writer: Float[Tensor, "out size"]) -> Float[Tensor, "out size"]:
    """A map with the centring and the weight of the norm behind it."""
    if norm is None:
        return writer
    centred = writer - writer.mean(-1, keepdim=True) if norm.norm.kind == "layer" else writer
    gain = _gain(norm)
    return centred if gain is None else centred * gain


def _gain(norm: Norm) -> Float[Tensor, " size"] | None:
    if norm.w is None:
        return None
    weight: Tensor = widen(norm.w)
    return 1 + weight if norm.norm.unit_offset else weight


def _kv_head(model: HookedCausalLM, head: int) -> int:
    return head // (model.cfg.n_heads // model.cfg.n_kv_heads)


def check_place(model: HookedCausalLM, layer: int, part: Literal["attn", "mlp"], *, head: int = 0) -> None:
    """Refuse a layer or a head that the model does not have, or a layer without attention or an MLP.

    Raises:
        InputError: says which layers and heads there are.
    """
    cfg = model.cfg
    if not 0 <= layer < cfg.n_layers or not 0 <= head < cfg.n_heads:
        raise InputError(
            f"layer {layer}, head {head} is not in the model; it has layers 0 to {cfg.n_layers - 1} with heads 0 to "
            f"{cfg.n_heads - 1}"
        )
    if (reason := cfg.description.why_absent(f"blocks.{layer}.{part}")) is not None:
        raise InputError(f"layer {layer} has no circuit to read: {reason}")
