"""The ways in which one batch of sequences can be run: at once, in steps on a key-value cache, on a frozen prefix.

Whatever the way, what the hook points show of the pieces, put together, has to be the activations of whole sequences.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.axes import HookSite
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import RotaryPositions
from hooklens.hooks.edits import Edit
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.attention.attention import Attention
from hooklens.model.plan.planning import reads_positions
from hooklens.verification.explicit import Batch
from hooklens.verification.probe import Probe, as_logits

# A long row, where the model's context allows it: beyond every table and buffer that starts small.
_LONG_ROW = 160
# Fewer tokens cannot be cut into pieces with padding in each.
_FEWEST_FOR_PIECES = 8

Hooks = Sequence[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to run some sequences.

    Attributes:
        label: for the report.
        batch: the whole sequences; with a prefix that all rows share, every row has it.
        pieces: how many columns each call runs.
        frozen: the cache is frozen before the last call.
        shares_prefix: the first piece is run as one row, which serves the whole batch.
    """

    label: str
    batch: Batch
    pieces: tuple[int, ...]
    frozen: bool = False
    shares_prefix: bool = False

    @property
    def n_before(self) -> int:
        """Columns before the last call."""
        return sum(self.pieces[:-1])

    @property
    def is_cached(self) -> bool:
        """Whether the way needs a key-value cache."""
        return len(self.pieces) > 1

    def run(
        self,
        model: HookedCausalLM,
        *,
        capture: Sequence[str] = (),
        hooks: Hooks = (),
        edits: Sequence[Edit] = (),
    ) -> "WayRun":
        """Run the pieces, all of them captured, hooks and edits acting in the last one."""
        pieces: list[tuple[Tensor, dict[str, Tensor]]] = []
        cache, start = None, 0
        for i, n in enumerate(self.pieces):
            rows = slice(0, 1) if self.shares_prefix and i == 0 else slice(None)
            columns, is_last = slice(start, start + n), i == len(self.pieces) - 1
            tokens, mask = self.batch.tokens[rows, columns], self.batch.mask[rows, columns]
            if self.is_cached and cache is None:
                cache = HookedKeyValueCache.init_cache(model.cfg, model.device, len(tokens), dtype=model.dtype)
            if is_last and cache is not None and self.frozen:
                cache.freeze()
            with ExitStack() as stack:
                if is_last and (hooks or edits):
                    stack.enter_context(model.hooks(list(hooks), edits=list(edits)))
                kept = stack.enter_context(model.capture(list(capture)) if capture else nullcontext({}))
                given = self.batch.given_positions
                logits = as_logits(
                    model(
                        tokens,
                        attention_mask=mask,
                        past_kv_cache=cache,
                        positions=given,
                    )
                )
            pieces.append((logits, kept))
            start += n
        return WayRun(self, model, pieces)


