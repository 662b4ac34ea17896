"""Names of models in TransformerLens 2.x, and where HookLens finds them.

`official_models.json` holds the official names with their aliases, the lengths that 2.x caps `n_ctx` at (by the
beginning of a name), the architectures whose texts get no BOS, and which checkpoints of earlier in training there are
(by regular expressions for the beginning of a name).
"""

import json
import logging
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.adapters import open_config
from hooklens.bundled import bundled_path
from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.config import HookedConfig
from hooklens.optional import import_package

_TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("official_models.json").read_text(encoding="utf-8"))


def _count(labels: list[Any]) -> list[int]:
    """Labels of which some are ranges."""
    return [label for one in labels for label in (range(*one) if isinstance(one, list) else [one])]


_CHECKPOINTS = {
    beginning: (one["revision"], _count(one["labels"])) for beginning, one in _TABLES["checkpoints"].items()
}
STANFORD_CRFM_CHECKPOINTS, PYTHIA_V0_CHECKPOINTS, PYTHIA_CHECKPOINTS = (labels for _, labels in _CHECKPOINTS.values())
OFFICIAL_MODEL_NAMES: list[str] = list(_TABLES["models"])
MODEL_ALIASES: dict[str, list[str]] = {name: aliases for name, aliases in _TABLES["models"].items() if aliases}
NON_HF_HOSTED_MODEL_NAMES: list[str] = _TABLES["not_on_the_hub"]
DEFAULT_MODEL_ALIASES: list[str] = [MODEL_ALIASES.get(name, [name])[0] for name in OFFICIAL_MODEL_NAMES]
_BUNDLED = "bundled:"
_MODEL = "hooklens.compat.transformer_lens.HookedTransformer"
# Labels beyond it count tokens.
_MOST_STEPS = 1e9


@dataclass(frozen=True, kw_only=True)
class FoundSource:
    """Where a model lies.

    Attributes:
        source: what `HookedCausalLM.from_pretrained` takes.
        keywords: what it takes beside that, `revision` or `variant`, for a checkpoint of earlier in training.
        n_ctx: the length that 2.x caps it at; None: none.
        words: fields of the config that say what it is.
    """

    source: str
    keywords: dict[str, str] = field(default_factory=dict)
    n_ctx: int | None = None
    words: dict[str, Any] = field(default_factory=dict)


def make_model_alias_map() -> dict[str, str]:
    """The official name of each name and alias, which are in lower case."""
    return {alias.lower(): name for name in OFFICIAL_MODEL_NAMES for alias in (*MODEL_ALIASES.get(name, ()), name)}


def get_official_model_name(model_name: str) -> str:
    """The official name of a model by name or alias; a `ValueError` where there is none."""
    official = make_model_alias_map().get(model_name.lower())
    if official is None:
        raise ValueError(f"{model_name} not found. Valid official model names (excl aliases): {OFFICIAL_MODEL_NAMES}")
    return official


def find_source(
    model_name: str, checkpoint_index: int | None = None, checkpoint_value: int | None = None
) -> FoundSource:
    """Where HookLens finds a model: one of 2.x by name or alias, a folder, or `owner/name` on the hub."""
    official = _find_name(model_name)
    if official in NON_HF_HOSTED_MODEL_NAMES:
        raise NotImplementedError(f"{official} is not hosted on the hub; give hf_model=")
    n_ctx = next((n for beginning, n in _TABLES["n_ctx"].items() if official.startswith(beginning)), None)
    words: dict[str, Any] = {"model_name": official.rpartition("/")[2], "tokenizer_name": official}
    if checkpoint_index is None and checkpoint_value is None:
        return FoundSource(source=official, n_ctx=n_ctx, words=words)
    labels, kind = get_checkpoint_labels(official)
    value = labels[checkpoint_index] if checkpoint_index is not None else checkpoint_value
    assert value in labels, f"Checkpoint value {value} is not in list of available checkpoints"
    words |= {"from_checkpoint": True, "checkpoint_label_type": kind}
    words |= {"checkpoint_value": value, "checkpoint_index": labels.index(value)}
    revision = _find_run(official)
    keywords = {"variant": str(value)} if revision is None else {"revision": revision[0].format(value)}
    return FoundSource(source=official, keywords=keywords, n_ctx=n_ctx, words=words)


def _find_name(model_name: str) -> str:
    """The official name; what HookLens reads, and 2.x has no name for, stays as it is."""
    if Path(model_name).exists() or model_name.startswith(_BUNDLED):
        return model_name
    if "/" in model_name and model_name.lower() not in make_model_alias_map():
        return model_name
    return get_official_model_name(model_name)


def _find_run(official: str) -> tuple[str, list[int]] | None:
    """The form of revisions, and the labels, of a run that keeps its checkpoints in branches."""
    return next((run for beginning, run in _CHECKPOINTS.items() if re.match(beginning, official)), None)


def list_files(official_model_name: str) -> list[str]:
    """The names of a model's files, in a folder or on the hub."""
    folder = Path(official_model_name)
    if folder.is_dir():
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files: list[str] = import_package("huggingface_hub").HfApi().list_repo_files(official_model_name)
    return files


