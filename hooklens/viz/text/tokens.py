"""Running text with a value at each token: what surprises, what is attended to, what a direction reads."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import reads
from hooklens.display.blocks import note
from hooklens.display.colours import AGAINST, FOR, MOST_OPAQUE, NO_VALUE
from hooklens.display.elements import Child, Element, data, element
from hooklens.display.labels import visible
from hooklens.display.numbers import format_number
from hooklens.display.page import read_asset
from hooklens.display.view import View
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.viz.labels import read_labels
from hooklens.viz.scale import (
    Scale,
    check_scale,
    furthest,
    gradient,
    paint,
    read_script,
    readout,
    round_for_script,
    scale_bar,
)
from hooklens.viz.text.figure import draw_text

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Alternatives = tuple[tuple[tuple[str, float], ...], ...]
"""Of each token, other tokens that could stand there with their probabilities."""

MOST_VALUES = 30_000
MOST_TOKENS = 5_000
_MOST_ALTERNATIVES = 10
_WHITE_SPACE = re.compile(r"( +|\n)")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Tokens(View):
    """A text whose tokens are coloured by a value.

    Attributes:
        tokens: the tokens as text.
        values: `[name pos]`; NaN is a token without a value, and is hatched.
        names: what each row of values is.
        alternatives: of each token what could stand in its place, with probabilities; None: not known.
        heading: what the view shows.
        scales: of the colours of each row of values.
    """

    tokens: tuple[str, ...]
    values: Float[Tensor, "name pos"]
    names: tuple[str, ...]
    alternatives: Alternatives | None
    heading: str
    scales: tuple[Scale, ...]

    kind: ClassVar[str] = "tokens"
    style: ClassVar[str] = read_asset(Path(__file__).with_name("tokens.css"))
    script: ClassVar[str] = read_script(Path(__file__).with_name("tokens.js"))

    @property
    def description(self) -> list[str]:
        """The number of tokens, and of each row of values those furthest from 0."""
        lines = [f"{len(self.tokens):,} tokens"]
        for name, values in zip(self.names, self.values, strict=True):
            places = values.nan_to_num(0.0).abs().topk(min(5, len(values))).indices.tolist()
            told = ", ".join(
                f"{place} {visible(self.tokens[place])} {format_number(float(values[place]))}" for place in places
            )
            lines.append(f"  {name}: {told}")
        return lines

    @property
    def _n_shown(self) -> int:
        return min(len(self.tokens), MOST_TOKENS, max(1, MOST_VALUES // len(self.names)))

    def _body(self) -> list[Child]:
        n_shown = self._n_shown
        values = self.values[:, :n_shown].tolist()
        largest = [furthest(row) for row in values]
        first = self.names[0]
        above: Child = note(first) if first else None
        if len(self.names) > 1:
            options = (element("option", name, value=place) for place, name in enumerate(self.names))
            above = element("label", "values ", element("select", options))
        shown = (
            _token(token, paint(value, largest[0], self.scales[0]), f"{place} {visible(token)}: {format_number(value)}")
            for place, (token, value) in enumerate(zip(self.tokens[:n_shown], values[0], strict=True))
        )
        blocks: list[Child] = [
            element("h3", self.title),
            above,
            element("div", shown, class_="hl-text", role="group", aria_label="tokens"),
            readout("Point at a token, or move with the arrow keys."),
            element("div", class_="hl-alternatives") if self.alternatives else None,
            scale_bar(largest[0], self.scales[0]),
            data("hl-data", self._for_script(values, largest)),
        ]
        if n_shown < len(self.tokens):
            left_out = len(self.tokens) - n_shown
            blocks.append(
                note(f"the last {left_out:,} of {len(self.tokens):,} tokens are left out; to_dataframe() has all")
            )
        return blocks

    def _for_script(self, values: list[list[float]], largest: list[float]) -> dict[str, object]:
        alternatives = None
        if self.alternatives is not None:
            alternatives = [
                [[visible(token), round_for_script(probability)] for token, probability in some[:_MOST_ALTERNATIVES]]
                for some in self.alternatives[: self._n_shown]
            ]
        return {
            "names": self.names,
            "values": [[round_for_script(value) for value in row] for row in values],
            "largest": [round_for_script(value) for value in largest],
            "signed": [scale == "signed" for scale in self.scales],
            "gradients": [gradient(scale) for scale in self.scales],
            "for": FOR,
            "against": AGAINST,
            "opaque": MOST_OPAQUE,
            "none": NO_VALUE,
            "alternatives": alternatives,
        }

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per token: `pos`, `token`, a column for each row of values, and `alternatives` where known."""
        table: pandas.DataFrame = import_package("pandas").DataFrame(
            {"pos": range(len(self.tokens)), "token": self.tokens}
        )
        for name, values in zip(self.names, self.values, strict=True):
            table[name or "value"] = values.tolist()
        if self.alternatives is not None:
            table = table.assign(alternatives=import_package("pandas").Series(self.alternatives, dtype=object))
        return table

    def to_matplotlib(self, name: str | None = None) -> "Figure":
        """The text in lines, coloured by one row of values.

        Args:
            name: which; None: the first.

        Raises:
            InputError: there is no such row.
            MissingDependencyError: matplotlib is not installed.
        """
        if name is not None and name not in self.names:
            raise InputError(f"to_matplotlib: no values are called {name!r}; expected one of {list(self.names)}")
        row = 0 if name is None else self.names.index(name)
        title = self.title + (f": {self.names[row]}" if self.names[row] else "")
        n_shown = self._n_shown
        return draw_text(
            self.tokens[:n_shown], self.values[row, :n_shown].tolist(), scale=self.scales[row], title=title
        )


