"""`loading_from_pretrained` of TransformerLens 2.x: names of models, their configs and weights; `from_pretrained`."""

import copy
import logging
from dataclasses import make_dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hooklens.adapters import model_names, open_config
from hooklens.bundled import bundled_path
from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens._state import process
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.config import HookedConfig
from hooklens.optional import import_package
from hooklens.weights.constants import bake_constants

Model = TypeVar("Model", bound="LoadingMethods")

# Arguments of Hugging Face that say where to read.
_WHERE = ("cache_dir", "token", "revision", "local_files_only", "subfolder")
# Those that change nothing here: no remote code is run, and loading needs no memory beside the model's.
_WITHOUT_EFFECT = ("trust_remote_code", "low_cpu_mem_usage")

OFFICIAL_MODEL_NAMES = list(model_names.ALIASES)
MODEL_ALIASES = {name: aliases for name, aliases in model_names.ALIASES.items() if aliases}
NON_HF_HOSTED_MODEL_NAMES = model_names.NOT_HOSTED
DEFAULT_MODEL_ALIASES = [MODEL_ALIASES.get(name, [name])[0] for name in OFFICIAL_MODEL_NAMES]
STANFORD_CRFM_CHECKPOINTS, PYTHIA_V0_CHECKPOINTS, PYTHIA_CHECKPOINTS = (run[1] for run in model_names.RUNS.values())
make_model_alias_map = model_names.name_table
# Code of a model's own is not run.
NEED_REMOTE_CODE_MODELS: tuple[str, ...] = ()
_BUNDLED, _MODEL = "bundled:", "hooklens.compat.transformer_lens.HookedTransformer"
_SIZES = {
    "d_model": 768, "debug": True, "layer_norm_eps": 1e-5, "d_vocab": 50257, "init_range": 0.02, "n_ctx": 1024,
    "d_head": 64, "d_mlp": 3072, "n_heads": 12, "n_layers": 12,
}  # fmt: skip
Config = make_dataclass("Config", [(name, type(value), value) for name, value in _SIZES.items()])


def get_official_model_name(model_name: str) -> str:
    """The official name of a model by name or alias."""
    return model_names.official_name(model_name)


def get_checkpoint_labels(model_name: str, **kwargs: Any) -> tuple[list[int], str]:
    """The labels of a model's checkpoints of earlier in training, and what they count."""
    return model_names.checkpoint_labels(model_name)


def find_source(
    model_name: str, checkpoint_index: int | None = None, checkpoint_value: int | None = None
) -> model_names.KnownModel:
    """Where a model of 2.x lies, or one that HookLens reads itself: a folder, or `owner/name`."""
    official = model_names.source_name(model_name)
    if official in NON_HF_HOSTED_MODEL_NAMES:
        raise NotImplementedError(f"{official} is not hosted on the hub; give hf_model=")
    if checkpoint_index is None and checkpoint_value is not None:
        is_there = checkpoint_value in get_checkpoint_labels(official)[0]
        assert is_there, f"Checkpoint value {checkpoint_value} is not in list of available checkpoints"
    return model_names.find_model(official, index=checkpoint_index, label=checkpoint_value)


def prepends_bos(hooked: HookedCausalLM | HookedConfig) -> bool:
    """Whether 2.x puts a BOS in front of a model's texts where nothing else is said."""
    return model_names.starts_with_bos(hooked if isinstance(hooked, HookedConfig) else hooked.cfg)


