"""`transformer_lens.patching` of 2.x, on HookLens's sweeps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hooklens.axes import get_act_name
from hooklens.errors import InputError
from hooklens.patching.runs.checks import check_model
from hooklens.patching.sweeps import act_patch
from hooklens.patching.sweeps.patch_setters import (
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    make_df_from_ranges,
)

Logits = CorruptedActivation = PatchedActivation = Tensor
AxisNames = str

_SWEEPS: dict[Any, Callable[..., Tensor]] = {}
_SETTERS: dict[str, Callable[..., Tensor]] = {
    "layer pos": layer_pos_patch_setter, "layer pos head": layer_pos_head_vector_patch_setter,
    "layer head": layer_head_vector_patch_setter, "layer head_index": layer_head_pattern_patch_setter,
    "layer head_index dest_pos": layer_head_pos_pattern_patch_setter,
    "layer head_index dest_pos src_pos": layer_head_dest_src_pos_pattern_patch_setter,
}  # fmt: skip


def generic_activation_patch(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, patching_metric: Callable[[Tensor], Any],
    patch_setter: Callable[[Tensor, Sequence[int], Tensor], Tensor], activation_name: str,
    index_axis_names: Sequence[Any] | None = None, index_df: Any = None, return_index_df: bool = False,
) -> Any:  # fmt: skip
    """The metric with each index of an activation patched; one sweep, where there is one of this kind."""
    assert (index_axis_names is None) != (index_df is None), "give either index_axis_names or index_df"
    tokens, mask = model._read_input(corrupted_tokens, None, None)
    mask = torch.ones_like(tokens) if mask is None else mask
    cache = getattr(clean_cache, "cache_dict", clean_cache)
    sweep = None if index_axis_names is None else _SWEEPS.get((activation_name, patch_setter, tuple(index_axis_names)))
    if index_df is None and model._is_ungrouped():
        # HookLens counts key-value heads.
        sizes = {"layer": model.cfg.n_layers, "head": model.cfg.n_heads, "head_index": model.cfg.n_heads}
        shape = [sizes.get(axis, tokens.shape[1]) for axis in index_axis_names or ()]
        table = make_df_from_ranges(shape, list(index_axis_names or ()))
        values = generic_activation_patch(
            model, tokens, clean_cache, patching_metric, patch_setter, activation_name, index_df=table
        ).view(shape)
        return (values, table) if return_index_df else values
    if sweep is None or not _can_sweep(model.hooked, activation_name, cache, mask):
        result: Any = act_patch.generic_activation_patch(
            model.hooked, tokens, cache, patching_metric, patch_setter, activation_name, index_axis_names, index_df,
            return_index_df, attention_mask=mask,
        )  # fmt: skip
        return result
    values = sweep(model.hooked, tokens, cache, patching_metric, attention_mask=mask).to(torch.get_default_dtype())
    return (values, make_df_from_ranges(values.shape, list(index_axis_names or ()))) if return_index_df else values


def _can_sweep(hooked: Any, activation_name: str, cache: Any, mask: Tensor) -> bool:
    """Whether nothing is out of the ordinary: hooks, training, padding, a cache of other rows or positions."""
    try:
        check_model(hooked, allow_training=False)
    except InputError:
        return False
    pos_axis = 2 if activation_name == "pattern" else 1
    names = [get_act_name(activation_name, layer) for layer in range(hooked.cfg.n_layers)]
    held = [cache[name].shape for name in names if name in cache]
    return bool(mask.all()) and len(held) == len(names) and all((s[0], s[pos_axis]) == mask.shape for s in held)


def _ready(name: str, word: str, axes: str) -> Callable[..., Any]:
    kind = (word, _SETTERS[axes], tuple(axes.split()))
    _SWEEPS[kind] = getattr(act_patch, f"get_act_patch_{name}")
    return partial(generic_activation_patch, activation_name=word, patch_setter=kind[1], index_axis_names=kind[2])


get_act_patch_resid_pre = _ready("resid_pre", "resid_pre", "layer pos")
get_act_patch_resid_mid = _ready("resid_mid", "resid_mid", "layer pos")
get_act_patch_attn_out = _ready("attn_out", "attn_out", "layer pos")
get_act_patch_mlp_out = _ready("mlp_out", "mlp_out", "layer pos")
get_act_patch_attn_head_out_by_pos = _ready("attn_head_out_by_pos", "z", "layer pos head")
get_act_patch_attn_head_q_by_pos = _ready("attn_head_q_by_pos", "q", "layer pos head")
get_act_patch_attn_head_k_by_pos = _ready("attn_head_k_by_pos", "k", "layer pos head")
get_act_patch_attn_head_v_by_pos = _ready("attn_head_v_by_pos", "v", "layer pos head")
get_act_patch_attn_head_pattern_by_pos = _ready("attn_head_pattern_by_pos", "pattern", "layer head_index dest_pos")
get_act_patch_attn_head_pattern_dest_src_pos = _ready(
    "attn_head_pattern_dest_src_pos", "pattern", "layer head_index dest_pos src_pos"
)
get_act_patch_attn_head_out_all_pos = _ready("attn_head_out_all_pos", "z", "layer head")
get_act_patch_attn_head_q_all_pos = _ready("attn_head_q_all_pos", "q", "layer head")
get_act_patch_attn_head_k_all_pos = _ready("attn_head_k_all_pos", "k", "layer head")
get_act_patch_attn_head_v_all_pos = _ready("attn_head_v_all_pos", "v", "layer head")
get_act_patch_attn_head_pattern_all_pos = _ready("attn_head_pattern_all_pos", "pattern", "layer head_index")


def _stack(functions: Sequence[Callable[..., Any]], *given: Any) -> Tensor:
    """The results of several; of key-value heads with zeros for the rest of the heads."""
    results = [function(*given) for function in functions]
    if functions[-1] is get_act_patch_attn_head_pattern_by_pos:
        results[-1] = results[-1].transpose(1, 2)
    most = max(result.shape[-1] for result in results)
    return torch.stack([F.pad(result, (0, most - result.shape[-1])) for result in results])


def get_act_patch_attn_head_all_pos_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Any
) -> Tensor:
    """Every head: output, query, key, value and pattern, `[5 layer head]`."""
    functions = (
        get_act_patch_attn_head_out_all_pos, get_act_patch_attn_head_q_all_pos, get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos, get_act_patch_attn_head_pattern_all_pos,
    )  # fmt: skip
    return _stack(functions, model, corrupted_tokens, clean_cache, metric)


def get_act_patch_attn_head_by_pos_every(model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Any) -> Tensor:
    """Every head at each position: output, query, key, value and pattern by destination, `[5 layer pos head]`."""
    functions = (
        get_act_patch_attn_head_out_by_pos, get_act_patch_attn_head_q_by_pos, get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos, get_act_patch_attn_head_pattern_by_pos,
    )  # fmt: skip
    return _stack(functions, model, corrupted_tokens, clean_cache, metric)


def get_act_patch_block_every(model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Any) -> Tensor:
    """The stream entering each block, attention's output and the MLP's at each position, `[3 layer pos]`."""
    functions = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return _stack(functions, model, corrupted_tokens, clean_cache, metric)
