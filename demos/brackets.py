"""How does a bidirectional classifier tell balanced brackets from others: which part looks for which mistake?

A string of brackets is balanced if the elevation, the number of brackets opened minus those closed so far, ends at zero
and is never below it. So there are two mistakes, and a string has one of them or both:

    count   (()(      the elevation does not end at zero
    order   ())(      it ends there, and has been negative
    both    ()))      it ends below

The network has three layers of one direction each, none: every token sees all others, and the answer, balanced or not,
is read at the [start] token. Its first layer knows no positions, so counting is all it can do there; what comes where
only the other layers can tell. The script trains it with `hooklens.training` and a loss of its own, on half balanced
and half nearly balanced strings, and asks:

1. How many strings that it has never seen does it classify?
2. What does each component add to the logit difference, balanced minus not, for each kind of string?
3. Which heads count, that is, write something at [start] that is linear in the elevation at the end, and what do they
   attend to?
4. Which mistakes are missed when these heads always give what they give on balanced strings?

Figures (PNG) and tables (CSV) go into the folder `--out`, beside the run; interrupted, the same command goes on.
"""

import argparse
import random
import zlib
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hooklens as hl
from hooklens import training
from hooklens.errors import HookLensError
from hooklens.optional import import_package

START, OPEN, CLOSE = range(3)
NOT_BALANCED, BALANCED = range(2)
KINDS = ("balanced", "count", "order", "both")
SHORTEST, LONGEST, BATCH = 4, 20, 128
_COLOURS = ("tab:green", "tab:orange", "tab:blue", "tab:red")
# A head counts where a line through the elevation leaves so little of its output's variance.
_COUNTS = 0.99


@dataclass(frozen=True)
class Strings:
    """Strings of brackets as token ids behind a [start] token, padded on the right.

    Attributes:
        ids: `[string pos]`.
        mask: tokens (1) and padding (0).
        kinds: the kind of each string, an index of `KINDS`.
    """

    ids: Tensor
    mask: Tensor
    kinds: Tensor

    @property
    def elevation(self) -> Tensor:
        """Of each string at its end."""
        return ((self.ids == OPEN).sum(1) - (self.ids == CLOSE).sum(1)).float()

    def of_kind(self, kind: str) -> Tensor:
        """Which strings are of a kind."""
        return self.kinds == KINDS.index(kind)


def draw_balanced(n_pairs: int, draw: random.Random) -> list[int]:
    """A balanced string as steps up and down, each alike likely: the cycle lemma (Dvoretzky and Motzkin 1947)."""
    steps = [1] * n_pairs + [-1] * (n_pairs + 1)
    draw.shuffle(steps)
    heights = list(accumulate(steps))
    first = heights.index(min(heights)) + 1
    return (steps[first:] + steps[:first])[:-1]


def draw_string(kind: str, n_pairs: int, draw: random.Random) -> list[int]:
    """A string of a kind, which differs from a balanced one in few places."""
    if kind == "order":
        below = draw.randint(1, n_pairs)
        before = draw.randint(0, n_pairs - below)
        if draw.random() < 0.5:
            inside = [-1, *draw_balanced(below - 1, draw), 1]
        else:
            inside = [-step for step in draw_balanced(below, draw)]
        return draw_balanced(before, draw) + inside + draw_balanced(n_pairs - below - before, draw)
    steps = draw_balanced(n_pairs, draw)
    if kind != "balanced":
        turned = -1 if kind == "count" else 1
        for place in draw.sample([i for i, step in enumerate(steps) if step == turned], draw.randint(1, 2)):
            steps[place] = -turned
    return steps


def is_held_out(steps: list[int]) -> bool:
    """Whether training never shows a string: an eighth of them, by a hash."""
    return zlib.crc32(str(steps).encode()) % 8 == 0


