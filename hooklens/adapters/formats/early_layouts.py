"""Layouts that TransformerLens turns into its own when it loads: those of its author's first SoLU models, and minGPT's.

- The first SoLU models (names on the hub end with `_old`): norms are called `norm`; up to six layers, maps lie as
  `[out, in]`, and up to eight, the positions lie as `[d_model, n_ctx]`.
- minGPT (Karpathy 2020), in which Othello-GPT (Li et al. 2023) was trained: maps lie as `[out, in]`, queries, keys and
  values are one each, with the heads one after the other.

Both are told by the names of tensors.
"""

import re
from collections.abc import Mapping

from einops import EinopsError, rearrange
from torch import Tensor

_MOST_LAYERS_TURNED, _MOST_LAYERS_OF_TURNED_POSITIONS = 6, 8
_LAYER = r"blocks\.\d+\."
_NORM = r"(^|\.)norm(?=\d?\.)"
# Names of minGPT, with the field's; those of a layer begin with `blocks.{i}.` in both.
_MINGPT = {
    "tok_emb.weight": "embed.W_E", "pos_emb": "pos_embed.W_pos", "head.weight": "unembed.W_U",
    "ln_f.weight": "ln_final.w", "ln_f.bias": "ln_final.b", "ln1.weight": "ln1.w", "ln1.bias": "ln1.b",
    "ln2.weight": "ln2.w", "ln2.bias": "ln2.b", "attn.query.weight": "attn.W_Q", "attn.query.bias": "attn.b_Q",
    "attn.key.weight": "attn.W_K", "attn.key.bias": "attn.b_K", "attn.value.weight": "attn.W_V",
    "attn.value.bias": "attn.b_V", "attn.proj.weight": "attn.W_O", "attn.proj.bias": "attn.b_O",
    "mlp.0.weight": "mlp.W_in", "mlp.0.bias": "mlp.b_in", "mlp.2.weight": "mlp.W_out", "mlp.2.bias": "mlp.b_out",
}  # fmt: skip
# Of some parameters the layout differs.
_TURNED = {
    "pos_embed.W_pos": "1 p m -> p m", "unembed.W_U": "v m -> m v", "mlp.W_in": "f m -> m f", "mlp.W_out": "m f -> f m",
    **dict.fromkeys(("attn.W_Q", "attn.W_K", "attn.W_V"), "(n h) m -> n m h"), "attn.W_O": "m (n h) -> n h m",
    **dict.fromkeys(("attn.b_Q", "attn.b_K", "attn.b_V"), "(n h) -> n h"),
}  # fmt: skip


def in_todays_layout(state: Mapping[str, Tensor], *, n_heads: int, n_layers: int) -> Mapping[str, Tensor]:
    """Tensors under the names and in the shapes of later files; such a file's are given back.

    Args:
        state: the tensors of a file.
        n_heads: heads of a layer.
        n_layers: number of layers.
    """
    if "tok_emb.weight" in state:
        return _from_mingpt(state, n_heads=n_heads)
    if any(re.search(_NORM, name) for name in state):
        return _from_first_solu(state, n_layers=n_layers)
    return state


def _from_first_solu(state: Mapping[str, Tensor], *, n_layers: int) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in state.items():
        later = re.sub(r"^ln\.", "ln_final.", re.sub(_NORM, r"\1ln", name))
        most = _MOST_LAYERS_OF_TURNED_POSITIONS if name.endswith("W_pos") else _MOST_LAYERS_TURNED
        is_turned = n_layers <= most and tensor.ndim > 1 and re.search(r"(^|\.)W_", name) is not None
        converted[later] = tensor.transpose(-2, -1) if is_turned else tensor
    return converted


def _from_mingpt(state: Mapping[str, Tensor], *, n_heads: int) -> dict[str, Tensor]:
    converted = {}
    for name, tensor in state.items():
        layer = (re.match(_LAYER, name) or [""])[0]
        later = _MINGPT.get(name.removeprefix(layer))
        converted[name if later is None else layer + later] = _turn(tensor, _TURNED.get(later or ""), n_heads)
    return converted


def _turn(tensor: Tensor, pattern: str | None, n_heads: int) -> Tensor:
    if pattern is None:
        return tensor
    try:
        return rearrange(tensor, pattern, **({"n": n_heads} if "n" in pattern else {}))
    except EinopsError:
        # It is told of with all that have another shape than the network's.
        return tensor
