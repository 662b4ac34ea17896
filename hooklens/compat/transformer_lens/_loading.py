"""`from_pretrained` of TransformerLens 2.x, with processing on by default."""

import copy
import logging
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from hooklens.adapters import open_config
from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens import loading_from_pretrained as loading
from hooklens.compat.transformer_lens._state import process
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.weights.constants import bake_constants

Model = TypeVar("Model", bound="LoadingMethods")

# Arguments of Hugging Face that say where to read.
_WHERE = ("cache_dir", "token", "revision", "local_files_only", "subfolder")
# Those that change nothing here: no remote code is run, and loading needs no memory beside the model's.
_WITHOUT_EFFECT = ("trust_remote_code", "low_cpu_mem_usage")


class LoadingMethods(nn.Module):
    """What makes a model of a checkpoint."""

    @classmethod
    def from_pretrained(
        cls: type[Model], model_name: str, fold_ln: bool = True, center_writing_weights: bool = True,
        center_unembed: bool = True, refactor_factored_attn_matrices: bool = False, checkpoint_index: int | None = None,
        checkpoint_value: int | None = None, hf_model: Any = None, device: str | torch.device | None = None,
        n_devices: int = 1, tokenizer: Any = None, move_to_device: bool = True, fold_value_biases: bool = True,
        default_prepend_bos: bool | None = None, default_padding_side: Literal["left", "right"] = "right",
        dtype: torch.dtype | str = "float32", first_n_layers: int | None = None, n_ctx: int | None = None,
        **from_pretrained_kwargs: Any,
    ) -> Model:  # fmt: skip
        """Load a checkpoint by a name of TransformerLens, or from any source that HookLens reads.

        Raises:
            TypeError: an argument of Hugging Face's that has no meaning here.
        """
        quantised = [name for name in ("load_in_8bit", "load_in_4bit") if from_pretrained_kwargs.pop(name, False)]
        assert not quantised, "Quantization not supported: load with hooklens.HookedCausalLM.from_pretrained(quantize=)"
        where = {name: from_pretrained_kwargs.pop(name) for name in _WHERE if name in from_pretrained_kwargs}
        dtype = from_pretrained_kwargs.pop("torch_dtype", dtype)
        for name in _WITHOUT_EFFECT:
            from_pretrained_kwargs.pop(name, None)
        if from_pretrained_kwargs:
            raise TypeError(f"from_pretrained: unknown arguments {sorted(from_pretrained_kwargs)}")
        if n_devices != 1:
            raise NotImplementedError("n_devices: load with hooklens.HookedCausalLM.from_pretrained(device_map=)")
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        layers = None if first_n_layers is None else range(first_n_layers)
        words: dict[str, Any] = {"model_name": model_name.rpartition("/")[2]}
        if hf_model is not None:
            if layers is not None or n_ctx is not None:
                raise NotImplementedError("first_n_layers, n_ctx: not with hf_model=; give the model's name or folder")
            # Its weights stay its own, whatever is done to these.
            hooked = copy.deepcopy(HookedCausalLM.from_hf(hf_model, tokenizer)).to(dtype)
        else:
            found = loading.find_source(model_name, checkpoint_index, checkpoint_value)
            words |= found.words
            keywords: dict[str, Any] = {**found.keywords, **where}
            n_ctx = _cap(n_ctx, found.n_ctx, found.source, keywords)
            hooked = HookedCausalLM.from_pretrained(
                found.source, tokenizer=tokenizer, dtype=dtype, layers=layers, n_ctx=n_ctx, **keywords,
            )  # fmt: skip
        starts_with_bos = loading.prepends_bos(hooked) if default_prepend_bos is None else default_prepend_bos
        hooked = bake(hooked)
        words |= {"dtype": dtype, "device": str(device), "default_prepend_bos": starts_with_bos}
        cfg = HookedTransformerConfig.from_hooked_config(hooked.cfg, **words)
        steps = {
            "fold_ln": fold_ln, "center_writing_weights": center_writing_weights, "center_unembed": center_unembed,
            "fold_value_biases": fold_value_biases, "refactor_factored_attn_matrices": refactor_factored_attn_matrices,
        }  # fmt: skip
        if dtype not in (torch.float32, torch.float64) and fold_ln:
            logging.warning("With reduced precision, it is advised to use `from_pretrained_no_processing`")
        processed = process(hooked, cfg, **steps)
        if processed is not hooked:
            kind = HookedTransformerConfig.from_hooked_config(processed.cfg).normalization_type
            cfg.normalization_type = kind
        tokenizer = processed.tokenizer if tokenizer is None else tokenizer
        model = cls(cfg, tokenizer, move_to_device, default_padding_side, hooked=processed)
        print(f"Loaded pretrained model {model_name} into HookedTransformer")
        return model

    @classmethod
    def from_pretrained_no_processing(
        cls: type[Model], model_name: str, fold_ln: bool = False, center_writing_weights: bool = False,
        center_unembed: bool = False, refactor_factored_attn_matrices: bool = False, fold_value_biases: bool = False,
        dtype: torch.dtype | str = torch.float32, default_prepend_bos: bool | None = None,
        default_padding_side: Literal["left", "right"] = "right", **from_pretrained_kwargs: Any,
    ) -> Model:  # fmt: skip
        """`from_pretrained` with processing off by default."""
        return cls.from_pretrained(
            model_name, fold_ln=fold_ln, center_writing_weights=center_writing_weights, center_unembed=center_unembed,
            fold_value_biases=fold_value_biases, refactor_factored_attn_matrices=refactor_factored_attn_matrices,
            dtype=dtype, default_prepend_bos=default_prepend_bos, default_padding_side=default_padding_side,
            **from_pretrained_kwargs,
        )  # fmt: skip


def _cap(n_ctx: int | None, most: int | None, source: str, where: dict[str, Any]) -> int | None:
    """The context asked for, or that of a checkpoint where it is longer than 2.x lets it be."""
    if n_ctx is not None or most is None:
        return n_ctx
    return most if open_config(source, **where).n_ctx > most else None


def bake(hooked: HookedCausalLM) -> HookedCausalLM:
    """The model with what 2.x has in its weights; see `hooklens.weights.constants`."""
    state, plain = bake_constants(hooked.named_weights(), hooked.cfg)
    if plain is hooked.cfg:
        return hooked
    baked = HookedCausalLM.from_state_dict(state, plain, hooked.tokenizer)
    baked.generation_config = dict(hooked.generation_config)
    return baked
