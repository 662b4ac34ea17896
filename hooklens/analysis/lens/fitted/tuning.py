"""Training the translators of a tuned lens on batches of rows; the model itself gets no gradient."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hooklens.analysis.lens.losses import LayerLoss, measure_losses
from hooklens.analysis.lens.rows import Data, Streams, draw_batches, run_rows, split_rows
from hooklens.analysis.lens.vocabulary import MOST_LOGITS
from hooklens.causal_lm import HookedCausalLM
from hooklens.model.stream_reader import StreamReader
from hooklens.optional import import_package
from hooklens.precision import wide_dtype

if TYPE_CHECKING:
    from hooklens.analysis.lens.fitted.tuned import TunedLens


class Recipe(NamedTuple):
    """How translators are trained; see `TunedLens.fit`."""

    steps: int
    lr: float
    batch_size: int
    held_out: float
    seed: int


class Trained(NamedTuple):
    """Translators, and the losses on the rows that were held out, without and with them."""

    lens: "TunedLens"
    before: list[LayerLoss]
    after: list[LayerLoss]


def train_translators(
    model: HookedCausalLM,
    data: Data,
    recipe: Recipe,
    *,
    make: Callable[[Tensor, Tensor], "TunedLens"],
    progress: bool,
) -> Trained:
    """Train on some rows, measure on the others.

    Args:
        model: the model.
        data: texts or ids.
        recipe: how.
        make: a lens of translators.
        progress: show bars.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    rows, held = split_rows(len(data), recipe.held_out, generator)
    layers, width = list(range(model.cfg.n_layers)), model.cfg.d_model
    # Outside of a caller's inference mode, whose tensors no gradient can pass.
    with torch.inference_mode(mode=False), torch.enable_grad():
        dtype, device = wide_dtype(model.dtype), model.device
        weight = torch.zeros(len(layers), width, width, requires_grad=True, dtype=dtype, device=device)
        bias = torch.zeros(len(layers), width, requires_grad=True, dtype=dtype, device=device)
        optimizer = torch.optim.Adam([weight, bias], lr=recipe.lr)
        falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / recipe.steps)
        batches = draw_batches(rows, recipe.batch_size, recipe.steps, generator)
        bar = import_package("tqdm.auto").tqdm(
            batches, total=recipe.steps, desc="tuned lens", disable=not progress, leave=False
        )
        reader = StreamReader(model)
        for batch in bar:
            streams = run_rows(model, data, batch, layers)
            optimizer.zero_grad()
            for layer in layers:
                _add_gradients(reader, streams, make(weight, bias), layer, [weight, bias])
            optimizer.step()
            falls.step()
        lens = make(weight.detach(), bias.detach())
        before, after = (
            measure_losses(
                model, data, held, layers=layers, transport=one, batch_size=recipe.batch_size, progress=progress
            )
            for one in (None, lens)
        )
    return Trained(lens, before, after)


def _add_gradients(reader: StreamReader, streams: Streams, lens: "TunedLens", layer: int, own: list[Tensor]) -> None:
    """Add the gradient of a layer's mean divergence to that of the translators, some tokens at a time.

    Gradients are asked for the translators alone: backward would leave some on the model's weights.
    """
    n_tokens = len(streams.final)
    for place in _blocks(n_tokens, max(1, MOST_LOGITS // reader.n_outputs)):
        with torch.no_grad():
            wanted = reader.read(streams.final[place])
        found = reader.read(lens.apply(streams.entering[layer][place], layer))
        loss = F.kl_div(found, wanted, reduction="sum", log_target=True) / n_tokens
        for parameter, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
            moved = gradient.to(parameter.device)
            parameter.grad = moved if parameter.grad is None else parameter.grad + moved


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))
