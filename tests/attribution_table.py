"""`python -m tests.attribution_table`: write docs/attribution.md, measured on the bundled models. Takes ten minutes."""

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hooklens import HookedCausalLM, patching
from hooklens.patching import EstimateCheck, EstimateWarning, LogitDiff, Pair

PAGE = Path(__file__).parent.parent / "docs" / "attribution.md"
MODELS = ("tiny-gpt-neox", "tiny-llama", "tiny-falcon")
SITES = ("resid_pre", "attn_out", "mlp_out", "z", "q", "k")
PROMPTS = ("names", "rare")
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {"rules": "gradient"},
    "norms": {"rules": "norms"},
    "linear": {"rules": "linear"},
    "relp": {"rules": "relp"},
    "gim": {"rules": "gim"},
    "atp*": {"rules": "atp*"},
    "norms + exact softmax": {"rules": [patching.HoldNormScale(), patching.ExactSoftmax()]},
    "ig": {"method": "ig"},
    "ig + norms": {"method": "ig", "rules": "norms"},
}
UNIT_METHODS = ("gradient", "norms", "linear", "relp", "gim", "atp*")
# What stands in a neuron's place, and the prompts.
UNIT_CASES: tuple[tuple[Literal["resample", "mean"], str], ...] = (
    ("resample", "names"), ("resample", "rare"), ("mean", "names"),
)  # fmt: skip
N_PAIRS = 16
_TEMPLATE = "When {first} and {second} went to the store, {subject} gave a drink to"
_NAMES = """
    Mary Anna Lucy Emma Alice Sarah Laura Kate Helen Susan John Tom Peter Paul James David Simon Martin Daniel Kevin
    Robert Thomas Michael Andrew George Henry Charles Adam
"""
# Words that no bundled tokenizer has: they are all its unknown token.
_RARE = ("Zork", "Quillon", "Brix")
_HEAD = """# How far estimates of patches can be trusted

Attribution patching estimates what every patch of a sweep would do from one gradient. How well depends on the site,
the model and the prompts, and on how the gradient is taken: `attribution(..., rules=...)` and
`edge_attribution(..., rules=...)` name a rule set, or take a list of rules (`help(hooklens.patching.estimates.rules)`).
Whatever is chosen, `.check(k)` runs the `k` strongest cells and as many random ones exactly, estimates the correlation
over all cells from them, lists the cells with the wrong sign, and warns below 0.9:

```python
from hooklens import HookedCausalLM, patching

model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
text = "When Mary and John went to the store, {} gave a drink to"
pairs = [patching.Pair.from_text(model, text.format("John"), text.format("Mary"), answer=" Mary", wrong=" John")]

estimate = patching.attribution(model, pairs, sites="mlp_out", metric=patching.LogitDiff(), progress=False)
estimate.check(20, progress=False)  # <EstimateCheck of atp, rules norms: checked on ...>
estimate  # tells it, too; so does estimate.plot()
```

The table has the Pearson correlation with the exact sweep, and the share of cells with the right sign (of those with
an effect of at least a hundredth of the largest, often four or five), over all layers and positions (and heads), of the
mean over 16 indirect-object prompts in float64. The second column of each site
("rare") has prompts in which some names are words that the tokenizer does not know. `gradient` is attribution patching
as published; `norms` is the default, since a norm's scale is what bends most between two prompts; `ig`, eight
gradients on the way between the runs, is the safest, with eight backward passes for one. Nothing is best at queries and
keys; there `.check` is not optional.

This page is written by `python -m tests.attribution_table`; the numbers move by a few thousandths with the prompts.

"""

_UNITS = """## Neurons

The scores of single units by `score_units(..., rules=...)`, beside those of one run for each unit: all neurons of a
model (`mlp.hook_post`), on the same prompts, ablated by their value on the corrupted prompt or by its mean. A single
neuron is a small step, for which the tangent is right, and what bends between two prompts does not bend for it: the
gradient itself is best, but for one column in which `atp*` is 0.004 better, and is the default there. `scores.check(k)`
ablates the `k` strongest units, and as many random ones, one by one.

"""


@dataclass(frozen=True)
class Row:
    """What one method reaches at one site of one model, for one kind of prompts."""

    model: str
    site: str
    prompts: str
    method: str
    check: EstimateCheck


@cache
def load(model: str) -> HookedCausalLM:
    """A bundled model, in float64."""
    return HookedCausalLM.from_pretrained(f"bundled:{model}", dtype="float64")


