"""Trains the bundled checkpoints: `python -m hooklens.bundled.train [NAME ...] --out FOLDER`.

A few minutes each on two CPU cores. The seed decides the weights and every batch, so the same seed gives
the same checkpoint on the same machine and versions of torch.
"""

import argparse
import dataclasses
import json
import logging
import platform
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.bundled import BUNDLED
from hooklens.bundled.architectures import N_CTX, build_model
from hooklens.bundled.corpus import TASK_SHARES, sample_row
from hooklens.bundled.evaluate import LogitsFunction, Metrics, measure, measure_heads
from hooklens.bundled.model_card import write_model_card
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.bundled.words import VOCABULARY
from hooklens.errors import ConfigError
from hooklens.optional import import_package
from hooklens.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a training run, beside the architecture.

    Attributes:
        seed: of the weights and the corpus.
        steps: optimiser steps.
        tokens_per_step: tokens in a batch, whatever its row length.
        row_lengths: row length -> share of the steps that use it; the longest teaches late positions.
        peak_learning_rate: top of the one-cycle schedule.
        warmup: share of the steps until the top.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        repeats_from: share of the steps before which repeated sequences are rare. A network that can repeat
            first is slow to learn which of two names not to repeat.
        threads: CPU threads; their number decides the order of sums, so it is part of the recipe.
        measure_every: steps between the entries of the record's history of skills.
    """

    seed: int = 0
    steps: int = 2400
    tokens_per_step: int = 3072
    row_lengths: tuple[tuple[int, float], ...] = ((64, 0.8), (128, 0.15), (256, 0.05))
    peak_learning_rate: float = 2e-3
    warmup: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    repeats_from: float = 0.4
    threads: int = 1
    measure_every: int = 200

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigError(f"recipe: steps={self.steps}; the one-cycle schedule needs 2 or more")
        too_long = [length for length, _ in self.row_lengths if length > N_CTX]
        if too_long:
            raise ConfigError(f"recipe: rows of {too_long} tokens; the models accept {N_CTX} or fewer")


# Share of repeated sequences before `Recipe.repeats_from`.
_EARLY_REPEATS = 0.03

# What each architecture is trained with.
RECIPES: dict[str, Recipe] = {
    "tiny-gpt-neox": Recipe(seed=1, steps=2400, weight_decay=0.1),
    "tiny-llama": Recipe(seed=1, steps=2400, weight_decay=0.1),
    "tiny-falcon": Recipe(steps=2000),
}


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """A trained model and what the record says about its training.

    Attributes:
        model: in evaluation mode.
        tokenizer: the corpus's.
        losses: weighted training loss in nats after each step.
        history: step -> metrics on a few prompts, to see when each skill appeared.
        seconds: wall clock of the training.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    losses: list[float]
    history: dict[int, Metrics]
    seconds: float


