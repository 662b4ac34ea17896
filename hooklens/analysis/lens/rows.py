"""What lenses are fitted and measured on: texts, or rows of token ids, run a batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.arguments import read_numbers, refusal
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.hooks import HookPoint

Data = Sequence[str] | Int[Tensor, "row pos"]
"""A list of texts, or token ids with the rows padded as a call of the model takes them."""


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The streams of some rows, at their tokens alone.

    Attributes:
        entering: by layer, the stream that enters it.
        final: the last stream.
        following: the token behind each token; -1 behind a row's last one.
    """

    entering: dict[int, Float[Tensor, "token d_model"]]
    final: Float[Tensor, "token d_model"]
    following: Int[Tensor, " token"]


def read_data(given: object, *, what: str, error: type[HookLensError] = InputError) -> Data:
    """Texts or rows of ids.

    Raises:
        HookLensError: anything else, one text included, which would be a list of letters.
    """
    expected = "a list of texts, or token ids [row, pos]"
    if isinstance(given, str):
        raise error(f"{what} is the text {given[:40]!r}; expected a list of texts: [text]")
    if isinstance(given, Sequence) and given and all(isinstance(one, str) for one in given):
        return list(given)
    ids = read_numbers(given, what=what, expected=expected, error=error)
    is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or not is_whole or not ids.numel():
        raise refusal(given, what, expected, error)
    return ids.long()


def encode(
    model: HookedCausalLM, data: Data, rows: Sequence[int]
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids of some rows and which of them are tokens; texts longer than `n_ctx` are cut.

    Raises:
        InputError: text without a tokenizer, or ids outside the vocabulary.
    """
    if isinstance(data, Tensor):
        ids, mask = tokenization.read_tokens(data[list(rows)], model.tokenizer, d_vocab=model.cfg.d_vocab)
        ids = ids.to(model.device)
    else:
        texts = [data[row] for row in rows]
        ids, mask = model.to_tokens(texts, padding_side="right", return_attention_mask=True)
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()


@torch.no_grad()
def run_rows(model: HookedCausalLM, data: Data, rows: Sequence[int], layers: Sequence[int]) -> Streams:
    """The streams of some rows of the data.

    Args:
        model: the model.
        data: texts or ids.
        rows: which of them.
        layers: whose entering streams are wanted.
    """
    ids, real = encode(model, data, rows)
    found: dict[int, Tensor] = {}

    def keep(stream: Tensor, hook: HookPoint) -> None:
        found[hook.layer()] = stream[real.to(stream.device)]

    final: Any = model.run_with_hooks(
        ids,
        attention_mask=real.long(),
        stop_at_layer=model.cfg.n_layers,
        fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", keep) for layer in layers],
    )
    return Streams(entering=found, final=final[real.to(final.device)], following=_find_following(ids, real))


def _find_following(ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]) -> Int[Tensor, " token"]:
    rows = []
    for row, own in zip(ids, real, strict=True):
        tokens = row[own]
        rows.append(torch.cat([tokens[1:], tokens.new_full((1,), -1)]))
    return torch.cat(rows)


def split_rows(n_rows: int, held_out: float, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Rows to fit on and rows to measure on, at random; at least one of each.

    Raises:
        InputError: there is one row only.
    """
    if n_rows < 2:
        raise InputError("data has 1 row; expected at least 2, one to fit on and one to measure on")
    order = torch.randperm(n_rows, generator=generator).tolist()
    n_held = min(max(1, round(held_out * n_rows)), n_rows - 1)
    return order[n_held:], order[:n_held]


def draw_batches(rows: Sequence[int], batch_size: int, n: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of rows, each row once before any comes again."""
    left: list[int] = []
    for _ in range(n):
        batch: list[int] = []
        while len(batch) < min(batch_size, len(rows)):
            if not left:
                left = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
            batch.append(left.pop())
        yield batch
