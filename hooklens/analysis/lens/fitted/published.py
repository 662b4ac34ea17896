"""The files that lenses are published in.

The `tuned-lens` package (AlignmentResearch): a folder with `config.json` (`d_model`, `num_hidden_layers`, `bias`,
`base_model_name_or_path`, ...) and `params.pt`, a state dict of linear maps, `{l}.weight [out, in]` and `{l}.bias`,
whose output is added to the stream that enters block `l`.

The `jlens` package (Anthropic 2026): a file, `lens.pt` as a rule, with `J` (by layer, `[out, in]`), `n_prompts`,
`source_layers` and `d_model`. Layers there are counted by the block that the stream leaves: layer `l` there is the
stream that enters block `l + 1`.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import CheckpointError, InputError, TransformError

_CONFIG, _PARAMS, _JACOBIANS = "config.json", "params.pt", "lens.pt"


def find_published(folder: Path) -> bool:
    """Whether a folder holds a tuned lens of the `tuned-lens` package."""
    return (folder / _CONFIG).is_file() and (folder / _PARAMS).is_file()


def find_jacobian_file(path: Path) -> Path | None:
    """The file of the `jlens` package at a path: itself, or the one of the usual name in the folder."""
    if path.is_file():
        return path if path.suffix in (".pt", ".pth", ".bin") else None
    return path / _JACOBIANS if (path / _JACOBIANS).is_file() else None


def read_tuned_lens(
    folder: Path, model: HookedCausalLM | None
) -> tuple[Float[Tensor, "layer out into"], Float[Tensor, "layer out"]]:
    """The translators of a folder of the `tuned-lens` package.

    Raises:
        CheckpointError: the files are damaged.
        InputError: no model is given, or one of other sizes.
        TransformError: the model's weights were processed.
    """
    model = _require_plain(model, f"{folder} is a lens of the tuned-lens package")
    try:
        cfg: Any = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _CONFIG}: cannot be read: {error}") from error
    if not isinstance(cfg, dict):
        raise CheckpointError(f"{folder / _CONFIG} holds {type(cfg).__name__}; expected a JSON object")
    sizes = {"d_model": model.cfg.d_model, "num_hidden_layers": model.cfg.n_layers}
    wrong = [
        f"{name} is {cfg.get(name)!r}, the model's is {own}" for name, own in sizes.items() if cfg.get(name) != own
    ]
    if wrong:
        named = cfg.get("base_model_name_or_path")
        raise InputError(f"{folder} is a lens of another model ({named!r}): {'; '.join(wrong)}")
    state = _load(folder / _PARAMS)
    has_bias, width = bool(cfg.get("bias", True)), model.cfg.d_model
    expected = {f"{layer}.weight": [width, width] for layer in range(model.cfg.n_layers)}
    expected |= {f"{layer}.bias": [width] for layer in range(model.cfg.n_layers)} if has_bias else {}
    found = {name: list(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}
    if differing := sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name)):
        raise CheckpointError(f"{folder / _PARAMS}: these tensors are missing, unexpected or misshapen: {differing}")
    layers = range(model.cfg.n_layers)
    weight = torch.stack([state[f"{layer}.weight"] for layer in layers]).float()
    bias = torch.stack([state[f"{layer}.bias"] for layer in layers]).float() if has_bias else weight[..., 0] * 0
    return weight, bias


def read_jacobian_lens(
    path: Path, model: HookedCausalLM | None
) -> tuple[tuple[int, ...], Float[Tensor, "layer out into"], int]:
    """Layers whose entering streams are carried, Jacobians and number of prompts of a file of the `jlens` package.

    Raises:
        CheckpointError: the file is damaged.
        InputError: no model is given, or one of other sizes.
        TransformError: the model's weights were processed.
    """
    model = _require_plain(model, f"{path} is a lens of the jlens package")
    state = _load(path)
    jacobians, n_prompts, width = state.get("J"), state.get("n_prompts"), state.get("d_model")
    if not isinstance(jacobians, Mapping) or not jacobians or not isinstance(n_prompts, int):
        raise CheckpointError(f"{path} holds {sorted(map(str, state))}; expected the keys J, n_prompts and d_model")
    if not all(isinstance(layer, int) and layer >= 0 for layer in jacobians):
        raise CheckpointError(f"{path}: J has the keys {list(jacobians)[:10]}; expected the numbers of layers")
    if width != model.cfg.d_model or max(jacobians) > model.cfg.n_layers - 2:
        raise InputError(
            f"{path} is a lens of another model: d_model {width!r} and streams that leave layers up to "
            f"{max(jacobians)}; the model has d_model={model.cfg.d_model} and n_layers={model.cfg.n_layers}"
        )
    wrong = [layer for layer, one in jacobians.items() if not isinstance(one, Tensor) or list(one.shape) != [width] * 2]
    if wrong:
        raise CheckpointError(f"{path}: J of layers {wrong} is no matrix [{width} {width}]")
    left = sorted(jacobians)
    return tuple(layer + 1 for layer in left), torch.stack([jacobians[layer] for layer in left]).float(), n_prompts


def _require_plain(model: HookedCausalLM | None, what: str) -> HookedCausalLM:
    """The model, if published files can be of it.

    Raises:
        InputError: there is none.
        TransformError: its weights were processed.
    """
    if model is None:
        raise InputError(f"{what}, which does not know the weights it is of; give the model: load(path, model=model)")
    if model.transforms:
        raise TransformError(
            f"{what}, which is of weights as they were published; the model's were processed "
            f"({', '.join(map(str, model.transforms))}): load the model anew"
        )
    return model


def _load(path: Path) -> dict[Any, Any]:
    """A file of `torch.save`, read without running what is in it.

    Raises:
        CheckpointError: it cannot be read, or holds something else than values by name.
    """
    try:
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path}: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} holds {type(stored).__name__}; expected values by name")
    return stored
