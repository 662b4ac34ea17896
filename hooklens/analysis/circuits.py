"""Weights in words: the singular vectors of OV circuits and MLPs, read in token space.

**Method** (Millidge and Black 2022, "The singular value decompositions of transformer weight matrices are
highly interpretable"). A matrix between two copies of the stream, a head's `W_V W_O` or an MLP's `W_out`, is

    M = sum over i of  s_i u_i v_i^T

so along component `i` it reads `u_i` and writes `s_i v_i`. A direction that is written is read by the
unembedding as `v_i W_U`, one number per token; a direction that a head reads matches tokens by `W_E u_i`. For
whole circuits, `W_E W_V W_O W_U` says how much attending to one token raises the logit of another (Elhage et al.
2021). `W_V`, an MLP's input weight and `W_U` stand for these maps with the norm before them folded in: its weight,
and the mean that a LayerNorm takes out. So a model reads the same before and after `fold_ln`.

**How to read it.** `s_i` is the strength; its tokens are a theme if they belong together. Singular vectors have
no sign of their own: the tokens at one end of what is read go with those at the same end of what is written.
The norms' denominators are left out, and so are layers in between, so early layers read and write directions that
the vocabulary need not describe.
"""

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.analysis.token_names import name_tokens
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.model.norm import Norm
from hooklens.optional import import_package
from hooklens.precision import widen
from hooklens.weights.factored import FactoredMatrix
from hooklens.weights.top_tokens import top_tokens

if TYPE_CHECKING:
    import pandas

End = Literal["+", "-"]


@torch.no_grad()
def read_ov_directions(
    model: HookedCausalLM, layer: int, head: int, *, n_directions: int = 5, k: int = 5
) -> "pandas.DataFrame":
    """The singular vectors of a head's OV circuit as tokens that it reads and tokens that it promotes.

    Columns: `direction`, `singular_value`, `end` (`"+"` or `"-"`), `reads` and `writes`: the `k` tokens furthest
    towards that end (text, or ids without a tokenizer).

    Raises:
        InputError: no such layer or head, or a number out of range.
    """
    _check_place(model, layer, head=head)
    circuit = _ov_circuit(model, layer, head)
    U, S, V = circuit.svd()
    writes = _unembedding(model).T @ V
    return _tabulate(model, S, reads=widen(model.W_E) @ U, writes=writes, n_directions=n_directions, k=k)


@torch.no_grad()
def read_mlp_directions(
    model: HookedCausalLM, layer: int, *, weight: Literal["in", "out"] = "out", n_directions: int = 5, k: int = 5
) -> "pandas.DataFrame":
    """The singular vectors of an MLP's weight in the stream, as tokens.

    Columns: `direction`, `singular_value`, `end`, and `writes` for `W_out` (tokens that it promotes) or `reads`
    for the input weight (tokens that it matches; the gate's where there is one).

    Raises:
        InputError: no such layer or weight, or a number out of range.
    """
    _check_place(model, layer)
    mlp = model.block_list()[layer].mlp
    if weight == "out":
        _, S, V_transposed = torch.linalg.svd(widen(mlp.W_out), full_matrices=False)
        return _tabulate(model, S, writes=_unembedding(model).T @ V_transposed.mT, n_directions=n_directions, k=k)
    if weight != "in":
        raise InputError(f"read_mlp_directions: weight is {weight!r}; expected 'in' or 'out'")
    reader = mlp.W_gate if model.cfg.gated_mlp else mlp.W_in
    block = model.block_list()[layer]
    norm = block.ln1 if block.ln2 is None else block.ln2
    U, S, _ = torch.linalg.svd(_fold_norm(norm, reader), full_matrices=False)
    return _tabulate(model, S, reads=widen(model.W_E) @ U, n_directions=n_directions, k=k)


@torch.no_grad()
def top_ov_pairs(model: HookedCausalLM, layer: int, head: int, *, k: int = 10) -> "pandas.DataFrame":
    """The pairs of tokens for which attending to the first raises the logit of the second most, through a head.

    Columns: `source`, `promoted`, `value`. The d_vocab x d_vocab circuit is streamed over, never made.

    Raises:
        InputError: no such layer or head, or `k` out of range.
    """
    _check_place(model, layer, head=head)
    circuit = _ov_circuit(model, layer, head)
    found = top_tokens(FactoredMatrix(widen(model.W_E) @ circuit.A, circuit.B @ _unembedding(model)), k)
    columns = {
        "source": name_tokens(model, found.rows),
        "promoted": name_tokens(model, found.columns),
        "value": found.values.tolist(),
    }
    table: pandas.DataFrame = import_package("pandas").DataFrame(columns)
    return table


def _ov_circuit(model: HookedCausalLM, layer: int, head: int) -> FactoredMatrix:
    block = model.block_list()[layer]
    kv_head = head // (model.cfg.n_heads // model.cfg.n_kv_heads)
    return FactoredMatrix(_fold_norm(block.ln1, block.attn.W_V[kv_head]), widen(block.attn.W_O[head]))


def _unembedding(model: HookedCausalLM) -> Float[Tensor, "d_model d_vocab"]:
    return _fold_norm(model.ln_final, model.W_U)


def _fold_norm(norm: Norm | None, reader: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
    """A map that reads the stream, at least in float32, with the weight and the centring of the norm before it."""
    reader = widen(reader)
    if norm is None:
        return reader
    gain = 1 + widen(norm.w) if norm.norm.unit_offset else widen(norm.w)
    folded = gain[:, None] * reader
    return folded - folded.mean(0, keepdim=True) if norm.norm.kind == "layer" else folded


def _tabulate(
    model: HookedCausalLM,
    singular_values: Float[Tensor, " rank"],
    *,
    n_directions: int,
    k: int,
    **sides: Float[Tensor, "d_vocab rank"],
) -> "pandas.DataFrame":
    rank, d_vocab = len(singular_values), model.cfg.d_vocab
    if not 1 <= n_directions <= rank or not 1 <= k <= d_vocab:
        raise InputError(
            f"n_directions={n_directions}, k={k}; expected 1 to {rank} directions, the rank, and 1 to {d_vocab} tokens"
        )
    lines = []
    for direction in range(n_directions):
        for end, sign in (("+", 1), ("-", -1)):
            line: dict[str, object] = {
                "direction": direction,
                "singular_value": float(singular_values[direction]),
                "end": end,
            }
            for side, values in sides.items():
                line[side] = name_tokens(model, (sign * values[:, direction]).topk(k).indices)
            lines.append(line)
    table: pandas.DataFrame = import_package("pandas").DataFrame(lines)
    return table


def _check_place(model: HookedCausalLM, layer: int, *, head: int = 0) -> None:
    cfg = model.cfg
    if not 0 <= layer < cfg.n_layers or not 0 <= head < cfg.n_heads:
        raise InputError(
            f"layer {layer}, head {head} is not in the model; it has layers 0 to {cfg.n_layers - 1} with heads 0 to "
            f"{cfg.n_heads - 1}"
        )
