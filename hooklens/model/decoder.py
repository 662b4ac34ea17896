"""The network: embedding, blocks, final norm, unembedding, with every activation in a hook point."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooklens.config import HookedConfig, LearnedPositions, RotaryPositions
from hooklens.errors import CacheError, InputError
from hooklens.hooks import HookedModule, HookPoint
from hooklens.hooks.selection import Phase, TokenIndex
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.block import Block
from hooklens.model.embed import Embed, PosEmbed, TiedUnembed, Unembed
from hooklens.model.norm import Norm
from hooklens.model.positions import LogitsAt, TokenPlan
from hooklens.model.rotary import RotaryTables
from hooklens.precision import widen

Tokens = Int[Tensor, "batch pos"]
Stream = Float[Tensor, "batch pos d_model"]
Logits = Float[Tensor, "batch chosen d_vocab"]


class Decoder(HookedModule):
    """A decoder-only transformer, from token ids to logits.

    Parameters are uninitialised; load a state dict or call `initialize`.

    Attributes:
        cfg: the network's configuration.
        transforms: the weight-processing steps that were done, in order; a key-value cache records them.
    """

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.transforms: tuple[str, ...] = ()
        self.embed = Embed(cfg)
        self.hook_embed = HookPoint()
        if isinstance(cfg.positions, LearnedPositions):
            self.pos_embed = PosEmbed(cfg, cfg.positions)
            self.hook_pos_embed = HookPoint()
        # One set of tables serves all layers.
        self.rotary = RotaryTables(cfg.positions, cfg.d_head) if isinstance(cfg.positions, RotaryPositions) else None
        self.blocks = nn.ModuleList(Block(cfg, layer, self.rotary) for layer in range(cfg.n_layers))
        self.ln_final = Norm(cfg.norm, cfg.d_model)
        self.unembed = TiedUnembed(cfg, self.embed) if cfg.tied_unembed else Unembed(cfg)
        self._plan: TokenPlan | None = None
        self._phase: Phase = "prefill"

    @torch.no_grad()
    def initialize(self, *, seed: int | None = None) -> None:
        """Fresh weights: normal with `cfg.init_std`, writing weights scaled down by depth as in GPT-2, biases 0."""
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        writing_std = self.cfg.init_std / max(1, 2 * self.cfg.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            part = name.rpartition(".")[2]
            if part.startswith("W_"):
                std = writing_std if part in ("W_O", "W_out") else self.cfg.init_std
                fresh = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
                parameter.copy_(fresh)
            else:
                parameter.zero_()
        for module in self.modules():
            if isinstance(module, Norm):
                module.initialize()

    @property
    def n_hooked_layers(self) -> int | None:
        """Number of blocks."""
        return self.cfg.n_layers

    def running_tokens(self) -> TokenIndex | None:
        """Which tokens the call in progress runs."""
        return self._plan

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Calls inside the `with` block run generated tokens: edits see the phase `"decode"`."""
        before = self._phase
        self.__dict__["_phase"] = "decode"
        try:
            yield
        finally:
            self.__dict__["_phase"] = before

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embed.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embed.W_E.dtype

    def forward(
        self,
        input: Tokens | Stream,
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Int[Tensor, "rows pos"] | Int[Tensor, " pos"] | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: LogitsAt = None,
    ) -> Logits | Stream:
        """Logits, or with `stop_at_layer` the residual stream; see `run`."""
        plan = self.make_plan(input, attention_mask, positions, past_kv_cache)
        return self.run(
            input,
            plan,
            past_kv_cache=past_kv_cache,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            logits_at=logits_at,
        )

    def run(
        self,
        input: Tokens | Stream,
        plan: TokenPlan,
        *,
        past_kv_cache: HookedKeyValueCache | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: LogitsAt = None,
        unembed: bool = True,
    ) -> Logits | Stream:
        """Run a planned call.

        Args:
            input: token ids; with `start_at_layer` the residual stream entering that block.
            plan: which tokens these are, from `make_plan`.
            past_kv_cache: what came before these tokens.
            start_at_layer: blocks below do not run.
            stop_at_layer: blocks from here on do not run; the stream entering this block comes back.
            logits_at: positions to unembed; None: all.
            unembed: False leaves out the final norm and the unembedding and gives the last stream.

        Raises:
            InputError: the layers do not fit the model.
            CacheError: blocks left out would leave a gap in the cache.
        """
        start, stop = self._check_layers(start_at_layer, stop_at_layer)
        if past_kv_cache is not None:
            self._check_partial_run(past_kv_cache, start, stop)
        columns_before = 0 if past_kv_cache is None else len(past_kv_cache)
        self.__dict__["_plan"] = plan
        try:
            stream = self._embed_tokens(input, plan) if start_at_layer is None else input
            stream = self._run_blocks(stream, plan, past_kv_cache, start, stop)
            if past_kv_cache is not None and not past_kv_cache.frozen:
                past_kv_cache.append_attention_mask(self._new_mask(plan))
                past_kv_cache.transforms = self.transforms
            if stop_at_layer is not None or not unembed:
                return stream
            return self._unembed_stream(stream, plan, logits_at)
        except BaseException:
            if past_kv_cache is not None and not past_kv_cache.frozen:
                past_kv_cache.roll_back(columns_before)
            raise
        finally:
            self.__dict__["_plan"] = None

    def _embed_tokens(self, tokens: Tokens, plan: TokenPlan) -> Stream:
        stream = self.hook_embed(self.embed(tokens))
        if isinstance(self.cfg.positions, LearnedPositions):
            stream = stream + self.hook_pos_embed(self.pos_embed(plan.positions).expand_as(stream).contiguous())
        return stream

    def _run_blocks(
        self, stream: Stream, plan: TokenPlan, cache: HookedKeyValueCache | None, start: int, stop: int
    ) -> Stream:
        table = None if self.rotary is None else self.rotary.look_up(plan, stream.dtype)
        blocks = self.block_list()
        for layer in range(start, stop):
            stream = blocks[layer](stream, plan, table, None if cache is None else cache.entries[layer])
        return stream

    def block_list(self) -> list[Block]:
        """The blocks, typed."""
        return list(self.blocks)  # type: ignore[arg-type]

    def _unembed_stream(self, stream: Stream, plan: TokenPlan, logits_at: LogitsAt) -> Logits:
        normed = self.ln_final(stream)
        if logits_at is not None:
            columns = plan.select_columns(logits_at)
            if isinstance(columns, slice):
                normed = normed[:, columns]
            else:
                normed = normed.take_along_dim(columns[..., None], dim=1)
        logits = self.unembed(normed)
        cap = self.cfg.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _check_layers(self, start: int | None, stop: int | None) -> tuple[int, int]:
        n_layers = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n_layers <= layer <= n_layers:
                raise InputError(
                    f"{name}={layer} is out of range: the model has {n_layers} layers, so 0 to {n_layers} "
                    "(negative ones count from the end)"
                )
        first = 0 if start is None else start + n_layers * (start < 0)
        last = n_layers if stop is None else stop + n_layers * (stop < 0)
        if first > last:
            raise InputError(f"start_at_layer={start} lies above stop_at_layer={stop}: no block would run")
        return first, last

    def _check_partial_run(self, cache: HookedKeyValueCache, start: int, stop: int) -> None:
        if not cache.frozen and (start, stop) != (0, self.cfg.n_layers):
            raise CacheError(
                f"running blocks {start} to {stop} of {self.cfg.n_layers} would append to the cache in those layers "
                "only; freeze the cache (it is then read, not written) or run all blocks"
            )

    def make_plan(
        self,
        input: Tokens | Stream,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
    ) -> TokenPlan:
        """Work out which tokens a call runs, and check them against the model and the cache.

        Args:
            input: token ids or a residual stream; only its first two sizes count.
            attention_mask: `[batch pos]`, real (1) and padding (0) columns.
            positions: `[pos]` or `[batch pos]`, in place of what the mask says.
            past_kv_cache: what came before these tokens.

        Raises:
            InputError: a mask or positions of the wrong shape, or more positions than the model has.
            CacheError: the cache does not fit the model or the batch.
        """
        cache = past_kv_cache
        batch, n_new = input.shape[:2]
        n_past, past_mask = 0, None
        if cache is not None:
            cache.check_fits(self.cfg, transforms=self.transforms, device=self.device, dtype=self.dtype, batch=batch)
            n_past = len(cache)
            past_mask = None if bool(cache.previous_attention_mask.all()) else cache.previous_attention_mask
        plan = TokenPlan(
            batch=batch,
            n_new=n_new,
            device=input.device,
            attention_mask=check_attention_mask(attention_mask, batch, n_new, n_past),
            past_mask=past_mask,
            n_past=n_past,
            positions=check_positions(positions, batch, n_new),
            phase=self._phase,
        )
        self._check_context(plan)
        return plan

    def _check_context(self, plan: TokenPlan) -> None:
        n_ctx = self.cfg.n_ctx
        if plan.n_positions <= n_ctx:
            return
        longest = plan.n_positions if plan.key_mask is None else int(plan.n_tokens.max())
        if longest > n_ctx:
            past = f" ({plan.n_past} of them in the cache)" if plan.n_past else ""
            raise InputError(
                f"the input needs {longest} positions{past}, the model has n_ctx={n_ctx}; shorten the input, or for "
                "positions that extrapolate load with a config whose n_ctx is larger (cfg.replace(n_ctx=...))"
            )

    @staticmethod
    def _new_mask(plan: TokenPlan) -> Tensor:
        if plan.attention_mask is not None:
            return plan.attention_mask
        return torch.ones(plan.batch, plan.n_new, dtype=torch.bool, device=plan.device)


