r"""One direction that mediates a behaviour, chosen from many on held-out prompts.

The method of Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction" (arXiv 2406.11717).
Candidates are the differences of means at the entrance of each layer, at each of some positions. On held-out prompts,
with the behaviour told by the log-odds that one of its tokens comes next:

- *bypass score*: the log-odds on positive prompts while the candidate is ablated everywhere in the stream;
- *induce score*: the log-odds on negative prompts while the candidate is added at its layer;
- *KL score*: what ablation does to the predictions on negative prompts.

Chosen is the least bypass score among candidates with `induce > 0`, `KL < 0.1` nats and a layer below 0.8 of all
(appendix C of the paper).
"""

import random
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import optional, read_flag, read_number, read_seed, reads, refusal, require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.prefix import Text
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.patching.runs.checks import check_model
from hooklens.precision import wide_dtype
from hooklens.steering.activations import Prompts, encode_prompts, run_batches
from hooklens.steering.candidates import CandidateRuns, read_tokens_of_behaviour
from hooklens.steering.errors import SteeringError
from hooklens.steering.provenance import Provenance
from hooklens.steering.selected import Criteria, DirectionSelection

HeldOut = float | tuple[Sequence[Text], Sequence[Text]]


@reads(
    SteeringError,
    model=partial(require, kind=HookedCausalLM, expected="a HookedCausalLM"),
    max_kl=partial(read_number, expected="a divergence in nats, > 0", allows=lambda number: number > 0),
    min_induce=partial(read_number, expected="log-odds in nats"),
    deepest=partial(read_number, expected="a part of the layers, 0 to 1", allows=lambda number: 0 < number <= 1),
    seed=read_seed,
    prepend_bos=optional(read_flag),
    progress=read_flag,
)
def select_direction(
    model: HookedCausalLM,
    positive: Sequence[Text],
    negative: Sequence[Text],
    *,
    tokens: str | int | Sequence[str | int],
    held_out: HeldOut = 0.25,
    layers: Choice = None,
    positions: Choice = -1,
    add_at: Choice = None,
    max_kl: float = 0.1,
    min_induce: float = 0.0,
    deepest: float = 0.8,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> DirectionSelection:
    """The direction of the stream that a behaviour hangs on, with the scores of all candidates.

    Each candidate costs a forward of every held-out prompt with it ablated, and of the negative ones another from its
    layer on.

    Args:
        model: runs the prompts.
        positive: prompts that bring the behaviour about (harmful instructions, for refusal).
        negative: prompts that do not.
        tokens: what shows the behaviour if it comes next: ids, or texts of one token each.
        held_out: the part of both lists that is kept for selection, drawn by `seed`; or a pair of lists, the positive
            and the negative prompts for it.
        layers: candidates are of the stream entering these blocks; None: all that `deepest` allows.
        positions: the tokens that candidates are made from, negative ones from a prompt's end; those of a chat
            template behind the instruction, in the paper.
        add_at: the tokens that a candidate is added to for its induce score; None: all, as in the paper.
        max_kl: the largest divergence that ablation may bring about on negative prompts, in nats.
        min_induce: what the log-odds on negative prompts have to be above when the candidate is added.
        deepest: candidates of blocks from this part of all layers on are not chosen, being close to the unembedding.
        seed: draws the held-out prompts.
        batch_size: prompts at once; `"auto"`: by memory.
        prepend_bos: for prompts that are text; None is the model's `default_prepend_bos`.
        progress: show progress bars.

    Returns:
        The scores of all candidates, and the chosen one as `.vector`; where none meets the criteria, `.chosen` is None,
        `.why` says what each failed, and `.choose_by(...)` chooses by others without running anything.

    Raises:
        SteeringError: prompts, tokens, layers or positions that do not go together.
    """
    check_batch_size(batch_size)
    check_model(model, allow_training=False)
    ids = read_tokens_of_behaviour(model, tokens)
    n_layers = model.cfg.n_layers
    index = read_choice(layers, what="layers", error=SteeringError)
    chosen_layers = sorted(resolve_choice(index, n_layers, what="layers", noun="layers", error=SteeringError))
    if layers is None:
        chosen_layers = [layer for layer in chosen_layers if layer < deepest * n_layers]
    places = _read_positions(positions)
    encode = partial(encode_prompts, model, prepend_bos=prepend_bos, positions=list(places))
    fitting, selecting = _split(encode, positive, negative, held_out, seed)
    average = partial(_mean_streams, model, layers=chosen_layers, positions=places)
    means = [average(side, batch_size=batch_size, progress=progress) for side in fitting]
    candidates = means[0] - means[1]
    # Tokens that all prompts begin with differ by rounding, which has a direction but no meaning.
    rounding = 8 * torch.finfo(model.dtype).eps * means[0].norm(dim=-1, keepdim=True)
    candidates = candidates.masked_fill(candidates.norm(dim=-1, keepdim=True) <= rounding, 0.0)
    runs = CandidateRuns(
        model,
        candidates.flatten(0, 1).to(model.device),
        [layer for _ in places for layer in chosen_layers],
        ids,
        add_at=add_at,
        batch_size=batch_size,
        progress=progress,
    )
    scores = runs.score(*selecting)
    shape = candidates.shape[:2]
    return DirectionSelection(
        directions=candidates.to(wide_dtype(model.dtype)),
        means=torch.stack([means[1], means[0]]).to(wide_dtype(model.dtype)),
        layers=tuple(chosen_layers),
        positions=places,
        n_layers=n_layers,
        bypass=scores.bypass.reshape(shape),
        induce=scores.induce.reshape(shape),
        kl=scores.kl.reshape(shape),
        positive=scores.positive,
        negative=scores.negative,
        criteria=Criteria(max_kl=max_kl, min_induce=min_induce, deepest=deepest),
        held_out=(len(selecting[0]), len(selecting[1])),
        provenance=Provenance.of(
            model,
            [*fitting, *selecting],
            method="selected mean_difference",
            positions=show(positions),
            counts=(len(fitting[0]), len(fitting[1])),
            seed=None if isinstance(held_out, tuple) else seed,
        ),
    )


def _read_positions(positions: Choice) -> tuple[int, ...]:
    index = read_choice(positions, what="positions", error=SteeringError)
    if not isinstance(index, int | tuple):
        raise refusal(positions, "positions", "a position or a list of them: each makes candidates", SteeringError)
    return (index,) if isinstance(index, int) else index


def _split(
    encode: "partial[Prompts]", positive: object, negative: object, held_out: object, seed: int
) -> tuple[tuple[Prompts, Prompts], tuple[Prompts, Prompts]]:
    """The prompts to make candidates from and those to select on, positive and negative ones.

    Raises:
        SteeringError: too few prompts, or `held_out` is neither a part nor two lists.
    """
    given = encode(positive, what="positive"), encode(negative, what="negative")
    if isinstance(held_out, tuple | list):
        if len(held_out) != 2:
            raise SteeringError(
                f"held_out has {len(held_out)} entries, expected a part, or (positive prompts, negative prompts)"
            )
        return given, (
            encode(held_out[0], what="held_out: positive"),
            encode(held_out[1], what="held_out: negative"),
        )
    part = read_number(
        held_out, what="held_out", expected="a part between 0 and 1, or two lists of prompts",
        allows=lambda number: 0 < number < 1, error=SteeringError,
    )  # fmt: skip
    drawn = random.Random(seed)
    fitting, selecting = [], []
    for name, side in zip(("positive", "negative"), given, strict=True):
        n_kept = max(1, round(part * len(side)))
        if n_kept >= len(side):
            raise SteeringError(
                f"{name}: of {len(side)} prompts {n_kept} would be held out, and none left to make candidates from; "
                "give more prompts, or held_out=(positive, negative)"
            )
        order = drawn.sample(range(len(side)), len(side))
        selecting.append(side.take(sorted(order[:n_kept])))
        fitting.append(side.take(sorted(order[n_kept:])))
    return (fitting[0], fitting[1]), (selecting[0], selecting[1])


def _mean_streams(
    model: HookedCausalLM,
    prompts: Prompts,
    *,
    layers: Sequence[int],
    positions: tuple[int, ...],
    batch_size: BatchSize,
    progress: bool,
) -> Float[Tensor, "positions layers d_model"]:
    """The mean stream entering each layer at each position, in float64."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in layers]
    total = torch.zeros(len(positions), len(layers), model.cfg.d_model, dtype=torch.float64)
    for _, batch, found in run_batches(model, prompts, names, batch_size=batch_size, progress=progress, what="fitting"):
        lengths = batch.mask.sum(1)
        rows = torch.arange(len(lengths), device=lengths.device)
        for place, position in enumerate(positions):
            columns = position if position >= 0 else lengths + position
            for layer, name in enumerate(names):
                total[place, layer] += found[name][rows, columns].double().sum(0).cpu()
    return total / len(prompts)
