"""Where does a model look up a fact: at the name that it is about, or where the answer is due?

    python demos/factual_recall.py                                  # a bundled model, no network
    python demos/factual_recall.py --model bundled:tiny-falcon      # one that does it in another way
    python demos/factual_recall.py --model EleutherAI/pythia-410m   # or another one

After "In France the capital is called" comes "Paris". The method is the causal tracing of Meng et al. 2022, "Locating
and Editing Factual Associations in GPT": Gaussian noise is added to the embedding of the country, so that the answer is
lost; then one activation at a time is put back as it was without noise. Where the answer comes back, the activation
carries it. That alone does not tell a country that is passed on from a capital that has been looked up, so paths are
cut, and the stream is read. Five questions are asked:

1. Does the model know the facts, and does the noise take them away?
2. Which activations bring the answer back: of the stream, of attention, of MLPs, at each layer and token?
3. What does it take behind the best of them: attention and MLPs at the last token, or MLPs at the country?
4. Where is the capital named: in the stream at the country, or in what is written at the last token?
5. Is it the same with other noise, with another country in its place, and in other words?

Figures (PNG) and tables (CSV) go into the folder `--out`. Figures need matplotlib: install HookLens with its extra
`plot`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import hooklens as hl
from hooklens.bundled.corpus import FACT_PHRASINGS
from hooklens.bundled.words import CAPITALS
from hooklens.errors import HookLensError, InputError
from hooklens.optional import import_package

TEMPLATE = "In {country} the capital is called"
OTHER_WORDS = tuple(words for words, asked in FACT_PHRASINGS if asked == "capital" and words != TEMPLATE)
PARTS = {"stream": "hook_resid_pre", "attention": "hook_attn_out", "MLP": "hook_mlp_out"}
NOISE = 3.0
"""Times the standard deviation of the countries' embeddings, as in the paper."""


@dataclass(frozen=True)
class Task:
    """Questions about capitals, with the noise that hides each country.

    Attributes:
        model: under investigation.
        tokens: the questions, each as often as noise is drawn, `[row pos]`.
        answers: ids of the capitals, `[row]`.
        subject: the position of the country.
        noise: added to the country's embedding, `[row d_model]`.
        labels: what stands at each position.
    """

    model: hl.HookedCausalLM
    tokens: Tensor
    answers: Tensor
    subject: int
    noise: Tensor
    labels: list[str]

    @property
    def corruption(self) -> hl.edits.Add:
        """The noise as an edit."""
        return hl.edits.Add("hook_embed", self.noise, pos=self.subject)

    @property
    def layers(self) -> range:
        """All layers."""
        return range(self.model.cfg.n_layers)

    def probability(self, edits: list[hl.edits.Edit]) -> float:
        """The mean probability of the right capital under some edits."""
        logits = self.model.run_with_hooks(self.tokens, edits=edits, logits_at=-1)[:, 0]
        return float(logits.softmax(-1).gather(1, self.answers[:, None]).mean())

    def record(self, edits: list[hl.edits.Edit]) -> hl.ActivationCache:
        """What stream, attention and MLPs carry under some edits."""
        names = [f"blocks.*.{point}" for point in PARTS.values()]
        return self.model.run_with_cache(self.tokens, edits=edits, names_filter=names, return_type=None)[1]


def choose_facts(model: hl.HookedCausalLM) -> dict[str, str]:
    """Countries and capitals that are a single token of the model, in the middle of a sentence."""

    def is_token(word: str) -> bool:
        return len(model.to_str_tokens(f" {word}", prepend_bos=False)) == 1

    facts = {country: capital for country, capital in CAPITALS.items() if is_token(country) and is_token(capital)}
    if len(facts) < 4:
        raise InputError(f"{len(facts)} of {len(CAPITALS)} facts are of single tokens of this model; expected 4")
    return facts


