"""Other forms of a model: transformers models, state dicts, xlstm-jax's trees, saved folders, processed weights."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hooklens.adapters import (
    build_hf_model,
    read_hf_generation_config,
    read_hf_model,
    read_xlstm,
    write_checkpoint,
    write_xlstm,
)
from hooklens.arguments import (
    MOST_ENTRIES,
    optional,
    read_device,
    read_dtype,
    read_flag,
    read_int,
    read_path,
    reads,
    refusal,
    require,
    show,
)
from hooklens.causal_lm.loading import build_from_tensors
from hooklens.causal_lm.settings import hand_on_settings
from hooklens.config import HookedConfig
from hooklens.errors import (
    CheckpointError,
    HookLensError,
    InputError,
    TransformError,
    UnsupportedModelError,
    join_names,
)
from hooklens.model.decoder import Decoder
from hooklens.model.parameters import ModelWeights, check_tied, name_as_field
from hooklens.model.parts.adapted import adapted_maps, refuse_adapters
from hooklens.model.parts.quantised import describe_maps, quantised_maps
from hooklens.model.placement.placement import find_place
from hooklens.model.placement.shared_weights import refuse_shared
from hooklens.tokens import Tokenizer, read_tokenizer
from hooklens.weights.offloaded import refuse_offloaded
from hooklens.weights.processing import process_weights
from hooklens.weights.steps import Processed, ProcessingStep, take_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="CheckpointMethods")

_TOKENIZER = optional(read_tokenizer)


def _read_shard_size(given: object, *, what: str, error: type[HookLensError]) -> int | str:
    if isinstance(given, str) and re.fullmatch(r"\d+(\.\d+)?\s*[KMGTP]B", given, re.IGNORECASE | re.ASCII):
        return given
    if isinstance(given, str):
        raise refusal(given, what, "a number of bytes, or a text such as '5GB'", error)
    return read_int(given, what=what, least=1, error=error)


def _read_state(given: object, *, what: str, error: type[HookLensError]) -> Mapping[str, Tensor]:
    require(given, kind=Mapping, what=what, expected="a mapping from names to tensors", error=error)
    assert isinstance(given, Mapping)
    wrong = [name for name, value in given.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if wrong:
        listed = ", ".join(f"{show(name)}: {show(given[name])}" for name in wrong[:5])
        raise error(f"{what} holds {listed}, expected tensors by name")
    return given


def _read_transformers_model(given: object, *, what: str, error: type[HookLensError]) -> Any:
    """A transformers model, without what runs it in parallel or compiled around it."""
    model: Any = given
    while isinstance(model, nn.Module) and (inside := _find_wrapped(model)) is not None:
        model = inside
    if isinstance(model, nn.Module) and isinstance(getattr(model, "pretrained_model", None), nn.Module):
        raise refusal(given, what, "a transformers model; the one inside this is its pretrained_model", error)
    if isinstance(model, nn.Module) and hasattr(getattr(model, "config", None), "to_dict") and hasattr(model, "device"):
        return model
    raise refusal(given, what, "a transformers model (a name or folder goes to from_pretrained)", error)


def _find_wrapped(model: nn.Module) -> nn.Module | None:
    """The model that another module only runs: compiled (`torch.compile`), or on several devices."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        wrapped: nn.Module = model.module
        return wrapped
    inside = model.__dict__.get("_modules", {}).get("_orig_mod")
    return inside if isinstance(inside, nn.Module) else None


