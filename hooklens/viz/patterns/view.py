"""Attention patterns: every head small, one of them large, with the tokens on both sides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_int, reads
from hooklens.display.blocks import fold, note, table
from hooklens.display.elements import Child, Element, data, element
from hooklens.display.labels import visible
from hooklens.display.numbers import format_number
from hooklens.display.page import read_asset
from hooklens.display.view import View
from hooklens.optional import import_package
from hooklens.viz.patterns.code import PatternCode
from hooklens.viz.patterns.figure import draw_attention
from hooklens.viz.patterns.reading import Patterns, read_patterns
from hooklens.viz.scale import read_script, readout

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

MOST_CHARACTERS = 310_000
"""Of written patterns, so that a page of 12 layers with 12 heads over 64 tokens stays below 400 kB."""

MOST_TOKENS = 256
_MOST_LABEL = 16
# Up to how many tokens a cell of the large head has which size, in pixels.
_CELLS = ((16, 24), (32, 18), (64, 14), (MOST_TOKENS, 12))


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Attention(View):
    """Attention patterns of heads over the same tokens.

    Attributes:
        patterns: all of them, with their heads and tokens.
        heading: what the view shows.
    """

    patterns: Patterns
    heading: str

    kind: ClassVar[str] = "attention"
    style: ClassVar[str] = read_asset(Path(__file__).with_name("attention.css"))
    script: ClassVar[str] = read_script(Path(__file__).with_name("attention.js"))

    @property
    def description(self) -> list[str]:
        """The sizes, and where each head looks."""
        n_heads, n_queries, n_keys = self.patterns.values.shape
        lines = [f"{n_heads} heads, {n_queries} queries x {n_keys} keys"]
        for head, summary in enumerate(summarize(self.patterns).tolist()):
            lines.append(f"  {self.patterns.name(head)}: {_tell(summary)}")
        return lines

    def _body(self) -> list[Child]:
        n_heads, n_queries, n_keys = self.patterns.values.shape
        shown = self.patterns.window(MOST_TOKENS)
        lengths = shown.row_lengths
        n_shown = max(1, min(n_heads, MOST_CHARACTERS // sum(lengths)))
        code = PatternCode(2 if 2 * n_shown * sum(lengths) <= MOST_CHARACTERS else 1)
        summaries = summarize(self.patterns).tolist()[:n_shown]
        rounding = (
            f"Values are rounded on a square-root scale: by at most {code.largest_error():.2g}, and by at most "
            f"{code.largest_error(0.1):.2g} where they are below 0.1. to_dataframe() has them as they are."
        )
        blocks: list[Child] = [
            element("h3", self.title),
            element("div", self._thumbnails(n_shown), _large(shown), class_="hl-attention"),
            note(rounding),
        ]
        if n_shown < n_heads:
            blocks.append(note(f"{n_heads - n_shown} of {n_heads} heads are left out; name some with layer= or heads="))
        if (n_queries, n_keys) != (len(shown.queries), len(shown.keys)):
            spans = [
                f"{side} {first} to {last}"
                for side, first, last in (
                    ("queries", shown.query(0)[0], shown.query(-1)[0]),
                    ("keys", shown.key(0)[0], shown.key(len(shown.keys) - 1)[0]),
                )
            ]
            blocks.append(
                note(
                    f"Of {n_queries:,} queries and {n_keys:,} keys these are shown: {' and '.join(spans)}; "
                    "to_dataframe() has all"
                )
            )
        rows = [[shown.name(head), *summary] for head, summary in enumerate(summaries)]
        names = ["head", "to the first key", "to the token before", "to itself", "entropy in nats"]
        numbers = table(names, rows, caption="Attention of each head, averaged over queries")
        blocks += [fold("The heads in numbers", *numbers), data("hl-data", _for_script(shown, n_shown, lengths, code))]
        return blocks

    def _thumbnails(self, n_shown: int) -> Element:
        """A small picture of each head, one row for each layer, of which one is chosen."""
        by_layer: dict[int | None, list[Element]] = {}
        for head, (layer, number) in enumerate(self.patterns.heads[:n_shown]):
            button = element(
                "button",
                element("canvas", aria_hidden="true"),
                element("span", str(number)),
                type="button",
                class_="hl-thumb",
                role="radio",
                aria_checked="true" if head == 0 else "false",
                aria_label=self.patterns.name(head),
                tabindex=-1,
            )
            by_layer.setdefault(layer, []).append(button)
        rows = (
            element(
                "div",
                None if layer is None else element("span", f"layer {layer}", class_="hl-layer"),
                buttons,
                class_="hl-thumbs",
            )
            for layer, buttons in by_layer.items()
        )
        return element("div", rows, class_="hl-heads", role="radiogroup", aria_label="heads")

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per value: `layer` (where it is known), `head`, `query`, `key` (positions), both tokens, `attention`.

        Keys after a query are left out where no head looks at one.
        """
        patterns = self.patterns
        allowed = torch.arange(len(patterns.keys)) < torch.tensor(patterns.row_lengths)[:, None]
        queries, keys = allowed.nonzero(as_tuple=True)
        n_cells = len(queries)
        repeated = {
            "query": [patterns.query(place)[0] for place in queries.tolist()],
            "key": [patterns.key(place)[0] for place in keys.tolist()],
            "query_token": [patterns.queries[place] for place in queries.tolist()],
            "key_token": [patterns.keys[place] for place in keys.tolist()],
        }
        columns: dict[str, Sequence[object]] = {
            "layer": [layer for layer, _ in patterns.heads for _ in range(n_cells)],
            "head": [head for _, head in patterns.heads for _ in range(n_cells)],
            **{name: values * len(patterns.heads) for name, values in repeated.items()},
            "attention": patterns.values[:, queries, keys].flatten().tolist(),
        }
        if patterns.heads[0][0] is None:
            del columns["layer"]
        made: pandas.DataFrame = import_package("pandas").DataFrame(columns)
        return made

    def to_matplotlib(self) -> "Figure":
        """Heads as heatmaps with their tokens, or, where there are more than four, all of them on one sheet.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return draw_attention(self.patterns, title=self.title)


def summarize(patterns: Patterns) -> Float[Tensor, "head 4"]:
    """Averages over queries: attention to the first key, to the token before, to the token itself, and the entropy."""
    values = patterns.values
    at = torch.tensor(patterns.query_at)
    places = torch.arange(len(at))
    before = at > 0
    return torch.stack(
        [
            values[:, :, 0].nanmean(-1),
            values[:, places[before], at[before] - 1].nanmean(-1),
            values[:, places, at].nanmean(-1),
            torch.special.entr(values.clamp_min(0.0)).sum(-1).nanmean(-1),
        ],
        dim=-1,
    )


def _tell(summary: Sequence[float]) -> str:
    first, before, itself, entropy = map(format_number, summary)
    return f"first {first}, before {before}, itself {itself}, entropy {entropy}"


def _colour_choice() -> Element:
    options = (element("option", text, value=value) for value, text in (("1", "attention"), ("0.5", "its square root")))
    return element("label", "colour ", element("select", options))


def _large(shown: Patterns) -> Element:
    return element(
        "div",
        element("div", element("b", shown.name(0), class_="hl-chosen"), _colour_choice(), class_="hl-bar"),
        readout("Point at a query, a key or a cell; tab and arrow keys move among heads, tokens and cells."),
        element("div", _map(shown), class_="hl-scroll"),
        class_="hl-large",
    )


def _map(shown: Patterns) -> Element:
    """The large head: keys above, queries at the left, and the field of cells."""
    cell = next(size for most, size in _CELLS if max(len(shown.queries), len(shown.keys)) <= most)
    sides = {
        "query": [shown.query(place) for place in range(len(shown.queries))],
        "key": [shown.key(place) for place in range(len(shown.keys))],
    }
    labels = {
        side: element(
            "div",
            (
                element(
                    "span",
                    visible(token, _MOST_LABEL) or str(position),
                    class_=f"hl-{side}",
                    role="img",
                    aria_label=f"{side} {position} {visible(token)}".rstrip(),
                    tabindex=-1,
                )
                for position, token in named
            ),
            class_=f"hl-{side}-axis",
            role="group",
            aria_label={"query": "queries", "key": "keys"}[side],
        )
        for side, named in sides.items()
    }
    field = element(
        "div",
        element("canvas", role="img", tabindex=0, aria_label="attention from each query to each key; arrow keys move"),
        element("div", class_="hl-mark"),
        class_="hl-field",
    )
    corner = element("div", "query \\ key", class_="hl-corner")
    return element("div", corner, labels["key"], labels["query"], field, class_="hl-map", style=f"--cell:{cell}px")


def _for_script(shown: Patterns, n_heads: int, lengths: tuple[int, ...], code: PatternCode) -> dict[str, object]:
    held = torch.arange(len(shown.keys)) < torch.tensor(lengths)[:, None]
    return {
        "width": code.width,
        "largest": code.largest,
        "lengths": lengths,
        "names": [shown.name(head) for head in range(n_heads)],
        "patterns": [code.write(pattern[held]) for pattern in shown.values[:n_heads]],
    }


@reads()
def attention(
    patterns: Mapping[str, Tensor] | Tensor,
    layer: int | Sequence[int] | None = None,
    *,
    tokens: Sequence[str] | None = None,
    row: int = 0,
    heads: Sequence[int] | None = None,
    title: str | None = None,
) -> Attention:
    """Attention patterns with their tokens: every head small, one of them large.

        _, cache = model.run_with_cache(text)
        hl.viz.attention(cache, 3, tokens=model.to_str_tokens(text))

    Pointing at a query shows where it looks, pointing at a key who looks at it. Keys that no query may see (later
    ones, padding) are left out; keys of a cached prefix are in.

    Args:
        patterns: an `ActivationCache` (or another mapping by hook name) with patterns, or a tensor
            `[head query key]` or `[layer head query key]`.
        layer: the layer, or several; None: all that the cache holds. With a tensor: what its layers are.
        tokens: the text of each key, or of each token of the run, where it began behind a cached prefix. None: the
            ids that the cache knows, or positions.
        row: the row of the batch of a cache; its padding is left out.
        heads: which heads of each layer; None: all.
        title: what stands above.

    Raises:
        MissingActivationError: the cache does not hold the pattern of a layer.
        InputError: patterns of other shapes or with values that are no attention, or layers, rows, heads or tokens
            that are not there.
    """
    read = read_patterns(patterns, layer, tokens=tokens, row=read_int(row, what="attention: row"), heads=heads)
    layers = list(dict.fromkeys(number for number, _ in read.heads if number is not None))
    where = f" of layer {layers[0]}" if len(layers) == 1 else f" of {len(layers)} layers" if layers else ""
    return Attention(patterns=read, heading=title or f"attention{where}")
