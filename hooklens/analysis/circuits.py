"""Weights in words: OV and QK circuits, MLPs and neurons, read in token space.

**Method** (Millidge and Black 2022, "The singular value decompositions of transformer weight matrices are
highly interpretable"). A matrix between two copies of the stream, a head's `W_V W_O` or an MLP's `W_out`, is

    M = sum over i of  s_i u_i v_i^T

so along component `i` it reads `u_i` and writes `s_i v_i`. A direction that is written is read by the
unembedding as `v_i W_U`, one number per token; a direction that a head reads matches tokens by `W_E u_i`. For
whole circuits, `W_E W_V W_O W_U` says how much attending to one token raises the logit of another, and
`W_E W_Q W_K^T W_E^T` how much one token asks for another (Elhage et al. 2021). `W_E` stands for a token's vector in
the stream, so with `cfg.embed_scale` for the scaled one: which tokens lead does not depend on a factor above 0, values
do, those of queries and keys on its square. `W_Q`, `W_K`, `W_V`, an MLP's input weight and `W_U` stand for these maps
with the norm before them folded in: its weight, and the mean that a LayerNorm takes out; so a model reads the same
before and after `fold_ln`. What leaves a branch through a norm (`cfg.norm_after`) is read behind it in the same way.
Else the weights are read as they are: centring `W_U` or the writing weights, by `process_weights`, changes what is
read.

**How to read it.** `s_i` is the strength; its tokens are a theme if they belong together. Singular vectors have
no sign of their own: the tokens at one end of what is read go with those at the same end of what is written.
The norms' denominators are left out, and so are layers in between, so early layers read and write directions that
the vocabulary need not describe.
"""

from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.analysis.circuit_weights import (
    check_place,
    embedding,
    mlp_reader,
    mlp_writer,
    ov_circuit,
    qk_circuit,
    unembedding,
)
from hooklens.analysis.reading.connection import read_model
from hooklens.analysis.reading.token_names import name_tokens
from hooklens.arguments import read_flag, read_int, read_one_of, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.optional import import_package
from hooklens.weights.factored import FactoredMatrix
from hooklens.weights.top_tokens import TopEntries, top_tokens

if TYPE_CHECKING:
    import pandas

End = Literal["+", "-"]


@reads(model=read_model, layer=read_int, head=read_int, n_directions=read_int, k=read_int)
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
    check_place(model, layer, "attn", head=head)
    circuit = ov_circuit(model, layer, head)
    U, S, V = circuit.svd()
    writes = unembedding(model).T @ V
    return _tabulate(model, S, reads=embedding(model) @ U, writes=writes, n_directions=n_directions, k=k)


@reads(
    model=read_model, layer=read_int, weight=partial(read_one_of, options=("in", "out")), n_directions=read_int,
    k=read_int,
)  # fmt: skip
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
    check_place(model, layer, "mlp")
    matrix = mlp_writer(model, layer) if weight == "out" else mlp_reader(model, layer)
    U, S, V_transposed = torch.linalg.svd(matrix, full_matrices=False)
    if weight == "out":
        return _tabulate(model, S, writes=unembedding(model).T @ V_transposed.mT, n_directions=n_directions, k=k)
    return _tabulate(model, S, reads=embedding(model) @ U, n_directions=n_directions, k=k)


@reads(model=read_model, layer=read_int, head=read_int, k=read_int, center=read_flag)
@torch.no_grad()
def top_ov_pairs(
    model: HookedCausalLM, layer: int, head: int, *, k: int = 10, center: bool = False
) -> "pandas.DataFrame":
    """The pairs of tokens for which attending to the first raises the logit of the second most, through a head.

    Columns: `source`, `promoted`, `value`. The d_vocab x d_vocab circuit is streamed over, never made.

    Args:
        model: the model.
        layer: the layer.
        head: the query head.
        k: how many pairs.
        center: subtract from each source's values their mean over the vocabulary, which no softmax sees. Without it
            `value` is the change of the logit alone, and a source that raises all logits alike can lead the list.

    Raises:
        InputError: no such layer or head, or `k` out of range.
    """
    check_place(model, layer, "attn", head=head)
    circuit = ov_circuit(model, layer, head)
    found = top_tokens(
        FactoredMatrix(embedding(model) @ circuit.A, circuit.B @ _columns(unembedding(model), center)), k
    )
    return _tabulate_pairs(model, found, "source", "promoted")