class CheckpointMethods:
    """Saving and converting a network.

    Attributes:
        tokenizer: a transformers tokenizer, or None.
        transforms: the weight-processing steps that were done, in order.
        generation_config: the contents of the checkpoint's `generation_config.json`, saved with the model; empty where
            there is none. `generate` takes its `eos_token_id` (one or a list) where it is given none, and fills
            rows with its `pad_token_id`. Its sampling settings do not act by themselves: the defaults of `generate` are
            what its signature says.
    """

    cfg: HookedConfig
    tokenizer: Tokenizer | None
    transforms: tuple[str, ...]
    generation_config: dict[str, Any]

    def as_decoder(self) -> Decoder:
        """The network that is loaded or saved."""
        assert isinstance(self, Decoder)
        return self

    @classmethod
    @reads(hf_model=_read_transformers_model, tokenizer=_TOKENIZER, share=optional(read_flag))
    def from_hf(
        cls: type[Model],
        hf_model: "PreTrainedModel",
        tokenizer: Tokenizer | None = None,
        *,
        share: bool | None = None,
    ) -> Model:
        """Take over a transformers model's weights: all of them in the same memory, or all of them copied.

        In shared memory a change of one model (an optimiser's step, an edit in place) is a change of the other. Never
        is a part of the weights shared, which would leave both models half changed.

        LoRA adapters of PEFT that act in the model are merged, as `from_pretrained(adapter=...)` does; the model that
        was given keeps them apart. Then all weights are copied.

        Args:
            hf_model: the model; compiled, in `DataParallel`, and a `PeftModel`, too.
            tokenizer: a transformers tokenizer, needed only for text.
            share: True: every weight is shared. False: none is. None: all are where the layout allows it of all, and
                else none. It does not where queries, keys and values of several key-value heads, or experts, lie in one
                tensor.

        Raises:
            CheckpointError: `share=True`, and some weights cannot be shared; they are named. Or tensors are missing, or
                hold no values (device `"meta"`).
            UnsupportedModelError: the architecture, or a value in its config, is not implemented, or an adapter is of
                a kind that is not.
        """
        cfg, state = read_hf_model(hf_model)
        place = find_place(state, cfg)
        model = build_from_tensors(cls, cfg, state.items(), tokenizer=tokenizer, device=place, by_columns=True)
        model.generation_config = read_hf_generation_config(hf_model)
        _settle_sharing(model.as_decoder(), hf_model, share=share)
        return model

    @classmethod
    @reads(state=_read_state, cfg=partial(require, kind=HookedConfig, expected="a HookedConfig"), tokenizer=_TOKENIZER)
    def from_state_dict(
        cls: type[Model], state: Mapping[str, Tensor], cfg: HookedConfig, tokenizer: Tokenizer | None = None
    ) -> Model:
        """Build a model from weights under the field's names or those of `state_dict()`.

        They are used as they are, not copied.

        Raises:
            CheckpointError: a missing, unknown or misshapen weight.
        """
        state = name_as_field(cfg, state)
        if "embed.W_E" in state:
            check_tied(state, tied_unembed=cfg.tied_unembed)
        return build_from_tensors(cls, cfg, state.items(), tokenizer=tokenizer, device=find_place(state, cfg))

    @classmethod
    @reads(
        params=partial(require, kind=Mapping, expected="arrays by name, or a tree of dicts with arrays"),
        config=partial(require, kind=(Mapping, str), expected="the fields of a configuration by name, or JSON of them"),
        n_ctx=partial(read_int, least=1, most=MOST_ENTRIES),
        dtype=optional(read_dtype),
        device=read_device,
        tokenizer=_TOKENIZER,
    )
    def from_xlstm(
        cls: type[Model],
        params: Mapping[Any, Any],
        config: Mapping[str, Any] | str,
        *,
        n_ctx: int = 8192,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        tokenizer: Tokenizer | None = None,
    ) -> Model:
        """Build a model from the parameters of xlstm-jax's transformer.

        Where its configuration masks across document boundaries, a call's `document_borders` do so; where it does not,
        they hide nothing. What xlstm-jax takes as `pos_idx` are a call's `positions`.

        Args:
            params: the tree, with or without the collection `"params"` around it, or the arrays by flat name
                (`"block_stack/block_0/..."`, with slashes or dots); blocks one by one or stacked. Arrays are numpy's,
                or become such; bfloat16 also as `ml_dtypes` or as the unsigned numbers of its bits. They are copied.
            config: its configuration, see `HookedConfig.from_xlstm`.
            n_ctx: longest sequence the model accepts.
            dtype: of the weights; None: that of the arrays. The configuration's own `dtype` says in which one xlstm-jax
                computes from parameters in float32.
            device: where to put the weights.
            tokenizer: a transformers tokenizer, needed only for text.

        Raises:
            ConfigError: the config has fields that are missing, unknown, or hold what they cannot.
            CheckpointError: parameters are missing, unknown, of another shape than the config says, of several dtypes,
                or hold no floating-point numbers; all are listed.
        """
        cfg, state = read_xlstm(params, config, n_ctx=n_ctx)
        return build_from_tensors(cls, cfg, state.items(), tokenizer=tokenizer, device=device, dtype=dtype)

    def to_xlstm(self) -> dict[str, Any]:
        """The parameter tree of xlstm-jax's transformer, numpy arrays under the collection `"params"`.

        Blocks are stacked where its configuration, `model.cfg.to_xlstm()`, says `scan_blocks`. Arrays are copies, in
        float32, which holds every number of a narrower dtype, or in float64 where the weights are.

        Raises:
            UnsupportedModelError: xlstm-jax has no such network; the fields that stand against it are listed.
        """
        self._require_plain("to_xlstm: such a tree holds weights alone", UnsupportedModelError, "to_xlstm()")
        return write_xlstm(self.cfg, ModelWeights(self.as_decoder()))

    @reads(folder=read_path, dtype=optional(read_dtype), max_shard_size=_read_shard_size)
    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads, tokenizer included.

        All files take their places in one step: a save that is interrupted, or killed, at any moment leaves what the
        folder held before, or all of the new checkpoint. Where that happens while the files are put in their places,
        the next `from_pretrained` or `save_pretrained` puts the rest there; until then the folder has no `config.json`.
        The weight-processing steps are recorded in `hooklens.json`. Quantised weights are written dequantised: the
        folder holds a plain checkpoint with the numbers that this model computes with.

        Args:
            folder: made if it does not exist. Files of an older checkpoint in it go; a tokenizer stays where the model
                has none.
            dtype: of the written weights; None: the model's.
            max_shard_size: files are split at this size.

        Raises:
            UnsupportedModelError: no Hugging Face architecture can hold this network, or there are adapters beside its
                weights; the text says why and what to do instead.
            CheckpointError: the folder cannot be written to, is a file, or holds a PEFT adapter.
        """
        self._require_plain(
            "save_pretrained: a checkpoint holds weights alone",
            UnsupportedModelError,
            "save_pretrained(folder) with the adapters merged, model.save_adapter(folder, name) writes one adapter",
        )
        write_checkpoint(
            Path(folder),
            self.cfg,
            ModelWeights(self.as_decoder()),
            dtype=dtype,
            max_shard_size=max_shard_size,
            transforms=self.transforms,
            generation_config=self.generation_config,
            tokenizer=self.tokenizer,
        )

    def to_hf(self) -> "PreTrainedModel":
        """The transformers model with equal logits: quantised weights dequantised, acting adapters merged.

        Raises:
            UnsupportedModelError: no Hugging Face architecture can hold this network, or weights are offloaded.
        """
        decoder = self.as_decoder()
        refuse_offloaded(
            decoder,
            "to_hf: the transformers model would have all weights in memory",
            UnsupportedModelError,
            otherwise="save_pretrained(folder), and transformers loads that with a device_map of its own",
        )
        refuse_shared(decoder, "to_hf", UnsupportedModelError)
        if adapted_maps(decoder):
            merged: Any = self
            plain: PreTrainedModel = merged.merge_adapter().to_hf()
            return plain
        return build_hf_model(
            self.cfg,
            ModelWeights(self.as_decoder()),
            transforms=self.transforms,
            generation_config=self.generation_config,
        )

    @reads(
        fold_ln=read_flag,
        center_writing_weights=read_flag,
        center_unembed=read_flag,
        fold_value_biases=read_flag,
        refactor_factored_attn_matrices=read_flag,
    )
    def process_weights(
        self: Model,
        *,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        fold_value_biases: bool = False,
        refactor_factored_attn_matrices: bool = False,
    ) -> Model:
        """A new model that computes the same with weights that are easier to read; this one stays as it is.

        See `hooklens.weights.processing` for what each step does, and what it preserves.

        Raises:
            TransformError: a step cannot hold for this architecture; the text says why. Or weights are quantised,
                offloaded, or have adapters beside them.
        """
        self._require_processable("process_weights")
        return self._rebuild(
            process_weights(
                self._weights_to_process(),
                self.cfg,
                fold_ln=fold_ln,
                center_writing_weights=center_writing_weights,
                center_unembed=center_unembed,
                fold_value_biases=fold_value_biases,
                refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            )
        )

    def change_weights(self: Model, steps: Sequence[ProcessingStep], *, what: str) -> Model:
        """A new model whose weights have been through steps, which it records; this one stays as it is.

        Args:
            steps: what to do, in order.
            what: what messages call it.

        Raises:
            TransformError: a step cannot hold for this architecture; or weights are quantised, offloaded, or have
                adapters beside them.
        """
        self._require_processable(what)
        return self._rebuild(take_steps(steps, self._weights_to_process(), self.cfg))

    def _require_processable(self, what: str) -> None:
        """Refuse weights of which a change would leave a part as it was, or have to be rounded again."""
        self._require_plain(
            f"{what}: what is changed in weights would stay in the adapters beside them", TransformError, f"{what}(...)"
        )
        refuse_offloaded(
            self.as_decoder(),
            f"{what}: a new model would have all weights in memory",
            TransformError,
            otherwise=f"call {what}(...) on the model in memory, save_pretrained(folder), load that with device_map",
        )
        if maps := quantised_maps(self.as_decoder()):
            raise TransformError(
                f"{what}: {describe_maps(maps)}, and what processing makes of them would have to be rounded "
                "again; process the weights of model.dequantize(), or load the checkpoint without quantize="
            )

    def _rebuild(self: Model, processed: Processed) -> Model:
        """The model of processed weights, with the settings of this one."""
        copied = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in processed.state.items()}
        decoder = self.as_decoder()
        place = decoder.device if decoder.placement is None else decoder.placement
        model = build_from_tensors(type(self), processed.cfg, copied.items(), tokenizer=self.tokenizer, device=place)
        model.transforms = (*self.transforms, *processed.steps)
        hand_on_settings(self, model)
        return model

    def dequantize(self: Model) -> Model:
        """A new model with plain weights, those that this one computes with; of other weights, copies.

        Without quantised weights it is a copy of the weights alone: hooks stay behind.

        Raises:
            InputError: there are adapters beside the weights, or weights are offloaded.
        """
        self._require_plain(
            "dequantize: adapters would have to be merged, too", InputError, "is the plain model with them merged"
        )
        refuse_offloaded(
            self.as_decoder(),
            "dequantize: a new model would have all weights in memory",
            InputError,
            otherwise="offloaded weights are plain, and copy.deepcopy(model) shares them",
        )
        weights = {name: weight.clone() for name, weight in ModelWeights(self.as_decoder()).items()}
        model = self.from_state_dict(weights, self.cfg, self.tokenizer)
        model.transforms = self.transforms
        hand_on_settings(self, model)
        return model

    def _require_plain(self, what: str, error: type[HookLensError], then: str) -> None:
        """Refuse what needs plain weights where adapters are beside them."""
        refuse_shared(self.as_decoder(), what, error)
        way_out = f"model.merge_adapter(){' ' if then.startswith('is ') else '.'}{then}"
        refuse_adapters(self.as_decoder(), what, error, otherwise=way_out)

    def _weights_to_process(self) -> Mapping[str, Tensor]:
        """The weights; on several devices with the final norm's beside the unembedding, to be folded into it."""
        decoder = self.as_decoder()
        refuse_shared(decoder, "process_weights", TransformError)
        weights = ModelWeights(decoder)
        place = decoder.device_map["unembed"]
        if decoder.device_map.get("ln_final", place) == place:
            return weights
        return {name: one.to(place) if name.startswith("ln_final.") else one for name, one in weights.items()}


def _settle_sharing(model: nn.Module, source: nn.Module, *, share: bool | None) -> None:
    """Leave all parameters in the memory of `source`, or none.

    Raises:
        CheckpointError: all are to be shared, and some cannot be.
    """
    theirs = {tensor.untyped_storage().data_ptr() for tensor in source.state_dict().values()}
    shared = {name: one.untyped_storage().data_ptr() in theirs for name, one in model.named_parameters()}
    apart = [name for name, is_shared in shared.items() if not is_shared]
    if not apart and share is not False:
        return
    if share:
        raise CheckpointError(
            f"share=True: {len(apart)} of {len(shared)} weights cannot lie in the memory of the "
            f"{type(source).__name__}: {join_names(apart)}. There they are parts of fused tensors, or on another "
            "device; take share=False"
        )
    for name, parameter in model.named_parameters():
        if shared[name]:
            parameter.data = parameter.data.clone()