def make_strings(n: int, *, seed: int, held_out: bool) -> Strings:
    """Strings drawn at random, half of them balanced, and each mistake as often as another."""
    draw = random.Random(seed)
    rows: list[list[int]] = []
    kinds: list[int] = []
    while len(rows) < n:
        (kind,) = draw.choices(range(len(KINDS)), [3, 1, 1, 1])
        steps = draw_string(KINDS[kind], draw.randint(SHORTEST // 2, LONGEST // 2), draw)
        if is_held_out(steps) == held_out:
            rows.append(steps)
            kinds.append(kind)
    ids, mask = torch.full((n, LONGEST + 1), START), torch.zeros(n, LONGEST + 1, dtype=torch.long)
    for row, steps in enumerate(rows):
        ids[row, 1 : len(steps) + 1] = torch.tensor([OPEN if step == 1 else CLOSE for step in steps])
        mask[row, : len(steps) + 1] = 1
    return Strings(ids, mask, torch.tensor(kinds))


def make_model() -> hl.HookedCausalLM:
    """Three layers in which every token sees all others, the first of them without positions, and two classes."""
    rotary = hl.RotaryPositions(dim=24, base=200.0)
    cfg = hl.HookedConfig(
        d_model=48,
        n_layers=3,
        n_heads=2,
        d_mlp=96,
        act_fn="relu",
        d_vocab=3,
        d_vocab_out=2,
        n_ctx=LONGEST + 1,
        causal=False,
        positions=(hl.NoPositions(), rotary, rotary),
        init_std=0.1,
    )
    model = hl.HookedCausalLM(cfg)
    model.initialize(seed=0)
    return model


def classify(model: hl.HookedCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the two classes, `[string class]`, read at [start]."""
    logits: Tensor = model(ids, attention_mask=mask, logits_at=0)
    return logits.reshape(len(ids), 2)


def measure_loss(model: hl.HookedCausalLM, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy of a batch of ids, masks and kinds."""
    ids, mask, kinds = batch
    return cross_entropy(classify(model, ids, mask), (kinds == KINDS.index("balanced")).long())


def train(out: Path, *, steps: int, seed: int) -> hl.HookedCausalLM:
    """Train the model, or go on; gives it as it is at the end."""
    config = training.TrainConfig(
        steps=steps,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=20,
        weight_decay=0.1,
        optimizer_options={"fused": True},
        seed=seed,
    )
    shown = make_strings(min(steps * BATCH, 60_000), seed=seed, held_out=False)
    rows = torch.utils.data.TensorDataset(shown.ids, shown.mask, shown.kinds)
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True)
    model = make_model()
    training.train(model, loader, config, loss=measure_loss, folder=out / "run")
    return model.eval()


def accuracy(model: hl.HookedCausalLM, strings: Strings) -> pd.Series:
    """The share of strings classified rightly, by kind."""
    right = classify(model, strings.ids, strings.mask).argmax(-1) == strings.of_kind("balanced")
    return pd.Series({kind: float(right[strings.of_kind(kind)].float().mean()) for kind in KINDS})


def attribute(model: hl.HookedCausalLM, strings: Strings) -> pd.DataFrame:
    """What each component adds to the logit difference at [start], the mean over each kind of string.

    The final norm's denominator is that of each run. Rows sum to the logit difference, but for the bias of that norm.
    """
    _, cache = model.run_with_cache(strings.ids, attention_mask=strings.mask)
    parts, labels = cache.decompose_resid(return_labels=True, pos_slice=0)
    added = cache.logit_attrs(parts, BALANCED, NOT_BALANCED, pos_slice=0)
    means = {kind: added[:, strings.of_kind(kind)].mean(1).tolist() for kind in KINDS}
    return pd.DataFrame(means, index=pd.Index(labels, name="component"))


def draw_counts(n: int, *, seed: int) -> Strings:
    """Strings of the greatest length with every share of opened brackets, in any order."""
    generator = torch.Generator().manual_seed(seed)
    opened = torch.rand(n, LONGEST, generator=generator) < torch.rand(n, 1, generator=generator)
    ids = torch.cat([torch.full((n, 1), START), torch.where(opened, OPEN, CLOSE)], dim=1)
    return Strings(ids, torch.ones_like(ids), torch.zeros(n, dtype=torch.long))


@dataclass(frozen=True)
class Counting:
    """How a head's output at [start] depends on the elevation at the end.

    Attributes:
        layer, head: which.
        r2: the share of its variance that a line through the elevation explains.
        along: the output along that line, `[string]`.
        pattern: its attention from [start], `[string key]`.
    """

    layer: int
    head: int
    r2: float
    along: Tensor
    pattern: Tensor

    @property
    def unevenness(self) -> float:
        """Standard deviation of the attention to single brackets, as a share of its mean."""
        brackets = self.pattern[:, 1:]
        return float(brackets.std() / brackets.mean())


def measure_counting(model: hl.HookedCausalLM, strings: Strings) -> list[Counting]:
    """How well each head counts, on strings of one length."""
    _, cache = model.run_with_cache(strings.ids, attention_mask=strings.mask)
    elevation = strings.elevation - strings.elevation.mean()
    found = []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            written = cache["z", layer][:, 0, head] @ model.W_O[layer, head]
            centred = written - written.mean(0)
            slope = elevation @ centred / (elevation @ elevation)
            left = centred - elevation[:, None] * slope
            r2 = 1 - float(left.square().sum() / centred.square().sum())
            found.append(Counting(layer, head, r2, centred @ slope / slope.norm(), cache["pattern", layer][:, head, 0]))
    return found


def ablate(model: hl.HookedCausalLM, strings: Strings, heads: list[Counting]) -> pd.Series:
    """Accuracy by kind where some heads give, at every token, their mean over the tokens of balanced strings."""
    balanced = strings.of_kind("balanced")
    _, cache = model.run_with_cache(strings.ids[balanced], attention_mask=strings.mask[balanced])
    tokens = strings.mask[balanced].bool()
    edits = [
        hl.edits.Replace(
            f"blocks.{one.layer}.attn.hook_z", cache["z", one.layer][tokens][:, one.head].mean(0), head=one.head
        )
        for one in heads
    ]
    with model.hooks(edits=edits):
        return accuracy(model, strings)


def plot_components(table: pd.DataFrame, out: Path) -> None:
    """The logit difference by component, a bar for each kind of string."""
    figure = import_package("matplotlib.figure").Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, (kind, colour) in enumerate(zip(KINDS, _COLOURS, strict=True)):
        places = [place + 0.2 * (index - 1.5) for place in range(len(table))]
        axes.bar(places, table[kind], width=0.2, color=colour, label=kind)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(table)), table.index)
    axes.set(ylabel="logits", title="added to the logit difference, balanced minus not, at [start]")
    axes.legend(title="strings")
    figure.savefig(out / "components.png", dpi=110)


