"""How long the residual stream is: its norm from layer to layer."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_int, reads
from hooklens.axes import get_act_name, layer_of
from hooklens.display.labels import visible
from hooklens.errors import InputError
from hooklens.viz.plots.curves import Curves, YScale, curves


@reads()
def residual_norms(
    cache: Mapping[str, Tensor],
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
    tokens: Sequence[str] | None = None,
    y_scale: YScale = "log",
    title: str = "norm of the residual stream",
) -> Curves:
    """The Euclidean norm of the residual stream as it enters each layer, and as it leaves the last.

    The first token often has a norm many times that of all others, so it is a line of its own; the others are their
    mean, in a band from the least to the largest.

    Args:
        cache: activations by hook name (an `ActivationCache`) with `resid_pre` of the layers, and the last layer's
            `resid_post`; layers that are missing are no places on the axis.
        row: the row of the batch. Padding is left out.
        positions: captured positions of the row that have a line each; None: the first token, and the mean of others.
        tokens: the texts of the row's tokens, to name the lines of positions by.
        y_scale: of the norms.
        title: what the view shows.

    Raises:
        InputError: the cache holds no residual stream, or a position or the row is not there.
    """
    layers = sorted({layer for name in cache if (layer := layer_of(name)) is not None})
    names = {f"{layer}_pre": get_act_name("resid_pre", layer) for layer in layers}
    if layers:
        names[f"{layers[-1]}_post"] = get_act_name("resid_post", layers[-1])
    names = {label: name for label, name in names.items() if name in cache}
    if not names:
        raise InputError("residual_norms: the cache holds no resid_pre or resid_post; capture 'resid_pre' at least")
    row = read_int(row, what="residual_norms: row")
    norms = torch.stack([_read_norms(cache, name, row) for name in names.values()], dim=-1)
    if positions is None:
        lines, bands = _average(norms)
    else:
        n_pos = len(norms)
        outside = [pos for pos in positions if not -n_pos <= pos < n_pos]
        if outside or not len(positions):
            raise InputError(f"residual_norms: positions are {list(positions)}; expected some of 0 to {n_pos - 1}")
        if tokens is not None and len(tokens) != n_pos:
            raise InputError(f"residual_norms: {len(tokens)} tokens are given, and the row has {n_pos} positions")
        places = [pos % n_pos for pos in positions]
        labels = {pos: f"pos {pos}" + ("" if tokens is None else f" {visible(tokens[pos])}") for pos in places}
        lines, bands = {labels[pos]: norms[pos] for pos in places}, {}
    return curves(lines, list(names), x_name="stream", y_name="norm", bands=bands, y_scale=y_scale, title=title)


def _average(norms: Float[Tensor, "pos stream"]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    lines, bands = {"first token": norms[0]}, {}
    if len(norms) > 1:
        name = f"mean of the other {len(norms) - 1}"
        lines[name] = norms[1:].mean(0)
        bands[name] = (norms[1:].amin(0), norms[1:].amax(0))
    return lines, bands


def _read_norms(cache: Mapping[str, Tensor], name: str, row: int) -> Float[Tensor, " pos"]:
    """The norms of a row's tokens."""
    stream = cache[name]
    mask = getattr(cache, "attention_mask", None)
    if getattr(cache, "has_batch_dim", stream.ndim == 3):
        if not -len(stream) <= row < len(stream):
            raise InputError(f"residual_norms: row is {row}; the cache has {len(stream)} rows")
        stream = stream[row]
    else:
        row = 0
    norms: Tensor = torch.linalg.vector_norm(stream.detach().float(), dim=-1).cpu()
    if mask is None:
        return norms
    # The mask covers past and new tokens where there is a past; the captured columns are among the new ones.
    tokens = getattr(cache, "tokens", None)
    n_run = len(mask[row]) if tokens is None else tokens.shape[-1]
    real = mask[row].bool().cpu()[len(mask[row]) - n_run :]
    columns = getattr(cache, "positions", None)
    return norms[real if columns is None else real[list(columns)]]
