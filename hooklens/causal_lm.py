"""`HookedCausalLM`: where loading, tokens, the network and generation meet.

Every method here is a few lines that hand over to the module that does the work.
"""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.activation_cache import ActivationCache
from hooklens.adapters import build_hf_model, open_checkpoint, read_hf_model, write_checkpoint
from hooklens.axes import find_site
from hooklens.bundled import bundled_path
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, InputError, suggest_names
from hooklens.hooks.capture import PosSlice
from hooklens.hooks.edits import Edit
from hooklens.hooks.module import HookList, require_gradients
from hooklens.hooks.names import NamesFilter
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.decoder import next_token_loss
from hooklens.model.parameters import ModelWeights, check_tied, fill_parameters
from hooklens.model.positions import LogitsAt, TokenPlan
from hooklens.model.weight_views import WeightViews
from hooklens.optional import import_package
from hooklens.tokens import PaddingSide, Tokenizer
from hooklens.weights.processing import process_weights

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel

Input = str | Sequence[str] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"] | Float[Tensor, "batch pos d_model"]
ReturnType = Literal["logits", "loss", "both"] | None

_RECORD_FILE = "hooklens.json"
_BUNDLED = "bundled:"


class LogitsAndLoss(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Tensor


class HookedCausalLM(WeightViews):
    """A decoder-only language model with a named hook point at every activation.

    Args:
        cfg: the network.
        tokenizer: a transformers tokenizer, needed only for text.

    Attributes:
        cfg: the network's configuration.
        tokenizer: the tokenizer, or None.
        transforms: the weight-processing steps that were done, in order.

    Example:
        >>> model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
        >>> logits, cache = model.run_with_cache("When Mary and John went to the store")
        >>> cache["pattern", 0].shape
        torch.Size([1, 4, 9, 9])
    """

    def __init__(self, cfg: HookedConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(cfg)
        self.tokenizer = tokenizer
        self.transforms: tuple[str, ...] = ()
        if self.device.type != "meta":
            self.initialize()
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: torch.device | str = "cpu",
        layers: Sequence[int] | None = None,
        tokenizer: Tokenizer | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> "HookedCausalLM":
        """Load a checkpoint in Hugging Face format.

        Args:
            source: a name on the hub, a local folder (no network is touched), or a bundled checkpoint
                (`"bundled:tiny-llama"`).
            revision: branch, tag or commit on the hub.
            dtype: of the weights; `"auto"` is the checkpoint's own.
            device: where to put the weights.
            layers: keep only these blocks, in this order.
            tokenizer: used in place of the checkpoint's own.
            cache_dir: the hub's cache folder.
            local_files_only: use what the hub's cache holds, and no network.

        Raises:
            CheckpointError: files or tensors are missing, damaged, or too many.
            UnsupportedModelError: the architecture, or a value in its config, is not implemented.
        """
        if isinstance(source, str) and source.startswith(_BUNDLED):
            source = bundled_path(source.removeprefix(_BUNDLED))
        checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
        kept = None if layers is None else list(layers)
        model = cls._from_tensors(
            checkpoint.config_for(kept),
            checkpoint.tensors(kept),
            tokenizer=tokenizer or _load_tokenizer(checkpoint.folder),
            device=device,
            dtype=checkpoint.dtype if dtype == "auto" else dtype,
        )
        model.transforms = _read_transforms(checkpoint.folder)
        return model

    @classmethod
    def from_hf(cls, hf_model: "PreTrainedModel", tokenizer: Tokenizer | None = None) -> "HookedCausalLM":
        """Take over a transformers model's weights, sharing memory where its layout allows.

        Raises:
            UnsupportedModelError: the architecture, or a value in its config, is not implemented.
        """
        cfg, state = read_hf_model(hf_model)
        return cls._from_tensors(cfg, state.items(), tokenizer=tokenizer, device=hf_model.device)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], cfg: HookedConfig, tokenizer: Tokenizer | None = None
    ) -> "HookedCausalLM":
        """Build a model from weights under HookLens' own names; they are used as they are, not copied.

        Raises:
            CheckpointError: a missing, unknown or misshapen weight.
        """
        check_tied(state, tied_unembed=cfg.tied_unembed)
        device = state["embed.W_E"].device if "embed.W_E" in state else "cpu"
        return cls._from_tensors(cfg, state.items(), tokenizer=tokenizer, device=device)

    @classmethod
    def _from_tensors(
        cls,
        cfg: HookedConfig,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        tokenizer: Tokenizer | None,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
    ) -> "HookedCausalLM":
        with torch.device("meta"):
            model = cls(cfg, tokenizer)
        fill_parameters(model, tensors, device=device, dtype=dtype)
        return model

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads, tokenizer included.

        Args:
            folder: made if it does not exist.
            dtype: of the written weights; None: the model's.
            max_shard_size: files are split at this size.

        Raises:
            UnsupportedModelError: no Hugging Face architecture can hold this network; the text says why.
        """
        write_checkpoint(Path(folder), self.cfg, ModelWeights(self), dtype=dtype, max_shard_size=max_shard_size)
        record = Path(folder) / _RECORD_FILE
        if self.transforms:
            record.write_text(json.dumps({"transforms": self.transforms}))
        else:
            record.unlink(missing_ok=True)
        if self.tokenizer is not None and hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(str(folder))

    def to_hf(self) -> "PreTrainedModel":
        """The transformers model with equal logits.

        Raises:
            UnsupportedModelError: no Hugging Face architecture can hold this network.
        """
        return build_hf_model(self.cfg, ModelWeights(self))

    def process_weights(
        self,
        *,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
        refactor_factored_attn_matrices: bool = False,
    ) -> "HookedCausalLM":
        """A new model that computes the same with weights that are easier to read; this one stays as it is.

        See `hooklens.weights.processing` for what each step does, and what it preserves.

        Raises:
            TransformError: a step cannot hold for this architecture; the text says why.
        """
        processed = process_weights(
            ModelWeights(self),
            self.cfg,
            fold_ln=fold_ln,
            center_writing_weights=center_writing_weights,
            center_unembed=center_unembed,
            fold_value_biases=fold_value_biases,
            refactor_factored_attn_matrices=refactor_factored_attn_matrices,
        )
        copied = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in processed.state.items()}
        model = self.from_state_dict(copied, processed.cfg, self.tokenizer)
        model.transforms = (*self.transforms, *processed.steps)
        return model

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
        past_kv_cache: HookedKeyValueCache | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        logits_at: LogitsAt = None,
    ) -> Tensor | LogitsAndLoss | None:
        """Run the model.

        Args:
            input: text, a list of texts, token ids `[batch pos]` or `[pos]`; with `start_at_layer` the residual
                stream `[batch pos d_model]` entering that block.
            return_type: `"logits"` `[batch pos d_vocab]`; `"loss"`, the mean cross-entropy of the next token in
                nats; `"both"`, a named tuple of the two; None, nothing, and no logits are computed unless
                somebody listens there.
            loss_per_token: the losses themselves, `[batch pos-1]`.
            prepend_bos: for text; None is the tokenizer's own rule (with a cache: False, text goes on).
            padding_side: for texts of different length; None is the tokenizer's own.
            attention_mask: `[batch pos]`, 1 for tokens and 0 for padding. None: for text, what padding was
                added; for ids, what can be inferred from the tokenizer's padding token.
            positions: position of each column, in place of what the mask says.
            past_kv_cache: what came before; a frozen one is read, another one is appended to.
            start_at_layer: `input` is the stream entering this block; blocks below do not run.
            stop_at_layer: return the stream entering this block (`n_layers`: the last `resid_post`); blocks
                from here on do not run.
            logits_at: positions to unembed (an int, a slice, or a list), counted over each row's real tokens;
                negative ones from its end. The position axis stays.

        Raises:
            InputError: arguments that do not fit each other or the model.
            CacheError: a cache that does not fit.
        """
        call = self._prepare(
            input,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
            positions=positions,
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
        call: "_Call",
        *,
        return_type: ReturnType = "logits",
        loss_per_token: bool = False,
        stop_at_layer: int | None = None,
        logits_at: LogitsAt = None,
    ) -> Tensor | LogitsAndLoss | None:
        wants_loss = return_type in ("loss", "both")
        _check_return_type(return_type, loss_per_token, call.start_at_layer, stop_at_layer, logits_at)
        out = self.run(
            call.input,
            call.plan,
            past_kv_cache=call.past_kv_cache,
            start_at_layer=call.start_at_layer,
            stop_at_layer=stop_at_layer,
            logits_at=logits_at,
            unembed=return_type is not None or self._listens_past_blocks(),
        )
        if return_type is None and stop_at_layer is None:
            return None
        if not wants_loss:
            return out
        loss = next_token_loss(out, call.input, call.plan.attention_mask, per_token=loss_per_token)
        return LogitsAndLoss(out, loss) if return_type == "both" else loss

    def _listens_past_blocks(self) -> bool:
        unembed = self.unembed
        return self.ln_final.listening or unembed.hook_in.listening or unembed.hook_out.listening

    def _prepare(
        self,
        input: Input,
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        past_kv_cache: HookedKeyValueCache | None = None,
        start_at_layer: int | None = None,
    ) -> "_Call":
        """Turn an input into token ids (or take the stream as it is) and plan the call."""
        if start_at_layer is not None:
            stream = _check_stream(input, self.cfg.d_model, self.dtype, self.device)
            plan = self.make_plan(stream, attention_mask, positions, past_kv_cache)
            return _Call(stream, plan, past_kv_cache, start_at_layer)
        if isinstance(input, Tensor):
            tokenization.check_token_ids(input, self.cfg.d_vocab)
            ids = input[None] if input.ndim == 1 else input
            if attention_mask is None and self.tokenizer is not None:
                attention_mask = self._infer_attention_mask(ids, padding_side)
            elif attention_mask is not None and attention_mask.ndim == 1:
                attention_mask = attention_mask[None]
        else:
            if prepend_bos is None and past_kv_cache is not None and len(past_kv_cache):
                prepend_bos = False
            ids, text_mask = tokenization.to_tokens(
                self._need_tokenizer(),
                input,
                prepend_bos=prepend_bos,
                padding_side=padding_side,
                truncate=False,
                n_ctx=self.cfg.n_ctx,
            )
            attention_mask = text_mask if attention_mask is None else attention_mask
        ids = ids.to(self.device)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return _Call(ids, self.make_plan(ids, mask, positions, past_kv_cache), past_kv_cache, None)

    def _infer_attention_mask(self, ids: Tensor, padding_side: PaddingSide | None) -> Tensor | None:
        tokenizer = self._need_tokenizer()
        return tokenization.infer_attention_mask(
            ids,
            pad_token_id=tokenization.padding_token_id(tokenizer),
            bos_token_id=getattr(tokenizer, "bos_token_id", None),
            eos_token_id=getattr(tokenizer, "eos_token_id", None),
            padding_side=padding_side,
        )

    def run_with_cache(
        self,
        input: Input,
        *,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        pos_slice: PosSlice = None,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        **forward_keywords: Any,
    ) -> tuple[Any, ActivationCache]:
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
            pos_slice: positions (columns) to keep.
            fwd_hooks: pairs (name or filter, `fn(tensor, hook)`) that last for this call.
            bwd_hooks: the same for gradients.
            edits: values from `hooklens.edits`.
            **forward_keywords: keywords of a call (`return_type`, `attention_mask`, ...).

        Returns:
            The output, and an `ActivationCache`.

        Raises:
            HookNameError: a part of the filter selects nothing.
        """
        prepare_keywords, run_keywords = _split_forward_keywords(forward_keywords)
        require_gradients(incl_bwd or bwd_hooks, "incl_bwd" if incl_bwd else "bwd_hooks")
        if incl_bwd and (forward_keywords.get("return_type") != "loss" or forward_keywords.get("loss_per_token")):
            raise InputError("incl_bwd needs a scalar to run backward from: call with return_type='loss'")
        call = self._prepare(input, **prepare_keywords)
        with (
            self.hooks(fwd_hooks, bwd_hooks, edits),
            self.capture(names_filter, device=device, dtype=dtype, pos_slice=pos_slice, incl_bwd=incl_bwd) as captured,
        ):
            output = self._run_call(call, **run_keywords)
            if incl_bwd:
                output.backward()  # type: ignore[union-attr]
        cache = ActivationCache(
            captured,
            cfg=self.cfg,
            transforms=self.transforms,
            tokens=call.input if call.start_at_layer is None else None,
            attention_mask=call.plan.key_mask,
            weights=ModelWeights(self),
        )
        return output, cache.remove_batch_dim() if remove_batch_dim else cache

    def run_with_hooks(  # type: ignore[override]
        self,
        input: Input,
        *,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        **forward_keywords: Any,
    ) -> Any:
        """Run the model with hooks and edits that last for this call; other keywords are a call's.

        Raises:
            HookNameError: a hook or edit names no hook point.
        """
        _split_forward_keywords(forward_keywords)
        return super().run_with_hooks(input, fwd_hooks=fwd_hooks, bwd_hooks=bwd_hooks, edits=edits, **forward_keywords)

    def prefill(self, prefix: Input, **forward_keywords: Any) -> HookedKeyValueCache:
        """A frozen key-value cache of a prefix, to run any number of continuations on.

        A prefix of one row serves batches of any size. `kv.last_logits` holds the logits at each row's last
        token.

        Args:
            prefix: text or token ids.
            **forward_keywords: keywords of a call (`attention_mask`, `prepend_bos`, ...).
        """
        prepare_keywords, run_keywords = _split_forward_keywords(forward_keywords)
        clash = sorted({*run_keywords, "past_kv_cache", "start_at_layer"} & forward_keywords.keys())
        if clash:
            raise InputError(f"prefill sets {clash} itself: leave them out")
        ids = self._prepare(prefix, **prepare_keywords)
        cache = HookedKeyValueCache.init_cache(self.cfg, self.device, len(ids.input), dtype=self.dtype)
        plan = self.make_plan(ids.input, ids.plan.attention_mask, prepare_keywords.get("positions"), cache)
        with torch.no_grad():
            logits = self.run(ids.input, plan, past_kv_cache=cache, logits_at=-1)
        cache.last_logits = logits[:, 0].detach()
        return cache.freeze()

    def to_tokens(
        self,
        text: str | Sequence[str],
        *,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of text; see `hooklens.tokens.to_tokens` for the rules."""
        batch = tokenization.to_tokens(
            self._need_tokenizer(),
            text,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            truncate=truncate,
            n_ctx=self.cfg.n_ctx,
        )
        return batch.tokens.to(self.device)

    def to_string(self, tokens: int | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
        """The text of token ids: a string for one row, a list of strings for several."""
        return tokenization.to_string(self._need_tokenizer(), tokens)

    def to_str_tokens(self, input: Any, *, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """The text of each token of a prompt or row of ids."""
        return tokenization.to_str_tokens(self._need_tokenizer(), input, prepend_bos=prepend_bos)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            InputError: it is none or several; the text names them.
        """
        return tokenization.to_single_token(self._need_tokenizer(), text)

    def to_single_str_token(self, token: int) -> str:
        """The text of one token id."""
        return tokenization.to_single_str_token(self._need_tokenizer(), token)

    def get_token_position(
        self, token: str | int, input: Any, *, mode: Literal["first", "last"] = "first", prepend_bos: bool | None = None
    ) -> int:
        """Where a token stands in a prompt.

        Raises:
            InputError: it does not occur.
        """
        return tokenization.get_token_position(self._need_tokenizer(), token, input, mode=mode, prepend_bos=prepend_bos)

    def tokens_to_residual_directions(self, tokens: str | int | Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        """The unembedding direction of each token: the column of `W_U` whose product with the stream is its logit."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.device)
        return self.W_U.T[ids]

    def hook_table(self) -> "pandas.DataFrame":
        """Every hook point of this model: name, axes, shape, on_request, description.

        Sizes that the input decides stand in the shape as axis names.
        """
        table: pandas.DataFrame = import_package("pandas").DataFrame(
            [self._describe_point(name) for name in self.hook_points()]
        )
        return table

    def _describe_point(self, name: str) -> dict[str, Any]:
        site = find_site(name)
        assert site is not None
        by_input = {"batch", "pos", "query", "key"}
        return {
            "name": name,
            "axes": site.axes,
            "shape": tuple(axis if axis in by_input else self.cfg.size(axis) for axis in site.axes),
            "on_request": site.on_request,
            "description": site.description,
        }

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "text was given, but the model has no tokenizer; pass token ids, or load with tokenizer=..."
            )
        return self.tokenizer


class _Call(NamedTuple):
    """A call whose input is known to fit the model."""

    input: Tensor
    plan: TokenPlan
    past_kv_cache: HookedKeyValueCache | None
    start_at_layer: int | None


def _keywords_of(method: Any) -> frozenset[str]:
    parameters = inspect.signature(method).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


_PREPARE_KEYWORDS = _keywords_of(HookedCausalLM._prepare)
_RUN_KEYWORDS = _keywords_of(HookedCausalLM._run_call)


def _split_forward_keywords(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords of a call, those that shape the input and those that shape the output.

    Raises:
        TypeError: a keyword that a call does not take.
    """
    known = _PREPARE_KEYWORDS | _RUN_KEYWORDS
    unknown = sorted(keywords.keys() - known)
    if unknown:
        raise TypeError(
            f"unexpected keyword {unknown[0]!r}.{suggest_names(unknown[0], known)} A call takes {', '.join(sorted(known))}"
        )
    prepare = {name: value for name, value in keywords.items() if name in _PREPARE_KEYWORDS}
    return prepare, {name: value for name, value in keywords.items() if name in _RUN_KEYWORDS}


def _check_return_type(
    return_type: ReturnType,
    loss_per_token: bool,  # noqa: FBT001
    start_at_layer: int | None,
    stop_at_layer: int | None,
    logits_at: LogitsAt,
) -> None:
    if return_type not in ("logits", "loss", "both", None):
        raise InputError(f"return_type is {return_type!r}; expected 'logits', 'loss', 'both' or None")
    if return_type in ("loss", "both"):
        clash = {"start_at_layer": start_at_layer, "stop_at_layer": stop_at_layer, "logits_at": logits_at}
        given = [name for name, value in clash.items() if value is not None]
        if given:
            raise InputError(
                f"return_type={return_type!r} needs token ids and logits at every position; leave out {given}"
            )
    elif loss_per_token:
        raise InputError(f"loss_per_token needs return_type 'loss' or 'both', got {return_type!r}")
    if stop_at_layer is not None and logits_at is not None:
        raise InputError("stop_at_layer returns the residual stream: logits_at has nothing to select")


def _check_stream(stream: object, d_model: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if not isinstance(stream, Tensor) or stream.ndim != 3 or stream.shape[-1] != d_model:
        found = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
        raise InputError(f"with start_at_layer the input is the residual stream [batch, pos, {d_model}]; got {found}")
    if (stream.dtype, stream.device) != (dtype, device):
        raise InputError(
            f"the residual stream is {stream.dtype} on {stream.device}, the model {dtype} on {device}; convert it"
        )
    return stream


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None where it ships none."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    tokenizer: Tokenizer = import_package("transformers").AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    return tokenizer


def _read_transforms(folder: Path) -> tuple[str, ...]:
    record = folder / _RECORD_FILE
    if not record.exists():
        return ()
    try:
        return tuple(json.loads(record.read_text())["transforms"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{record}: cannot be read as a record of weight processing ({error})") from error
