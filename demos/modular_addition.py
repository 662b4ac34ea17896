"""How does a one-layer transformer learn to add modulo a number, and what does it do to add?

    python demos/modular_addition.py

The network reads `a b =` and is to say `(a + b) mod p`. Trained on a part of all pairs, under weight decay, it soon
knows that part by heart and nothing else; long after, it finds the rule, and what it says of the other pairs becomes
right: it "groks" (Power et al. 2022). The rule is a Fourier transform (Nanda et al. 2023, "Progress measures for
grokking via mechanistic interpretability"): numbers are embedded as cosines and sines of a few key frequencies
`w = 2 pi k / p`, neurons multiply these to those of the sum, and the logit of `c` is large where all the
`cos(w (a + b - c))` agree. The script trains such a network with `hooklens.training` and asks:

1. When does it know the pairs that it is trained on, and when the others?
2. How few frequencies hold the embedding, beside that of a fresh network?
3. Do the logits need their waves of `a + b` at these frequencies, and anything but these?
4. Is what a neuron computes made of one frequency?

Figures (PNG) and the table (CSV) go into the folder `--out`, beside the run; interrupted, the same command goes on.
Figures need matplotlib: install HookLens with its extra `plot`.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import hooklens as hl
from hooklens import training
from hooklens.errors import HookLensError
from hooklens.optional import import_package

N_CHECKPOINTS = 50
ENERGY = 0.9
"""The share of the embedding's energy that its key frequencies hold."""


@dataclass(frozen=True)
class Task:
    """All pairs of numbers, and which of them are trained on.

    Attributes:
        p: the modulus, an odd number.
        rows: `a b =` for each pair, `[p * p, 3]`; `=` is the token `p`.
        answers: `(a + b) mod p`, `[p * p]`.
        is_trained: which pairs are trained on, `[p * p]`.
    """

    p: int
    rows: Tensor
    answers: Tensor
    is_trained: Tensor


def make_task(p: int, *, fraction: float, seed: int) -> Task:
    """All pairs, a fraction of them drawn to be trained on."""
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    is_trained = torch.zeros(p * p, dtype=torch.bool)
    is_trained[order[: round(fraction * p * p)]] = True
    return Task(p, torch.stack([a, b, torch.full_like(a, p)], dim=1), (a + b) % p, is_trained)


def make_model(p: int, *, seed: int) -> hl.HookedCausalLM:
    """One layer without norms, as in the paper, at half its width or less."""
    cfg = hl.HookedConfig(
        d_model=64,
        n_layers=1,
        n_heads=4,
        d_mlp=128,
        d_vocab=p + 1,
        d_vocab_out=p,
        n_ctx=3,
        positions=hl.LearnedPositions(),
        act_fn="relu",
        norm=None,
        final_norm=None,
        qkv_bias=False,
        out_bias=False,
        init_std=0.1,
    )
    model = hl.HookedCausalLM(cfg)
    model.initialize(seed=seed)
    return model


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """The mean cross-entropy of the answers; in float64, as the losses of pairs known by heart vanish in float32."""
    return torch.nn.functional.cross_entropy(logits.double(), answers)


