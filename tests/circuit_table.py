"""`python -m tests.circuit_table`: write docs/circuits.md, how well ways to score edges find circuits."""

import re
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from hooklens import HookedCausalLM
from hooklens.patching import (
    Circuit,
    EdgeChoice,
    FaithfulnessCurve,
    LogitDiff,
    Pair,
    discover_circuit,
    edge_attribution,
    edge_auroc,
    faithfulness_curve,
    held_out_curve,
    known,
    learn_circuit,
    random_circuits,
    split_pairs,
)

PAGE = Path(__file__).parent.parent / "docs" / "circuits.md"
MODELS = ("tiny-llama", "tiny-gpt-neox", "tiny-falcon")
# Methods, and how they take gradients.
METHODS = (
    ("eap", "gradient"),
    ("eap", "norms"),
    ("eap", "linear"),
    ("eap", "relp"),
    ("eap", "gim"),
    ("eap-ig-inputs", "gradient"),
    ("eap-ig-activations", "gradient"),
)
# Gates trained for circuits of so many edges; in the table as a method.
LEARNED = ("learn_circuit", "kl")
_SHARE = 0.05
NORMS = (None, "layer", "rms")
GATES = "`learn_circuit`, gates of 5 edges, KL"
THRESHOLD = 0.1
NAMES = ("Mary", "John", "Anna", "Paul", "Alice", "Tom", "Sarah", "James")
SENTENCE = "When {first} and {second} went to the store , {subject} gave a drink to"
_HEAD = """# How well circuits are found

MIB's measures (Mueller et al. 2025, arXiv 2504.13151) of the bundled models on indirect objects: 28 prompts such as
"When Mary and John went to the store, John gave a drink to", whose corrupted ones have the other name as their subject,
and the logit difference of both names. Edges are scored on a random half of the pairs, circuits of the ten sizes are
chosen greedily from the logits and measured on the other half, everything outside them resampled from the corrupted
prompts.

- **CPR**: the area under the faithfulness over the fraction of edges, edges that work for the behaviour first
  (`EdgeChoice(by="signed")`). 0.999 is a curve that is 1 everywhere; it can be above, where circuits leave out what
  works against the behaviour.
- **CMD**: the area between the curve and 1, strongest edges first (`by="absolute"`). 0 is best.
- `learn_circuit`: hard concrete gates, trained on the KL divergence for circuits of a twentieth of the edges, and used
  as scores without a sign for both measures. They are made for one size; away from it their order says little.
- **random**: five draws of connected circuits of the same sizes, lowest to highest.

| model | edges | scores | rules | CPR | CMD | random CPR | random CMD |
|---|---|---|---|---|---|---|---|
"""
_KNOWN = """
A network whose circuit is known, since its weights are set by hand: two layers of four heads that complete a sequence
seen before (`hooklens.patching.known.induction`). Five of its edges carry all that differs between two prompts. The
area under the receiver operating characteristic of scores (AUROC) is 1 where they tell these from the others, and 0.5
for chance; of a circuit, its edges have the score 1 and others 0. 32 pairs; the logit difference.

| found by | AUROC, no norm | LayerNorm | RMS norm |
|---|---|---|---|
"""
_FOOT = """
This page is written by `python -m tests.circuit_table`; `tests/test_circuit_table.py` holds its numbers.
"""


class Row(NamedTuple):
    """A row of the table of bundled models."""

    model: str
    edges: int
    method: str
    rules: str
    cpr: float
    cmd: float
    random_cpr: tuple[float, ...]
    random_cmd: tuple[float, ...]

    def __str__(self) -> str:
        low, high = ([f"{end(draws):.2f}" for draws in (self.random_cpr, self.random_cmd)] for end in (min, max))
        bands = " | ".join(f"{one} to {other}" for one, other in zip(low, high, strict=True))
        what = f"| `{self.model}` | {self.edges} | `{self.method}` | `{self.rules}`"
        return f"{what} | {self.cpr:.3f} | {self.cmd:.3f} | {bands} |"


def indirect_objects(model: HookedCausalLM) -> list[Pair]:
    """Prompts of a bundled model whose answer is the name that is not the subject."""
    couples = list(permutations(NAMES, 2))[::2]
    prompts = [
        [SENTENCE.format(first=one, second=other, subject=subject) for subject in (other, one)]
        for one, other in couples
    ]
    return [
        Pair.from_text(model, *both, answer=f" {one}", wrong=f" {other}")
        for both, (one, other) in zip(prompts, couples, strict=True)
    ]


