"""Fitting the erasure of a concept on prompts with classes."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import optional, read_flag, read_one_of, reads, refusal, require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.prefix import Text
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.vectors import choose_vectors
from hooklens.patching.runs.checks import check_model
from hooklens.steering.activations import Positions, Prompts, encode_prompts, run_batches
from hooklens.steering.concept import AffineEraser, ConceptMoments, ErasureMethod
from hooklens.steering.erasure import Erasure, PointErasure
from hooklens.steering.errors import SteeringError
from hooklens.steering.provenance import Provenance

Labels = Sequence[int | str] | Sequence[Sequence[int | str]] | Tensor


@reads(
    SteeringError,
    model=partial(require, kind=HookedCausalLM, expected="a HookedCausalLM"),
    method=partial(read_one_of, options=("leace", "mean_difference")),
    sequential=read_flag,
    edits=read_edits,
    prepend_bos=optional(read_flag),
    progress=read_flag,
)
def fit_erasure(
    model: HookedCausalLM,
    prompts: Sequence[Text],
    labels: Labels,
    *,
    at: NamesFilter = "resid_post",
    method: ErasureMethod = "leace",
    positions: Positions = None,
    sequential: bool = False,
    edits: Sequence[Edit] = (),
    batch_size: BatchSize = "auto",
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Erasure:
    """The affine maps after which no linear probe tells a concept's classes apart on the tokens they were fitted on.

    See `hooklens.steering.concept` for the formulas. Covariances are streamed in float64: `d x d` numbers for each hook
    point and head, however many prompts there are.

    Args:
        model: runs the prompts.
        prompts: texts, or rows of token ids.
        labels: the class of each prompt, which all its tokens have; or, of each prompt, the class of each token. Whole
            numbers or texts.
        at: hook points with a vector at each token.
        method: `"leace"`, the least change that hides the concept, or `"mean_difference"`, the orthogonal projection,
            to compare with.
        positions: the tokens that count, each by itself; as in `fit`. None: all.
        sequential: fit the points one after another, each while those before it are erased (concept scrubbing), in a
            pass for each. False: one pass for all, each as if it were erased alone.
        edits: act in all runs.
        batch_size: prompts at once; `"auto"`: by memory.
        prepend_bos: for prompts that are text; None is the model's `default_prepend_bos`.
        progress: show a progress bar.

    Raises:
        SteeringError: prompts, positions or labels that do not go together, or fewer than two classes.
        HookNameError: `at` selects nothing.
    """
    check_batch_size(batch_size)
    check_model(model, allow_training=False)
    names = choose_vectors(model, at, what="at", error=SteeringError)
    encoded = encode_prompts(model, prompts, what="prompts", positions=positions, prepend_bos=prepend_bos)
    classes, numbered = _read_labels(labels, encoded)
    run = partial(_collect, model, encoded, numbered, len(classes), batch_size=batch_size, progress=progress)
    erasers: dict[str, list[AffineEraser]] = {}
    moments: dict[str, list[ConceptMoments]] = {}
    if sequential:
        acting = list(edits)
        for name in names:
            moments = run([name], edits=acting)
            erasers[name] = [one.erase(method) for one in moments[name]]
            acting += _make_point(model, name, erasers[name]).edits()
    else:
        moments = run(names, edits=edits)
        erasers = {name: [one.erase(method) for one in moments[name]] for name in names}
    counts = moments[names[-1]][0].counts
    return Erasure(
        points=tuple(_make_point(model, name, erasers[name]) for name in names),
        classes=tuple(classes),
        sequential=sequential,
        provenance=Provenance.of(
            model, [encoded], method=method, positions=show(positions), counts=tuple(int(one) for one in counts)
        ),
    )


def _read_labels(labels: object, prompts: Prompts) -> tuple[list[int | str], list[Int[Tensor, " _"]]]:
    """The classes, and the number of each token's class.

    Raises:
        SteeringError: labels of another kind or number, or of a single class among the tokens that count.
    """
    given = labels.tolist() if isinstance(labels, Tensor) else labels
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise refusal(
            labels, "labels", "a class for each prompt, or a list of the classes of its tokens", SteeringError
        )
    if len(given) != len(prompts):
        raise SteeringError(f"labels has {len(given)} entries for {len(prompts)} prompts; give one for each")
    rows, wrong = [], []
    for place, (one, length) in enumerate(zip(given, prompts.lengths, strict=True)):
        row = list(one) if isinstance(one, list | tuple | Tensor) else [one] * length
        row = [entry.item() if isinstance(entry, Tensor) and entry.ndim == 0 else entry for entry in row]
        if len(row) != length:
            wrong.append(f"labels of prompt {place} are {len(row)}, and it has {length} tokens")
        elif not all(isinstance(entry, int | str) and not isinstance(entry, bool) for entry in row):
            wrong.append(f"labels of prompt {place} are {show(one)}, expected whole numbers or texts")
        rows.append(row)
    if wrong:
        raise SteeringError("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
    counted = {
        entry
        for row, chosen in zip(rows, prompts.chosen, strict=True)
        for entry, counts in zip(row, chosen.tolist(), strict=True)
        if counts
    }
    if len(counted) < 2:
        raise SteeringError(
            f"labels: all tokens that count are of the class {show(next(iter(counted)))}; expected two classes or more"
        )
    classes = sorted(counted, key=lambda one: (isinstance(one, str), one))
    number = {one: place for place, one in enumerate(classes)}
    return classes, [torch.tensor([number.get(entry, 0) for entry in row]) for row in rows]


def _collect(
    model: HookedCausalLM,
    prompts: Prompts,
    labels: list[Int[Tensor, " _"]],
    n_classes: int,
    names: list[str],
    *,
    edits: Sequence[Edit],
    batch_size: BatchSize,
    progress: bool,
) -> dict[str, list[ConceptMoments]]:
    """By hook point, the moments of each head."""
    joined: dict[str, list[ConceptMoments]] = {}
    for indices, batch, found in run_batches(
        model, prompts, names, batch_size=batch_size, progress=progress, edits=edits, what="erasing"
    ):
        own = [labels[i][prompts.chosen[i]] for i in indices]
        for name, one in found.items():
            tokens = one[batch.chosen.to(one.device)]
            classes = torch.cat(own).to(one.device)
            groups = tokens.reshape(len(tokens), -1, tokens.shape[-1]).unbind(1)
            new = [ConceptMoments.of(group, classes, n_classes) for group in groups]
            before = joined.get(name)
            joined[name] = new if before is None else [a.join(b) for a, b in zip(before, new, strict=True)]
    return joined


def _make_point(model: HookedCausalLM, name: str, erasers: list[AffineEraser]) -> PointErasure:
    """The maps of one point, those of a head with a lower rank filled up with rows of zeros."""
    rank = max(len(one.readers) for one in erasers)

    def stack(rows: list[Tensor]) -> Tensor:
        filled = torch.stack([torch.cat([one, one.new_zeros(rank - len(one), one.shape[1])]) for one in rows])
        return filled if has_heads else filled[0]

    has_heads = len(model.cfg.description.points[name].axes) > 3
    means = torch.stack([one.mean for one in erasers])
    removed = torch.tensor([one.removed for one in erasers], dtype=torch.float64)
    return PointErasure(
        name=name,
        mean=means if has_heads else means[0],
        readers=stack([one.readers for one in erasers]),
        writers=stack([one.writers for one in erasers]),
        removed=removed if has_heads else removed[0],
    )