def plot_counting(
    model: hl.HookedCausalLM, strings: Strings, counted: Strings, head: Counting, shares: pd.DataFrame, out: Path
) -> None:
    """What the best counting head attends to, what it writes, and what is missed without all that count."""
    figure = import_package("matplotlib.figure").Figure(figsize=(13, 4), layout="constrained")
    pattern, output, missed = figure.subplots(1, 3, width_ratios=[1.7, 1, 1])
    name = f"L{head.layer}H{head.head}"
    whole = strings.mask.all(1)
    shown = [int((whole & strings.of_kind(kind)).nonzero()[0]) for kind in KINDS]
    _, cache = model.run_with_cache(strings.ids[shown])
    rows = cache["pattern", head.layer][:, head.head, 0].numpy()
    # Attention spread evenly is the middle of the scale.
    image = pattern.imshow(rows, cmap="Blues", vmin=0, vmax=2 / rows.shape[-1], aspect="auto")
    for row, string in enumerate(shown):
        for column, token in enumerate(strings.ids[string].tolist()):
            pattern.text(column, row, "s()"[token], ha="center", va="center", fontsize=12)
    pattern.set_yticks(range(len(KINDS)), KINDS)
    pattern.set_xticks(range(0, LONGEST + 1, 4))
    pattern.set(title=f"attention of {name} from [start] (s)", xlabel="position")
    figure.colorbar(image, ax=pattern)
    output.scatter(counted.elevation.tolist(), head.along.tolist(), s=8, color="tab:purple")
    output.set(
        title=f"output of {name} at [start], R² {head.r2:.3f}", xlabel="elevation at the end", ylabel="along its line"
    )
    drawn = (("whole", "whole", "grey"), ("ablated", "counting heads ablated", "tab:purple"))
    for index, (column, label, colour) in enumerate(drawn):
        places = [place + 0.4 * (index - 0.5) for place in range(len(KINDS))]
        missed.bar(places, shares[column], 0.4, color=colour, label=label)
    missed.set_xticks(range(len(KINDS)), KINDS)
    missed.set(title="share classified rightly", ylim=(0, 1.25), yticks=[0, 0.25, 0.5, 0.75, 1])
    missed.legend(loc="upper center", ncols=2, fontsize="small")
    figure.savefig(out / "counting.png", dpi=110)


