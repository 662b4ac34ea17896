"""Can one direction make a model answer "Paris" whatever country is asked for, and what does it cost?

    python demos/steering_vector.py                               # a bundled model, no network
    python demos/steering_vector.py --model bundled:tiny-llama    # one without biases, into which nothing can be baked

"The capital of Italy is" calls for "Rome". Is there a vector that, added to the stream, makes it "Paris"? Contrastive
pairs give candidates (Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation Addition"): the mean activation
on questions about France minus that on the same questions about other countries, at each layer, read at the country's
token or at the last one. They are tried on countries and words that they were not made from, at several strengths, and
beside every effect stands the damage: how much the predictions on other text change. Five questions are asked:

1. How likely is "Paris" without steering, where it is right and where it is wrong?
2. What do the vectors do, by layer and strength, and what do they damage?
3. Which is the best within a limit of damage, and how does it compare with random vectors of its length?
4. Is it the capital that is changed, or the country: what of questions in the other direction?
5. Can the vector be baked into the weights, so that the checkpoint steers by itself?

Figures (PNG), tables (CSV) and the vector go into the folder `--out`. Figures need matplotlib: install HookLens with
its extra `plot`.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

import hooklens as hl
from hooklens import patching, steering
from hooklens.bundled import corpus
from hooklens.bundled.words import CAPITALS
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.steering import SteeringTable, SteeringVector, StrengthChoice

TARGET, ANSWER = "France", CAPITALS["France"]
FITTED_WORDS = ("The capital of {country} is", "The capital city of {country} is")
TRIED_WORDS = "In {country} the capital is called"
REVERSED_WORDS = "{capital} is the capital of"
READ_AT = {"country": -2, "last token": -1}
"""Which token of the questions that the vectors are made from is read."""
STRENGTHS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
N_RANDOM = 5


@dataclass(frozen=True)
class Task:
    """What vectors are made from, and what they are tried on.

    Attributes:
        model: is steered.
        positive, negative: questions about the target and, in the same words, about other countries.
        tried: questions about countries, and in words, that are in neither.
        countries: those of `tried`.
        neutral: other text: stories and repeated words, no facts.
    """

    model: hl.HookedCausalLM
    positive: list[str]
    negative: list[str]
    tried: list[str]
    countries: list[str]
    neutral: list[str]

    @property
    def effect(self) -> patching.Probability:
        """The probability of the target's capital."""
        return patching.Probability(f" {ANSWER}")

    def measure(self, vectors: SteeringVector | steering.SteeringVectors, strengths: Sequence[float]) -> SteeringTable:
        """Effect and damage of vectors at some strengths."""
        return steering.sweep_strength(
            self.model, vectors, self.tried, strengths, self.effect, neutral=self.neutral, progress=False
        )


