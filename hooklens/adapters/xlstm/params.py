"""The parameter tree of xlstm-jax's Llama, and the weights that it holds."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooklens.adapters.rules import Copy, DiskShapes
from hooklens.adapters.xlstm.arrays import as_array, as_tensor, dtype_problem
from hooklens.adapters.xlstm.config import read_values, read_xlstm_config, write_values
from hooklens.config import HookedConfig
from hooklens.errors import CheckpointError, join_names
from hooklens.weights.shapes import weight_shapes

_ATTN, _FFN = "block_stack/block_{i}/attn", "block_stack/block_{i}/ffn"
_BLOCK = "blocks.{i}"


def _biased(cfg: HookedConfig) -> bool:
    return cfg.qkv_bias


def _normed(cfg: HookedConfig) -> bool:
    return cfg.qk_norm is not None


RULES = (
    Copy("token_embedding/sharded/embedding", "embed.W_E", "1 v m -> v m"),
    Copy(f"{_ATTN}/pre_norm/scale", f"{_BLOCK}.ln1.w"),
    Copy(f"{_ATTN}/attn/dense_q/kernel", f"{_BLOCK}.attn.W_Q", "m n h -> n m h"),
    Copy(f"{_ATTN}/attn/dense_k/kernel", f"{_BLOCK}.attn.W_K", "m n h -> n m h"),
    Copy(f"{_ATTN}/attn/dense_v/kernel", f"{_BLOCK}.attn.W_V", "m n h -> n m h"),
    Copy(f"{_ATTN}/attn/dense_out/kernel", f"{_BLOCK}.attn.W_O"),
    Copy(f"{_ATTN}/attn/dense_q/bias", f"{_BLOCK}.attn.b_Q", when=_biased),
    Copy(f"{_ATTN}/attn/dense_k/bias", f"{_BLOCK}.attn.b_K", when=_biased),
    Copy(f"{_ATTN}/attn/dense_v/bias", f"{_BLOCK}.attn.b_V", when=_biased),
    Copy(f"{_ATTN}/attn/dense_out/bias", f"{_BLOCK}.attn.b_O", when=_biased),
    Copy(f"{_ATTN}/attn/q_norm/scale", f"{_BLOCK}.attn.q_norm.w", when=_normed),
    Copy(f"{_ATTN}/attn/k_norm/scale", f"{_BLOCK}.attn.k_norm.w", when=_normed),
    Copy(f"{_FFN}/pre_norm/scale", f"{_BLOCK}.ln2.w"),
    Copy(f"{_FFN}/ffn/proj_up/kernel", f"{_BLOCK}.mlp.W_in"),
    Copy(f"{_FFN}/ffn/proj_up_gate/kernel", f"{_BLOCK}.mlp.W_gate"),
    Copy(f"{_FFN}/ffn/proj_down/kernel", f"{_BLOCK}.mlp.W_out"),
    Copy(f"{_FFN}/ffn/proj_up/bias", f"{_BLOCK}.mlp.b_in", when=_biased),
    Copy(f"{_FFN}/ffn/proj_up_gate/bias", f"{_BLOCK}.mlp.b_gate", when=_biased),
    Copy(f"{_FFN}/ffn/proj_down/bias", f"{_BLOCK}.mlp.b_out", when=_biased),
    Copy("lm_head/out_norm/scale", "ln_final.w"),
    Copy("lm_head/out_dense/kernel", "unembed.W_U"),
)
"""Tensors there and weights here. Letters of axes are those of `hooklens.adapters.rules`."""

_SCANNED = "block_stack/block/"
# Levels that say nothing of a parameter: the collection, and the box that knows over which devices it is spread.
_COLLECTION, _BOX = "params", "value"


def read_xlstm(
    params: Mapping[Any, Any], config: object, *, n_ctx: int = 8192
) -> tuple[HookedConfig, dict[str, Tensor]]:
    """The network and its weights under HookLens names; see `HookedCausalLM.from_xlstm`.

    How the blocks lie in the tree, one by one or stacked, is noted in the config as its `scan_blocks`.

    Raises:
        ConfigError: the config has fields that are missing, unknown, or hold what they cannot.
        CheckpointError: parameters are missing, unknown, of another shape than the config says, of several dtypes, or
            hold no floating-point numbers; all are listed.
    """
    values, arrays = read_values(config), _flatten(params)
    is_scanned = any(name.startswith(_SCANNED) for name in arrays)
    # What lies there says it, and is to be written back so.
    cfg = read_xlstm_config({**values, "scan_blocks": is_scanned}, n_ctx=n_ctx)
    expected, shapes = dict(_bind(cfg)), DiskShapes(weight_shapes(cfg), cfg)
    wanted = {name: tuple(shapes.of(rule, layer)) for name, (rule, layer) in expected.items()}
    if is_scanned:
        wanted = {
            _scan_name(name): (cfg.n_layers, *shape) if _scan_name(name) != name else shape
            for name, shape in wanted.items()
        }
    _check(arrays, wanted)
    state = {}
    for name, (rule, layer) in expected.items():
        is_stacked = is_scanned and _scan_name(name) != name
        array = arrays[_scan_name(name)][layer] if is_stacked else arrays[name]
        (state[rule.name.format(i=layer)],) = rule.load(as_tensor(array), cfg)
    return cfg, state


def write_xlstm(cfg: HookedConfig, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The parameter tree of a network; see `HookedCausalLM.to_xlstm`.

    Raises:
        UnsupportedModelError: no `LlamaConfig` describes the network.
    """
    values = write_values(cfg)
    flat: dict[str, list[np.ndarray]] = {}
    for name, (rule, layer) in _bind(cfg):
        tensor = rule.save((state[rule.name.format(i=layer)].detach(),), cfg)
        # float32 holds every number of a narrower dtype.
        wide = tensor.to("cpu", torch.promote_types(tensor.dtype, torch.float32))
        flat.setdefault(_scan_name(name) if values["scan_blocks"] else name, []).append(wide.contiguous().numpy())
    tree: dict[str, Any] = {}
    for name, arrays in flat.items():
        *path, last = name.split("/")
        inside = tree
        for word in path:
            inside = inside.setdefault(word, {})
        inside[last] = np.stack(arrays) if name.startswith(_SCANNED) else arrays[0].copy()
    return {_COLLECTION: tree}


