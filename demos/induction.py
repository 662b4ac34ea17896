"""How do induction heads form in an attention-only model of two layers, while it is trained?

A row of random tokens in which a piece is repeated can be predicted only by looking back: where did this token stand
before, and what came next? A model of two layers without MLPs learns that with two kinds of heads (Elhage et al.
2021): one in the first layer attends to the token before, and one in the second uses what the first one wrote to attend
to what came after the earlier copy. Neither helps without the other, so for a while little happens; then both grow
together, and the loss on repeated tokens falls (Olsson et al. 2022, "In-context Learning and Induction Heads").

The script trains the model with `hooklens.training` and asks the checkpoints, one after another:

1. How does the loss fall on tokens that are repeated, beside that of guessing?
2. Which head of the first layer attends to the token before, and which of the second layer is an induction head?
3. In which steps does the induction head form, and how much of the loss falls in them?

The figure (PNG) and the table (CSV) go into the folder `--out`, beside the run; interrupted, the same command goes on.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import hooklens as hl
from hooklens import training
from hooklens.analysis import heads
from hooklens.errors import HookLensError
from hooklens.optional import import_package

D_VOCAB, LENGTH, BATCH = 32, 24, 32
PERIOD = LENGTH // 2


class RepeatedRows(torch.utils.data.IterableDataset[Tensor]):
    """Batches of rows that repeat a piece of random tokens, of a length of their own in each batch."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            period = int(torch.randint(LENGTH // 4, PERIOD + 1, ()))
            piece = torch.randint(D_VOCAB, (BATCH, period))
            yield piece.repeat(1, LENGTH // period + 1)[:, :LENGTH]


def make_model() -> hl.HookedCausalLM:
    """Two layers of attention and nothing else."""
    cfg = hl.HookedConfig(
        d_model=32,
        n_layers=2,
        n_heads=4,
        d_vocab=D_VOCAB,
        n_ctx=LENGTH,
        positions=hl.LearnedPositions(),
        attn_only=True,
        init_std=0.1,
    )
    model = hl.HookedCausalLM(cfg)
    model.initialize(seed=0)
    return model


def train(out: Path, *, steps: int, seed: int) -> training.Checkpoints:
    """Train the model, or go on; gives its checkpoints, forty over the training."""
    config = training.TrainConfig(
        steps=steps,
        learning_rate=5e-3,
        optimizer_options={"betas": (0.9, 0.98), "fused": True},
        warmup_steps=20,
        seed=seed,
        checkpoint_every=max(1, steps // 40),
    )
    loader = torch.utils.data.DataLoader(RepeatedRows(), batch_size=None)
    training.train(make_model(), loader, config, folder=out / "run")
    return training.checkpoints(out / "run")


def measure(model: hl.HookedCausalLM) -> dict[str, float]:
    """Loss on repeated tokens, and the scores of all heads: to the token before in layer 0, of induction in layer 1."""
    rows = heads.repeated_random_tokens(model, n_rows=64, period=PERIOD, seed=1)
    with torch.no_grad():
        losses = model(rows, return_type="loss", loss_per_token=True)
    scores = heads.head_scores(model, rows)
    previous = scores.loc[scores["layer"] == 0, "previous_token"]
    induction = scores.loc[scores["layer"] == 1, "induction"]
    # The first token of the copy is no more foreseeable than those before it.
    return {"loss": float(losses[:, PERIOD:].mean()), **previous.to_dict(), **induction.to_dict()}


def find_change(curve: pd.Series) -> tuple[int, int]:
    """The steps in which a curve goes from a quarter to three quarters of its way up."""
    way = (curve - curve.iloc[0]) / (curve.max() - curve.iloc[0])
    return int((way >= 0.25).idxmax()), int((way >= 0.75).idxmax())


def plot(table: pd.DataFrame, previous: str, induction: str, change: tuple[int, int], out: Path) -> None:
    """Loss and scores over the training, the change shaded."""
    figure = import_package("matplotlib.figure").Figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(table.index, table["loss"], color="black")
    above.axhline(torch.tensor(D_VOCAB).log(), linestyle=":", color="grey")
    above.set(ylabel="loss in nats", title="loss on repeated tokens (dotted: guessing)")
    for name in table.columns.drop("loss"):
        shown = {previous: ("tab:blue", "to the token before"), induction: ("tab:red", "induction")}.get(name)
        colour, label = (shown[0], f"{name}, {shown[1]}") if shown else ("lightgrey", None)
        below.plot(table.index, table[name], color=colour, label=label, zorder=2 if shown else 1)
    below.set(xlabel="step", ylabel="share of attention", title="scores of heads")
    below.legend()
    for axes in (above, below):
        axes.axvspan(*change, color="tab:red", alpha=0.15)
    figure.savefig(out / "induction.png", dpi=110)


def investigate(out: Path, *, steps: int, seed: int) -> dict[str, float]:
    """Train, ask all three questions, print the answers, write figure and table; gives the main numbers."""
    print((__doc__ or "").partition("\n")[0])
    table = train(out, steps=steps, seed=seed).curve(measure).set_index("step")
    first, last = table.iloc[0], table.iloc[-1]
    guessing = float(torch.tensor(float(D_VOCAB)).log())
    print(
        f"1. Loss on repeated tokens: {first['loss']:.2f} before, {last['loss']:.2f} after; {guessing:.2f} is guessing."
    )
    previous = str(last.filter(like="L0").idxmax())
    induction = str(last.filter(like="L1").idxmax())
    print(
        f"2. {previous} attends to the token before with {last[previous]:.0%} ({first[previous]:.0%} before training), "
        f"{induction} as an induction head with {last[induction]:.0%} ({first[induction]:.0%})."
    )
    change = find_change(table[induction])
    fallen = (table["loss"][change[0]] - table["loss"][change[1]]) / (first["loss"] - table["loss"].min())
    print(
        f"3. From step {change[0]} to {change[1]} of {steps} {induction} goes half of its way; {fallen:.0%} of the "
        "fall of the loss is there."
    )
    plot(table, previous, induction, change, out)
    table.to_csv(out / "induction.csv")
    print(f"The figure and the table are in {out}.")
    print(
        f"Answer: not evenly, and together with what they need. {induction} goes half of its way in "
        f"{(change[1] - change[0]) / steps:.0%} of the training, after {change[0] / steps:.0%}; {fallen:.0%} of "
        f"the fall of the loss is there. {previous}, which attends to the token before, goes from "
        f"{table[previous][change[0]]:.0%} to {table[previous][change[1]]:.0%} meanwhile."
    )
    return {
        "loss before": float(first["loss"]),
        "loss after": float(last["loss"]),
        "guessing": guessing,
        "previous token": float(last[previous]),
        "induction before": float(first[induction]),
        "induction": float(last[induction]),
        "change begins": change[0],
        "change ends": change[1],
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the investigation as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3000, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the training's rows")
    parser.add_argument(
        "--out", type=Path, default=Path("induction"), help="folder of the run, the figure and the table"
    )
    options = parser.parse_args(arguments)
    if options.steps < 40:
        parser.error(f"--steps is {options.steps}; forty checkpoints need at least 40")
    try:
        # Before the work, which takes a minute.
        import_package("matplotlib.figure")
        options.out.mkdir(parents=True, exist_ok=True)
        numbers = investigate(options.out, steps=options.steps, seed=options.seed)
    except (HookLensError, OSError) as error:
        parser.exit(1, f"{error}\n")
    return numbers


if __name__ == "__main__":
    main()
