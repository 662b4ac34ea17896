"""The network: embedding, blocks, final norm, unembedding, with every activation in a hook point."""

from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooklens.arguments import optional, read_one_of, read_seed, reads
from hooklens.axes import is_below_blocks, layer_of
from hooklens.config import (
    DROPOUTS,
    AttentionBackend,
    HookedConfig,
    InitScheme,
    describe_with,
)
from hooklens.errors import CacheError, CheckpointError, InputError
from hooklens.hooks import HookPoint
from hooklens.hooks.call import NOBODY, Call, Listeners, join_listeners, thread_listeners
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.attention.attention import Attention
from hooklens.model.attention.rotary import RotaryTables
from hooklens.model.block import Block, Blocks
from hooklens.model.embed import (
    Embed,
    HeadPosEmbed,
    PosEmbed,
    SinusoidalPosEmbed,
    TiedUnembed,
    Unembed,
    embed_class,
    embeds_positions,
    find_position_part,
    unembed_class,
    watch_tokens,
)
from hooklens.model.initialization import initialize
from hooklens.model.norm import STREAM, Norm, norm
from hooklens.model.parameters import read_state
from hooklens.model.parts.adapted import refuse_adapters
from hooklens.model.parts.declared import When, inner, point
from hooklens.model.parts.part import Part, describe_parts
from hooklens.model.parts.quantised import describe_maps, quantised_maps, set_compute_dtype
from hooklens.model.placement.placed import Placed
from hooklens.model.placement.shared_weights import refuse_shared
from hooklens.model.plan.documents import Borders
from hooklens.model.plan.planning import Planning, documents_to_keep, new_mask
from hooklens.model.plan.positions import ChosenColumns, LogitsAt, TokenPlan
from hooklens.model.recomputing import GradientCheckpointing, can_recompute, run_checkpointed
from hooklens.weights.offloaded import refuse_offloaded


class Processes:
    """The processes that share the blocks of a network."""

    def run_blocks(
        self, stream: Tensor, plan: TokenPlan, call: Call, cache: HookedKeyValueCache | None, layers: range
    ) -> Tensor:
        """The stream behind some blocks, in every process."""
        raise NotImplementedError


Tokens = Int[Tensor, "batch pos"]
Stream = Float[Tensor, "batch pos d_model"]
Logits = Float[Tensor, "batch chosen d_vocab_out"]


_EMBEDDED = When(embeds_positions, "its positions are no vectors, learned, sinusoidal or shortformer")
_NORMED_LAST = When(lambda cfg: cfg.final_norm is not None, "it has no final norm")


