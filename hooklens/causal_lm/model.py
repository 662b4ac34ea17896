"""The model class: what it is made of, and its calls, captures and prefixes."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from hooklens import tokens as tokenization
from hooklens.activation_cache import ActivationCache
from hooklens.arguments import optional, read_flag, reads, require
from hooklens.causal_lm.adapting import AdapterMethods
from hooklens.causal_lm.calls import (
    CALLING,
    CallKeywords,
    Input,
    InputKeywords,
    LogitsAndLoss,
    Output,
    PreparedCall,
    ReturnType,
    check_return_type,
    check_stream,
)
from hooklens.causal_lm.checkpoints import CheckpointMethods
from hooklens.causal_lm.embedding import EmbeddingMethods
from hooklens.causal_lm.loading import LoadingMethods
from hooklens.causal_lm.memory.guard import refuse_beyond_memory
from hooklens.causal_lm.overview import summarise
from hooklens.causal_lm.text import TextMethods
from hooklens.config import HookedConfig, refuse_other_outputs
from hooklens.display import Displayed, Summary
from hooklens.documents import NO_DOCUMENT
from hooklens.errors import InputError
from hooklens.generation import TextGeneration
from hooklens.generation.past import read_past
from hooklens.hooks.arguments import CAPTURING, LISTENING, HookList
from hooklens.hooks.call import NOBODY, Listeners, join_listeners
from hooklens.hooks.capture import Capture, choose_columns, columns_among
from hooklens.hooks.choice import Choice
from hooklens.hooks.edits import Edit
from hooklens.hooks.module import require_gradients, run_backward
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.point import HookPoint
from hooklens.hooks.splice import Splice, naming
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.decoder import Decoder
from hooklens.model.loss import next_token_loss
from hooklens.model.parts.adapted import Adapted
from hooklens.model.parts.part import Part
from hooklens.model.parts.weight_views import WeightViews
from hooklens.model.plan.documents import Borders
from hooklens.model.plan.positions import LogitsAt
from hooklens.optional import import_package
from hooklens.tokens import PaddingSide, Tokenizer

if TYPE_CHECKING:
    import pandas

    from hooklens.causal_lm.calls import CachedCallOptions, Called, HookedCallOptions


# What a mixin declares as an attribute (`device`, `W_U`) is a property of the network.
class HookedCausalLM(  # pyright: ignore[reportIncompatibleVariableOverride]
    Displayed,
    LoadingMethods,
    CheckpointMethods,
    AdapterMethods,
    TextMethods,
    EmbeddingMethods,
    TextGeneration,
    WeightViews,
    Decoder,
):
    """A decoder-only language model with a named hook point at every activation.

    `print(model)` tells sizes and parts, equal blocks as one, and a notebook shows its tree with all weights and hook
    points. torch's tree of modules is `torch.nn.Module.__repr__(model)`; of a part, `print(model.blocks[0])`.

    Args:
        cfg: the network.
        tokenizer: a transformers tokenizer, needed only for text.

    Attributes:
        cfg: the network's configuration.
        tokenizer: the tokenizer, or None.
        default_prepend_bos: whether text gets a BOS where a call does not say; None: the tokenizer's own rule.
        transforms: the weight-processing steps that were done, in order.
        generation_config: the checkpoint's settings of generation, of which `generate` takes the end tokens.

    Example:
        >>> model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
        >>> logits, cache = model.run_with_cache("When Mary and John went to the store")
        >>> cache["pattern", 0].shape
        torch.Size([1, 4, 9, 9])
    """

    @reads(
        cfg=partial(require, kind=HookedConfig, expected="a HookedConfig"),
        tokenizer=optional(tokenization.read_tokenizer),
    )
    def __init__(self, cfg: HookedConfig, tokenizer: Tokenizer | None = None) -> None:
        # Parameters made under inference_mode could never be trained, nor read with gradients.
        with torch.inference_mode(mode=False):
            super().__init__(cfg)
            if self.device.type != "meta":
                self.initialize()
        self.tokenizer = tokenizer
        self.generation_config: dict[str, Any] = {}
        self.eval()

    if TYPE_CHECKING:
        # `nn.Module` says that a call takes and gives anything.
        __call__: Called  # pyright: ignore[reportIncompatibleMethodOverride]

    @reads(**CALLING)
    def forward(  # type: ignore[override]
        self,
        input: Input,
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_borders: Borders = None,
        restart_positions: bool | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: LogitsAt = None,
    ) -> Output:
        """Run the model.

        Args:
            input: text, a list of texts, token ids `[batch pos]` or `[pos]`; with `start_at_layer` the residual
                stream `[batch pos d_model]` entering that block.
            return_type: `"logits"` `[batch pos d_vocab_out]`; `"loss"`, the mean cross-entropy of the next token in
                nats; `"both"`, a named tuple of the two; None, nothing, and no logits are computed unless
                somebody listens there.
            loss_per_token: the losses themselves, `[batch pos-1]`; `[batch pos]` on a cached prefix whose
                `last_logits` are known, which predict the first token.
            prepend_bos: for text; None is `default_prepend_bos`. On a cache that holds tokens text goes on from
                them: it is encoded together with them, and there is no BOS to prepend.
            padding_side: for texts of different length; None is the tokenizer's own.
            attention_mask: `[batch pos]`, 1 for tokens and 0 for padding. None: for text, the padding that was
                added; ids are all tokens but runs of a dedicated pad id at a row's ends (`hooklens.tokens.padding`).
            positions: position of each column, in place of what the mask says.
            document_ids: the document of each column, `[batch pos]` or `[pos]`, -1 for padding: the tokens of a row
                that have the same number stand one after another and see no others, as if each document were run
                alone. Edits and `logits_at` go on counting along the row; no first token of a document counts in the
                loss. On a cache with documents the ids go on, too; without ids the last document goes on.
            document_borders: the same said by where documents start: booleans, `[batch pos]` or `[pos]`, or columns of
                this call, alike in all rows.
            restart_positions: count positions within each document. False: along the row. None: as the cache does,
                else within each document, or along the row in a network whose documents see each other
                (`cfg.document_mask=False`).
            past_kv_cache: what came before; a frozen one is read, another one is appended to.
            start_at_layer: `input` is the stream entering this block; blocks below do not run.
            stop_at_layer: return the stream entering this block (`n_layers`: the last `resid_post`); blocks
                from here on do not run.
            logits_at: positions to unembed (an int, a slice, or a list), counted over each row's real tokens;
                negative ones from its end. The position axis stays.

        Raises:
            InputError: arguments that do not fit each other or the model, or text that does not go on from the
                tokens in the cache.
            CacheError: a cache that does not fit, or does not know the tokens that text goes on from.
        """
        call = self._prepare(
            input,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            positions=positions,
            document_ids=document_ids,
            document_borders=document_borders,
            restart_positions=restart_positions,
            past_kv_cache=past_kv_cache,
            start_at_layer=start_at_layer,
        )
        return self._run_call(
            call,
            return_type=return_type,
            loss_per_token=loss_per_token,
            stop_at_layer=stop_at_layer,
            logits_at=logits_at,
        )

    def _run_call(
        self,
        call: PreparedCall,
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        logits_at: LogitsAt = None,
        listeners: Listeners = NOBODY,
    ) -> Output:
        wants_loss = return_type in ("loss", "both")
        check_return_type(return_type, loss_per_token, call.start_at_layer, stop_at_layer, logits_at)
        if wants_loss:
            refuse_other_outputs(self.cfg, f"return_type={return_type!r}: the loss of the next token", InputError)
        cache = call.past_kv_cache
        # Before the call, which may append to the cache.
        before = None if cache is None or not wants_loss else cache.last_logits
        out = self.run(
            call.input,
            call.plan,
            listeners=listeners,
            past_kv_cache=call.past_kv_cache,
            start_at_layer=call.start_at_layer,
            stop_at_layer=stop_at_layer,
            logits_at=logits_at,
            unembed=return_type is not None,
        )
        if return_type is None and stop_at_layer is None:
            return None
        if not wants_loss:
            return out
        loss = next_token_loss(
            out,
            call.input,
            call.plan.attention_mask,
            last_logits=before,
            starts_document=call.plan.starts_document,
            per_token=loss_per_token,
        )
        return LogitsAndLoss(out, loss) if return_type == "both" else loss

    def _prepare(
        self,
        input: Input,
        end: Literal["closed", "open"] = "closed",
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_borders: Borders = None,
        restart_positions: bool | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
        start_at_layer: int | None = None,
    ) -> PreparedCall:
        """Turn an input into token ids (or take the stream as it is) and plan the call.

        Text that is `"open"`, because something follows, leaves out what the tokenizer puts behind a text.
        """
        if start_at_layer is not None:
            stream = check_stream(input, self.cfg.d_model, self.dtype, self.devices)
            marks = self.read_documents(stream, document_ids, document_borders, restart_positions)
            plan = self.make_plan(stream, attention_mask, positions, past_kv_cache, marks=marks)
            return PreparedCall(stream, plan, past_kv_cache, start_at_layer)
        # Document ids say which columns are padding: it is not guessed from the tokens.
        past = read_past(self, input, past_kv_cache)
        said = document_ids is not None and attention_mask is None and not tokenization.is_text(input)
        ids, attention_mask = tokenization.read_tokens(
            input,
            self.tokenizer,
            d_vocab=self.cfg.d_vocab,
            n_ctx=self.cfg.n_ctx,
            attention_mask=document_ids != NO_DOCUMENT if said else attention_mask,
            prepend_bos=self.bos_rule(prepend_bos=prepend_bos, begins=past is None),
            padding_side=padding_side,
            past=past,
            closed=end == "closed",
        )
        tokenization.check_has_values(ids, self.device)
        ids = tokenization.as_usable(ids.to(self.device))
        marks = self.read_documents(ids, document_ids, document_borders, restart_positions)
        plan = self.make_plan(ids, None if said else attention_mask, positions, past_kv_cache, marks=marks)
        return PreparedCall(ids, plan, past_kv_cache, None)

    if TYPE_CHECKING:

        @overload  # type: ignore[override]
        def run_with_cache(
            self,
            input: Input,
            *,
            return_type: Literal["logits", "loss"] = ...,
            stop_at_layer: int | None = ...,
            **options: Unpack[CachedCallOptions],
        ) -> tuple[Tensor, ActivationCache]: ...
        @overload
        def run_with_cache(
            self,
            input: Input,
            *,
            return_type: Literal["both"],
            stop_at_layer: None = ...,
            **options: Unpack[CachedCallOptions],
        ) -> tuple[LogitsAndLoss, ActivationCache]: ...
        @overload
        def run_with_cache(
            self,
            input: Input,
            *,
            return_type: None,
            stop_at_layer: None = ...,
            **options: Unpack[CachedCallOptions],
        ) -> tuple[None, ActivationCache]: ...
        @overload
        def run_with_cache(
            self,
            input: Input,
            *,
            return_type: None,
            stop_at_layer: int,
            **options: Unpack[CachedCallOptions],
        ) -> tuple[Tensor, ActivationCache]: ...
        @overload
        def run_with_cache(
            self,
            input: Input,
            *,
            return_type: ReturnType,
            stop_at_layer: int | None = ...,
            **options: Unpack[CachedCallOptions],
        ) -> tuple[Output, ActivationCache]: ...

    @reads(**CALLING, **LISTENING, **CAPTURING, remove_batch_dim=read_flag, check_memory=read_flag)
    def run_with_cache(
        self,
        input: Input,
        *,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: Choice = None,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        splices: Sequence[Splice] = (),
        check_memory: bool = True,
        **forward_keywords: Any,
    ) -> tuple[Output, ActivationCache]:
        """Run the model and keep activations.

        Args:
            input: as for a call.
            names_filter: which activations: None for all but the on-request ones, a name, word or glob
                (`"*"` is everything), a list of them, or `predicate(name)`.
            device: where to keep them; None: where they are, uncopied.
            dtype: what to keep them in; None: their own.
            remove_batch_dim: drop the batch axis, which must have size 1.
            incl_bwd: also run backward from the output, which must be a scalar loss (`return_type="loss"`),
                and keep gradients under `"<name>_grad"`. The parameters' gradients accumulate, too.
            pos_slice: positions to keep, columns of this call: an int, a slice, or a list. The axis stays, also for
                an int. At `unembed.*` they are counted over the positions of `logits_at`.
            fwd_hooks: pairs (name or filter, `fn(tensor, hook)`) that last for this call.
            bwd_hooks: the same for gradients.
            edits: values from `hooklens.edits`.
            splices: sparse autoencoders and the like (`sae.at(name)`); they act after `edits`.
            check_memory: refuse a call that takes more than the free memory (`hooklens.plan`). Calls that are small
                beside it are not looked at; functions of one's own (`fwd_hooks`, `bwd_hooks`) are not counted.
            **forward_keywords: keywords of a call (`return_type`, `attention_mask`, ...).

        Returns:
            The output, and an `ActivationCache`.

        Raises:
            HookNameError: a part of the filter selects nothing.
            InsufficientMemoryError: the call does not fit into the free memory; before the forward.
            InputError: `pos_slice` is of another kind, out of range, or keeps nothing; before the forward.
        """
        prepare_keywords, run_keywords = _KEYWORDS.split(forward_keywords, self.run_with_cache)
        require_gradients(incl_bwd or bwd_hooks, "incl_bwd" if incl_bwd else "bwd_hooks")
        if incl_bwd and (forward_keywords.get("return_type") != "loss" or forward_keywords.get("loss_per_token")):
            raise InputError("incl_bwd needs a scalar to run backward from: call with return_type='loss'")
        call = self._prepare(input, **prepare_keywords)
        idle = self._find_idle(forward_keywords)
        with naming(self, splices):
            points = self.select_hook_points(names_filter, idle=idle)
            own = self.listen(fwd_hooks, bwd_hooks, edits, splices=splices, idle=idle)
        columns = self._choose_columns(pos_slice, run_keywords.get("logits_at"), call, points)
        if check_memory:
            said: dict[str, Any] = {"device": device, "dtype": dtype, "incl_bwd": incl_bwd, "pos_slice": pos_slice}
            said |= {"names_filter": names_filter, "edits": edits, "splices": splices, **forward_keywords}
            refuse_beyond_memory(self, input, call, len(points), said)
        capture = Capture(points, device=device, dtype=dtype, pos_slice=columns, incl_bwd=incl_bwd)
        listeners = join_listeners([own, capture.listeners])
        output = self._run_call(call, listeners=listeners, **run_keywords)
        if incl_bwd:
            run_backward(output, capture)
        cache = ActivationCache(
            capture.tensors,
            cfg=self.cfg,
            transforms=self.transforms,
            tokens=call.input if call.start_at_layer is None else None,
            attention_mask=call.plan.key_mask,
            positions=None if columns is None else tuple(columns),
            weights=self.named_weights(),
        )
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def _find_idle(self, keywords: dict[str, Any]) -> frozenset[str]:
        return self.idle_points(
            start_at_layer=keywords.get("start_at_layer"), stop_at_layer=keywords.get("stop_at_layer")
        )

    @staticmethod
    def _choose_columns(
        pos_slice: Choice, logits_at: LogitsAt, call: PreparedCall, points: Collection[str]
    ) -> list[int] | None:
        """The columns that a capture keeps, before anything runs."""
        if pos_slice is None:
            return None
        columns = choose_columns(pos_slice, call.plan.n_new, where="positions run in this call")
        if logits_at is not None:
            held = call.plan.choose_columns(logits_at).columns
            for name in points:
                if name.startswith("unembed."):
                    columns_among(columns, held, name)
        return columns

    if TYPE_CHECKING:

        @overload  # type: ignore[override]
        def run_with_hooks(
            self,
            input: Input,
            *,
            return_type: Literal["logits", "loss"] = ...,
            stop_at_layer: int | None = ...,
            **options: Unpack[HookedCallOptions],
        ) -> Tensor: ...
        @overload
        def run_with_hooks(
            self,
            input: Input,
            *,
            return_type: Literal["both"],
            stop_at_layer: None = ...,
            **options: Unpack[HookedCallOptions],
        ) -> LogitsAndLoss: ...
        @overload
        def run_with_hooks(
            self,
            input: Input,
            *,
            return_type: None,
            stop_at_layer: None = ...,
            **options: Unpack[HookedCallOptions],
        ) -> None: ...
        @overload
        def run_with_hooks(
            self,
            input: Input,
            *,
            return_type: None,
            stop_at_layer: int,
            **options: Unpack[HookedCallOptions],
        ) -> Tensor: ...
        @overload
        def run_with_hooks(
            self,
            input: Input,
            *,
            return_type: ReturnType,
            stop_at_layer: int | None = ...,
            **options: Unpack[HookedCallOptions],
        ) -> Output: ...

    @reads(**CALLING, **LISTENING)
    def run_with_hooks(
        self,
        input: Input,
        *,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        splices: Sequence[Splice] = (),
        **forward_keywords: Any,
    ) -> Output:
        """Run the model with hooks and edits that last for this call; other keywords are a call's.

        Backward hooks act in every backward pass from the output, also later ones.

        Raises:
            HookNameError: a hook or edit names no hook point, or none that this call reaches.
        """
        prepare_keywords, run_keywords = _KEYWORDS.split(forward_keywords, self.run_with_hooks)
        require_gradients(bwd_hooks, "bwd_hooks")
        with naming(self, splices):
            idle = self._find_idle(forward_keywords)
            listeners = self.listen(fwd_hooks, bwd_hooks, edits, splices=splices, idle=idle)
        return self._run_call(self._prepare(input, **prepare_keywords), listeners=listeners, **run_keywords)

    @reads(**CALLING)
    def prefill(self, prefix: Input, **forward_keywords: Unpack[InputKeywords]) -> HookedKeyValueCache:
        """A frozen key-value cache of a prefix, to run any number of continuations on.

        A prefix of one row serves batches of any size. `kv.last_logits` holds the logits at each row's last
        token. Of text, what a tokenizer puts behind it (an EOS, in some) is left out, since the text goes on.

        Args:
            prefix: text or token ids.
            **forward_keywords: keywords of a call (`attention_mask`, `prepend_bos`, ...).
        """
        prepare_keywords, run_keywords = _KEYWORDS.split(forward_keywords, self.prefill)
        clash = sorted({*run_keywords, "past_kv_cache", "start_at_layer"} & forward_keywords.keys())
        if clash:
            raise InputError(f"prefill sets {clash} itself: leave them out")
        ids = self._prepare(prefix, "open", **prepare_keywords)
        cache = HookedKeyValueCache.init_cache(self.cfg, self.device, len(ids.input), dtype=self.dtype)
        marks = self.read_documents(ids.input, *(prepare_keywords.get(name) for name in _SAYS_DOCUMENTS))
        plan = self.make_plan(ids.input, ids.plan.attention_mask, prepare_keywords.get("positions"), cache, marks=marks)
        # Out of inference_mode, whose tensors no later call could compute gradients with.
        with torch.inference_mode(mode=False), torch.no_grad():
            logits = self.run(ids.input, plan, past_kv_cache=cache, logits_at=-1)
        cache.last_logits = logits[:, 0].detach()
        return cache.freeze()

    def _summary(self) -> Summary:
        return summarise(self)

    def hook_table(self) -> "pandas.DataFrame":
        """Every hook point of this model: name, axes, shape, on_request, description.

        Sizes that the input decides stand in the shape as axis names.
        """
        table: pandas.DataFrame = import_package("pandas").DataFrame(
            [self._describe_point(name, point) for name, point in self.hook_points().items()]
        )
        return table

    def _describe_point(self, name: str, point: HookPoint) -> dict[str, Any]:
        site = self.cfg.description.points.get(name) or point.site
        if site is None:
            return {"name": name, "axes": None, "shape": None, "on_request": False, "description": ""}
        return {
            "name": name,
            "axes": site.axes,
            "shape": tuple(axis if axis in _BY_INPUT else self._size(name, axis) for axis in site.axes),
            "on_request": site.on_request,
            "description": site.description,
        }

    def _size(self, name: str, axis: str) -> int:
        """The size of an axis at a hook point, as the part it stands in knows it."""
        part = self.get_submodule(name.rpartition(".")[0])
        return part.size_of(axis) if isinstance(part, Part | Adapted) else self.cfg.size(axis)


_SAYS_DOCUMENTS = ("document_ids", "document_borders", "restart_positions")
_BY_INPUT = frozenset({"batch", "pos", "query", "key"})
_KEYWORDS = CallKeywords(HookedCausalLM.forward, HookedCausalLM._prepare)
_KEYWORDS.show(HookedCausalLM.run_with_cache)
_KEYWORDS.show(HookedCausalLM.run_with_hooks)
_KEYWORDS.show(HookedCausalLM.prefill, names=InputKeywords.__annotations__)