def make_task(model: hl.HookedCausalLM, *, n_neutral: int, seed: int) -> Task:
    """Half of the other countries for the vectors, half to try them on."""
    draw = random.Random(seed)
    others = [country for country in CAPITALS if country != TARGET]
    draw.shuffle(others)
    fitted, tried = others[: len(others) // 2], others[len(others) // 2 :]
    shares = {"indirect_object": 0.7, "repeats": 0.3, "facts": 0.0}
    return Task(
        model,
        positive=[words.format(country=TARGET) for words in FITTED_WORDS for _ in fitted],
        negative=[words.format(country=country) for words in FITTED_WORDS for country in fitted],
        tried=[TRIED_WORDS.format(country=country) for country in tried],
        countries=tried,
        neutral=[" ".join(corpus.sample_row(draw, length=48, shares=shares).words) for _ in range(n_neutral)],
    )


def answer_probability(
    model: hl.HookedCausalLM, questions: list[str], answers: list[str], edits: list[hl.edits.Edit]
) -> float:
    """The mean probability of each question's answer."""
    logits = model.run_with_hooks(questions, edits=edits, logits_at=-1)[:, 0]
    ids = torch.tensor([model.to_single_token(f" {answer}") for answer in answers])
    return float(logits.softmax(-1).gather(1, ids[:, None]).mean())


def choose(tables: dict[str, SteeringTable], *, max_kl: float) -> tuple[str, StrengthChoice]:
    """Where the best vector within a limit of damage was read, and the cell of its table."""
    best = {place: table.best(max_kl=max_kl) for place, table in tables.items()}
    place = max(best, key=lambda one: best[one].effect)
    return place, best[place]


def try_reversed(task: Task, edits: list[hl.edits.Edit]) -> dict[str, float]:
    """Question 4: with the vector, what comes after "Rome is the capital of"."""
    questions = [REVERSED_WORDS.format(capital=CAPITALS[country]) for country in task.countries]
    wrong = [TARGET] * len(questions)
    return {
        "right country": answer_probability(task.model, questions, task.countries, []),
        "right country, steered": answer_probability(task.model, questions, task.countries, edits),
        f"{TARGET}, steered": answer_probability(task.model, questions, wrong, edits),
        f"{ANSWER}, steered": answer_probability(task.model, questions, [ANSWER] * len(questions), edits),
    }


def bake(task: Task, vector: SteeringVector, strength: float, out: Path) -> float | None:
    """Question 5: the effect of the checkpoint into which the vector is baked, loaded anew; None: it has no place."""
    try:
        baked = steering.bake(task.model, vector, strength=strength)
    except HookLensError as error:
        print(f"5. It cannot be baked: {error}")
        return None
    baked.save_pretrained(out / "baked")
    loaded = hl.HookedCausalLM.from_pretrained(out / "baked")
    steered = task.model.run_with_hooks(task.tried, edits=vector.edits(strength=strength))
    difference = float((loaded(task.tried) - steered).abs().max())
    effect = answer_probability(loaded, task.tried, [ANSWER] * len(task.tried), [])
    print(
        f'5. Baked, saved and loaded anew, without any edit "{ANSWER}" has {effect:.2f}; logits differ from those '
        f"under the edit by at most {difference:.1e}."
    )
    return effect


def plot_tables(tables: dict[str, SteeringTable], random_table: SteeringTable, max_kl: float, out: Path) -> None:
    """Effect over damage, a line for each layer, a panel for each place; random vectors beside them."""
    figure = import_package("matplotlib.figure").Figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.subplots(1, len(tables), sharex=True, sharey=True)
    for axes, (place, table) in zip(grid, tables.items(), strict=True):
        for layer, (kl, effect) in enumerate(zip(table.kl, table.effect, strict=True)):
            axes.plot(kl.tolist(), effect.tolist(), marker="o", markersize=4, label=f"behind layer {layer}")
        axes.plot(
            random_table.kl.flatten().tolist(),
            random_table.effect.flatten().tolist(),
            "x",
            color="grey",
            label="random, as long as the best",
        )
        axes.axvline(max_kl, linestyle=":", color="black")
        axes.set(xscale="log", title=f"vectors read at the {place}", xlabel="damage: KL on other text, nats a token")
    grid[0].set(ylabel=f'effect: probability of "{ANSWER}"')
    grid[0].legend(fontsize="small")
    figure.suptitle("each line goes through the strengths (dotted: the limit of damage)")
    figure.savefig(out / "strengths.png", dpi=110)


def investigate(task: Task, out: Path, *, max_kl: float) -> dict[str, float]:
    """Ask all five questions, print the answers, write the figure, the tables and the vector; gives main numbers."""
    print((__doc__ or "").partition("\n")[0])
    model, n_tried = task.model, len(task.tried)
    right = answer_probability(model, [TRIED_WORDS.format(country=TARGET)], [ANSWER], [])
    wrong = answer_probability(model, task.tried, [ANSWER] * n_tried, [])
    print(
        f'1. Without steering "{ANSWER}" has {right:.2f} where it is right, {wrong:.4f} in {n_tried} other questions.'
    )

    vectors = {
        place: steering.fit(model, task.positive, task.negative, at="resid_post", positions=pos, progress=False)
        for place, pos in READ_AT.items()
    }
    tables = {place: task.measure(found, STRENGTHS) for place, found in vectors.items()}
    frame = pd.concat({place: table.to_dataframe() for place, table in tables.items()}, names=["read at"])
    for column, title in (("effect", f'probability of "{ANSWER}"'), ("kl", "damage: KL on other text, nats a token")):
        shown = frame.reset_index("read at").pivot(index=["read at", "layer"], columns="strength", values=column)
        print(f"2. By strength, {title}:\n{shown.round(2).to_string()}")

    place, best = choose(tables, max_kl=max_kl)
    vector = vectors[place][best.name]
    random_effects = [task.measure(vector.random_like(seed=seed), [best.strength]) for seed in range(N_RANDOM)]
    largest = max(float(table.effect.max()) for table in random_effects)
    print(
        f"3. Within {max_kl:g} nats the best is read at the {place}, behind layer {vector.layer}, at strength "
        f'{best.strength:g}: "{ANSWER}" has {best.effect:.2f} at {best.kl:.2f} nats; perplexity of other text goes '
        f"from {tables[place].plain_perplexity:.1f} to {best.perplexity:.1f}.\n   Of {N_RANDOM} random vectors of its "
        f"length none gives more than {largest:.4f}."
    )

    reversed_ = try_reversed(task, vector.edits(strength=best.strength))
    print(f'4. After "{REVERSED_WORDS}": {", ".join(f"{name} {value:.2f}" for name, value in reversed_.items())}.')

    baked = bake(task, vector, best.strength, out)
    random_table = task.measure(vector.random_like(seed=0), STRENGTHS)
    plot_tables(tables, random_table, max_kl, out)
    frame.to_csv(out / "strengths.csv")
    vector.save(out / "vector.safetensors")
    print(f"The figure, the table and the vector are in {out}.")
    verdict = "yes" if best.effect > 0.5 else "in part"
    carried = TARGET if reversed_[f"{TARGET}, steered"] > reversed_[f"{ANSWER}, steered"] else ANSWER
    print(
        f'Answer: {verdict}. Within {max_kl:g} nats of damage "{ANSWER}" goes from {wrong:.4f} to {best.effect:.2f} on '
        f"questions that the vector was not made from, and the perplexity of other text is {best.perplexity:.1f} in "
        f'place of {tables[place].plain_perplexity:.1f}. What it carries is rather "{carried}", as questions in the '
        "other direction show."
    )
    return {
        "right": right,
        "wrong": wrong,
        "effect": best.effect,
        "kl": best.kl,
        "layer": float(-1 if vector.layer is None else vector.layer),
        "random": largest,
        "baked": float("nan") if baked is None else baked,
        **reversed_,
    }


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Run the investigation as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="bundled:tiny-gpt-neox", help="a bundled model, or a folder of one")
    parser.add_argument("--max-kl", type=float, default=1.5, help="the most damage, in nats a token")
    parser.add_argument("--neutral", type=int, default=16, help="rows of other text")
    parser.add_argument("--seed", type=int, default=0, help="which countries are held out, and what the text is")
    parser.add_argument("--out", type=Path, default=Path("steering_vector"), help="folder of what is written")
    options = parser.parse_args(arguments)
    if options.neutral < 1 or options.max_kl <= 0:
        parser.error(f"--neutral is {options.neutral} and --max-kl is {options.max_kl}; expected both above 0")
    try:
        # Before the work.
        import_package("matplotlib.figure")
        options.out.mkdir(parents=True, exist_ok=True)
        model = hl.HookedCausalLM.from_pretrained(options.model)
        with torch.no_grad():
            task = make_task(model, n_neutral=options.neutral, seed=options.seed)
            return investigate(task, options.out, max_kl=options.max_kl)
    except (HookLensError, OSError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