def _token(token: str, colour: str, told: str) -> Element:
    """A token that shows its white space: a dot in each space, an arrow before each line break."""
    parts: list[Child] = []
    for part in _WHITE_SPACE.split(token):
        if part == "\n":
            parts += [element("i", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", class_="hl-break"), element("br")]
        elif part.startswith(" "):
            parts += [element("i", " ", class_="hl-space") for _ in part]
        else:
            parts.append(visible(part))
    return element("span", parts, class_="hl-token", style=colour, aria_label=told, tabindex=-1, role="img")


@reads()
def tokens(
    str_tokens: Sequence[str],
    values: Tensor | Sequence[float] | Mapping[str, Sequence[float] | Tensor],
    *,
    names: Sequence[str] | None = None,
    alternatives: Sequence[Sequence[tuple[str, float]] | Mapping[str, float] | None] | None = None,
    title: str = "tokens",
    scale: Scale | None = None,
) -> Tokens:
    """A text with each token coloured by a value, told of the token that is pointed at.

    Args:
        str_tokens: the tokens as text, such as `model.to_str_tokens(text)`.
        values: one for each token, or several rows of them, `[name pos]` or by name, of which one is chosen in the
            view. NaN is a token without a value.
        names: what each row of a tensor is.
        alternatives: of each token what could stand in its place, with probabilities (the most likely tokens of a
            generation's step); None for a token of which none are known.
        title: what the view shows.
        scale: `"signed"`: blue above 0 and orange below, as far to both sides; `"amount"`: from 0 to the largest;
            None: each row of values by itself, signed where one is below 0. Each row has its own largest.

    Raises:
        InputError: values, names or alternatives that do not go with the tokens, or no token.
    """
    if isinstance(values, Mapping):
        if names is not None:
            raise InputError("tokens: names go with a tensor; a mapping has its own")
        names = list(values)
        rows = [torch.as_tensor(row, dtype=torch.float32).detach().cpu() for row in values.values()]
    else:
        table = torch.as_tensor(values).detach().float().cpu()
        rows = list(table if table.ndim > 1 else table[None])
    if not len(str_tokens) or not rows:
        raise InputError("tokens: found no tokens or no values; expected at least one token with a value")
    read = read_labels(str_tokens, len(str_tokens), subject="tokens", what="tokens")
    odd = [list(row.shape) for row in rows if row.shape != (len(read),)]
    if odd:
        raise InputError(
            f"tokens: there are {len(read)} tokens, and values have the shape {odd[0]}; expected one for each"
        )
    if names is None:
        names = [""] if len(rows) == 1 else [str(place) for place in range(len(rows))]
    if scale is not None:
        check_scale(scale, "tokens")
    stacked = torch.stack(rows)
    return Tokens(
        tokens=read,
        values=stacked,
        names=read_labels(names, len(rows), subject="tokens", what="rows of values"),
        alternatives=None if alternatives is None else _read_alternatives(alternatives, len(read)),
        heading=title,
        scales=tuple(scale or ("signed" if bool((row < 0).any()) else "amount") for row in rows),
    )


def _read_alternatives(
    given: Sequence[Sequence[tuple[str, float]] | Mapping[str, float] | None], n_tokens: int
) -> Alternatives:
    if len(given) != n_tokens:
        raise InputError(
            f"tokens: alternatives are given for {len(given)} tokens, and there are {n_tokens}; "
            "None stands for a token without any"
        )
    return tuple(
        # By pairs: two tokens may read alike.
        tuple(
            (str(token), float(probability))
            for token, probability in (some.items() if isinstance(some, Mapping) else some or ())
        )
        for some in given
    )
