"""How does a small autoencoder keep more features than it has dimensions, and what does that cost?

    python demos/superposition.py

Features `x` go through fewer hidden dimensions and back, `relu(x W W^T + b)` (Elhage et al. 2022, "Toy models of
superposition"). Where features are dense, the most important ones get a dimension each and the others are left out.
Where they are sparse, two are rarely there together, and it pays to give features directions that are not orthogonal:
antipodal pairs, then a pentagon. The autoencoder is a `HookedModule` of the script's own, and trained with
`hooklens.training` for all sparsities at once. The script asks:

1. How many features are represented at each sparsity?
2. How do they share the dimensions?
3. What happens to other features when one's direction is taken out of the hidden activations?
4. Is it the same with more features and more dimensions?

Figures (PNG) and the table (CSV) go into the folder `--out`, beside the runs; interrupted, the same command goes on.
Figures need matplotlib: install HookLens with its extra `plot`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import hooklens as hl
from hooklens import training
from hooklens.errors import HookLensError
from hooklens.optional import import_package

IMPORTANCE = 0.9
"""Each feature's share of the importance of the one before it."""
SPARSITIES = (0.0, 0.7, 0.9, 0.97, 0.99)
"""How often a feature is 0."""
REPRESENTED = 0.5
"""From which norm of its direction on a feature counts as represented; the norms lie near 0 and 1."""


@dataclass(frozen=True)
class Study:
    """What is trained: autoencoders of one size at all sparsities.

    Attributes:
        n_features, n_hidden: the size.
        n_copies: how many are trained at each sparsity, from other weights each. Small ones may end in a poor minimum;
            the best copy is asked.
    """

    n_features: int
    n_hidden: int
    n_copies: int

    @property
    def name(self) -> str:
        """The size, for names of files."""
        return f"{self.n_features}_in_{self.n_hidden}"

    @property
    def importance(self) -> Tensor:
        """How much an error of each feature counts, `[feature]`."""
        return IMPORTANCE ** torch.arange(self.n_features)

    @property
    def instance_sparsities(self) -> Tensor:
        """The sparsity of each instance: all of them, each `n_copies` times, `[instance]`."""
        return torch.tensor(SPARSITIES).repeat_interleave(self.n_copies)


SMALL = Study(5, 2, n_copies=4)
LARGE = Study(20, 5, n_copies=1)


class Autoencoder(hl.HookedModule):
    """Linear autoencoders with tied weights and a ReLU at the end, several beside each other.

    Attributes:
        W: each feature's direction, `[instance feature hidden]`.
        b: added to the output, `[instance feature]`.
        hook_hidden: `[batch instance hidden]`.
        hook_output: `[batch instance feature]`.
    """

    def __init__(self, n_instances: int, n_features: int, n_hidden: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(n_instances, n_features, n_hidden))
        self.b = nn.Parameter(torch.zeros(n_instances, n_features))
        self.hook_hidden = hl.HookPoint()
        self.hook_output = hl.HookPoint()

    def forward(self, features: Tensor) -> Tensor:
        """The features as they come back, `[batch instance feature]`."""
        hidden = self.hook_hidden(torch.einsum("bif,ifh->bih", features, self.W))
        output: Tensor = self.hook_output(torch.relu(torch.einsum("bih,ifh->bif", hidden, self.W) + self.b))
        return output


class SparseFeatures(torch.utils.data.IterableDataset[Tensor]):
    """Batches of features that are 0, or uniform up to 1, independently of each other, `[batch instance feature]`."""

    def __init__(self, study: Study, *, batch: int = 1024) -> None:
        self._study, self._batch = study, batch

    def __iter__(self) -> Iterator[Tensor]:
        sparsities = self._study.instance_sparsities[:, None]
        shape = (self._batch, len(sparsities), self._study.n_features)
        while True:
            yield torch.rand(shape) * (torch.rand(shape) >= sparsities)


def squared_errors(model: Autoencoder, features: Tensor) -> Tensor:
    """The mean squared error of each feature, `[instance feature]`."""
    errors: Tensor = model(features) - features
    return errors.square().mean(0)