def investigate(out: Path, *, steps: int, seed: int) -> dict[str, float]:
    """Train, ask all four questions, print the answers, write figures and tables; gives the main numbers."""
    print((__doc__ or "").partition("\n")[0])
    model = train(out, steps=steps, seed=seed)
    with torch.no_grad():
        strings = make_strings(2000, seed=seed + 1, held_out=True)
        whole = accuracy(model, strings)
        right = float(
            classify(model, strings.ids, strings.mask).argmax(-1).eq(strings.of_kind("balanced")).float().mean()
        )
        print(f"1. Of strings never seen {right:.1%} are classified rightly: {_by_kind(whole)}.")

        table = attribute(model, strings)
        print("2. Mean logit difference, balanced minus not, from each component:")
        print(table.round(2).to_string())
        for kind in KINDS[1:]:
            apart = (table["balanced"] - table[kind]).sort_values(ascending=False)
            print(f"   {kind}: told from balanced by {', '.join(f'{name} {by:.1f}' for name, by in apart[:3].items())}")

        counted = draw_counts(400, seed=seed)
        heads = sorted(measure_counting(model, counted), key=lambda one: one.r2, reverse=True)
        counting = [one for one in heads if one.r2 > _COUNTS]
        for one in counting:
            print(
                f"3. L{one.layer}H{one.head} counts: R² {one.r2:.3f}; its attention to single brackets varies by "
                f"{one.unevenness:.0%}."
            )
        print(f"   Of all other heads the nearest to it has {max(one.r2 for one in heads if one.r2 <= _COUNTS):.2f}.")
        without = ablate(model, strings, counting)
        print(f"4. With them ablated, classified rightly: {_by_kind(without)}.")
        shares = pd.DataFrame({"whole": whole, "ablated": without}).rename_axis("kind")
        plot_components(table, out)
        plot_counting(model, strings, counted, heads[0], shares, out)
    table.to_csv(out / "components.csv")
    shares.to_csv(out / "accuracy.csv")
    print(f"The figures and tables are in {out}.")
    names = " and ".join(f"L{one.layer}H{one.head}" for one in counting)
    who = f"by {names} for the count, and by others for the order" if counting else "by no head that only counts"
    print(
        f"Answer: {who}. Without what counts, mistakes of both kinds are found in "
        f"{without['both']:.0%} of strings ({whole['both']:.0%} with it), of the count alone in {without['count']:.0%} "
        f"({whole['count']:.0%}), of the order alone in {without['order']:.0%} ({whole['order']:.0%})."
    )
    return {
        "accuracy": right,
        "counting heads": len(counting),
        "deepest counting": max((one.layer for one in counting), default=-1),
        "unevenness": max((one.unevenness for one in counting), default=1.0),
        **{f"{kind}, ablated": float(without[kind]) for kind in KINDS},
        **{f"{kind}, whole": float(whole[kind]) for kind in KINDS},
    }


def _by_kind(shares: pd.Series) -> str:
    return ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the investigation as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the strings and their order")
    parser.add_argument(
        "--out", type=Path, default=Path("brackets"), help="folder of the run, the figures and the tables"
    )
    options = parser.parse_args(arguments)
    if options.steps < 20:
        parser.error(f"--steps is {options.steps}; the learning rate climbs for 20")
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
