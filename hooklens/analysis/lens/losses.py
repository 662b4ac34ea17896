"""How well streams predict: mean divergence from the model, and cross-entropy of the next token, layer by layer."""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from hooklens.analysis.lens.rows import Data, read_data, run_rows
from hooklens.analysis.lens.streams import check_transport
from hooklens.analysis.lens.transport import Transport, carry, read_transport
from hooklens.analysis.lens.vocabulary import summarize
from hooklens.analysis.reading.connection import read_model
from hooklens.arguments import optional, read_flag, read_int, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.model.stream_reader import StreamReader
from hooklens.optional import import_package
from hooklens.progress import progress_bar

if TYPE_CHECKING:
    import pandas


class LayerLoss(NamedTuple):
    """How well the stream that enters a layer predicts.

    Attributes:
        layer: the layer; `n_layers` is the end of the model.
        kl: mean KL(final || this) in nats, over all tokens.
        cross_entropy: mean of the next token in nats, over the tokens that have one; NaN where none has.
    """

    layer: int
    kl: float
    cross_entropy: float


@reads(
    model=read_model,
    data=read_data,
    transport=optional(read_transport),
    batch_size=partial(read_int, least=1),
    progress=read_flag,
)
def lens_losses(
    model: HookedCausalLM,
    data: Data,
    *,
    transport: Transport | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> "pandas.DataFrame":
    """How well each layer's stream predicts, on any amount of text.

    Columns: `layer` (`n_layers` is the end of the model); `kl`, the mean of KL(final || this) in nats over all tokens;
    `cross_entropy`, the mean of the next token in nats.

    Args:
        model: the model.
        data: a list of texts, or token ids `[row pos]`.
        transport: what carries streams to the end before they are read: its layers have lines. None: each layer has,
            read as it is.
        batch_size: rows run at a time.
        progress: show a bar.

    Raises:
        InputError: data of another kind, or a transport of another model.
        TransformError: the transport was fitted on weights that were processed otherwise.
    """
    refuse_other_outputs(model.cfg, "lens_losses: the loss of the next token", InputError)
    check_transport(model, transport, sublayers=False)
    layers = range(model.cfg.n_layers) if transport is None else transport.layers
    found = measure_losses(
        model, data, list(range(len(data))), layers=[*layers, model.cfg.n_layers], transport=transport,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    table: pandas.DataFrame = import_package("pandas").DataFrame(found, columns=list(LayerLoss._fields))
    return table


@torch.no_grad()
def measure_losses(
    model: HookedCausalLM,
    data: Data,
    rows: list[int],
    *,
    layers: list[int],
    transport: Transport | None,
    batch_size: int,
    progress: bool,
) -> list[LayerLoss]:
    """The losses of some layers on some rows of the data; arguments as in `lens_losses`."""
    reader, end = StreamReader(model), model.cfg.n_layers
    divergence, surprise = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0.0)
    n_tokens = n_predicted = 0
    starts = range(0, len(rows), batch_size)
    with progress_bar("measuring", starts, unit="batch", progress=progress) as bar:
        for start in bar:
            found = run_rows(model, data, rows[start : start + batch_size], [layer for layer in layers if layer < end])
            predicted = found.following >= 0
            n_tokens += len(predicted)
            n_predicted += int(predicted.sum())
            streams = (
                (str(layer), found.final if layer == end else _carried(transport, found.entering[layer], layer))
                for layer in layers
            )
            read = summarize(
                reader,
                ((name, stream[None]) for name, stream in streams),
                found.final[None],
                k=1,
                targets=found.following.clamp(min=0)[None],
            )
            for layer, (_, summary) in zip(layers, read, strict=True):
                assert summary.target_logprob is not None
                own = summary.target_logprob[predicted.to(summary.kl.device)]
                divergence[layer] += float(summary.kl.double().sum())
                surprise[layer] -= float(own.double().sum())
    return [
        LayerLoss(layer, divergence[layer] / n_tokens, surprise[layer] / n_predicted if n_predicted else float("nan"))
        for layer in layers
    ]


def _carried(transport: Transport | None, stream: torch.Tensor, layer: int) -> torch.Tensor:
    return stream if transport is None else carry(transport, stream, layer)
