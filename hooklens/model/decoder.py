"""The network: embedding, blocks, final norm, unembedding, with every activation in a hook point."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooklens.arguments import optional, read_seed, reads
from hooklens.axes import layer_of
from hooklens.config import AlibiPositions, HookedConfig, LearnedPositions, NoPositions, describe_with
from hooklens.errors import CacheError, InputError
from hooklens.hooks import HookPoint
from hooklens.hooks.call import NOBODY, Call, Listeners, Phase, join_listeners, thread_listeners
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.kv_cache.documents import ColumnDocuments
from hooklens.model.block import Block
from hooklens.model.declared import When, inner, point
from hooklens.model.documents import Borders, DocumentMarks, hide_padding, place_documents, read_marks
from hooklens.model.embed import Embed, PosEmbed, TiedUnembed, Unembed
from hooklens.model.norm import STREAM, Norm, norm
from hooklens.model.parameters import read_state
from hooklens.model.part import Part, describe_parts
from hooklens.model.positions import ChosenColumns, LogitsAt, TokenPlan, check_attention_mask, check_positions

Tokens = Int[Tensor, "batch pos"]
Stream = Float[Tensor, "batch pos d_model"]
Logits = Float[Tensor, "batch chosen d_vocab"]


_LEARNED = When(lambda cfg: isinstance(cfg.positions, LearnedPositions), "its positions are not learned vectors")
_NORMED_LAST = When(lambda cfg: cfg.final_norm is not None, "it has no final norm")


class Decoder(Part, place=""):
    """A decoder-only transformer, from token ids to logits.

    Parameters are uninitialised; load a state dict or call `initialize`.

    Attributes:
        cfg: the network's configuration.
        transforms: the weight-processing steps that were done, in order; a key-value cache records them.
    """

    embed: Embed = inner(Embed)
    hook_embed: HookPoint = point(STREAM, "token embedding, as it enters the stream")
    pos_embed: PosEmbed = inner(PosEmbed, when=_LEARNED)
    hook_pos_embed: HookPoint = point(STREAM, "learned position embedding", when=_LEARNED)
    blocks: nn.ModuleList = inner(Block, lambda cfg: cfg.blocks, per_layer=True)
    ln_final: Norm | None = norm("final norm", kind=lambda cfg: cfg.final_norm, when=_NORMED_LAST)
    unembed: Unembed = inner(
        lambda cfg: TiedUnembed if cfg.tied_unembed else Unembed,
        reads=lambda cfg: "ln_final" if _NORMED_LAST.holds(cfg) else None,
    )

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__(cfg)
        self.transforms: tuple[str, ...] = ()
        self._embeds_positions = _LEARNED.holds(cfg)
        if isinstance(self.unembed, TiedUnembed):
            self.unembed.tie(self.embed)
        self.name_hook_points()

    @reads(seed=optional(read_seed))
    @torch.no_grad()
    def initialize(self, *, seed: int | None = None) -> None:
        """Fresh weights: normal with `cfg.init_std`, writing weights scaled down by depth as in GPT-2, biases 0."""
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        writing_std = self.cfg.init_std / max(1, 2 * self.cfg.n_layers) ** 0.5
        for part in self.modules():
            if isinstance(part, Norm):
                part.initialize()
            elif isinstance(part, Part):
                in_block = part.place not in ("embed", "pos_embed")
                for weight, shape in part.weight_table():
                    if weight.is_bias:
                        fresh = torch.zeros(shape)
                    else:
                        std = writing_std if weight.writes and in_block else self.cfg.init_std
                        fresh = torch.empty(shape).normal_(0.0, std, generator=generator)
                    getattr(part, weight.name).copy_(fresh)

    @property
    def n_hooked_layers(self) -> int | None:
        """Number of blocks."""
        return self.cfg.n_layers

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embed.table.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.embed.table.weight.dtype

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
            CacheError: blocks left out would leave a gap in the cache.
        """
        start, stop = self.check_layers(start_at_layer, stop_at_layer)
        if past_kv_cache is not None:
            self._check_partial_run(past_kv_cache, start, stop)
        chosen = None if logits_at is None else plan.choose_columns(logits_at)
        call = Call(join_listeners([thread_listeners(), listeners]), plan)
        columns_before = 0 if past_kv_cache is None else len(past_kv_cache)
        try:
            stream = self._embed_tokens(input, plan, call) if start_at_layer is None else input
            stream = self._run_blocks(stream, plan, call, past_kv_cache, start, stop)
            if past_kv_cache is not None and not past_kv_cache.frozen:
                past_kv_cache.append_attention_mask(
                    self._new_mask(plan),
                    all_tokens=plan.attention_mask is None,
                    documents=self._documents_to_keep(plan),
                    token_ids=input if start_at_layer is None else None,
                )
                past_kv_cache.transforms = self.transforms
            if stop_at_layer is not None or not (unembed or self.listens_past_blocks(call)):
                return stream
            return self._unembed_stream(stream, call, chosen)
        except BaseException:
            if past_kv_cache is not None and not past_kv_cache.frozen:
                past_kv_cache.roll_back(columns_before)
            raise

    def listens_past_blocks(self, call: Call) -> bool:
        """Whether somebody listens in the final norm or the unembedding."""
        unembed = self.unembed
        in_norm = self.ln_final is not None and self.ln_final.listens(call)
        return in_norm or unembed.hook_in.listens(call) or unembed.hook_out.listens(call)

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
            elif name in ("hook_embed", "hook_pos_embed"):
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
            CheckpointError: the field's names with other shapes.
        """
        return super().load_state_dict(read_state(self, state_dict), strict=strict, assign=assign)

    def _embed_tokens(self, tokens: Tokens, plan: TokenPlan, call: Call) -> Stream:
        stream = self.hook_embed(self.embed(tokens), call)
        if self._embeds_positions:
            stream = stream + self.hook_pos_embed(self.pos_embed(plan.positions).expand_as(stream).contiguous(), call)
        return stream

    def _run_blocks(
        self, stream: Stream, plan: TokenPlan, call: Call, cache: HookedKeyValueCache | None, start: int, stop: int
    ) -> Stream:
        blocks = self.block_list()
        for layer in range(start, stop):
            stream = blocks[layer](stream, plan, call, None if cache is None else cache.entries[layer])
        return stream

    def depends_on_length(self, n_tokens: int) -> bool:
        """Whether a sequence of this length turns at rotary frequencies of its own (dynamic scaling)."""
        rotaries = {block.attn.rotary for block in self.block_list() if block.has_attn}
        return any(rotary is not None and rotary.depends_on_length(n_tokens) for rotary in rotaries)

    def block_list(self) -> list[Block]:
        """The blocks, typed."""
        # `torch.compile` looks an attribute of a container up in the class, and finds the declaration.
        blocks = self._modules["blocks"]
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)  # type: ignore[arg-type]

    def _unembed_stream(self, stream: Stream, call: Call, chosen: ChosenColumns | None) -> Logits:
        normed = stream if self.ln_final is None else self.ln_final(stream, call)
        if chosen is not None:
            normed, call = chosen.take(normed), call.on(chosen)
        logits = self.unembed(normed, call)
        cap = self.cfg.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

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

    @staticmethod
    def read_documents(
        input: Tokens | Stream,
        document_ids: object = None,
        document_borders: object = None,
        restart_positions: bool | None = None,  # noqa: FBT001
    ) -> DocumentMarks | None:
        """What a caller says about the documents of an input; see `hooklens.model.documents.read_marks`."""
        batch, n_new = input.shape[:2]
        return read_marks(document_ids, document_borders, restart_positions, batch=batch, n_new=n_new)

    def make_plan(
        self,
        input: Tokens | Stream,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
        *,
        phase: Phase = "prefill",
        marks: DocumentMarks | None = None,
    ) -> TokenPlan:
        """Work out which tokens a call runs, and check them against the model and the cache.

        Args:
            input: token ids or a residual stream; only its first two sizes count.
            attention_mask: `[batch pos]`, real (1) and padding (0) columns.
            positions: `[pos]` or `[batch pos]`, in place of what the mask says.
            past_kv_cache: what came before these tokens.
            phase: `"decode"` for generated tokens, of which edits are told.
            marks: the documents of these tokens, from `read_documents`. None: of the row, or of a cache with
                documents the last one.

        Raises:
            InputError: a mask or positions of the wrong shape, positions that change nothing, or too many, or
                documents that do not go with them.
            CacheError: the cache does not fit the model, the batch or the documents.
        """
        cache = past_kv_cache
        batch, n_new = input.shape[:2]
        n_past, past_mask = 0, None
        if cache is not None:
            cache.check_fits(self.cfg, transforms=self.transforms, device=self.device, dtype=self.dtype, batch=batch)
            n_past = len(cache)
            past_mask = cache.previous_attention_mask if cache.has_padding else None
        # Looked at where it was given: a mask on the host keeps no device waiting.
        checked = check_attention_mask(attention_mask, batch, n_new, n_past)
        given = self._check_positions(positions, batch, n_new, cache)
        if marks is not None:
            checked = hide_padding(checked, marks, batch=batch, n_past=n_past)
        plan = TokenPlan(
            batch=batch,
            n_new=n_new,
            device=input.device,
            attention_mask=None if checked is None else checked.to(input.device),
            past_mask=past_mask,
            n_past=n_past,
            positions=None if given is None else given.to(input.device),
            phase=phase,
            causal=self.cfg.causal,
        )
        if marks is not None or (cache is not None and cache.document_ids is not None):
            plan.documents = place_documents(marks, cache, plan, checked)
        self._check_context(plan)
        return plan

    def _check_positions(
        self, positions: Tensor | None, batch: int, n_new: int, cache: HookedKeyValueCache | None
    ) -> Int[Tensor, "rows pos"] | None:
        """Positions as `[rows pos]`, where giving them has a meaning in this network."""
        given = check_positions(positions, batch, n_new, self.cfg.n_ctx)
        if given is None:
            return None
        attending = [block for block in self.cfg.blocks if block.attn is not None]
        kinds = [block.positions for block in attending]
        windowed = any(block.window is not None for block in attending)
        if not (windowed or self._embeds_positions) and all(isinstance(kind, NoPositions) for kind in kinds):
            raise InputError("positions were given, and nothing in this network reads them (cfg.positions is none)")
        if cache is not None and (windowed or any(isinstance(kind, AlibiPositions) for kind in kinds)):
            raise InputError(
                "positions with a key-value cache: linear biases and sliding windows need the positions of the cached "
                "keys, which a cache counts from its mask; leave positions or past_kv_cache out"
            )
        return given

    def _check_context(self, plan: TokenPlan) -> None:
        n_ctx = self.cfg.n_ctx
        if plan.n_keys <= n_ctx:
            return
        if plan.counts_within_documents:
            longest = int(plan.document_positions.max()) + 1
        else:
            longest = plan.n_keys if plan.key_mask is None else int(plan.n_tokens.max())
        if longest > n_ctx:
            past = f" ({plan.n_past} of them in the cache)" if plan.n_past else ""
            raise InputError(
                f"the input needs {longest} positions{past}, the model has n_ctx={n_ctx}; shorten the input, or for "
                "positions that extrapolate load with a larger one (from_pretrained(..., n_ctx=...))"
            )

    @staticmethod
    def _documents_to_keep(plan: TokenPlan) -> ColumnDocuments | None:
        documents = plan.documents
        return None if documents is None else ColumnDocuments(documents.ids, documents.restarts)

    @staticmethod
    def _new_mask(plan: TokenPlan) -> Tensor:
        if plan.attention_mask is not None:
            return plan.attention_mask
        return torch.ones(plan.batch, plan.n_new, dtype=torch.bool, device=plan.device)


describe_with(lambda cfg: describe_parts(Decoder, cfg))
