"""`transformer_lens.patching` of 2.x, on HookLens's sweeps."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor

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

Logits = Tensor
AxisNames = str


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    patching_metric: Callable[[Tensor], Any],
    patch_setter: Callable[[Tensor, Sequence[int], Tensor], Tensor],
    activation_name: str,
    index_axis_names: Sequence[Any] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
) -> Any:
    """The metric with each index of an activation patched by a function of one's own."""
    assert (index_axis_names is None) != (index_df is None), "give either index_axis_names or index_df"
    return act_patch.generic_activation_patch(
        model.hooked,
        corrupted_tokens,
        _tensors(clean_cache),
        patching_metric,
        patch_setter,
        activation_name,
        index_axis_names,
        index_df,
        return_index_df,
    )


def _tensors(cache: Any) -> Any:
    return getattr(cache, "cache_dict", cache)


def _on_hooklens(name: str) -> Callable[..., Tensor]:
    ours = getattr(act_patch, name)

    @wraps(ours)
    def patch(model: Any, corrupted_tokens: Tensor, clean_cache: Any, patching_metric: Callable[..., Any]) -> Tensor:
        values: Tensor = ours(model.hooked, corrupted_tokens, _tensors(clean_cache), patching_metric)
        return values

    patch.__name__ = name
    return patch


get_act_patch_resid_pre = _on_hooklens("get_act_patch_resid_pre")
get_act_patch_resid_mid = _on_hooklens("get_act_patch_resid_mid")
get_act_patch_attn_out = _on_hooklens("get_act_patch_attn_out")
get_act_patch_mlp_out = _on_hooklens("get_act_patch_mlp_out")
get_act_patch_attn_head_out_by_pos = _on_hooklens("get_act_patch_attn_head_out_by_pos")
get_act_patch_attn_head_q_by_pos = _on_hooklens("get_act_patch_attn_head_q_by_pos")
get_act_patch_attn_head_k_by_pos = _on_hooklens("get_act_patch_attn_head_k_by_pos")
get_act_patch_attn_head_v_by_pos = _on_hooklens("get_act_patch_attn_head_v_by_pos")
get_act_patch_attn_head_pattern_by_pos = _on_hooklens("get_act_patch_attn_head_pattern_by_pos")
get_act_patch_attn_head_pattern_dest_src_pos = _on_hooklens("get_act_patch_attn_head_pattern_dest_src_pos")
get_act_patch_attn_head_out_all_pos = _on_hooklens("get_act_patch_attn_head_out_all_pos")
get_act_patch_attn_head_q_all_pos = _on_hooklens("get_act_patch_attn_head_q_all_pos")
get_act_patch_attn_head_k_all_pos = _on_hooklens("get_act_patch_attn_head_k_all_pos")
get_act_patch_attn_head_v_all_pos = _on_hooklens("get_act_patch_attn_head_v_all_pos")
get_act_patch_attn_head_pattern_all_pos = _on_hooklens("get_act_patch_attn_head_pattern_all_pos")
get_act_patch_attn_head_all_pos_every = _on_hooklens("get_act_patch_attn_head_all_pos_every")
get_act_patch_attn_head_by_pos_every = _on_hooklens("get_act_patch_attn_head_by_pos_every")
get_act_patch_block_every = _on_hooklens("get_act_patch_block_every")

__all__ = [
    "generic_activation_patch",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]
