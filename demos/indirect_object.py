"""How does a model find the indirect object: which parts carry it, and which edges between them are enough?

    python demos/indirect_object.py                                   # a bundled model, no network
    python demos/indirect_object.py --model EleutherAI/pythia-160m    # or another one, whose heads write to the
                                                                      # stream without a norm behind them

Figures need matplotlib: install HookLens with its extra `plot`.

The task is that of Wang et al. 2022, "Interpretability in the wild". After

    When Mary and John went to the store, John gave a drink to

the next word is the name that has occurred once. The corrupted prompt names Mary a second time instead, and then
it is John. Between the two the metric, `logit(Mary) - logit(John)`, changes its sign. Six questions are asked:

1. Can the model do it?
2. Where in the stream, layer by layer and token by token, is the difference between the two prompts?
3. Which heads carry it, and which are needed?
4. What do the strongest heads look at, and does their output, query, key or value count?
5. Through which paths does the information reach the strongest head?
6. Which edges between heads and MLPs are enough to keep the behaviour, everything else ablated?

Figures (PNG) and tables (CSV) go into the folder `--out`.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

import hooklens as hl
from hooklens import patching
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching import LogitDiff, Pair, SweepResult, grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "When {first} and {second} went to the store, {subject} gave a drink to"
_NAMES = """
    Mary Anna Lucy Emma Alice Sarah Laura Kate Helen Susan John Tom Peter Paul James David Simon Martin Daniel Kevin
    Robert Thomas Michael Andrew George Henry Charles Adam
"""
NAMES = tuple(_NAMES.split())


@dataclass(frozen=True)
class Task:
    """Pairs of prompts, and what is measured.

    Attributes:
        model: the model under investigation.
        pairs: the clean and corrupted prompts.
        metric: the logit of the clean prompt's answer minus that of the corrupted prompt's.
        out: the folder of figures and tables.
    """

    model: hl.HookedCausalLM
    pairs: list[Pair]
    metric: LogitDiff
    out: Path

    @property
    def clean(self) -> torch.Tensor:
        """Ids of the clean prompts, `[pairs pos]`."""
        return torch.stack([pair.clean for pair in self.pairs])

    @property
    def corrupted(self) -> torch.Tensor:
        """Ids of the corrupted prompts, `[pairs pos]`."""
        return torch.stack([pair.corrupted for pair in self.pairs])

    @property
    def labels(self) -> list[str]:
        """What stands at each position, the template's fields by their name."""
        labels = list(self.pairs[0].labels)
        for field, span in self.pairs[0].spans.items():
            labels[span[0]] = f"{{{field}}}"
        return labels

    def sweep(self, sites: patching.Grid | str, **options: Any) -> SweepResult:
        """A sweep over the task's pairs."""
        return patching.sweep(self.model, self.clean, self.corrupted, sites, self.metric, progress=False, **options)

    def save(self, figure: "Figure", name: str) -> None:
        """Write a figure."""
        figure.savefig(self.out / f"{name}.png", dpi=110)


def make_task(model: hl.HookedCausalLM, out: Path, *, n_pairs: int, seed: int) -> Task:
    """Pairs with names drawn at random, in both orders, each name a single token of the model."""
    names = [name for name in NAMES if len(model.to_str_tokens(f" {name}", prepend_bos=False)) == 1]
    draw = random.Random(seed)
    pairs, answers, wrong = [], [], []
    for index in range(n_pairs):
        object_, subject = draw.sample(names, 2)
        first, second = (object_, subject) if index % 2 else (subject, object_)
        fields = {"first": first, "second": second}
        pairs.append(
            Pair.from_template(
                model, TEMPLATE, clean={**fields, "subject": subject}, corrupted={**fields, "subject": object_}
            )
        )
        answers.append(f" {object_}")
        wrong.append(f" {subject}")
    return Task(model, pairs, LogitDiff(answers, wrong), out)


def measure_behaviour(task: Task) -> pd.DataFrame:
    """Question 1: the metric of every pair's two prompts."""
    metric = task.metric.encode(task.model)
    return pd.DataFrame(
        {
            "answer": task.metric.answer,
            "wrong": task.metric.wrong,
            "clean": metric(task.model(task.clean)).tolist(),
            "corrupted": metric(task.model(task.corrupted)).tolist(),
        }
    )