def measure(name: str, methods: Sequence[tuple[str, str]] = METHODS) -> list[Row]:
    """The rows of a bundled model."""
    model = HookedCausalLM.from_pretrained(f"bundled:{name}")
    pairs = indirect_objects(model)
    rows = []
    for method, rules in methods:
        if (method, rules) == LEARNED:
            signed, absolute = curves_of_gates(model, pairs)
        else:
            signed, absolute = (
                held_out_curve(
                    model, pairs, metric=LogitDiff(), method=method, rules=rules, sizes="mib",
                    choice=EdgeChoice(by=order), random_draws=5, progress=False,
                ).curve
                for order in ("signed", "absolute")
            )  # fmt: skip
        edges = len(Circuit.full(model.cfg))
        rows.append(Row(name, edges, method, rules, signed.cpr, absolute.cmd, absolute.random_cpr, absolute.random_cmd))
    return rows


def curves_of_gates(model: HookedCausalLM, pairs: list[Pair]) -> tuple[FaithfulnessCurve, FaithfulnessCurve]:
    """The curves of trained gates, which have no sign, on pairs that they were not trained on."""
    parts = split_pairs(model, pairs)
    n_edges = round(_SHARE * len(Circuit.full(model.cfg)))
    found = learn_circuit(model, list(parts.discovery), target_size=n_edges, progress=False)
    curve = faithfulness_curve(
        model,
        list(parts.evaluation),
        scores=found.scores,
        metric=LogitDiff(),
        sizes="mib",
        choice=EdgeChoice(by="absolute"),
        random_draws=5,
        progress=False,
    )
    return curve, curve


def measure_known(norms: Sequence[str | None] = NORMS, *, learn: bool = True) -> dict[str, tuple[float, ...]]:
    """The areas of each way to find the known circuit, for each norm; gates are left out unless they are to be learned.

    Without a norm, with a LayerNorm and with an RMS norm, it is the page's table.
    """
    areas: dict[str, tuple[float, ...]] = {}
    for norm in norms:
        task = known.induction(norm=norm)
        pairs = task.pairs(32)
        found = {}
        for method, rules in (*METHODS, ("exact", None)):
            scores = edge_attribution(task.model, pairs, metric=task.metric, method=method, rules=rules, progress=False)
            words = f"`{method}`" if rules is None else f"`{method}`, rules `{rules}`"
            found[f"`edge_attribution`, {words}"] = scores.auroc(task.circuit)
        if learn:
            gates = learn_circuit(task.model, pairs, target_size=len(task.circuit), progress=False)
            found[GATES] = gates.scores.auroc(task.circuit)
        acdc = discover_circuit(
            task.model, pairs, metric=task.metric, threshold=THRESHOLD, holdout=0, progress=False
        ).circuit
        found[f"`discover_circuit` (ACDC), threshold {THRESHOLD}"] = edge_auroc(acdc, task.circuit, edges=scores.edges)
        # Connected circuits of the true one's size.
        drawn = [
            edge_auroc(
                random_circuits(scores.edges, [len(task.circuit)], seed=seed)[0], task.circuit, edges=scores.edges
            )
            for seed in range(20)
        ]
        found["a random circuit of 5 edges, mean of 20 draws"] = sum(drawn) / len(drawn)
        areas = {name: (*areas.get(name, ()), area) for name, area in found.items()}
    return areas


def make_page() -> str:
    """The page, measured anew."""
    rows = "".join(f"{row}\n" for name in MODELS for row in measure(name, (*METHODS, LEARNED)))
    known = "".join(f"{known_row(name, found)}\n" for name, found in measure_known().items())
    return _HEAD + rows + _KNOWN + known + _FOOT


def known_row(name: str, areas: Sequence[float]) -> str:
    """A row of the table of the known circuit."""
    return f"| {name} | {' | '.join(f'{area:.3f}' for area in areas)} |"


def read_page() -> dict[tuple[str, str, str], tuple[float, float]]:
    """CPR and CMD by model, method and rules, as the page has them."""
    row = re.compile(r"^\| `(\S+)` \| \d+ \| `(\S+)` \| `(\S+)` \| (\S+) \| (\S+) \|", re.M)
    found = row.findall(PAGE.read_text(encoding="utf-8"))
    return {(name, method, rules): (float(cpr), float(cmd)) for name, method, rules, cpr, cmd in found}


def read_known() -> dict[str, tuple[float, ...]]:
    """The areas of the known circuit, as the page has them."""
    found = re.findall(r"^\| (.+?) \| (\d\.\d+) \| (\d\.\d+) \| (\d\.\d+) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {name: tuple(map(float, areas)) for name, *areas in found}


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