def sample_batch(
    rng: random.Random, recipe: Recipe, ids: dict[str, int], *, step: int
) -> tuple[Int[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Draw one training step's token ids and their weights in the loss.

    All rows have one length, and `recipe.tokens_per_step` tokens in all.
    """
    lengths, frequencies = zip(*recipe.row_lengths, strict=True)
    (length,) = rng.choices(lengths, weights=frequencies)
    is_early = step <= recipe.repeats_from * recipe.steps
    shares = {**TASK_SHARES, "repeats": _EARLY_REPEATS} if is_early else TASK_SHARES
    rows = [sample_row(rng, length=length, shares=shares) for _ in range(recipe.tokens_per_step // length)]
    tokens = torch.tensor([[ids[word] for word in row.words] for row in rows])
    return tokens, torch.tensor([row.weights for row in rows])


def weighted_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"], weights: Float[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """The weighted mean of the next-token losses, in nats."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(name: str, recipe: Recipe, *, progress: bool = True) -> TrainingRun:
    """Train one architecture on the corpus with AdamW and a one-cycle learning rate.

    Args:
        name: one of `BUNDLED`.
        recipe: everything else that decides the run.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError: no architecture has that name.
    """
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    model = build_model(name).train()
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = build_tokenizer(n_ctx=N_CTX)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.peak_learning_rate, total_steps=recipe.steps, pct_start=recipe.warmup
    )
    losses: list[float] = []
    history: dict[int, Metrics] = {}
    start = time.perf_counter()
    with progress_bar(name, total=recipe.steps, progress=progress, stays=True) as bar:
        for step in range(1, recipe.steps + 1):
            tokens, weights = sample_batch(rng, recipe, ids, step=step)
            loss = weighted_loss(model(tokens, use_cache=False).logits, tokens, weights)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            if step % recipe.measure_every == 0:
                history[step] = measure(_logits_function(model), tokenizer, n_indirect_objects=128, n_repeats=16)
                logger.info("%s, step %d: %s", name, step, history[step])
    return TrainingRun(
        model=model.eval(),
        tokenizer=tokenizer,
        losses=losses,
        history=history,
        seconds=time.perf_counter() - start,
    )


def _logits_function(model: "PreTrainedModel") -> LogitsFunction:
    def logits_of(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits

    return logits_of


def measure_run(run: TrainingRun) -> tuple[Metrics, dict[str, Any]]:
    """The run's metrics and, as plain values, its strongest induction and previous-token heads."""

    def patterns_of(tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "n_layers batch head query key"]:
        return torch.stack(run.model(tokens, use_cache=False, output_attentions=True).attentions)

    metrics = measure(_logits_function(run.model), run.tokenizer)
    chosen = run.model.config._attn_implementation
    assert chosen is not None
    # Only the eager implementation hands its attention patterns out.
    run.model.set_attn_implementation("eager")
    induction, previous = measure_heads(patterns_of, run.tokenizer)
    run.model.set_attn_implementation(chosen)
    return metrics, {"induction": _strongest(induction), "previous_token": _strongest(previous)}


def _strongest(scores: Float[Tensor, "n_layers head"]) -> dict[str, float | int]:
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return {"layer": layer, "head": head, "score": round(float(scores.max()), 4)}


def save(run: TrainingRun, name: str, recipe: Recipe, folder: Path) -> Metrics:
    """Measure the run and write its checkpoint: weights, config, tokenizer, model card, training record."""
    metrics, heads = measure_run(run)
    folder.mkdir(parents=True, exist_ok=True)
    run.model.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    record = {
        "name": name,
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(weight.numel() for weight in run.model.parameters()),
        "metrics": metrics.to_dict(),
        "heads": heads,
        "loss_curve": _thin_out(run.losses),
        "history": [{"step": step, **skills.to_dict()} for step, skills in run.history.items()],
        "seconds": round(run.seconds, 1),
        "versions": {
            "python": platform.python_version(),
            **{package: import_package(package).__version__ for package in ("torch", "transformers", "tokenizers")},
        },
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_model_card(folder, record)
    return metrics


def _thin_out(losses: Sequence[float], *, points: int = 40) -> list[dict[str, float]]:
    """About `points` entries of the loss curve, each the mean loss of the steps since the one before."""
    stride = max(1, len(losses) // points)
    curve = []
    for end in range(stride, len(losses) + 1, stride):
        mean = sum(losses[end - stride : end]) / stride
        curve.append({"step": end, "loss": round(mean, 4)})
    return curve


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and save the checkpoints that the command line names; log how they measure up."""
    parser = argparse.ArgumentParser(prog="python -m hooklens.bundled.train", description="Train bundled checkpoints.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(BUNDLED)}; none: all of them")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a sub-folder per checkpoint")
    parser.add_argument("--seed", type=int, default=None, help="in place of the recipe's")
    parser.add_argument("--steps", type=int, default=None, help="in place of the recipe's")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BUNDLED]
    if unknown:
        parser.error(f"unknown checkpoints {', '.join(unknown)}; there are {', '.join(BUNDLED)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    changes = {name: value for name in ("seed", "steps") if (value := getattr(options, name)) is not None}
    for name in options.names or BUNDLED:
        recipe = dataclasses.replace(RECIPES[name], **changes)
        run = train(name, recipe)
        metrics = save(run, name, recipe, options.out / name)
        logger.info("%s: %s", name, metrics)
        for shortfall in metrics.list_shortfalls():
            logger.warning("%s falls short: %s", name, shortfall)


if __name__ == "__main__":
    main()