def locate_in_stream(task: Task) -> SweepResult:
    """Question 2: the stream entering each block, at each position, taken from the clean run."""
    result = task.sweep("resid_pre")
    task.save(
        result.plot(
            backend="matplotlib", title="stream patched: logit difference restored", labels={"pos": task.labels}
        ),
        "1_stream",
    )
    return result


def find_heads(task: Task) -> tuple[SweepResult, SweepResult]:
    """Question 3: heads whose clean output restores the behaviour, and heads whose mean output destroys it."""
    enough = task.sweep("z")
    mean = patching.mean_activations(task.model, torch.cat([task.clean, task.corrupted]), "z")
    needed = task.sweep("z", direction="noise", source=mean)
    task.save(enough.plot(backend="matplotlib", title="head patched: logit difference restored"), "2_heads_restore")
    task.save(needed.plot(backend="matplotlib", title="head set to its mean: logit difference lost"), "3_heads_needed")
    return enough, needed


def strongest_heads(result: SweepResult, k: int) -> list[tuple[int, int]]:
    """(layer, head) of the cells that move the metric most."""
    table = result.top(k)
    return list(zip(table["layer"].astype(int), table["head"].astype(int), strict=True))


def show_patterns(task: Task, heads: list[tuple[int, int]]) -> None:
    """Question 4, first half: what each head looks at from the position where its patch counts, mean over the pairs."""
    rows, names = [], []
    for layer, head in heads:
        by_position = task.sweep(grid("z", layers=layer, heads=head, positions="each"))
        pos = int(by_position.normalized.abs().argmax())
        _, cache = task.model.run_with_cache(task.clean, names_filter=f"blocks.{layer}.attn.hook_pattern")
        rows.append(cache["pattern", layer][:, head, pos].mean(0))
        names.append(f"{layer}.{head}, from {task.labels[pos]}")
    figure = import_package("matplotlib.figure").Figure(figsize=(8, 0.5 * len(heads) + 2.2), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(torch.stack(rows), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set(title="attention from the position where the head's patch counts", ylabel="head")
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(task.labels)), task.labels, rotation=90)
    figure.colorbar(image, ax=axes)
    task.save(figure, "4_patterns")


def split_heads(task: Task, heads: list[tuple[int, int]]) -> pd.DataFrame:
    """Question 4, second half: what is restored by the clean output, query, pattern, key and value of each head.

    Keys and values belong to the head's group where heads share them.
    """
    cfg = task.model.cfg
    rows = []
    for layer, head in heads:
        row: dict[str, Any] = {"head": f"{layer}.{head}"}
        for word in ("z", "q", "pattern", "k", "v"):
            own = head * cfg.n_kv_heads // cfg.n_heads if word in ("k", "v") else head
            row[word] = float(task.sweep(grid(word, layers=layer, heads=own)).normalized)
        rows.append(row)
    return pd.DataFrame(rows)


def trace_paths(task: Task, head: tuple[int, int]) -> pd.DataFrame:
    """Question 5: what each earlier head and MLP sends to a head's query, key and value, and straight to the logits."""
    layer, number = head
    group = number * task.model.cfg.n_kv_heads // task.model.cfg.n_heads
    receivers = {"q": f"a{layer}.h{number}.q", "k": f"a{layer}.h{group}.k", "v": f"a{layer}.h{group}.v"}
    columns = {}
    for name, receiver in {**receivers, "logits": "logits"}.items():
        result = patching.path_patch(
            task.model, task.clean, task.corrupted, None, [receiver], task.metric, through_mlps=False, progress=False
        )
        columns[name] = pd.Series(result.normalized.tolist(), index=list(result.axes["sender"]))
    return pd.DataFrame(columns).rename_axis("sender").reset_index()