def make_task(model: hl.HookedCausalLM, template: str, *, noise: float, draws: int, seed: int) -> Task:
    """The questions in some words, with noise of some strength."""
    facts = choose_facts(model)
    rows = [model.to_tokens(template.format(country=country))[0] for country in facts]
    tokens = torch.stack(rows).repeat(draws, 1)
    (subject,) = (tokens != tokens[:1]).any(0).nonzero().flatten().tolist()
    answers = torch.tensor([model.to_single_token(f" {capital}") for capital in facts.values()])
    _, cache = model.run_with_cache(tokens[: len(facts)], names_filter="hook_embed", stop_at_layer=0)
    spread = noise * float(cache["hook_embed"][:, subject].std())
    drawn = spread * torch.randn(len(tokens), model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    labels = [str(token).strip() for token in model.to_str_tokens(rows[0])]
    labels[subject] = "{country}"
    return Task(model, tokens, answers.repeat(draws), subject, drawn, labels)


def put_back(cache: hl.ActivationCache, part: str, layer: int, pos: int) -> hl.edits.Replace:
    """The edit that gives a part at a position what it has in a cache."""
    name = f"blocks.{layer}.{PARTS[part]}"
    return hl.edits.Replace(name, cache[name][:, pos], pos=pos)


def trace(task: Task, part: str, clean: hl.ActivationCache) -> Tensor:
    """Question 2: the probability of the answer with one activation put back, `[layer pos]`."""
    values = torch.zeros(len(task.layers), len(task.labels))
    for layer in task.layers:
        for pos in range(task.subject, len(task.labels)):
            values[layer, pos] = task.probability([task.corruption, put_back(clean, part, layer, pos)])
    # Nothing before the country knows of it.
    values[:, : task.subject] = task.probability([task.corruption])
    return values


def cut_paths(task: Task, start: int, clean: hl.ActivationCache, noised: hl.ActivationCache) -> dict[str, float]:
    """Question 3: the stream at the country is put back behind a layer's MLP, and something later stays as with noise.

    Args:
        task: the questions.
        start: the first layer whose input at the country is as it was without noise.
        clean: the run without noise.
        noised: the run with it.
    """
    restored = [task.corruption, put_back(clean, "stream", start, task.subject)]
    behind, last = [layer for layer in task.layers if layer >= start], len(task.labels) - 1
    held = {
        "nothing": [],
        "MLPs at the country": [("MLP", layer, task.subject) for layer in behind],
        "MLPs at the last token": [("MLP", layer, last) for layer in behind],
        "attention at the last token": [("attention", layer, last) for layer in behind],
    }
    return {
        name: task.probability([*restored, *(put_back(noised, *place) for place in places)])
        for name, places in held.items()
    }


def read_capitals(task: Task) -> pd.DataFrame:
    """Question 4: in which share of facts the right capital leads all capitals, where a part is read as if it were all.

    What is read goes through the last norm and the unembedding at once, as if no layer followed (the logit lens).
    """
    model, n_facts = task.model, len(task.answers.unique())
    _, cache = model.run_with_cache(task.tokens[:n_facts], names_filter=["resid_post", "attn_out", "mlp_out"])

    def share_named(word: str, layer: int, pos: int) -> float:
        logits = model(cache[word, layer], start_at_layer=model.cfg.n_layers, logits_at=pos)[:, 0]
        leading = logits[:, task.answers[:n_facts]].argmax(-1)
        return float((leading == torch.arange(n_facts)).float().mean())

    columns = {
        "stream at the country": ("resid_post", task.subject),
        "stream at the last token": ("resid_post", -1),
        "attention's output there": ("attn_out", -1),
        "MLP's output there": ("mlp_out", -1),
    }
    table = {name: [share_named(word, layer, pos) for layer in task.layers] for name, (word, pos) in columns.items()}
    return pd.DataFrame(table, index=pd.Index(task.layers, name="layer"))


def restore_each(task: Task, clean: hl.ActivationCache) -> pd.DataFrame:
    """What share of the loss comes back with the MLP at the country, or attention at the last token, by layer."""
    plain, lost = task.probability([]), task.probability([task.corruption])
    columns = {"MLP at the country": ("MLP", task.subject), "attention at the end": ("attention", len(task.labels) - 1)}
    table = {
        name: [
            (task.probability([task.corruption, put_back(clean, part, layer, pos)]) - lost) / (plain - lost)
            for layer in task.layers
        ]
        for name, (part, pos) in columns.items()
    }
    return pd.DataFrame(table)


def compare_settings(model: hl.HookedCausalLM, *, draws: int, seed: int) -> pd.DataFrame:
    """Question 5: both places with other noise, with another country in place of noise, and in other words."""
    tasks = {f"noise of {noise:g} sd": (TEMPLATE, noise) for noise in (1.0, NOISE, 5.0)}
    tasks |= {f'"{words.format(country="...")}"': (words, NOISE) for words in OTHER_WORDS}
    made = {
        name: make_task(model, template, noise=noise, draws=draws, seed=seed)
        for name, (template, noise) in tasks.items()
    }
    task = made[f"noise of {NOISE:g} sd"]
    n_facts = len(task.answers.unique())
    _, cache = model.run_with_cache(task.tokens[:n_facts], names_filter="hook_embed", stop_at_layer=0)
    own = cache["hook_embed"][:, task.subject]
    made["another country"] = Task(
        model, task.tokens[:n_facts], task.answers[:n_facts], task.subject, own.roll(1, 0) - own, task.labels
    )
    rows = []
    for name, one in made.items():
        restored = restore_each(one, one.record([]))
        row: dict[str, float | str] = {"setting": name, "with noise": one.probability([one.corruption])}
        for place, values in restored.items():
            row |= {f"{place}: layer": int(values.idxmax()), f"{place}: restores": float(values.max())}
        rows.append(row)
    return pd.DataFrame(rows).set_index("setting")


def plot_traces(task: Task, traces: dict[str, Tensor], out: Path) -> None:
    """What comes back, for the stream, attention and MLPs."""
    figure = import_package("matplotlib.figure").Figure(figsize=(11, 3.6), layout="constrained")
    grid = figure.subplots(1, len(traces), sharey=True)
    for axes, (part, values) in zip(grid, traces.items(), strict=True):
        image = axes.imshow(values.numpy(), cmap="Greens", vmin=0, vmax=1, aspect="auto", origin="lower")
        axes.set_xticks(range(len(task.labels)), task.labels, rotation=60, ha="right")
        axes.set(title=f"{part} put back", yticks=list(task.layers))
        axes.title.set_text({"stream": "stream entering a block put back"}.get(part, f"output of {part} put back"))
    grid[0].set(ylabel="layer")
    figure.colorbar(image, ax=grid, label="probability of the capital")
    figure.savefig(out / "1_traces.png", dpi=110)


def plot_reading(table: pd.DataFrame, n_facts: int, out: Path) -> None:
    """Which parts name the capital, layer by layer."""
    figure = import_package("matplotlib.figure").Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for column in table.columns:
        axes.plot(table.index, table[column], marker="o", label=column)
    axes.axhline(1 / n_facts, linestyle=":", color="grey")
    axes.set(
        xlabel="layer", ylabel="share of facts", title="the right capital leads (dotted: chance)", ylim=(-0.05, 1.05)
    )
    axes.set_xticks(list(table.index))
    axes.legend()
    figure.savefig(out / "2_reading.png", dpi=110)


def investigate(model: hl.HookedCausalLM, out: Path, *, draws: int, seed: int) -> dict[str, float]:
    """Ask all five questions, print the answers, write figures and tables; gives the main numbers."""
    print((__doc__ or "").partition("\n")[0])
    task = make_task(model, TEMPLATE, noise=NOISE, draws=draws, seed=seed)
    plain, lost = task.probability([]), task.probability([task.corruption])
    print(f"1. Probability of the capital: {plain:.2f}, with noise on the country {lost:.2f}.")

    clean, noised = task.record([]), task.record([task.corruption])
    traces = {part: trace(task, part, clean) for part in PARTS}
    print("2. Put back as it was, the probability becomes:")
    for part, values in traces.items():
        for place, pos in (("country", task.subject), ("last token", -1)):
            column = ", ".join(f"{value:.2f}" for value in values[:, pos].tolist())
            print(f"     {part:<9} at the {place:<10} by layer: {column}")

    restored = restore_each(task, clean)
    mlp = int(restored["MLP at the country"].idxmax())
    start = min(mlp + 1, len(task.layers) - 1)
    cut = cut_paths(task, start, clean, noised)
    print(f"3. The stream at the country put back from layer {start} on, and held as with noise:")
    print("\n".join(f"     {name:<28} {probability:.2f}" for name, probability in cut.items()))

    reading = read_capitals(task)
    n_facts = len(task.answers.unique())
    print(f"4. Share of {n_facts} facts in which the right capital leads, read from:\n{reading.round(2).to_string()}")

    settings = compare_settings(model, draws=draws, seed=seed + 1)
    print(f"5. Where most is restored, and the share of what was lost:\n{settings.round(2).to_string()}")

    plot_traces(task, traces, out)
    plot_reading(reading, n_facts, out)
    frames = {part: pd.DataFrame(values.numpy(), columns=task.labels) for part, values in traces.items()}
    pd.concat(frames, names=["part", "layer"]).to_csv(out / "traces.csv")
    reading.to_csv(out / "reading.csv")
    settings.to_csv(out / "settings.csv")
    print(f"Figures and tables are in {out}.")
    kept = (cut["MLPs at the last token"] - lost) / (cut["nothing"] - lost)
    print(f"Answer: {conclude(restored, reading, kept_without_mlps=kept)}")
    return {
        "clean": plain,
        "noised": lost,
        "MLP at the country": mlp,
        "MLP restores": float(restored["MLP at the country"].max()),
        "attention at the end": int(restored["attention at the end"].idxmax()),
        "attention restores": float(restored["attention at the end"].max()),
        **{f"held {name}": probability for name, probability in cut.items()},
        "attention names": float(reading["attention's output there"].max()),
    }


def conclude(restored: pd.DataFrame, reading: pd.DataFrame, *, kept_without_mlps: float) -> str:
    """The answer in words.

    Args:
        restored: see `restore_each`.
        reading: see `read_capitals`.
        kept_without_mlps: what is kept of the capital's probability where the stream at the country is put back and the
            MLPs at the last token are held as with noise, as a share.
    """
    by_mlp, by_attention = restored["MLP at the country"], restored["attention at the end"]
    movers = [int(layer) for layer in by_attention.index[by_attention > by_attention.max() / 2]]
    which = f"layer{'s' if len(movers) > 1 else ''} {' and '.join(map(str, movers))}"
    named = float(reading.loc[movers, "attention's output there"].max())
    moved = (
        f"attention of {which} moves it to the last token (one layer restores up to {by_attention.max():.0%}), and its "
        f"output names the capital in {named:.0%} of facts"
    )
    if by_mlp.max() > 0.5:
        needed = f"without the MLPs at the last token {kept_without_mlps:.0%} of that is kept"
        return (
            f"at the country. MLP {int(by_mlp.idxmax())} there restores {by_mlp.max():.0%} of what the noise took; "
            f"{moved}; {needed}."
        )
    weights = " It reads nothing but embeddings, so its weights hold the facts." if movers == [0] else ""
    return f"not in an MLP at the country, the best of which restores {by_mlp.max():.0%}: {moved}.{weights}"


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the investigation as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="bundled:tiny-gpt-neox", help="a bundled model, a hub name, or a folder")
    parser.add_argument("--draws", type=int, default=8, help="how often noise is drawn for each fact")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--out", type=Path, default=Path("factual_recall"), help="folder of figures and tables")
    options = parser.parse_args(arguments)
    if options.draws < 1:
        parser.error(f"--draws is {options.draws}; expected at least 1")
    try:
        # Before the work, which takes minutes on a larger model.
        import_package("matplotlib.figure")
        options.out.mkdir(parents=True, exist_ok=True)
        model = hl.HookedCausalLM.from_pretrained(options.model)
        with torch.no_grad():
            return investigate(model, options.out, draws=options.draws, seed=options.seed)
    except (HookLensError, OSError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