def get_pretrained_model_config(
    model_name: str, hf_cfg: dict[str, Any] | None = None, checkpoint_index: int | None = None,
    checkpoint_value: int | None = None, fold_ln: bool = False, device: str | torch.device | None = None,
    n_devices: int = 1, default_prepend_bos: bool | None = None, dtype: torch.dtype = torch.float32,
    first_n_layers: int | None = None, n_ctx: int | None = None, **kwargs: Any,
) -> HookedTransformerConfig:  # fmt: skip
    """The config of a model, of which `config.json` alone is read; `kwargs` say where (`revision`, `token`, ...)."""
    kwargs.pop("trust_remote_code", None)
    found = find_source(model_name, checkpoint_index, checkpoint_value)
    is_bundled = found.source.startswith(_BUNDLED)
    source = bundled_path(found.source.removeprefix(_BUNDLED)) if is_bundled else found.source
    network = open_config(source, **{**found.keywords, **kwargs})
    more = {**found.words, "n_ctx": n_ctx or min(network.n_ctx, found.n_ctx or network.n_ctx), "n_devices": n_devices}
    more |= {"device": device, "dtype": dtype, "n_layers": first_n_layers or network.n_layers, "init_weights": False}
    if hf_cfg is not None and "vocab_size" in hf_cfg:
        more["d_vocab"] = hf_cfg["vocab_size"]
    more["default_prepend_bos"] = prepends_bos(network) if default_prepend_bos is None else default_prepend_bos
    cfg = HookedTransformerConfig.from_hooked_config(network, **more)
    if fold_ln and cfg.positional_embedding_type == "shortformer":
        logging.warning("fold_ln: norms cannot be folded where positions are shortformer's; they stay")
    elif fold_ln and cfg.normalization_type in ("LN", "RMS"):
        cfg.normalization_type += "Pre"
    return cfg


def get_num_params_of_pretrained(model_name: str) -> int | None:
    """The number of parameters in a model's blocks, as its config counts them."""
    return get_pretrained_model_config(model_name).n_params


def get_basic_config(model_name: str, **kwargs: Any) -> Any:
    """A few sizes of a model."""
    words = get_pretrained_model_config(model_name, **kwargs).to_dict()
    return Config(**{name: words[name] for name in _SIZES if name in words})


def get_pretrained_state_dict(
    official_model_name: str, cfg: HookedTransformerConfig, hf_model: Any = None, dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """The weights of a model, or of the checkpoint that `cfg` names, under 2.x's names and unprocessed."""
    if hf_model is None:
        checkpoint = cfg.checkpoint_value if cfg.from_checkpoint else None
        kwargs |= {"first_n_layers": cfg.n_layers, "checkpoint_value": checkpoint}
    load = import_package(_MODEL).HookedTransformer.from_pretrained_no_processing
    return dict(load(official_model_name, hf_model=hf_model, dtype=dtype, device="cpu", **kwargs).state_dict())


def fill_missing_keys(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, with the model's own values for what it lacks."""
    own = model.state_dict()
    for name in sorted(set(own) - set(state_dict)):
        if "W_" in name:
            logging.warning(f"{name} is missing in the state dict; it stays as the model has it")
        state_dict[name] = own[name]
    return state_dict


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
        given = from_pretrained_kwargs
        quantised = [name for name in ("load_in_8bit", "load_in_4bit") if given.pop(name, False)]
        assert not quantised, "Quantization not supported: load with hooklens.HookedCausalLM.from_pretrained(quantize=)"
        where: dict[str, Any] = {name: given.pop(name) for name in _WHERE if name in given}
        dtype = given.pop("torch_dtype", dtype)
        for name in _WITHOUT_EFFECT:
            given.pop(name, None)
        if given:
            raise TypeError(f"from_pretrained: unknown arguments {sorted(given)}")
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
            found = find_source(model_name, checkpoint_index, checkpoint_value)
            words |= found.words
            where = {**found.keywords, **where}
            # A checkpoint's context may be longer than 2.x lets it be.
            if n_ctx is None and found.n_ctx is not None and open_config(found.source, **where).n_ctx > found.n_ctx:
                n_ctx = found.n_ctx
            hooked = HookedCausalLM.from_pretrained(
                found.source, tokenizer=tokenizer, dtype=dtype, layers=layers, n_ctx=n_ctx, **where,
            )  # fmt: skip
        starts_with_bos = prepends_bos(hooked) if default_prepend_bos is None else default_prepend_bos
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
            cfg.normalization_type = HookedTransformerConfig.from_hooked_config(processed.cfg).normalization_type
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


def bake(hooked: HookedCausalLM) -> HookedCausalLM:
    """The model with what 2.x has in its weights; see `hooklens.weights.constants`."""
    state, plain = bake_constants(hooked.named_weights(), hooked.cfg)
    if plain is hooked.cfg:
        return hooked
    baked = HookedCausalLM.from_state_dict(state, plain, hooked.tokenizer)
    baked.generation_config = dict(hooked.generation_config)
    return baked