def get_checkpoint_labels(model_name: str, **kwargs: Any) -> tuple[list[int], str]:
    """The labels of the checkpoints of earlier in training, and what they count: `"step"` or `"token"`."""
    official = _find_name(model_name)
    if (run := _find_run(official)) is not None:
        return run[1], "step"
    if official.startswith(tuple(_TABLES["own"])) or Path(official).is_dir():
        found = [re.fullmatch(r"checkpoints/.*_(\d+)\.pth", name) for name in list_files(official)]
        if labels := sorted(int(one[1]) for one in found if one is not None):
            return labels, "token" if labels[-1] > _MOST_STEPS else "step"
    raise ValueError(f"Model {official} is not checkpointed.")


def prepends_bos(hooked: HookedCausalLM | HookedConfig) -> bool:
    """Whether 2.x puts a BOS in front of a model's texts where nothing else is said."""
    cfg = hooked if isinstance(hooked, HookedConfig) else hooked.cfg
    architectures = json.loads(cfg.origin.hub_config).get("architectures") if cfg.origin is not None else None
    return not set(architectures or ()) & set(_TABLES["starts_without_bos"])


def get_pretrained_model_config(
    model_name: str,
    hf_cfg: dict[str, Any] | None = None,
    checkpoint_index: int | None = None,
    checkpoint_value: int | None = None,
    fold_ln: bool = False,
    device: str | torch.device | None = None,
    n_devices: int = 1,
    default_prepend_bos: bool | None = None,
    dtype: torch.dtype = torch.float32,
    first_n_layers: int | None = None,
    n_ctx: int | None = None,
    **kwargs: Any,
) -> HookedTransformerConfig:
    """The config of a model, of which `config.json` alone is read; `kwargs` say where (`revision`, `token`, ...)."""
    kwargs.pop("trust_remote_code", None)
    found = find_source(model_name, checkpoint_index, checkpoint_value)
    is_bundled = found.source.startswith(_BUNDLED)
    source = bundled_path(found.source.removeprefix(_BUNDLED)) if is_bundled else found.source
    network = open_config(source, **{**found.keywords, **kwargs})
    if first_n_layers is not None:
        network = network.take_layers(range(first_n_layers))
    length = n_ctx or min(network.n_ctx, found.n_ctx or network.n_ctx)
    more = {**found.words, "n_ctx": length, "device": device, "dtype": dtype, "n_devices": n_devices}
    if hf_cfg is not None and "vocab_size" in hf_cfg:
        more["d_vocab"] = hf_cfg["vocab_size"]
    more["default_prepend_bos"] = prepends_bos(network) if default_prepend_bos is None else default_prepend_bos
    cfg = HookedTransformerConfig.from_hooked_config(network, init_weights=False, **more)
    if fold_ln and cfg.positional_embedding_type == "shortformer":
        logging.warning("fold_ln: norms cannot be folded where positions are shortformer's; they stay")
    elif fold_ln and cfg.normalization_type in ("LN", "RMS"):
        cfg.normalization_type += "Pre"
    return cfg


def convert_hf_model_config(model_name: str, **kwargs: Any) -> dict[str, Any]:
    """The fields of a model's config, of which `config.json` alone is read."""
    return get_pretrained_model_config(model_name, **kwargs).to_dict()


def get_num_params_of_pretrained(model_name: str) -> int:
    """The number of parameters in a model's blocks, as its config counts them."""
    return get_pretrained_model_config(model_name).n_params or 0


def get_pretrained_state_dict(
    official_model_name: str,
    cfg: HookedTransformerConfig,
    hf_model: Any = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The weights of a model, or of the checkpoint that `cfg` names, under 2.x's names and unprocessed."""
    model = import_package(_MODEL).HookedTransformer.from_pretrained_no_processing(
        official_model_name,
        hf_model=hf_model,
        dtype=dtype,
        device="cpu",
        checkpoint_value=cfg.checkpoint_value if cfg.from_checkpoint else None,
        first_n_layers=None if hf_model is not None else cfg.n_layers,
        **kwargs,
    )
    return dict(model.state_dict())


def fill_missing_keys(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, with the model's own values for what it lacks."""
    own = model.state_dict()
    for name in sorted(set(own) - set(state_dict)):
        if "W_" in name:
            logging.warning(f"{name} is missing in the state dict; it stays as the model has it")
        state_dict[name] = own[name]
    return state_dict


@dataclass
class Config:
    """A few sizes of a network."""

    d_model: int = 768
    debug: bool = True
    layer_norm_eps: float = 1e-5
    d_vocab: int = 50257
    init_range: float = 0.02
    n_ctx: int = 1024
    d_head: int = 64
    d_mlp: int = 3072
    n_heads: int = 12
    n_layers: int = 12


def get_basic_config(model_name: str, **kwargs: Any) -> Config:
    """A few sizes of a model."""
    words = get_pretrained_model_config(model_name, **kwargs).to_dict()
    return Config(**{spec.name: words[spec.name] for spec in fields(Config) if spec.name in words})
