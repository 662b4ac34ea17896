"""`transformer_lens.patching` of 2.x, on HookLens's sweeps."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from hooklens.patching.sweeps import act_patch, patch_setters

Logits = CorruptedActivation = PatchedActivation = Tensor
AxisNames = str

make_df_from_ranges = patch_setters.make_df_from_ranges
layer_pos_patch_setter = patch_setters.layer_pos_patch_setter
layer_pos_head_vector_patch_setter = patch_setters.layer_pos_head_vector_patch_setter
layer_head_vector_patch_setter = patch_setters.layer_head_vector_patch_setter
layer_head_pattern_patch_setter = patch_setters.layer_head_pattern_patch_setter
layer_head_pos_pattern_patch_setter = patch_setters.layer_head_pos_pattern_patch_setter
layer_head_dest_src_pos_pattern_patch_setter = patch_setters.layer_head_dest_src_pos_pattern_patch_setter


def generic_activation_patch(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, patching_metric: Callable[[Tensor], Any],
    patch_setter: Callable[[Tensor, Sequence[int], Tensor], Tensor], activation_name: str,
    index_axis_names: Sequence[Any] | None = None, index_df: Any = None, return_index_df: bool = False,
) -> Any:  # fmt: skip
    """The metric with each index of an activation patched; one sweep, where there is one of this kind."""
    assert (index_axis_names is None) != (index_df is None), "give either index_axis_names or index_df"
    tokens, mask = model._read_input(corrupted_tokens, None, None)
    names, table, shape = index_axis_names, index_df, [-1]
    if names is not None and model._is_ungrouped():
        # HookLens counts key-value heads.
        sizes = {"layer": model.cfg.n_layers, "head": model.cfg.n_heads, "head_index": model.cfg.n_heads}
        shape = [sizes.get(axis, tokens.shape[1]) for axis in names]
        table, names = make_df_from_ranges(shape, names), None
    found: Any = act_patch.generic_activation_patch(
        model.hooked, tokens, getattr(clean_cache, "cache_dict", clean_cache), patching_metric, patch_setter,
        activation_name, names, table, True, attention_mask=torch.ones_like(tokens) if mask is None else mask,
    )  # fmt: skip
    values = found[0] if names is not None else found[0].view(shape)
    return (values, found[1]) if return_index_df else values


def _ready(word: str, axes: str) -> Callable[..., Any]:
    setter = patch_setters.SETTERS[word == "pattern", axes.replace("head_index", "head")]
    names = tuple(axes.split())
    return partial(generic_activation_patch, activation_name=word, patch_setter=setter, index_axis_names=names)


get_act_patch_resid_pre = _ready("resid_pre", "layer pos")
get_act_patch_resid_mid = _ready("resid_mid", "layer pos")
get_act_patch_attn_out = _ready("attn_out", "layer pos")
get_act_patch_mlp_out = _ready("mlp_out", "layer pos")
get_act_patch_attn_head_out_by_pos = _ready("z", "layer pos head")
get_act_patch_attn_head_q_by_pos = _ready("q", "layer pos head")
get_act_patch_attn_head_k_by_pos = _ready("k", "layer pos head")
get_act_patch_attn_head_v_by_pos = _ready("v", "layer pos head")
get_act_patch_attn_head_pattern_by_pos = _ready("pattern", "layer head_index dest_pos")
get_act_patch_attn_head_pattern_dest_src_pos = _ready("pattern", "layer head_index dest_pos src_pos")
get_act_patch_attn_head_out_all_pos = _ready("z", "layer head")
get_act_patch_attn_head_q_all_pos = _ready("q", "layer head")
get_act_patch_attn_head_k_all_pos = _ready("k", "layer head")
get_act_patch_attn_head_v_all_pos = _ready("v", "layer head")
get_act_patch_attn_head_pattern_all_pos = _ready("pattern", "layer head_index")


@runtime_checkable
class _PatchesSeveral(Protocol):
    def __call__(self, model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Any) -> Tensor: ...


def _every(functions: Sequence[Callable[..., Any]], doc: str) -> _PatchesSeveral:
    """The results of several functions as one; of key-value heads with zeros for the rest of the heads."""

    def patch(model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Any) -> Tensor:
        results = [function(model, corrupted_tokens, clean_cache, metric) for function in functions]
        if functions[-1] is get_act_patch_attn_head_pattern_by_pos:
            results[-1] = results[-1].transpose(1, 2)
        most = max(result.shape[-1] for result in results)
        return torch.stack([F.pad(result, (0, most - result.shape[-1])) for result in results])

    patch.__doc__ = doc
    return patch


get_act_patch_attn_head_all_pos_every = _every(
    (
        get_act_patch_attn_head_out_all_pos, get_act_patch_attn_head_q_all_pos, get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos, get_act_patch_attn_head_pattern_all_pos,
    ),
    "Every head: output, query, key, value and pattern, `[5 layer head]`.",
)  # fmt: skip
get_act_patch_attn_head_by_pos_every = _every(
    (
        get_act_patch_attn_head_out_by_pos, get_act_patch_attn_head_q_by_pos, get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos, get_act_patch_attn_head_pattern_by_pos,
    ),
    "Every head at each position: output, query, key, value and pattern by destination, `[5 layer pos head]`.",
)  # fmt: skip
get_act_patch_block_every = _every(
    (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out),
    "The stream entering each block, attention's output and the MLP's at each position, `[3 layer pos]`.",
)