def train(task: Task, out: Path, *, steps: int, seed: int) -> training.Checkpoints:
    """Train on the whole of the training pairs in each step, or go on; gives the checkpoints over the training."""
    config = training.TrainConfig(
        steps=steps,
        learning_rate=5e-3,
        weight_decay=2.0,
        optimizer_options={"betas": (0.9, 0.98), "fused": True},
        max_grad_norm=None,
        seed=seed,
        log_every=100,
        checkpoint_every=max(1, steps // N_CHECKPOINTS),
    )

    def loss(model: hl.HookedCausalLM, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, answers = batch
        return answer_loss(model(rows, logits_at=-1)[:, 0], answers)

    batch = (task.rows[task.is_trained], task.answers[task.is_trained])
    training.train(make_model(task.p, seed=seed), [batch], config, loss=loss, folder=out / "run")
    return training.checkpoints(out / "run")


def embedding_spectrum(model: hl.HookedCausalLM) -> Tensor:
    """The share of each frequency 1, 2, ... in the energy of the numbers' embeddings about their mean, `[p // 2]`."""
    numbers = model.embed.W_E.detach()[:-1].double()
    energy = torch.fft.rfft(numbers, dim=0).abs().square().sum(1)[1:]
    shares: Tensor = energy / energy.sum()
    return shares


def find_key_frequencies(spectrum: Tensor) -> list[int]:
    """The fewest frequencies that hold `ENERGY` of a spectrum, the strongest first."""
    strongest = spectrum.sort(descending=True)
    n_needed = int((strongest.values.cumsum(0) < ENERGY).sum()) + 1
    return (strongest.indices[:n_needed] + 1).tolist()


def split_logits(logits: Tensor, p: int, frequencies: list[int]) -> tuple[Tensor, Tensor]:
    """Logits of all pairs as their mean and the waves of `a + b` at some frequencies, and as all but these waves.

    They are the two-dimensional Fourier transform's terms over `a` and `b`: `cos(w (a + b))` and `sin(w (a + b))` are
    those of the indices `(k, k)` and `(-k, -k)`.
    """
    waves = torch.fft.fft2(logits.double().view(p, p, -1), dim=(0, 1))
    k = torch.tensor([sign * one for one in frequencies for sign in (1, -1)])
    kept = torch.zeros_like(waves)
    kept[k, k] = waves[k, k]
    left = waves - kept
    kept[0, 0] = waves[0, 0]
    restricted, excluded = (torch.fft.ifft2(one, dim=(0, 1)).real.flatten(0, 1) for one in (kept, left))
    return restricted, excluded


def single_frequency_shares(neurons: Tensor, p: int) -> Tensor:
    """How much of each neuron's variance over all pairs one frequency explains, `[p // 2, d_mlp]`.

    A frequency's terms are products of 1, `cos(w a)` and `sin(w a)` with those of `b`: the indices in which each of the
    two is `-k`, 0 or `k`.
    """
    energy = torch.fft.fft2(neurons.double().view(p, p, -1), dim=(0, 1)).abs().square()
    energy[0, 0] = 0
    explained = []
    for k in range(1, p // 2 + 1):
        indices = torch.tensor([-k, 0, k])
        explained.append(energy[indices[:, None], indices].sum((0, 1)))
    # A neuron that is off for all pairs has no variance.
    shares: Tensor = torch.stack(explained) / energy.sum((0, 1)).clamp_min(torch.finfo(energy.dtype).tiny)
    return shares


def measure(model: hl.HookedCausalLM, *, task: Task, frequencies: list[int]) -> dict[str, float]:
    """Losses and accuracies on both parts of the pairs, progress measures, and the embedding's spectrum.

    The restricted loss is that of all pairs with the waves of `a + b` at the key frequencies alone; the excluded loss
    that of the training pairs without them.
    """
    with torch.no_grad():
        logits = model(task.rows, logits_at=-1)[:, 0]
    restricted, excluded = split_logits(logits, task.p, frequencies)
    correct, trained = logits.argmax(-1) == task.answers, task.is_trained
    found = {
        "train loss": answer_loss(logits[trained], task.answers[trained]),
        "test loss": answer_loss(logits[~trained], task.answers[~trained]),
        "restricted loss": answer_loss(restricted, task.answers),
        "excluded loss": answer_loss(excluded[trained], task.answers[trained]),
        "train accuracy": correct[trained].double().mean(),
        "test accuracy": correct[~trained].double().mean(),
        "restricted accuracy": (restricted.argmax(-1) == task.answers).double().mean(),
        "excluded accuracy": (excluded.argmax(-1) == task.answers).double().mean(),
    }
    spectrum = {f"frequency {k}": share for k, share in enumerate(embedding_spectrum(model).tolist(), start=1)}
    return {name: float(value) for name, value in found.items()} | spectrum


def neuron_activations(model: hl.HookedCausalLM, task: Task) -> Tensor:
    """The neurons at `=`, for all pairs, `[p * p, d_mlp]`."""
    with torch.no_grad():
        _, cache = model.run_with_cache(task.rows, names_filter="blocks.0.mlp.hook_post", pos_slice=-1)
    neurons: Tensor = cache["blocks.0.mlp.hook_post"][:, 0]
    return neurons


def plot_training(table: pd.DataFrame, frequencies: list[int], out: Path) -> None:
    """Losses and the embedding's spectrum over the training."""
    figure = import_package("matplotlib.figure").Figure(figsize=(7.5, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    lines = {
        "train": ("-", "tab:blue", "training pairs"),
        "test": ("-", "tab:red", "other pairs"),
        "restricted": ("--", "tab:green", "restricted: key frequencies alone"),
        "excluded": ("--", "tab:orange", "excluded: all but these"),
    }
    for name, (style, colour, label) in lines.items():
        above.plot(table.index, table[f"{name} loss"], style, color=colour, label=label)
    above.set(yscale="log", ylabel="loss in nats", title="learned by heart first, the rule later")
    above.legend()
    for name in table.filter(like="frequency").columns:
        key = int(name.split()[1]) in frequencies
        below.plot(
            table.index,
            table[name],
            color=None if key else "lightgrey",
            label=name if key else None,
            zorder=2 if key else 1,
        )
    below.set(xlabel="step", ylabel="share of energy", title="frequencies in the embedding (grey: all others)")
    below.legend()
    figure.savefig(out / "training.png", dpi=110)


def plot_neurons(neurons: Tensor, shares: Tensor, p: int, frequencies: list[int], out: Path) -> None:
    """For each key frequency the neuron that is most its own, over all pairs."""
    shown = frequencies[:4]
    figure = import_package("matplotlib.figure").Figure(figsize=(2.6 * len(shown) + 0.5, 3.2), layout="constrained")
    for axes, k in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        neuron = int((shares[k - 1] * (neurons.var(0) > neurons.var(0).median())).argmax())
        axes.imshow(neurons[:, neuron].view(p, p).numpy(), cmap="Blues", origin="lower")
        axes.set(title=f"neuron {neuron}\nfrequency {k}: {shares[k - 1, neuron]:.0%}", xlabel="b", ylabel="a")
        axes.label_outer()
    figure.suptitle("neurons over all pairs, and how much one frequency explains")
    figure.savefig(out / "neurons.png", dpi=110)


def first_step(accuracy: pd.Series) -> int | None:
    """The first step from which on at least 99 % are right; None: there is none."""
    reached = accuracy[::-1].cummin()[::-1] >= 0.99
    return min(reached.index[reached], default=None)


def investigate(task: Task, out: Path, *, steps: int, seed: int) -> dict[str, float]:
    """Train, ask all four questions, print the answers, write figures and table; gives the main numbers."""
    print((__doc__ or "").partition("\n")[0])
    points = train(task, out, steps=steps, seed=seed)
    fresh, trained = points.load(points.steps[0]), points.load(points.steps[-1])
    frequencies = find_key_frequencies(embedding_spectrum(trained))
    n_fresh, n_all = len(find_key_frequencies(embedding_spectrum(fresh))), task.p // 2
    table = points.curve(partial(measure, task=task, frequencies=frequencies)).set_index("step")
    last = table.iloc[-1]

    by_heart, rule = first_step(table["train accuracy"]), first_step(table["test accuracy"])
    print(
        f"1. Of {int(task.is_trained.sum())} training pairs {last['train accuracy']:.1%} are right in the end, of the "
        f"{int((~task.is_trained).sum())} others {last['test accuracy']:.1%}."
    )
    if by_heart is None or rule is None:
        print("   It has not found the rule: give it more --steps, or a larger --fraction.")
    else:
        print(f"   At least 99% are right from step {by_heart} on, and from step {rule} on.")
    share = float(embedding_spectrum(trained)[torch.tensor(frequencies) - 1].sum())
    print(
        f"2. {len(frequencies)} of {n_all} frequencies hold {share:.0%} of the embedding's energy: "
        f"{', '.join(map(str, frequencies))}. A fresh network needs {n_fresh} for {ENERGY:.0%}."
    )
    print(
        f"3. With the waves of a + b at these frequencies alone {last['restricted accuracy']:.1%} of all pairs are "
        f"right, without them {last['excluded accuracy']:.1%}; {1 / task.p:.1%} is guessing."
    )
    neurons = neuron_activations(trained, task)
    shares = single_frequency_shares(neurons, task.p)
    fresh_share = float(single_frequency_shares(neuron_activations(fresh, task), task.p).amax(0).median())
    neuron_share = float(shares.amax(0)[neurons.var(0) > 0].median())
    print(
        f"4. In the median neuron one frequency explains {neuron_share:.0%} of the variance ({fresh_share:.0%} before "
        "training)."
    )
    plot_training(table, frequencies, out)
    plot_neurons(neurons, shares, task.p, frequencies, out)
    table.to_csv(out / "training.csv")
    print(f"The figures and the table are in {out}.")
    learned = "not within this training" if rule is None else f"by step {rule}"
    print(
        f"Answer: it knows the training pairs by heart {'not yet' if by_heart is None else f'by step {by_heart}'}, and "
        f"has the rule {learned}. The rule is in {len(frequencies)} frequencies: with their waves alone "
        f"{last['restricted accuracy']:.0%} of all pairs are right, without them {last['excluded accuracy']:.0%}."
    )
    return {
        "train accuracy": float(last["train accuracy"]),
        "test accuracy": float(last["test accuracy"]),
        "restricted accuracy": float(last["restricted accuracy"]),
        "excluded accuracy": float(last["excluded accuracy"]),
        "known by heart from": steps if by_heart is None else by_heart,
        "rule known from": steps if rule is None else rule,
        "key frequencies": len(frequencies),
        "key frequencies before": n_fresh,
        "frequencies": n_all,
        "neuron share": neuron_share,
        "neuron share before": fresh_share,
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the investigation as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--modulus", type=int, default=43, help="an odd number")
    parser.add_argument("--fraction", type=float, default=0.45, help="of the pairs that is trained on")
    parser.add_argument("--steps", type=int, default=2000, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh weights, and of which pairs are trained on")
    parser.add_argument(
        "--out", type=Path, default=Path("modular_addition"), help="folder of the run, the figures and the table"
    )
    options = parser.parse_args(arguments)
    problems = []
    if options.modulus < 5 or options.modulus % 2 == 0:
        problems.append(f"--modulus is {options.modulus}; expected an odd number from 5 on")
    if not 0.1 <= options.fraction <= 0.9:
        problems.append(f"--fraction is {options.fraction}; expected 0.1 to 0.9, so that both parts have pairs")
    if options.steps < N_CHECKPOINTS:
        problems.append(f"--steps is {options.steps}; {N_CHECKPOINTS} checkpoints need as many")
    if problems:
        parser.error("; ".join(problems))
    try:
        # Before the work, which takes minutes.
        import_package("matplotlib.figure")
        options.out.mkdir(parents=True, exist_ok=True)
        task = make_task(options.modulus, fraction=options.fraction, seed=options.seed)
        numbers = investigate(task, options.out, steps=options.steps, seed=options.seed)
    except (HookLensError, OSError) as error:
        parser.exit(1, f"{error}\n")
    return numbers


if __name__ == "__main__":
    main()
