"""Task vectors in words: what fine-tuning changed in each weight, read in token space.

**Method.** A task vector is the difference between the weights of a fine-tuned model and of its base (Ilharco et al.
2023, "Editing Models with Task Arithmetic"). Of each matrix between a copy of the stream and something else,

    D = M_tuned - M_base = sum over i of  s_i u_i v_i^T        (singular value decomposition)

and the leading directions on the stream's side are read as `analysis.circuits` reads those of weights (Millidge and
Black 2022): what is written by the base's unembedding, `v_i W_U`, and what is read by its embedding, `W_E u_i`. Both
matrices have the norms next to them folded in, each its own model's, so a change of a norm's weight is part of the
change, and models read the same before and after `fold_ln`.

**How to read it.** `share` is `s_i^2 / ||D||^2`, the part of all that changed in this matrix. A large one says that
fine-tuning wrote one thing (adapters of low rank have few directions by construction). Tokens at one end that belong
together, the answers of a task say, are what the change promotes or looks for, those at the other end what it works
against; which end is called "+" is without meaning. `singular_value` is for comparing matrices of one kind with each
other. Early layers write what later ones read, not what is predicted, so their directions need not be words.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.analysis.circuit_weights import behind_norm, embedding, fold_norm, unembedding
from hooklens.analysis.reading.connection import read_model
from hooklens.analysis.reading.token_names import name_tokens
from hooklens.arguments import read_flag, read_int, reads, refusal
from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import DeclaredWeight
from hooklens.errors import HookLensError, InputError, TransformError, suggest_names
from hooklens.hooks.choice import Choice, Index, read_choice, resolve_choice
from hooklens.optional import import_package
from hooklens.precision import widen
from hooklens.progress import progress_bar
from hooklens.weights.processing import check_transforms_match
from hooklens.weights.shapes import weight_shapes

if TYPE_CHECKING:
    import pandas

Side = Literal["reads", "writes"]


def _read_words(given: object, *, what: str, error: type[HookLensError] = InputError) -> tuple[str, ...] | None:
    if given is None:
        return None
    listed = (given,) if isinstance(given, str) else given
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(one, str) for one in listed):
        raise refusal(given, what, "a weight's word such as 'W_O', a list of such words, or None", error)
    return tuple(listed)


@reads(
    base=read_model, tuned=read_model, layers=partial(read_choice), weights=_read_words, k=partial(read_int, least=1),
    n_directions=partial(read_int, least=1), progress=read_flag,
)  # fmt: skip
@torch.no_grad()
def task_vector_directions(
    base: HookedCausalLM,
    tuned: HookedCausalLM,
    *,
    layers: Choice = None,
    weights: str | list[str] | tuple[str, ...] | None = None,
    n_directions: int = 3,
    k: int = 5,
    progress: bool = True,
) -> "pandas.DataFrame":
    """The leading directions of what fine-tuning changed in the blocks' matrices, as tokens.

    Columns: `layer`, `weight` (`"attn.W_O"`), `side` (`"writes"` to the stream or `"reads"` it), `direction`,
    `singular_value`, `share`, `end` (`"+"` or `"-"`) and `tokens`, the `k` furthest towards that end (text, or ids
    without a tokenizer); with experts `expert`. All heads of a layer count as one matrix, each expert as its own. A
    matrix that did not change has no lines. Embedding and unembedding, whose rows are tokens already, are left out.

    Args:
        base: the model before.
        tuned: the model after, of the same shapes.
        layers: an int, a slice, or a list, array or tensor of ints; None: all.
        weights: which matrices, by their word (`"W_O"`, `"W_out"`, ...); None: all.
        n_directions: how many directions of each, the strongest first; a matrix of lower rank has fewer.
        k: tokens to list at each end.
        progress: show a progress bar: wide matrices take seconds each to decompose.

    Raises:
        InputError: weights of other names or shapes, all named; no such layer or word; or `k` above d_vocab.
        TransformError: the weights of the two were processed differently.
    """
    d_vocab = base.cfg.d_vocab
    if k > d_vocab:
        raise InputError(f"task_vector_directions: k={k}; expected 1 to {d_vocab}, the size of the vocabulary")
    _check_pair(base, tuned)
    chosen = _choose(base, layers, weights)  # type: ignore[arg-type]  # read above
    readers = {"reads": embedding(base).T, "writes": unembedding(base)}
    lines: list[dict[str, object]] = []
    with progress_bar("decomposing", chosen, unit="weight", progress=progress) as bar:
        for weight in bar:
            changes = zip(_list_matrices(base, weight), _list_matrices(tuned, weight), strict=True)
            for one, other in changes:
                side = "writes" if weight.writes else "reads"
                described: dict[str, object] = {
                    "layer": layer_of(weight.name),
                    "weight": weight.name.split(".", 2)[2],
                    **({} if one.expert is None else {"expert": one.expert}),
                    "side": side,
                }
                change = other.matrix.to(one.matrix.device) - one.matrix
                lines += _describe(base, change, readers[side], described, n_directions=n_directions, k=k)
        table: pandas.DataFrame = import_package("pandas").DataFrame(lines, columns=None if lines else _COLUMNS)
    return table.astype({"expert": "Int64"}) if "expert" in table else table


_COLUMNS = ["layer", "weight", "side", "direction", "singular_value", "share", "end", "tokens"]


def _check_pair(base: HookedCausalLM, tuned: HookedCausalLM) -> None:
    """Refuse two models whose weights have no difference.

    Raises:
        InputError: names or shapes differ.
        TransformError: they were processed differently.
    """
    try:
        check_transforms_match(base.transforms, tuned.transforms)
    except TransformError as error:
        raise TransformError(f"base (first) and tuned (second): {error}") from error
    ours, theirs = weight_shapes(base.cfg), weight_shapes(tuned.cfg)
    differing = [
        f"{name!r} is {_show(ours.get(name))} in base and {_show(theirs.get(name))} in tuned"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 10} more" if len(differing) > 10 else ""
        raise InputError(
            f"task_vector_directions: the models have other weights: {'; '.join(differing[:10])}{more}; give a model "
            "and what was trained from it"
        )


def _show(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _choose(model: HookedCausalLM, layers: Index, words: tuple[str, ...] | None) -> list[DeclaredWeight]:
    """The matrices of the blocks that are to be read.

    Raises:
        InputError: no such layer, or a word that no block has a matrix of.
    """
    wanted = set(resolve_choice(layers, model.cfg.n_layers, what="layers", noun="layers"))
    # What has no bias of its own is no map: tables of positions.
    maps = [
        weight
        for weight in model.cfg.description.weights.values()
        if layer_of(weight.name) is not None and weight.bias is not None and "d_model" in weight.axes
    ]
    there = list(dict.fromkeys(weight.name.rpartition(".")[2] for weight in maps))
    if words is not None and (unknown := [word for word in words if word not in there]):
        raise InputError(
            f"weights: no block has a matrix {unknown} in the stream.{suggest_names(unknown[0], there)} There are "
            f"{there}"
        )
    return [
        weight
        for weight in maps
        if layer_of(weight.name) in wanted and (words is None or weight.name.rpartition(".")[2] in words)
    ]


class _Matrix(NamedTuple):
    """A matrix with the stream on its left, `[d_model other]`, and the expert that it belongs to."""

    matrix: Float[Tensor, "d_model other"]
    expert: int | None


def _list_matrices(model: HookedCausalLM, weight: DeclaredWeight) -> Iterator[_Matrix]:
    """A weight with the norms next to it folded in; one matrix for each expert, and one for all heads."""
    held = widen(model.named_weights()[weight.name])
    has_experts = "expert" in weight.axes and len(weight.axes) > 2
    axes = tuple(axis for axis in weight.axes if axis != "expert") if has_experts else weight.axes
    for expert, one in enumerate(held) if has_experts else [(None, held)]:
        stream_first = one.movedim(axes.index("d_model"), 0).flatten(1)
        if weight.writes:
            _, layer, part = weight.name.split(".")[:3]
            block = model.block_list()[int(layer)]
            norm = block.exit_norm(part)
            yield _Matrix(behind_norm(norm, stream_first.T).T * model.cfg.residual_scale, expert)
        else:
            before: Any = None if weight.reads is None else model.get_submodule(weight.reads)
            yield _Matrix(fold_norm(before, stream_first), expert)


def _describe(
    base: HookedCausalLM,
    change: Float[Tensor, "d_model other"],
    reader: Float[Tensor, "d_model d_vocab"],
    described: dict[str, object],
    *,
    n_directions: int,
    k: int,
) -> Iterator[dict[str, object]]:
    """The lines of a matrix."""
    U, S, _ = torch.linalg.svd(change, full_matrices=False)
    size = S.square().sum()
    for direction in range(min(n_directions, int((S > 0).sum()))):
        along = U[:, direction].to(reader.device) @ reader
        for end, sign in (("+", 1), ("-", -1)):
            yield {
                **described,
                "direction": direction,
                "singular_value": float(S[direction]),
                "share": float(S[direction].square() / size),
                "end": end,
                "tokens": name_tokens(base, (sign * along).topk(k).indices),
            }