@reads(model=read_model, layer=read_int, head=read_int, k=read_int, center=read_flag)
@torch.no_grad()
def top_qk_pairs(
    model: HookedCausalLM, layer: int, head: int, *, k: int = 10, center: bool = False
) -> "pandas.DataFrame":
    """The pairs of tokens for which a head's query at the first asks most for a key at the second.

    The full QK circuit `W_E W_Q W_K^T W_E^T` of Elhage et al. 2021, times the scale of the scores, with the gains of
    query and key norms. Columns: `query`, `key`, `value`. The d_vocab x d_vocab circuit is streamed over, never made.

    Positions are left out: rotary ones stand at distance 0, learned ones and ALiBi at none. So are biases, soft caps
    and the norms' denominators.

    Args:
        model: the model.
        layer: the layer.
        head: the query head.
        k: how many pairs.
        center: subtract from each query's values their mean over the vocabulary, which no softmax over keys sees.

    Raises:
        InputError: no such layer or head, or `k` out of range.
    """
    check_place(model, layer, "attn", head=head)
    circuit, W_E = qk_circuit(model, layer, head), embedding(model)
    found = top_tokens(FactoredMatrix(W_E @ circuit.A, _columns(circuit.B @ W_E.mT, center)), k)
    return _tabulate_pairs(model, found, "query", "key")


def _columns(matrix: Float[Tensor, "inner d_vocab"], center: bool) -> Float[Tensor, "inner d_vocab"]:  # noqa: FBT001
    """The right factor of a circuit, on request without what all tokens have in common."""
    return matrix - matrix.mean(1, keepdim=True) if center else matrix


def _tabulate_pairs(model: HookedCausalLM, found: TopEntries, rows: str, columns: str) -> "pandas.DataFrame":
    table: pandas.DataFrame = import_package("pandas").DataFrame(
        {
            rows: name_tokens(model, found.rows),
            columns: name_tokens(model, found.columns),
            "value": found.values.tolist(),
        }
    )
    return table


@reads(model=read_model, layer=read_int, k=read_int)
@torch.no_grad()
def neuron_tokens(model: HookedCausalLM, layer: int, neurons: Choice = None, *, k: int = 5) -> "pandas.DataFrame":
    """The input tokens that excite each neuron most and the output tokens that it promotes most, by its weights.

    A neuron of input weight `w_in` and output weight `w_out` is read as the key `W_E w_in` and the value `w_out W_U`
    of a memory (Geva et al. 2021, "Transformer Feed-Forward Layers Are Key-Value Memories"; Geva et al. 2022 for
    values in the vocabulary). Columns: `neuron`, `excited_by`, `excitations`, `promotes`, `promotions`: the `k` tokens
    with the largest values, and the values. With a gate, `excited_by` is what opens it.

    Biases and the norms' denominators are left out; a token's embedding alone is read, as if nothing lay between.

    Args:
        model: the model.
        layer: the layer.
        neurons: an int, a slice, or a list, array or tensor of ints; None: all.
        k: tokens to list at each end.

    Raises:
        InputError: no such layer or neuron, a layer without an MLP, or `k` out of range.
    """
    check_place(model, layer, "mlp")
    d_vocab = model.cfg.d_vocab
    if not 1 <= k <= d_vocab:
        raise InputError(f"neuron_tokens: k={k}; expected 1 to {d_vocab}, the size of the vocabulary")
    reads_stream, writes = mlp_reader(model, layer), mlp_writer(model, layer)
    chosen = resolve_choice(
        read_choice(neurons, what="neurons"), len(writes), what="neurons", noun="neurons of this MLP"
    )
    W_U = unembedding(model)
    W_E, lines = embedding(model), []
    for neuron in chosen:
        excites, promotes = (W_E @ reads_stream[:, neuron]).topk(k), (writes[neuron] @ W_U).topk(k)
        lines.append(
            {
                "neuron": neuron,
                "excited_by": name_tokens(model, excites.indices),
                "excitations": tuple(excites.values.tolist()),
                "promotes": name_tokens(model, promotes.indices),
                "promotions": tuple(promotes.values.tolist()),
            }
        )
    table: pandas.DataFrame = import_package("pandas").DataFrame(lines)
    return table


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
