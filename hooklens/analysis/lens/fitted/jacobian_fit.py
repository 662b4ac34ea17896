r"""The mean Jacobian of the last stream with respect to the streams below, exactly, many output directions at a time.

**Definition** (the Jacobian lens of Anthropic's `jlens` package, 2026; the linear shortcuts of Din et al. 2023, "Jump
to conclusions", arXiv 2303.09435, are fitted by regression in its place). With `x_l[p]` the stream that enters layer
`l` at token `p` of a prompt, `y[p']` the last stream, before the final norm, and `P` the prompt's counted tokens,

    J_l  =  mean over prompts of  mean over p in P of  sum over p' in P of  d y[p'] / d x_l[p]         targets="later"
    J_l  =  mean over prompts of  mean over p in P of  d y[p] / d x_l[p]                               targets="same"

In a causal network `p'` runs over `p` and what comes later. The first `skip_first` tokens are not counted, which
attention uses as a sink, nor is a prompt's last token, which nothing follows.

**Cost.** The layers below the lowest one wanted are run once for a prompt. Then one forward from that layer on runs
`batch_size` copies of its stream, and each backward through it carries `batch_size` different output directions, one a
row: `ceil(d_model / batch_size)` backwards give all rows of the Jacobians of *all* layers at once. `"same"` needs these
for each counted token.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.analysis.lens.rows import Data, encode
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks import HookPoint
from hooklens.precision import widen
from hooklens.progress import progress_bar

Targets = Literal["later", "same"]


class Cost(NamedTuple):
    """What a fit took, over all prompts.

    Attributes:
        forwards: from the lowest layer wanted to the end, of `batch_size` rows each.
        backwards: through these.
    """

    forwards: int
    backwards: int


def average_jacobians(
    model: HookedCausalLM,
    data: Data,
    layers: Sequence[int],
    *,
    targets: Targets,
    skip_first: int,
    batch_size: int,
    progress: bool,
) -> tuple[Float[Tensor, "layer out into"], Cost]:
    """The mean Jacobian of each layer, see the module; arguments as in `JacobianLens.fit`.

    Raises:
        InputError: prompts without a counted token.
    """
    _check_lengths(model, data, skip_first)
    total: Tensor | None = None
    forwards = backwards = 0
    # Outside of a caller's inference mode, whose tensors no gradient can pass.
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        progress_bar("Jacobian lens", range(len(data)), unit="prompt", progress=progress) as bar,
    ):
        for row in bar:
            ids, real = encode(model, data, [row])
            run = _Run(model, ids[real][None], layers, batch_size)
            counted = torch.arange(skip_first, run.n_tokens - 1)
            found = run.differentiate(counted) if targets == "later" else run.differentiate_each(counted)
            total = found if total is None else total.add_(found)
            forwards, backwards = forwards + 1, backwards + run.backwards
    assert total is not None
    return total / len(data), Cost(forwards, backwards)


def _check_lengths(model: HookedCausalLM, data: Data, skip_first: int) -> None:
    """Refuse prompts in which no token counts, before any is run."""
    short = [row for row in range(len(data)) if int(encode(model, data, [row])[1].sum()) < skip_first + 2]
    if short:
        raise InputError(
            f"JacobianLens.fit: {len(short)} of {len(data)} prompts, such as number {short[0]}, have fewer than "
            f"{skip_first + 2} tokens; the first {skip_first} and the last one do not count, so nothing is left. Give "
            "longer prompts, or a smaller skip_first"
        )


class _Run:
    """One prompt from the lowest wanted layer to the end, in as many equal rows as output directions go at a time."""

    def __init__(
        self, model: HookedCausalLM, ids: Int[Tensor, "one pos"], layers: Sequence[int], batch_size: int
    ) -> None:
        first = min(layers)
        with torch.no_grad():
            below: Any = model(ids, stop_at_layer=first, attention_mask=torch.ones_like(ids))
        self.n_rows = min(batch_size, model.cfg.d_model)
        start = below.detach().expand(self.n_rows, -1, -1).clone().requires_grad_()
        found: dict[int, Tensor] = {first: start}

        def keep(stream: Tensor, hook: HookPoint) -> None:
            found[hook.layer()] = stream

        above = [layer for layer in layers if layer != first]
        self._end: Any = model.run_with_hooks(
            start,
            start_at_layer=first,
            stop_at_layer=model.cfg.n_layers,
            fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", keep) for layer in above],
        )
        self._streams = [found[layer] for layer in layers]
        self.n_tokens = ids.shape[1]
        self.backwards = 0

    def differentiate(self, counted: Int[Tensor, " n"]) -> Float[Tensor, "layer out into"]:
        """The sum over counted target tokens, averaged over counted source tokens."""
        return self._collect(lambda gradient: gradient[:, counted.to(gradient.device)].mean(1), counted)

    def differentiate_each(self, counted: Int[Tensor, " n"]) -> Float[Tensor, "layer out into"]:
        """The Jacobian of each counted token with respect to itself, averaged."""
        each = [self._collect(partial(_take_token, token=int(token)), token[None]) for token in counted]
        return torch.stack(each).mean(0)

    def _collect(self, read: Callable[[Tensor], Tensor], at: Int[Tensor, " n"]) -> Float[Tensor, "layer out into"]:
        """All rows of the Jacobians of what is summed over target tokens, by what is read of gradients."""
        parts = [
            torch.stack([widen(read(gradient)[:n].detach()).cpu() for gradient in gradients])
            for n, gradients in self._pull_back(at)
        ]
        return torch.cat(parts, 1)

    def _pull_back(self, at: Int[Tensor, " n"]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Gradients of the streams, a row for each output direction of the last stream at some tokens."""
        width = self._end.shape[-1]
        for start in range(0, width, self.n_rows):
            n = min(self.n_rows, width - start)
            asked = torch.zeros_like(self._end)
            rows = torch.arange(n, device=asked.device)
            asked[rows[:, None], at.to(asked.device)[None], start + rows[:, None]] = 1
            self.backwards += 1
            yield n, torch.autograd.grad(self._end, self._streams, asked, retain_graph=True)


def _take_token(gradient: Float[Tensor, "row pos d_model"], token: int) -> Float[Tensor, "row d_model"]:
    return gradient[:, token]
