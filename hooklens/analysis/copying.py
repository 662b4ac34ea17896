"""Copying: whether a head's OV circuit raises the logit of the very token that it attends to.

**Method.** Two summaries of the full OV circuit `M = W_E W_V W_O W_U`, `[d_vocab d_vocab]`, whose row `t` holds what
attending to token `t` adds to each logit:

- the *eigenvalue score* `sum(lambda) / sum(|lambda|)` over the eigenvalues of `M` (Elhage et al. 2021, "A Mathematical
  Framework for Transformer Circuits"): 1 for positive eigenvalues only, -1 for negative ones. `M` has the non-zero
  eigenvalues of `W_O W_U W_E W_V`, which is d_head x d_head, so `M` is not made;
- the *top-k score*: the share of tokens `t` that are among the `k` largest entries of row `t` (the copy score of Wang
  et al. 2022, "Interpretability in the wild", there for names in the stream behind the first MLP, here for tokens of
  the vocabulary as they are embedded). A block of rows is made at a time.

**How to read it.** An induction head needs a copying OV circuit, and a head that suppresses what it attends to has
negative eigenvalues. Chance is about 0 for the eigenvalue score and `k / d_vocab` for the top-k score. Norms are folded
in as `analysis.circuits` does; layers in between are left out. Centring `W_U` over the vocabulary leaves the ranks of
the top-k score as they are, not the eigenvalues: weights are read as the model has them. A factor on the embeddings
(`cfg.embed_scale`) changes neither score.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.analysis.circuit_weights import embedding, ov_circuit, unembedding
from hooklens.analysis.reading.connection import read_model
from hooklens.analysis.reading.token_names import read_tokens
from hooklens.arguments import read_int, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.progress import progress_bar
from hooklens.weights.factored import FactoredMatrix

if TYPE_CHECKING:
    import pandas

# Entries of a block of rows: 64 MiB in float32.
_BLOCK_ENTRIES = 2**24


@reads(model=read_model, k=partial(read_int, least=1))
@torch.no_grad()
def copying_scores(model: HookedCausalLM, *, k: int = 5, tokens: Any = None) -> "pandas.DataFrame":
    """The eigenvalue score and the top-k score of every head's OV circuit.

    Columns: `layer`, `head`, `eigenvalue_score`, `top_k_score`; the index holds labels `"L0H0"`. A circuit that is 0
    has the eigenvalue score 0.

    Args:
        model: the model.
        k: how many of the largest logits count for the top-k score.
        tokens: the tokens that are attended to, for the top-k score, as text or ids (names, say). None: all.

    Raises:
        InputError: `k` is above d_vocab, or a token is none of the vocabulary's.
    """
    d_vocab = model.cfg.d_vocab
    if k > d_vocab:
        raise InputError(f"copying_scores: k={k}; expected 1 to {d_vocab}, the size of the vocabulary")
    everything = torch.arange(d_vocab)
    attended = everything if tokens is None else read_tokens(model, tokens, what="tokens").flatten()
    attended = attended.to(model.device)
    W_E, W_U = embedding(model), unembedding(model)
    around = W_U @ W_E
    layers = [block.layer for block in model.cfg.blocks if block.attn is not None]
    lines = []
    heads = [(layer, head) for layer in layers for head in range(model.cfg.n_heads)]
    with progress_bar("copying scores", heads, unit="head", progress=None) as bar:
        for layer, head in bar:
            circuit = ov_circuit(model, layer, head)
            lines.append(
                {
                    "layer": layer,
                    "head": head,
                    "eigenvalue_score": _score_eigenvalues(circuit.B @ around @ circuit.A),
                    "top_k_score": _share_of_copies(
                        FactoredMatrix(W_E[attended] @ circuit.A, circuit.B @ W_U), attended, k
                    ),
                }
            )
    columns = ["layer", "head", "eigenvalue_score", "top_k_score"]
    table: pandas.DataFrame = import_package("pandas").DataFrame(lines, columns=columns, index=model.all_head_labels())
    return table


def _score_eigenvalues(circuit: Float[Tensor, "d_head d_head"]) -> float:
    # In float64: sums of eigenvalues of both signs cancel.
    eigenvalues = torch.linalg.eigvals(circuit.double().cpu())
    size = float(eigenvalues.abs().sum())
    return float(eigenvalues.sum().real) / size if size else 0.0


def _share_of_copies(circuit: FactoredMatrix, attended: Int[Tensor, " row"], k: int) -> float:
    """The share of rows in which the column of the row's own token is one of the `k` largest."""
    n_rows, d_vocab = circuit.shape
    rows_at_once, copies = max(1, _BLOCK_ENTRIES // d_vocab), 0
    for start in range(0, n_rows, rows_at_once):
        logits = circuit.A[start : start + rows_at_once] @ circuit.B
        own = logits.gather(1, attended[start : start + rows_at_once, None])
        copies += int(((logits > own).sum(1) < k).sum())
    return copies / n_rows