def train(study: Study, out: Path, *, steps: int, seed: int) -> Autoencoder:
    """Train all instances of a study at once, or go on; gives the best copy at each sparsity."""
    generator = torch.Generator().manual_seed(seed)
    model = Autoencoder(len(study.instance_sparsities), study.n_features, study.n_hidden)
    nn.init.normal_(model.W, std=0.5 * study.n_hidden**-0.5, generator=generator)
    config = training.TrainConfig(
        steps=steps,
        learning_rate=1e-2,
        weight_decay=0.0,
        optimizer_options={"fused": True},
        schedule="cosine",
        # Each instance learns as if it were alone.
        max_grad_norm=None,
        seed=seed,
        log_every=100,
    )

    def loss(model: Autoencoder, features: Tensor) -> Tensor:
        return (squared_errors(model, features) * study.importance).mean(1).sum()

    loader = torch.utils.data.DataLoader(SparseFeatures(study), batch_size=None)
    training.train(model, loader, config, loss=loss, folder=out / f"run_{study.name}")
    return choose_best(model, study, seed=seed)


def draw_features(study: Study, *, seed: int) -> Tensor:
    """Features to measure on, `[batch instance feature]`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return next(iter(SparseFeatures(study, batch=2**14)))


@torch.no_grad()
def choose_best(model: Autoencoder, study: Study, *, seed: int) -> Autoencoder:
    """The instances with the smallest loss, one for each sparsity."""
    losses = (squared_errors(model, draw_features(study, seed=seed)) * study.importance).mean(1)
    copies = losses.view(-1, study.n_copies).argmin(1)
    chosen = torch.arange(len(copies)) * study.n_copies + copies
    best = Autoencoder(len(chosen), study.n_features, study.n_hidden)
    best.load_state_dict({name: value[chosen] for name, value in model.state_dict().items()})
    return best


def describe_features(model: Autoencoder, study: Study) -> pd.DataFrame:
    """Each feature's norm, the dimensions it has for itself, and the angle to the one that is nearest.

    The dimensions are `|W_i|^2 / sum_j (W_i / |W_i| . W_j)^2` (Elhage et al. 2022): 1 for a dimension of its own, 1/2
    in an antipodal pair, 2/5 in a pentagon. Angles are between represented features, in degrees.
    """
    rows = []
    for sparsity, directions in zip(SPARSITIES, model.W.detach(), strict=True):
        norms = directions.norm(dim=1)
        units = directions / norms[:, None]
        dimensions = norms.square() / (units @ directions.T).square().sum(1)
        cosines = (units @ units.T).fill_diagonal_(-1.0)
        cosines[:, norms <= REPRESENTED] = -1.0
        angles = cosines.amax(1).clamp(-1.0, 1.0).arccos().rad2deg()
        rows += [
            {
                "size": study.name,
                "sparsity": sparsity,
                "feature": feature,
                "norm": float(norms[feature]),
                "represented": bool(norms[feature] > REPRESENTED),
                "dimensions": float(dimensions[feature]),
                "nearest": float(angles[feature]),
            }
            for feature in range(study.n_features)
        ]
    return pd.DataFrame(rows)


@torch.no_grad()
def measure_damage(model: Autoencoder, features: Tensor) -> Tensor:
    """What all other features lose when the first one's direction is taken out of the hidden activations, `[instance]`.

    It is the sum of the squared errors that they gain, as a multiple of the one that the first feature gains.
    """
    direction = model.W[:, 0] / model.W[:, 0].norm(dim=1, keepdim=True)

    def remove(hidden: Tensor, hook: hl.HookPoint) -> Tensor:
        along: Tensor = (hidden * direction).sum(-1, keepdim=True) * direction
        return hidden - along

    before = squared_errors(model, features)
    with model.hooks(fwd_hooks=[("hook_hidden", remove)]):
        gained = squared_errors(model, features) - before
    damage: Tensor = gained[:, 1:].sum(1) / gained[:, 0]
    return damage


def plot_directions(model: Autoencoder, study: Study, features: Tensor, out: Path) -> None:
    """The features' directions at each sparsity, two hidden dimensions wide, among the hidden activations of inputs."""
    hidden = model.run_with_cache(features, names_filter="hook_hidden")[1]["hook_hidden"]
    n_shown = len(SPARSITIES)
    figure = import_package("matplotlib.figure").Figure(figsize=(2.4 * n_shown, 3.3), layout="constrained")
    for instance, axes in enumerate(figure.subplots(1, n_shown, sharex=True, sharey=True)):
        axes.scatter(*hidden[:, instance].T.numpy(), s=2, color="lightgrey", linewidths=0)
        for feature, (x, y) in enumerate(model.W[instance].tolist()):
            axes.plot([0, x], [0, y], color=f"C{feature}", linewidth=2)
            axes.plot(x, y, "o", color=f"C{feature}", label=f"feature {feature}")
        axes.set(title=f"sparsity {SPARSITIES[instance]:g}", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
        axes.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=study.n_features, frameon=False)
    figure.suptitle(f"directions of {study.n_features} features in 2 dimensions (grey: hidden activations)")
    figure.savefig(out / "directions.png", dpi=110)


