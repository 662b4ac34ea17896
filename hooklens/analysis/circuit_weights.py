"""The weights of circuits, from one copy of the stream to the next, with the norms on the way folded in.

A norm's weight and the mean that a LayerNorm takes out are linear and belong to the map behind it; its denominator
depends on the run and is left out, and so are biases. Everything is at least in float32.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.model.attention.head_norm import HeadNorm
from hooklens.model.attention.latent import LatentAttention
from hooklens.model.embed import scale_in
from hooklens.model.norm import Norm
from hooklens.precision import widen
from hooklens.weights.factored import FactoredMatrix


def embedding(model: HookedCausalLM) -> Float[Tensor, "d_vocab d_model"]:
    """What each token is in the stream: its row of `W_E`, times `cfg.embed_scale` where the model has one."""
    W_E, factor = widen(model.W_E), model.cfg.embed_scale
    return W_E if factor is None else W_E * float(scale_in(factor, model.cfg, model.dtype))


def ov_circuit(model: HookedCausalLM, layer: int, head: int) -> FactoredMatrix:
    """What a head writes to the stream of what it reads there, `W_V W_O`, `[d_model d_model]`.

    In latent attention `W_DKV W_UV` stands for `W_V`, with the gain of the norm between the two.
    """
    block = model.block_list()[layer]
    if isinstance(block.attn, LatentAttention):
        reads = fold_norm(block.ln1, block.attn.W_DKV) @ fold_norm(block.attn.kv_latent_norm, block.attn.W_UV[head])
    else:
        reads = fold_norm(block.ln1, block.attn.read_weight("W_V")[_kv_head(model, head)])
    writes = behind_norm(block.exit_norm("attn"), widen(block.attn.W_O[head]))
    return _together(model, reads, writes * model.cfg.residual_scale)


def qk_circuit(model: HookedCausalLM, layer: int, head: int) -> FactoredMatrix:
    """What a query in the stream scores with a key there at distance 0, `W_Q W_K^T` scaled, `[d_model d_model]`.

    Rotations cancel at distance 0. Query and key norms count with their weights, as if they stood before the rotation;
    clipping and temperatures do not count, nor do positions that are added to what queries and keys read.

    Raises:
        InputError: the layer has latent attention, whose keys are made of two parts of which one is normed.
    """
    block = model.block_list()[layer]
    attn = block.attn
    if isinstance(attn, LatentAttention):
        raise InputError(
            f"layer {layer} has latent attention: of a head's key only what does not turn goes through a norm, so no "
            "product of weights is the score up to the norms' denominators. What does not turn has a circuit between "
            "the normed latents, FactoredMatrix(attn.W_UQ[..., d_rope:], attn.W_UK.mT)"
        )
    W_Q = behind_norm(attn.q_norm, fold_norm(block.ln1, attn.W_Q[head]), head)
    W_K = behind_norm(
        attn.k_norm, fold_norm(block.ln1, attn.read_weight("W_K")[_kv_head(model, head)]), _kv_head(model, head)
    )
    return _together(model, W_Q * model.cfg.block(layer).score_scale, W_K.mT)


def mlp_reader(model: HookedCausalLM, layer: int) -> Float[Tensor, "d_model d_mlp"]:
    """What an MLP's neurons, or their gates where it has such, read of the stream."""
    block = model.block_list()[layer]
    reader = block.mlp.W_gate if model.cfg.gated_mlp else block.mlp.W_in
    return fold_norm(block.ln1 if block.ln2 is None else block.ln2, reader).to(model.device)


def mlp_writer(model: HookedCausalLM, layer: int) -> Float[Tensor, "d_mlp d_model"]:
    """What an MLP's neurons write to the stream."""
    block = model.block_list()[layer]
    return behind_norm(block.exit_norm("mlp"), widen(block.mlp.W_out)).to(model.device) * model.cfg.residual_scale


def unembedding(model: HookedCausalLM) -> Float[Tensor, "d_model d_vocab"]:
    """What the logits of tokens read of the stream.

    Raises:
        InputError: the logits are of something else than tokens.
    """
    refuse_other_outputs(model.cfg, "tokens that the stream promotes", InputError)
    return fold_norm(model.ln_final, model.W_U.to(model.device))


def _together(model: HookedCausalLM, reads: Tensor, writes: Tensor) -> FactoredMatrix:
    """A circuit where the embedding is, which on several devices need not be where its layer is."""
    return FactoredMatrix(reads.to(model.device), writes.to(model.device))


def fold_norm(norm: Norm | None, reader: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
    """A map that reads the stream with the weight and the centring of the norm before it."""
    reader = widen(reader)
    if norm is None:
        return reader
    gain = _gain(norm)
    folded = reader if gain is None else gain[:, None].to(reader.device) * reader
    return folded - folded.mean(0, keepdim=True) if norm.norm.kind == "layer" else folded


def behind_norm(norm: Norm | None, writer: Float[Tensor, "out size"], head: int = 0) -> Float[Tensor, "out size"]:
    """A map with the centring and the weight of the norm behind it, which may have a weight for each head.

    The mean that a LayerNorm over all heads takes out is of them all, and no part of one head's map.
    """
    if norm is None:
        return writer
    over_all = norm.cfg.qk_norm_over == "all_heads" and isinstance(norm, HeadNorm)
    centred = writer - writer.mean(-1, keepdim=True) if norm.norm.kind == "layer" and not over_all else writer
    gain = _gain(norm)
    if gain is None:
        return centred
    return centred * (gain if gain.ndim == 1 else gain[head])


def _gain(norm: Norm) -> Float[Tensor, " size"] | Float[Tensor, "heads size"] | None:
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
    if part == "mlp" and (reason := cfg.description.why_absent(f"blocks.{layer}.mlp.hook_post")) is not None:
        raise InputError(f"layer {layer} has no neurons to read: {reason}")