def find_circuit(task: Task) -> tuple[patching.FaithfulnessCurve, patching.Circuit]:
    """Question 6: edges ranked by attribution, and the smallest circuit of them that keeps four fifths."""
    scores = patching.edge_attribution(task.model, task.clean, task.corrupted, task.metric, method="eap-ig")
    curve = patching.faithfulness_curve(task.model, task.clean, task.corrupted, scores, task.metric, progress=False)
    task.save(
        curve.plot(backend="matplotlib", title="circuits of the strongest edges, all others ablated"), "5_circuits"
    )
    return curve, curve.smallest(0.8)


def investigate(task: Task) -> dict[str, float]:
    """Ask all six questions, print the answers, write figures and tables; gives the main numbers."""
    print((__doc__ or "").partition("\n")[0])
    behaviour = measure_behaviour(task)
    means = behaviour[["clean", "corrupted"]].mean()
    print(f"1. Mean logit difference: {means['clean']:.2f} clean, {means['corrupted']:.2f} corrupted.")

    stream = locate_in_stream(task)
    print("2. The clean stream restores most where it is patched in at:")
    for row in stream.top(6).itertuples():
        print(f"     layer {row.layer:>2}, {task.labels[row.pos]:<12} {row.normalized:6.0%}")

    enough, needed = find_heads(task)
    heads = strongest_heads(enough, 5)
    restored = ", ".join(f"{layer}.{head} {float(enough.normalized[layer, head]):.0%}" for layer, head in heads)
    lost = ", ".join(
        f"{layer}.{head} {float(needed.normalized[layer, head]):.0%}" for layer, head in strongest_heads(needed, 5)
    )
    print(f"3. One head alone restores: {restored}.\n   One head set to its mean loses: {lost}.")

    show_patterns(task, heads)
    parts = split_heads(task, heads)
    print(f"4. Restored by each part of these heads:\n{parts.round(2).to_string(index=False)}")

    paths = trace_paths(task, heads[0])
    strongest = paths.set_index("sender").abs().max(axis=1).nlargest(8).index
    print(f"5. Paths into {heads[0][0]}.{heads[0][1]}, and straight to the logits:")
    print(paths[paths["sender"].isin(strongest)].round(3).to_string(index=False))

    curve, circuit = find_circuit(task)
    table = curve.to_dataframe()
    print(f"6. Of {table['edges'].max()} edges {len(circuit)} keep four fifths of the logit difference: {circuit}")

    behaviour.to_csv(task.out / "behaviour.csv", index=False)
    parts.to_csv(task.out / "heads.csv", index=False)
    paths.to_csv(task.out / "paths.csv", index=False)
    table.to_csv(task.out / "circuits.csv", index=False)
    circuit.save(task.out / "circuit.json")
    print(f"Figures and tables are in {task.out}.")
    best = parts.set_index("head").iloc[0]
    by_input = best[["q", "k", "v"]].astype(float)
    print(
        f"Answer: mostly through head {best.name}, which alone restores {best['z']:.0%} of the difference: by its "
        f"{by_input.idxmax()} ({by_input.max():.0%}; its attention pattern {best['pattern']:.0%}). {len(circuit)} of "
        f"{table['edges'].max()} edges keep four fifths."
    )
    return {
        "clean": float(means["clean"]),
        "corrupted": float(means["corrupted"]),
        "best head restores": float(enough.normalized.max()),
        "edges": len(circuit),
        "all edges": int(table["edges"].max()),
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the investigation as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="bundled:tiny-gpt-neox", help="a bundled model, a hub name, or a folder")
    parser.add_argument("--pairs", type=int, default=16, help="how many pairs of prompts")
    parser.add_argument("--seed", type=int, default=0, help="which names are drawn")
    parser.add_argument("--out", type=Path, default=Path("indirect_object"), help="folder of figures and tables")
    options = parser.parse_args(arguments)
    if options.pairs < 2:
        parser.error(f"--pairs is {options.pairs}; means need at least 2")
    try:
        # Before the work, which takes minutes on a larger model.
        import_package("matplotlib.figure")
        options.out.mkdir(parents=True, exist_ok=True)
        model = hl.HookedCausalLM.from_pretrained(options.model)
    except (HookLensError, OSError) as error:
        parser.error(str(error))
    with torch.no_grad():
        numbers = investigate(make_task(model, options.out, n_pairs=options.pairs, seed=options.seed))
    return numbers


if __name__ == "__main__":
    main()