def plot_products(model: Autoencoder, study: Study, out: Path) -> None:
    """The products of the features' directions at each sparsity."""
    n_shown = len(SPARSITIES)
    figure = import_package("matplotlib.figure").Figure(figsize=(2.4 * n_shown + 0.6, 3.4), layout="constrained")
    grid = figure.subplots(1, n_shown, sharex=True, sharey=True)
    for axes, sparsity, directions in zip(grid, SPARSITIES, model.W.detach(), strict=True):
        image = axes.imshow((directions @ directions.T).numpy(), cmap="RdBu", vmin=-1.2, vmax=1.2)
        n_represented = int((directions.norm(dim=1) > REPRESENTED).sum())
        axes.set(title=f"sparsity {sparsity:g}\n{n_represented} represented", xlabel="feature")
    grid[0].set(ylabel="feature")
    figure.colorbar(image, ax=grid, shrink=0.75)
    figure.suptitle(f"products of the directions of {study.n_features} features in {study.n_hidden} dimensions")
    figure.savefig(out / f"products_{study.name}.png", dpi=110)


def investigate(out: Path, *, steps: int, seed: int) -> pd.DataFrame:
    """Train, ask all four questions, print the answers, write figures and table; gives a row for each sparsity."""
    print((__doc__ or "").partition("\n")[0])
    small, large = (train(study, out, steps=steps, seed=seed) for study in (SMALL, LARGE))
    features = pd.concat([describe_features(small, SMALL), describe_features(large, LARGE)], ignore_index=True)
    counts = features.groupby(["size", "sparsity"])["represented"].sum().unstack("size")
    shown = features[features["represented"] & (features["size"] == SMALL.name)].groupby("sparsity")
    # One draw at each sparsity, for the one instance that there is of it.
    draws = draw_features(SMALL, seed=seed + 1)[:, :: SMALL.n_copies]
    table = pd.DataFrame(
        {
            "represented": counts[SMALL.name],
            "dimensions": shown["dimensions"].mean(),
            "nearest": shown["nearest"].mean(),
            "damage": pd.Series(measure_damage(small, draws).tolist(), index=list(SPARSITIES)),
            f"represented, {LARGE.n_features} in {LARGE.n_hidden}": counts[LARGE.name],
        }
    )
    dense, sparse = table.iloc[0], table.iloc[-1]
    print(
        f"1. Of {SMALL.n_features} features, {SMALL.n_hidden} dimensions represent {dense['represented']:.0f} where "
        f"all are present, and {sparse['represented']:.0f} where each is present in {1 - SPARSITIES[-1]:.0%} of inputs."
    )
    print(
        "2. A represented feature has for itself, and stands from the nearest one at:\n"
        + "\n".join(
            f"     sparsity {row.Index:<4g}: {row.dimensions:.2f} dimensions, {row.nearest:4.0f} degrees"
            for row in table.itertuples()
        )
    )
    print(
        "3. With feature 0's direction taken out of hook_hidden the others gain, of the error that it gains:\n     "
        + ", ".join(f"{damage:.0%} at sparsity {sparsity:g}" for sparsity, damage in table["damage"].items())
        + "."
    )
    print(
        f"4. Of {LARGE.n_features} features, {LARGE.n_hidden} dimensions represent, at the same sparsities: "
        f"{', '.join(map(str, counts[LARGE.name]))}."
    )
    plot_directions(small, SMALL, draws, out)
    plot_products(small, SMALL, out)
    plot_products(large, LARGE, out)
    features.to_csv(out / "features.csv", index=False)
    print(f"The figures and the table are in {out}.")
    print(
        "Answer: where features are sparse it gives them directions that are not orthogonal, at "
        f"{sparse['nearest']:.0f} degrees for {sparse['represented']:.0f} features in {SMALL.n_hidden} dimensions. "
        f"They interfere: taking one out costs the others {sparse['damage']:.0%} of its own error, and "
        f"{dense['damage']:.0%} where {dense['represented']:.0f} features have a dimension each."
    )
    return table


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Run the investigation as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of the fresh weights and of the features that are drawn")
    parser.add_argument(
        "--out", type=Path, default=Path("superposition"), help="folder of the runs, the figures and the table"
    )
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; expected at least 1")
    try:
        # Before the work, which takes a minute.
        import_package("matplotlib.figure")
        options.out.mkdir(parents=True, exist_ok=True)
        table = investigate(options.out, steps=options.steps, seed=options.seed)
    except (HookLensError, OSError) as error:
        parser.exit(1, f"{error}\n")
    return table


if __name__ == "__main__":
    main()