def check_attention_mask(mask: Tensor | None, batch: int, n_new: int, n_past: int) -> Bool[Tensor, "batch pos"] | None:
    """The mask as booleans, or None when it hides nothing.

    Raises:
        InputError: another shape than the input's, or values other than 0 and 1.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != (batch, n_new):
        hint = f"; it covers the new tokens only, not the {n_past} in the cache" if n_past else ""
        raise InputError(f"attention_mask has shape {list(mask.shape)}; expected [{batch}, {n_new}]{hint}")
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError("attention_mask holds values other than 0 (padding) and 1 (token)")
        mask = mask.bool()
    if bool(mask.all()):
        return None
    empty = (~mask).all(1).nonzero()[:, 0].tolist()
    if empty and not n_past:
        raise InputError(f"attention_mask hides every token of rows {empty}; leave empty rows out of the batch")
    return mask


def check_positions(positions: Tensor | None, batch: int, n_new: int) -> Int[Tensor, "rows pos"] | None:
    """Positions as `[rows pos]`.

    Raises:
        InputError: another shape, a floating dtype, or a negative position.
    """
    if positions is None:
        return None
    if positions.ndim == 1:
        positions = positions[None]
    if positions.shape[0] not in (1, batch) or positions.shape[1:] != (n_new,) or positions.is_floating_point():
        raise InputError(
            f"positions are {list(positions.shape)} {positions.dtype}; expected integers [{n_new}] or "
            f"[{batch}, {n_new}]"
        )
    if bool((positions < 0).any()):
        raise InputError(f"positions hold {int(positions.min())}; expected numbers >= 0")
    return positions


def next_token_loss(
    logits: Logits, tokens: Tokens, attention_mask: Bool[Tensor, "batch pos"] | None = None, *, per_token: bool = False
) -> Float[Tensor, ""] | Float[Tensor, "batch next"]:
    """Cross-entropy in nats of each next token, averaged over the pairs of real tokens.

    Args:
        logits: at every position.
        tokens: the tokens run.
        attention_mask: real tokens; pairs that touch padding do not count.
        per_token: the losses themselves, `[batch pos-1]`, 0 where a pair touches padding.
    """
    wide = widen(logits)
    losses = F.cross_entropy(wide[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    losses = losses.view(tokens.shape[0], -1)
    if attention_mask is None:
        return losses if per_token else losses.mean()
    pairs = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
    losses = losses * pairs
    return losses if per_token else losses.sum() / pairs.sum()
