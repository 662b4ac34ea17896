"""Training the translators of a tuned lens on batches of rows; the model itself gets no gradient."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooklens.analysis.lens.losses import LayerLoss, measure_losses
from hooklens.analysis.lens.rows import Data, draw_batches, run_rows, split_rows
from hooklens.analysis.lens.transport import apply_affine
from hooklens.analysis.lens.vocabulary import MOST_LOGITS
from hooklens.causal_lm import HookedCausalLM
from hooklens.model.stream_reader import StreamReader
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar

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
        made: dict[str, Any] = {"dtype": wide_dtype(model.dtype), "device": model.device}
        # Leaves of each layer's own: a gradient of all layers' would be made for each.
        weights = [torch.zeros(width, width, **made).requires_grad_() for _ in layers]
        biases = [torch.zeros(width, **made).requires_grad_() for _ in layers]
        optimizer = torch.optim.Adam([*weights, *biases], lr=recipe.lr)
        falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / recipe.steps)
        batches = draw_batches(rows, recipe.batch_size, recipe.steps, generator)
        reader = StreamReader(model)
        with progress_bar("tuned lens", batches, total=recipe.steps, progress=progress) as bar:
            for batch in bar:
                streams = run_rows(model, data, batch, layers)
                optimizer.zero_grad()
                for layer in layers:
                    _set_gradients(reader, streams.entering[layer], streams.final, weights[layer], biases[layer])
                optimizer.step()
                falls.step()
        lens = make(torch.stack(weights).detach(), torch.stack(biases).detach())
        before, after = (
            measure_losses(
                model, data, held, layers=layers, transport=one, batch_size=recipe.batch_size, progress=progress
            )
            for one in (None, lens)
        )
    return Trained(lens, before, after)


def _set_gradients(
    reader: StreamReader,
    stream: Float[Tensor, "token d_model"],
    final: Float[Tensor, "token d_model"],
    weight: Float[Tensor, "d_model d_model"],
    bias: Float[Tensor, " d_model"],
) -> None:
    """The gradient of a layer's mean divergence, some tokens at a time.

    It is asked for the translator alone: backward would leave some on the model's weights.
    """
    gradients = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for place in _blocks(len(final), max(1, MOST_LOGITS // reader.n_outputs)):
        with torch.no_grad():
            wanted = reader.read(final[place])
        found = reader.read(stream[place] + apply_affine(stream[place], weight, bias))
        loss = F.kl_div(found, wanted, reduction="sum", log_target=True) / len(final)
        for total, gradient in zip(gradients, torch.autograd.grad(loss, [weight, bias]), strict=True):
            total.add_(gradient)
    weight.grad, bias.grad = gradients


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))