class Decoder(Planning, GradientCheckpointing, Placed, Part, place=""):
    """A decoder-only transformer, from token ids to logits.

    Parameters are uninitialised; load a state dict or call `initialize`.

    Attributes:
        cfg: the network's configuration.
        transforms: the weight-processing steps that were done, in order; a key-value cache records them.
        processes: what runs the blocks where several processes share them, see `hooklens.parallel`; None: this one
            does.
    """

    processes: "Processes | None" = None

    # The caller's own tensor enters.
    hook_tokens: HookPoint = point(
        "batch pos",
        "token ids as they run, selected by this name alone; an edit reaches the embedding",
        on_request=True,
        shared=True,
        discrete=True,
    )
    embed: Embed = inner(embed_class)
    hook_embed: HookPoint = point(STREAM, "token embedding, as it enters the stream")
    pos_embed: PosEmbed | SinusoidalPosEmbed = inner(find_position_part, when=_EMBEDDED)
    hook_pos_embed: HookPoint = point(
        STREAM, "position embedding, as it enters the stream, or with shortformer queries and keys", when=_EMBEDDED
    )
    blocks: Blocks = inner(Block, lambda cfg: cfg.blocks, per_layer=True)
    ln_final: Norm | None = norm("final norm", kind=lambda cfg: cfg.final_norm, when=_NORMED_LAST)
    unembed: Unembed = inner(
        unembed_class,
        reads=lambda cfg: "ln_final" if _NORMED_LAST.holds(cfg) else None,
    )

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__(cfg)
        self.transforms: tuple[str, ...] = ()
        self._embeds_positions = _EMBEDDED.holds(cfg)
        self._positions_in_heads = isinstance(self.pos_embed, HeadPosEmbed)
        if isinstance(self.unembed, TiedUnembed):
            self.unembed.tie(self.embed)
        if isinstance(self.pos_embed, HeadPosEmbed):
            for block in self.block_list():
                if isinstance(block.attn, Attention):
                    block.attn.read_positions_from(self.pos_embed)
        self.name_hook_points()

    @reads(seed=optional(read_seed), scheme=optional(partial(read_one_of, options=get_args(InitScheme))))
    @torch.no_grad()
    def initialize(self, *, seed: int | None = None, scheme: InitScheme | None = None) -> None:
        """Fresh weights, biases of 0 and norms that act as 1; see `hooklens.model.initialization`.

        Args:
            seed: the same seed draws the same weights, on any device and with any number of threads, and leaves torch's
                own generator alone. None: drawn from that one.
            scheme: how they are drawn: `"gpt2"`, `"xavier_uniform"`, `"xavier_normal"`, `"kaiming_uniform"`,
                `"kaiming_normal"`, `"muP"`, `"small"`, `"wang"`. None: `cfg.init_scheme`.

        Raises:
            InputError: weights are quantised, offloaded, or have adapters beside them.
        """
        refuse_offloaded(
            self,
            "initialize: offloaded weights cannot be changed",
            InputError,
            otherwise="make the network of model.cfg anew",
        )
        refuse_shared(self, "initialize", InputError)
        refuse_adapters(
            self,
            "initialize: fresh weights would have adapters beside them that are made for others",
            InputError,
            otherwise="make the network of model.cfg anew, or delete the adapters first",
        )
        if maps := quantised_maps(self):
            raise InputError(
                f"initialize: {describe_maps(maps)}, and fresh ones would not be: make the network of model.cfg anew"
            )
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        initialize(self, self.cfg.init_scheme if scheme is None else scheme, generator)

    @property
    def n_hooked_layers(self) -> int | None:
        """Number of blocks."""
        return self.cfg.n_layers

    @property
    def device(self) -> torch.device:
        """Where the weights lie; of a network on several devices the token embedding, so where token ids go."""
        return self._a_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self._a_weight().dtype

    def _a_weight(self) -> Tensor:
        """The token embedding, looked up as fast as a call wants it that asks several times."""
        weight: Tensor = self.embed._modules["table"].weight  # type: ignore[union-attr, assignment]
        return weight

    @property
    def drops(self) -> bool:
        """Whether a call is random: in training mode, with a dropout."""
        return self.training and any(getattr(self.cfg, name) for name in DROPOUTS)

    def forward(
        self,
        input: Tokens | Stream,
        *,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        positions: Int[Tensor, "rows pos"] | Int[Tensor, " pos"] | None = None,
        document_ids: Int[Tensor, "rows pos"] | Int[Tensor, " pos"] | None = None,
        document_borders: Borders = None,
        restart_positions: bool | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: LogitsAt = None,
    ) -> Logits | Stream:
        """Logits, or with `stop_at_layer` the residual stream; see `run`."""
        marks = self.read_documents(input, document_ids, document_borders, restart_positions)
        plan = self.make_plan(input, attention_mask, positions, past_kv_cache, marks=marks)
        return self.run(
            input,
            plan,
            past_kv_cache=past_kv_cache,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            logits_at=logits_at,
        )

    @reads(backend=partial(read_one_of, options=get_args(AttentionBackend)))
    def set_attention_backend(self, backend: AttentionBackend) -> None:
        """Say what computes attention from here on, see `HookedConfig.attention_backend`.

        Attention of one's own computes as it does.

        Raises:
            InputError: no such backend.
            ConfigError: one that cannot compute this network.
        """
        self.cfg = self.cfg.replace(attention_backend=backend)
        for block in self.block_list():
            if isinstance(block.attn, Attention):
                block.attn.backend = backend

    def run(
        self,
        input: Tokens | Stream,
        plan: TokenPlan,
        *,
        listeners: Listeners = NOBODY,
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
            listeners: who listens to this call, besides what the thread and the hook points have.
            past_kv_cache: what came before these tokens.
            start_at_layer: blocks below do not run.
            stop_at_layer: blocks from here on do not run; the stream entering this block comes back.
            logits_at: positions to unembed; None: all.
            unembed: False leaves out the final norm and the unembedding and gives the last stream.

        Raises:
            InputError: the layers do not fit the model.
            CacheError: blocks left out would leave a gap in the cache, or what is dropped would go into it.
        """
        start, stop = self.check_layers(start_at_layer, stop_at_layer)
        if past_kv_cache is not None:
            if self.drops:
                raise CacheError(
                    "the model is in training mode with dropout, and a key-value cache would keep what one draw has "
                    "left of keys and values; call model.eval() first, or leave the cache out"
                )
            self._check_partial_run(past_kv_cache, start, stop)
        chosen = None if logits_at is None else plan.choose_columns(logits_at)
        call = Call(join_listeners([thread_listeners(), listeners]), plan)
        columns_before = 0 if past_kv_cache is None else len(past_kv_cache)
        try:
            stream = self._embed_tokens(input, plan, call) if start_at_layer is None else input
            if self._positions_in_heads:
                plan.embedded_positions = self._embed_positions(stream, plan, call)
            stream = self._run_blocks(stream, plan, call, past_kv_cache, start, stop)
            if past_kv_cache is not None and not past_kv_cache.frozen:
                past_kv_cache.append_attention_mask(
                    new_mask(plan),
                    all_tokens=plan.attention_mask is None,
                    documents=documents_to_keep(plan),
                    token_ids=input if start_at_layer is None else None,
                )
                past_kv_cache.transforms, past_kv_cache.adapters = self.transforms, self.active_adapters
            if stop_at_layer is not None or not (unembed or self.listens_past_blocks(call)):
                return stream
            return self._unembed_stream(stream, call, chosen)
        except BaseException:
            if past_kv_cache is not None and not past_kv_cache.frozen:
                past_kv_cache.roll_back(columns_before)
            raise

    def listens_past_blocks(self, call: Call) -> bool:
        """Whether somebody listens in the final norm or the unembedding."""
        in_norm = self.ln_final is not None and self.ln_final.listens(call)
        return in_norm or self.unembed.listens(call)

    def idle_points(self, *, start_at_layer: int | None = None, stop_at_layer: int | None = None) -> frozenset[str]:
        """The hook points that do not fire in a call that leaves out blocks."""
        if start_at_layer is None and stop_at_layer is None:
            return frozenset()
        start, stop = self.check_layers(start_at_layer, stop_at_layer)
        idle = set()
        for name in self._hook_point_table().points:
            layer = layer_of(name)
            if layer is not None:
                is_idle = not start <= layer < stop
            elif name == "hook_pos_embed" and self._positions_in_heads:
                is_idle = False
            elif is_below_blocks(name):
                is_idle = start_at_layer is not None
            else:
                is_idle = stop_at_layer is not None
            if is_idle:
                idle.add(name)
        return frozenset(idle)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], *, strict: bool = True, assign: bool = False
    ) -> Any:
        """Load parameters, as `nn.Module.load_state_dict` does; the field's names and shapes are read, too.

        Args:
            state_dict: under the names of `state_dict()`, of `named_weights()`, or as TransformerLens saved it.
            strict: names must match exactly.
            assign: use the tensors themselves, where the names are those of `state_dict()`.

        Raises:
            CheckpointError: the field's names with other shapes, or quantised weights, here or there; weights that are
                offloaded here; or `assign` with adapters beside the weights.
        """
        refuse_offloaded(
            self,
            "load_state_dict: offloaded weights cannot be changed",
            CheckpointError,
            otherwise='model.dispatch({"": device}) brings them into memory first',
        )
        refuse_shared(self, "load_state_dict", CheckpointError)
        if maps := quantised_maps(self):
            raise CheckpointError(
                f"load_state_dict: {describe_maps(maps)}, and take no others; load a checkpoint with quantize=, or "
                "load into model.dequantize()"
            )
        if assign:
            refuse_adapters(
                self,
                "load_state_dict: assign=True would part what several maps have of an adapter in one parameter",
                CheckpointError,
                otherwise="leave it out, and the values are copied",
            )
        loaded = super().load_state_dict(read_state(self, state_dict), strict=strict, assign=assign)
        if assign:
            self.settle_placement(self.placement)
        return loaded

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
        """What `to(...)` and its like do; quantised maps compute in the dtype of the other weights."""
        applied = super()._apply(fn, recurse)
        for linear in quantised_maps(self).values():
            set_compute_dtype(linear, self.dtype)
        return applied

    def _embed_tokens(self, tokens: Tokens, plan: TokenPlan, call: Call) -> Stream:
        if self.hook_tokens.listens(call):
            tokens = watch_tokens(self.hook_tokens, tokens, call, self.cfg.d_vocab)
        embedded, kept = self.embed(tokens, call), None
        if self.cfg.embed_dropout and self.training:
            # Drawn once for the sum, and taken from each of its parts: so the stream is the sum of what is shown.
            kept = F.dropout(torch.ones_like(embedded), self.cfg.embed_dropout)
            embedded = embedded * kept
        stream = self.hook_embed(embedded, call)
        if self._embeds_positions and not self._positions_in_heads:
            stream = stream + self._embed_positions(stream, plan, call, kept)
        return stream

    def _embed_positions(self, stream: Stream, plan: TokenPlan, call: Call, kept: Tensor | None = None) -> Stream:
        """What positions add to the stream, without the entries that are dropped from it."""
        positions = plan.positions
        if self.placement is not None:
            positions = positions.to(self.placement["pos_embed"])
        embedded = self.pos_embed(positions=positions).to(stream).expand_as(stream).contiguous()
        return self.hook_pos_embed(embedded if kept is None else embedded * kept, call)

    def _run_blocks(
        self, stream: Stream, plan: TokenPlan, call: Call, cache: HookedKeyValueCache | None, start: int, stop: int
    ) -> Stream:
        if self.processes is not None:
            return self.processes.run_blocks(stream, plan, call, cache, range(start, stop))
        return self.run_layers(stream, plan, call, cache, start, stop)

    def run_layers(
        self, stream: Stream, plan: TokenPlan, call: Call, cache: HookedKeyValueCache | None, start: int, stop: int
    ) -> Stream:
        """The stream behind some blocks, all of which this process runs.

        Args:
            stream: as it enters the first.
            plan: the tokens.
            call: who listens.
            cache: what came before these tokens.
            start: the first block.
            stop: one past the last.
        """
        blocks = self.block_list()
        may_recompute = self.is_gradient_checkpointing and cache is None and torch.is_grad_enabled()
        places = None if self.placement is None else self.placement.layers
        for layer in range(start, stop):
            if places is not None and places[layer] != plan.device:
                plan = plan.on(places[layer])
                stream, call = stream.to(plan.device), call.on(plan)
            if may_recompute and self.recomputes(layer) and can_recompute(blocks[layer], call):
                stream = run_checkpointed(blocks[layer], stream, plan, call)
            else:
                stream = blocks[layer](stream, plan, call, None if cache is None else cache.entries[layer])
        return stream

    def depends_on_length(self, n_tokens: int) -> bool:
        """Whether a sequence of this length turns at rotary frequencies of its own (dynamic scaling)."""
        return any(rotary.depends_on_length(n_tokens) for rotary in self._rotaries())

    def fits_past(self, plan: TokenPlan) -> bool:
        """Whether the cached keys of a call, if any, turned at the rotary frequencies of its sequences' lengths.

        Args:
            plan: the call's tokens, made with its cache.
        """
        return all(rotary.fits_past(plan) for rotary in self._rotaries())

    def _rotaries(self) -> set[RotaryTables]:
        found = {block.attn.rotary for block in self.block_list() if block.has_attn}
        return {rotary for rotary in found if rotary is not None}

    def block_list(self) -> list[Block]:
        """The blocks, typed."""
        # `torch.compile` looks an attribute of a container up in the class, and finds the declaration.
        blocks = self._modules["blocks"]
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)  # type: ignore[arg-type]

    def _unembed_stream(self, stream: Stream, call: Call, chosen: ChosenColumns | None) -> Logits:
        if self.ln_final is not None:
            stream, call = self._bring_to("ln_final", stream, call)
            stream = self.ln_final(stream, call)
        if chosen is not None:
            if self.placement is not None:
                chosen = chosen.on(stream.device)
            stream, call = chosen.take(stream), call.on(chosen)
        stream, call = self._bring_to("unembed", stream, call)
        return self.unembed.cap(self.unembed(stream, call))

    def _bring_to(self, part: str, stream: Stream, call: Call) -> tuple[Stream, Call]:
        """The stream and the call on the device of a part."""
        if self.placement is None:
            return stream, call
        tokens: Any = call.tokens
        device = self.placement[part]
        return stream.to(device), call.on(tokens.on(device))

    def check_layers(self, start: int | None, stop: int | None) -> tuple[int, int]:
        """The first block that runs, and one past the last.

        Raises:
            InputError: no layers of the model, or none between them.
        """
        n_layers = self.cfg.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is None:
                continue
            if isinstance(layer, bool) or not isinstance(layer, int) or not -n_layers <= layer <= n_layers:
                raise InputError(
                    f"{name}={layer!r} is out of range: the model has {n_layers} layers, so 0 to {n_layers} "
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


describe_with(lambda cfg: describe_parts(Decoder, cfg))
