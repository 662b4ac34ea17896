"""Names of models, their configs and weights, as `loading_from_pretrained` of TransformerLens 2.x gives them."""

import logging
from dataclasses import make_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.adapters import model_names, open_config
from hooklens.bundled import bundled_path
from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.config import HookedConfig
from hooklens.optional import import_package

OFFICIAL_MODEL_NAMES = list(model_names.ALIASES)
MODEL_ALIASES = {name: aliases for name, aliases in model_names.ALIASES.items() if aliases}
NON_HF_HOSTED_MODEL_NAMES = model_names.NOT_HOSTED
DEFAULT_MODEL_ALIASES = [MODEL_ALIASES.get(name, [name])[0] for name in OFFICIAL_MODEL_NAMES]
STANFORD_CRFM_CHECKPOINTS, PYTHIA_V0_CHECKPOINTS, PYTHIA_CHECKPOINTS = (run[1] for run in model_names.RUNS.values())
make_model_alias_map, get_official_model_name = model_names.name_table, model_names.official_name
_BUNDLED, _MODEL = "bundled:", "hooklens.compat.transformer_lens.HookedTransformer"
_SIZES = {
    "d_model": 768, "debug": True, "layer_norm_eps": 1e-5, "d_vocab": 50257, "init_range": 0.02, "n_ctx": 1024,
    "d_head": 64, "d_mlp": 3072, "n_heads": 12, "n_layers": 12,
}  # fmt: skip
Config = make_dataclass("Config", [(name, type(value), value) for name, value in _SIZES.items()])


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