def _bind(cfg: HookedConfig) -> Iterator[tuple[str, tuple[Copy, int]]]:
    """The names of all parameters, each with its rule and layer."""
    for rule in RULES:
        if rule.when(cfg):
            for layer in range(cfg.n_layers) if "{i}" in rule.hub else [0]:
                yield rule.hub.format(i=layer), (rule, layer)


def _scan_name(name: str) -> str:
    """The name of the array that holds a parameter for all blocks; that of a parameter outside of them stays."""
    return re.sub(r"^block_stack/block_\d+/", _SCANNED, name)


def _flatten(params: Mapping[Any, Any]) -> dict[str, Any]:
    """Arrays by name, `"a/b/c"`, from a tree, from names with slashes or dots, or from tuples.

    Raises:
        CheckpointError: a parameter is there twice.
    """
    names: dict[str, Any] = {}
    doubled = []
    for path, value in _walk(params, ()):
        inner = path[1:] if path[:1] == (_COLLECTION,) else path
        inner = inner[:-1] if inner[-1:] == (_BOX,) else inner
        name = "/".join(inner)
        if name in names:
            doubled.append(name)
        names[name] = value
    if doubled:
        raise CheckpointError(f"xlstm-jax parameters are given under two names: {join_names(doubled)}")
    return names


def _walk(tree: Mapping[Any, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        words = key if isinstance(key, tuple) else re.split(r"[/.]", str(key))
        below = (*path, *(str(word) for word in words if word))
        if isinstance(value, Mapping):
            yield from _walk(value, below)
        else:
            yield below, value


def _check(arrays: dict[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Account for every name, shape and dtype, and take values out of their boxes.

    Raises:
        CheckpointError: with all that is wrong.
    """
    problems = []
    if missing := [name for name in wanted if name not in arrays]:
        problems.append(f"missing: {join_names(missing)}")
    if unexpected := [name for name in arrays if name not in wanted]:
        problems.append(f"unexpected: {join_names(unexpected)}")
    misshapen, unreadable = [], []
    dtypes: dict[str, str] = {}
    for name in (name for name in wanted if name in arrays):
        array = arrays[name] = as_array(arrays[name])
        if (reason := dtype_problem(array)) is not None:
            unreadable.append(f"{name!r} is {reason}")
        elif tuple(array.shape) != wanted[name]:
            misshapen.append(f"{name!r} is {list(array.shape)}, expected {list(wanted[name])}")
        else:
            dtypes.setdefault(array.dtype.name, name)
    if misshapen:
        problems.append(f"of another shape than the config says: {'; '.join(misshapen)}")
    if unreadable:
        problems.append(f"no floating-point numbers: {'; '.join(unreadable)}")
    if len(dtypes) > 1:
        listed = ", ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
        problems.append(f"of several dtypes ({listed}); bring all to one")
    if problems:
        raise CheckpointError(
            f"the parameters do not go with their xlstm-jax config: {'. '.join(problems)}. Check that they belong "
            "together"
        )