class WayRun:
    """The pieces of a run, put together.

    Args:
        way: how it was run.
        model: what was run.
        pieces: logits and captures of each call.
    """

    def __init__(self, way: Way, model: HookedCausalLM, pieces: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> None:
        self.last_logits = pieces[-1][0]
        n_rows, n_columns = way.batch.tokens.shape
        self.logits: Float[Tensor, "batch pos d_vocab"] = torch.cat(
            [logits.expand(n_rows, -1, -1) for logits, _ in pieces], 1
        )
        self.captures: dict[str, Tensor] = {}
        for name in pieces[-1][1]:
            site = model.hook_points()[name].site
            if site is not None and site.position_axis is not None:
                shown = [captured[name] for _, captured in pieces]
                self.captures[name] = _join(shown, site, n_rows, n_columns)


def _join(pieces: Sequence[Tensor], site: HookSite, n_rows: int, n_columns: int) -> Tensor:
    """What the pieces show, along their position axis; keys that a piece did not have yet are hidden from it."""
    assert site.position_axis is not None
    whole = []
    for piece in pieces:
        rows = piece.expand(n_rows, *piece.shape[1:])
        if "key" in site.axes:
            missing = n_columns - piece.shape[-1]
            rows = F.pad(rows, (0, missing), value=-torch.inf if site.template.endswith("scores") else 0.0)
        whole.append(rows)
    return torch.cat(whole, site.position_axis)


def can_be_cut(probe: Probe) -> bool:
    """Whether the rows are long enough for padding at their ends and in their middle."""
    return probe.n_tokens >= _FEWEST_FOR_PIECES


def takes_caches(probe: Probe) -> bool:
    """Whether the network is causal and has attention, all of the kind whose use of a cache is known."""
    if not probe.model.cfg.causal:
        return False
    blocks = probe.model.block_list()
    return bool(blocks) and all(block._modules.get("attn") is None or type(block.attn) is Attention for block in blocks)


def runs_in_pieces(probe: Probe) -> bool:
    """Whether rows can be run on a key-value cache, piece by piece."""
    return can_be_cut(probe) and takes_caches(probe) and not probe.model.depends_on_length(probe.n_tokens)


def ways_to_run(probe: Probe) -> Iterator[Way]:
    """The ways in which a network is run under verification."""
    yield Way(label="one batch", batch=_batch(probe.tokens), pieces=(probe.n_tokens,))
    for side in ("left", "right"):
        tokens, mask = probe.pad(side)
        yield Way(label=f"{side}-padded", batch=Batch(tokens=tokens, mask=mask), pieces=(probe.n_tokens,))
    cfg, generator = probe.model.cfg, torch.Generator().manual_seed(probe.seed + 1)
    length = min(cfg.n_ctx, _LONG_ROW)
    long_row = torch.randint(0, cfg.d_vocab, (1, length), generator=generator).to(probe.model.device)
    if length > probe.n_tokens:
        yield Way(label=f"a row of {length}", batch=_batch(long_row), pieces=(length,))
    if _takes_positions(probe.model):
        last = torch.arange(cfg.n_ctx - probe.n_tokens, cfg.n_ctx, device=probe.model.device)
        batch = Batch(tokens=probe.tokens, mask=torch.ones_like(probe.tokens, dtype=torch.bool), given_positions=last)
        yield Way(label=f"positions up to n_ctx={cfg.n_ctx}", batch=batch, pieces=(probe.n_tokens,))
    if runs_in_pieces(probe):
        yield from _cached_ways(probe)
        if not probe.model.depends_on_length(length) and length > probe.n_tokens:
            steps = (length // 2, 1, length - length // 2 - 1)
            yield Way(label=f"a row of {length}, prefill and steps", batch=_batch(long_row), pieces=steps)
            parts = (length - 4, 4)
            yield Way(label=f"a row of {length}, frozen prefix", batch=_batch(long_row), pieces=parts, frozen=True)


def _cached_ways(probe: Probe) -> Iterator[Way]:
    n = probe.n_tokens
    half = n // 2
    # One token, two, and the rest.
    steps = (half, 1, 2, n - half - 3)
    whole, ragged = torch.ones_like(probe.tokens, dtype=torch.bool), ragged_mask(probe.tokens, half)
    yield Way(label="prefill and steps", batch=_batch(probe.tokens), pieces=steps)
    yield Way(label="padded prefill and steps", batch=Batch(tokens=probe.tokens, mask=ragged), pieces=steps)
    yield Way(
        label="frozen prefix of each row", batch=Batch(tokens=probe.tokens, mask=ragged), pieces=(half, n - half),
        frozen=True,
    )  # fmt: skip
    shared = share_prefix(probe.tokens, half)
    for rows, words in ((whole, "frozen prefix of all rows"), (ragged, "frozen prefix of all rows, ragged")):
        mask = rows.clone()
        mask[:, :half] = True
        yield Way(
            label=words, batch=Batch(tokens=shared, mask=mask), pieces=(half, n - half), frozen=True, shares_prefix=True
        )


def share_prefix(tokens: Int[Tensor, "batch pos"], n: int) -> Int[Tensor, "batch pos"]:
    """Rows that all begin as the first one does."""
    return torch.cat([tokens[:1, :n].expand(len(tokens), -1), tokens[:, n:]], 1)


def ragged_mask(tokens: Int[Tensor, "batch pos"], n_before: int) -> Bool[Tensor, "batch pos"]:
    """Padding at the start, in the middle (where a right-padded prefix goes on) and at the end of rows."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row in range(len(tokens)):
        if row % 3 == 1:
            mask[row, : n_before // 3] = False
            mask[row, -2:] = False
        elif row % 3 == 2:
            mask[row, n_before - 2 : n_before + 2] = False
    return mask


def _batch(tokens: Int[Tensor, "batch pos"]) -> Batch:
    return Batch(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))


def _takes_positions(model: HookedCausalLM) -> bool:
    """Whether positions can be given, and tables are not each row's own."""
    kinds = [block.positions for block in model.cfg.blocks if block.attn is not None]
    by_length = any(
        isinstance(kind, RotaryPositions) and kind.scaling is not None and kind.scaling.kind in ("dynamic", "longrope")
        for kind in kinds
    )
    return reads_positions(model.cfg) and not by_length
