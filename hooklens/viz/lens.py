"""What each layer would predict at each position: a logit lens with its tokens in the cells."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import reads
from hooklens.display.labels import visible
from hooklens.display.numbers import format_number
from hooklens.errors import InputError
from hooklens.viz.grid import Grid, grid
from hooklens.viz.labels import read_labels

if TYPE_CHECKING:
    import pandas

By = Literal["probability", "kl", "entropy", "target_logprob", "reciprocal_rank"]

_TITLES: dict[str, str] = {
    "probability": "logit lens: the likeliest token of each stream, and its probability",
    "kl": "logit lens: KL(final || stream) in nats",
    "entropy": "logit lens: entropy in nats",
    "target_logprob": "logit lens: log-probability of the target in nats",
    "reciprocal_rank": "logit lens: 1 / (1 + rank of the target), 1 where it is the likeliest",
}
_COLUMN: dict[str, str] = {"reciprocal_rank": "target_rank", "probability": "top_probs"}


@reads()
def lens(
    table: "pandas.DataFrame | Float[Tensor, 'layer pos']",
    texts: Sequence[Sequence[str]] | None = None,
    *,
    tokens: Sequence[str] | None = None,
    streams: Sequence[object] | None = None,
    by: By = "probability",
    row: int = 0,
    title: str | None = None,
) -> Grid:
    """What each layer would predict at each position, the last layer on top.

    The colour is one number of each cell; the likeliest tokens are told of the cell that is pointed at. A column is a
    token of the text, its cells are predictions of the token after it.

        hl.viz.lens(analysis.lens.logit_lens(model, cache, pos_slice=None), tokens=model.to_str_tokens(text))

    Args:
        table: what `hooklens.analysis.lens.logit_lens` gives (columns `stream`, `row`, `pos`, `top_tokens`,
            `top_probs`, `kl`, `entropy`, and those of a target), or values `[layer pos]`, the first layer first.
        texts: what stands in the cells, `[layer][pos]`, where values are given.
        tokens: the tokens of the text, one for each position of the row (all of them, where a table has some).
        streams: what each layer is called, where values are given; None counts from 0.
        by: which number is the colour: the probability of the likeliest token, or another column of the table.
        row: the row of the batch, where a table has several.
        title: what the values are.

    Raises:
        InputError: the table lacks a column or the row, or tokens, texts or streams do not go with the values.
    """
    if isinstance(table, Tensor):
        return _of_values(table, texts, tokens=tokens, streams=streams, title=title)
    given = [name for name, value in (("texts", texts), ("streams", streams)) if value is not None]
    if given:
        raise InputError(f"lens: {' and '.join(given)} go with values; a table has its own")
    needed = ["stream", "pos", "top_tokens", "top_probs", _COLUMN.get(by, by)]
    missing = [name for name in dict.fromkeys(needed) if name not in table.columns]
    if by not in _TITLES or missing:
        lacks = f"the table lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns))}"
        raise InputError(
            f"lens: by={by!r}; expected one of {', '.join(map(repr, _TITLES))}"
            if by not in _TITLES
            else f"lens: {lacks}; expected what logit_lens gives (with target= for columns of a target)"
        )
    return _of_table(table, tokens=tokens, by=by, row=row, title=title or _TITLES[by])


def _of_values(
    values: Float[Tensor, "layer pos"],
    texts: Sequence[Sequence[str]] | None,
    *,
    tokens: Sequence[str] | None,
    streams: Sequence[object] | None,
    title: str | None,
) -> Grid:
    if values.ndim != 2:
        raise InputError(f"lens: values have the shape {list(values.shape)}; expected [layer pos]")
    names = read_labels(range(len(values)) if streams is None else streams, len(values), subject="lens", what="streams")
    return grid(
        values.flip(0),
        rows=("stream", names[::-1]),
        columns="pos" if tokens is None else ("pos", tokens),
        texts=None if texts is None else list(texts)[::-1],
        title=title or "lens",
        scale="signed" if bool((values < 0).any()) else "amount",
    )


def _of_table(table: "pandas.DataFrame", *, tokens: Sequence[str] | None, by: str, row: int, title: str) -> Grid:
    if "row" in table.columns:
        rows = sorted(set(table["row"].tolist()))
        table = table[table["row"] == row]
        if not len(table):
            raise InputError(f"lens: the table has no row {row}; it has {', '.join(map(str, rows))}")
    streams = list(dict.fromkeys(table["stream"].tolist()))[::-1]
    places = sorted(set(table["pos"].tolist()))
    if tokens is not None and (isinstance(tokens, str) or len(tokens) <= places[-1]):
        found = "a text" if isinstance(tokens, str) else f"{len(tokens)} tokens"
        raise InputError(f"lens: tokens are {found}, and the table goes to position {places[-1]}; expected all tokens")
    values = torch.full((len(streams), len(places)), torch.nan)
    texts = [[""] * len(places) for _ in streams]
    details = [[""] * len(places) for _ in streams]
    columns = [table[name].tolist() for name in ("stream", "pos", "top_tokens", "top_probs", _COLUMN.get(by, by))]
    for stream, pos, top, probabilities, number in zip(*columns, strict=True):
        line, place = streams.index(stream), places.index(pos)
        values[line, place] = _read_value(number, by)
        texts[line][place] = str(top[0])
        details[line][place] = "; ".join(
            f"{visible(str(token))} {format_number(probability)}"
            for token, probability in zip(top, probabilities, strict=True)
        )
    return grid(
        values,
        rows=("stream", streams),
        columns=("pos", [str(place) if tokens is None else str(tokens[place]) for place in places]),
        texts=texts,
        details=details,
        title=title,
        scale="signed" if by == "target_logprob" else "amount",
    )


def _read_value(number: object, by: str) -> float:
    if by == "probability":
        return float(number[0])  # type: ignore[index]
    if by == "reciprocal_rank":
        return 1 / (1 + int(number))  # type: ignore[call-overload, no-any-return]
    return float(number)  # type: ignore[arg-type]
