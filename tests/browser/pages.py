"""The displays that a browser looks at: each has a name and a function that makes its HTML.

A display that is added here gets all checks of `test_all_pages.py`.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

from hooklens import ActivationCache, HookedCausalLM, HookedConfig, viz
from hooklens.display import document
from hooklens.generation.output import GenerationOutput
from hooklens.patching import Pair
from hooklens.verification import VerificationReport
from tests.display.objects import OBJECTS

NASTY = (
    "</script><script>window.broken=1</script>",
    "<b>",
    " \"quoted'",
    "\n\n",
    "\t",
    "\0",
    "\N{FAMILY}\N{ZERO WIDTH JOINER}\N{GRINNING FACE}",
    " \N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED}",
    "\N{RIGHT-TO-LEFT OVERRIDE}abc",
    "\ud83d",
    "&amp;",
    "$x$",
)
"""Texts of tokens that a page could read as something else."""


def causal(*sizes: int) -> torch.Tensor:
    """Attention as a softmax of random scores over the keys up to each query, `[*sizes[:-2] query key]`."""
    scores = 2 * torch.randn(*sizes, generator=torch.Generator().manual_seed(0))
    n_queries, n_keys = sizes[-2:]
    later = torch.ones(n_queries, n_keys).triu(n_keys - n_queries + 1).bool()
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def words(n: int) -> list[str]:
    """Texts of tokens, the nasty ones first."""
    return [*NASTY, *(f" word{place}" for place in range(n))][:n]


def attention() -> str:
    return viz.attention(causal(2, 4, 14, 14), tokens=words(14))._repr_html_()


def attention_behind_a_prefix() -> str:
    return viz.attention(causal(3, 5, 9), layer=7, tokens=words(5))._repr_html_()


def tokens() -> str:
    n = len(NASTY) + 4
    values = {"surprisal": [float("nan"), *range(n - 1)], "direction": [place - 5.0 for place in range(n)]}
    others = [None, *([("<i>", 0.5), (" other", 0.25)] for _ in range(n - 1))]
    return viz.tokens(words(n), values, alternatives=others, title="what surprises")._repr_html_()


def grid() -> str:
    values = torch.arange(-12.0, 12.0).reshape(2, 3, 4)
    values[0, 0, 0] = torch.nan
    return viz.grid(values, rows="layer", columns=("pos", words(4)), panels=["one", "<two>"])._repr_html_()


def heads() -> str:
    return viz.heads(torch.arange(-10.0, 10.0).reshape(4, 5) / 7, title="what each head adds")._repr_html_()


def lens() -> str:
    texts = [[f"{text}{layer}" for text in words(5)] for layer in range(3)]
    return viz.lens(torch.rand(3, 5), texts, tokens=words(5), title="lens")._repr_html_()


def head_circuit() -> str:
    return viz.head_circuit(torch.eye(6) * 3 - 1, words(6), circuit="QK")._repr_html_()


def bars() -> str:
    values = [(-1) ** place * (30 - place) / 7 for place in range(30)]
    return viz.bars([*words(20), *(f"L{place}H0" for place in range(10))], values, k=18)._repr_html_()


def curves() -> str:
    steps = list(range(0, 1000, 50))
    losses = {f"run {run}": [3.0 / (1 + step / (100 + 50 * run)) for step in steps] for run in range(10)}
    band = ([0.9 * loss for loss in losses["run 0"]], [1.1 * loss for loss in losses["run 0"]])
    return viz.curves(losses, steps, x_name="step", y_name="loss", bands={"run 0": band})._repr_html_()


def curves_over_labels() -> str:
    values = torch.tensor([[1.0, float("nan"), 100.0, 1000.0]])
    return viz.curves(values, ["0_pre", "1_pre", "<2>", "3_post"], names=["<b>"], y_scale="log")._repr_html_()


def circuit() -> str:
    edges = [
        ("embed", "a0.h1.q", 0.5),
        ("embed", "a0.h0.v", -0.25),
        ("a0.h1", "m0", 2.0),
        ("a0.h0", "a1.h0.k", -1.0),
        ("m0", "logits", 0.125),
        ("a1.h0", "logits", 1.5),
    ]
    return viz.circuit(edges)._repr_html_()


SUMMARIES = (HookedCausalLM, HookedConfig, ActivationCache, GenerationOutput, Pair, VerificationReport)
"""What shows itself by a summary alone; those with a picture have the picture's view, which stands above."""


def _summarise(kind: type) -> str:
    html: str = OBJECTS[kind]()._repr_html_()
    return html


PAGES: list[tuple[str, Callable[[], str]]] = [
    ("attention", attention),
    ("attention behind a prefix", attention_behind_a_prefix),
    ("tokens", tokens),
    ("grid", grid),
    ("heads", heads),
    ("lens", lens),
    ("head circuit", head_circuit),
    ("bars", bars),
    ("curves", curves),
    ("curves over labels", curves_over_labels),
    ("circuit", circuit),
    *((f"summary: {kind.__name__}", partial(_summarise, kind)) for kind in SUMMARIES),
]


@cache
def page_of(name: str) -> str:
    """The whole document of one display."""
    return document(name, dict(PAGES)[name]())


NAMES = [name for name, _ in PAGES]