def make_pairs(model: HookedCausalLM, prompts: str, *, seed: int = 0, n_pairs: int = N_PAIRS) -> list[Pair]:
    """Indirect-object prompts with names drawn at random, in both orders; at most one of a pair is unknown."""
    known = [name for name in _NAMES.split() if len(model.to_str_tokens(f" {name}", prepend_bos=False)) == 1]
    pool, draw, pairs = known + list(_RARE if prompts == "rare" else ()), random.Random(seed), list[Pair]()
    unknown = model.tokenizer.unk_token_id
    while len(pairs) < n_pairs:
        object_, subject = draw.sample(pool, 2)
        if object_ in _RARE and subject in _RARE:
            continue
        first, second = (object_, subject) if len(pairs) % 2 else (subject, object_)
        answer, wrong = (unknown if name in _RARE else model.to_single_token(f" {name}") for name in (object_, subject))
        fields = {"first": first, "second": second}
        with warnings.catch_warnings():
            # That the words are not known is what they are here for.
            warnings.simplefilter("ignore")
            pairs.append(
                Pair.from_template(
                    model,
                    _TEMPLATE,
                    clean={**fields, "subject": subject},
                    corrupted={**fields, "subject": object_},
                    answer=answer,
                    wrong=wrong,
                )
            )
    return pairs


@cache
def _load_pairs(model: str, prompts: str, seed: int) -> list[Pair]:
    return make_pairs(load(model), prompts, seed=seed)


@cache
def _run_exactly(model: str, site: str, prompts: str, seed: int) -> Tensor:
    """The exact effects of all cells of a site, in the order of the sweep: the same whatever estimates them."""
    pairs, grid = _load_pairs(model, prompts, seed), patching.grid(site, positions="each")
    estimate = patching.attribution(load(model), pairs, sites=grid, metric=LogitDiff(), progress=False)
    assert estimate.run_exactly is not None
    return estimate.run_exactly(list(range(len(estimate.cells))), progress=False)


def measure(model: str, site: str, prompts: str, method: str, *, seed: int = 0) -> Row:
    """Estimate all cells of a site, and run all of them."""
    estimate = patching.attribution(
        load(model),
        _load_pairs(model, prompts, seed),
        sites=patching.grid(site, positions="each"),
        metric=LogitDiff(),
        progress=False,
        **METHODS[method],
    )
    exact = _run_exactly(model, site, prompts, seed)
    estimate = replace(estimate, run_exactly=lambda cells, *, progress: exact[list(cells)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimateWarning)
        return Row(model, site, prompts, method, estimate.check(None, progress=False))


def measure_all() -> Iterator[Row]:
    """All rows of the page."""
    for model in MODELS:
        for site in SITES:
            for prompts in PROMPTS:
                for method in METHODS:
                    yield measure(model, site, prompts, method)


def measure_units(
    model: str,
    ablation: Literal["resample", "mean"],
    prompts: str,
    methods: Sequence[str] = UNIT_METHODS,
    *,
    layers: Sequence[int] | None = None,
    n_pairs: int = N_PAIRS,
) -> dict[str, EstimateCheck]:
    """Estimate the scores of all neurons of some layers in several ways, and ablate each."""
    network = load(model)
    options: dict[str, Any] = {
        "names": [f"blocks.{layer}.mlp.hook_post" for layer in layers or range(network.cfg.n_layers)],
        "metric": LogitDiff(),
        "ablation": ablation,
        "progress": False,
    }
    pairs = _load_pairs(model, prompts, 0)[:n_pairs]
    exact = torch.cat(list(patching.score_units(network, pairs, method="exact", **options).scores.values()))
    found = {}
    for method in methods:
        scores = patching.score_units(network, pairs, **METHODS[method], **options)
        scores = replace(scores, run_exactly=lambda units, *, progress: exact[list(units)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EstimateWarning)
            found[method] = scores.check(None, progress=False)
    return found


def make_unit_table(found: dict[tuple[str, str, str], dict[str, EstimateCheck]]) -> str:
    """The page's part on neurons, of checks by model, ablation and prompts."""
    columns = [f"{model}, {ablation}, {prompts}" for model, ablation, prompts in found]
    lines = [_UNITS + f"| rules | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for method in UNIT_METHODS:
        checks = [of_case[method] for of_case in found.values()]
        lines.append(
            f"| {method} | {' | '.join(f'{check.pearson:.3f} {check.sign_agreement:.0%}' for check in checks)} |"
        )
    return "\n".join(lines) + "\n"


def make_page(rows: list[Row]) -> str:
    """The page."""
    found = {(row.model, row.site, row.prompts, row.method): row.check for row in rows}
    parts = [_HEAD]
    for model in MODELS:
        parts.append(f"## {model}\n\n| rules | {' | '.join(f'{site} | rare' for site in SITES)} |\n")
        parts.append(f"|---|{'---|' * (2 * len(SITES))}\n")
        for method in METHODS:
            cells = (found[model, site, prompts, method] for site in SITES for prompts in PROMPTS)
            texts = (f"{check.pearson:.3f} {check.sign_agreement:.0%}" for check in cells)
            parts.append(f"| {method} | {' | '.join(texts)} |\n")
        parts.append("\n")
    return "".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    of_units: dict[tuple[str, str, str], dict[str, EstimateCheck]] = {
        (model, *case): measure_units(model, *case) for model in MODELS for case in UNIT_CASES
    }
    PAGE.write_text(f"{make_page(list(measure_all()))}\n{make_unit_table(of_units)}", encoding="utf-8")
