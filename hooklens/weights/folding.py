"""Folding: moving a norm's weights, or the values' bias, into the linear maps next to them.

**fold_ln.** A norm ends in `y = n * w + b`, with `n` the normalised stream, and only linear maps read `y`:

    y W + c  =  n (diag(w) W) + (c + b W)

so the maps take over `w` and `b`. For a LayerNorm `n` has mean zero over d_model, so the mean over d_model
of a map that reads it has no effect; it is taken out, which leaves only directions that are really read (as
TransformerLens does). An edit of `hook_normalized` that adds the same number to all entries is therefore
without effect in the new model. For an RMSNorm there is no bias and the mean counts.

**fold_value_biases.** The rows of an attention pattern sum to one, so the bias of the values reaches every
position alike, `sum_k p_qk (v_k + b_V) = z_q + b_V`, and moves through `W_O` into `b_O`. Rows that attend
nowhere (padding that sees no key) are the exception: there it was absent and is added afterwards.
"""

import torch

from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import join_names
from hooklens.weights.draft import WeightDraft
from hooklens.weights.steps import ProcessingStep


def _fold_norms(draft: WeightDraft, cfg: HookedConfig) -> None:
    """Move the weight and bias of each norm into all maps that read it."""
    readers: dict[str, list[DeclaredWeight]] = {}
    for weight in draft.declared.values():
        if weight.reads is not None:
            readers.setdefault(weight.reads, []).append(weight)
    for norm, maps in readers.items():
        _fold_norm(draft, cfg, norm, maps)


def _fold_norm(draft: WeightDraft, cfg: HookedConfig, norm: str, readers: list[DeclaredWeight]) -> None:
    weight = draft.read(f"{norm}.w")
    scale = 1 + weight if cfg.norm.unit_offset else weight
    for reader in readers:
        W, axis = draft.read(reader.name), reader.axes.index("d_model")
        if cfg.norm.bias:
            assert reader.bias is not None
            moved = torch.tensordot(draft.read(f"{norm}.b"), W, dims=([0], [axis]))
            draft.write(reader.bias, draft.read(reader.bias) + moved)
        folded = scale.view([-1 if place == axis else 1 for place in range(W.ndim)]) * W
        if cfg.norm.kind == "layer":
            folded = folded - folded.mean(dim=axis, keepdim=True)
        draft.write(reader.name, folded)
    draft.write(f"{norm}.w", torch.zeros_like(weight) if cfg.norm.unit_offset else torch.ones_like(weight))
    if cfg.norm.bias:
        draft.write(f"{norm}.b", torch.zeros_like(weight))


def _fold_block_norms(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    _fold_norms(draft, cfg)


def _folding_obstacles(cfg: HookedConfig) -> list[str]:
    if not cfg.norm.bias:
        return []
    weights = _config_with_folded_norms(cfg).description.weights
    without = [weight.name for weight in weights.values() if weight.reads is not None and weight.bias not in weights]
    if not without:
        return []
    return [f"{join_names(without, limit=5)} have no bias, which the bias of the norms would have to move into"]


def _config_with_folded_norms(cfg: HookedConfig) -> HookedConfig:
    """Untied, because `W_U` takes the final norm and `W_E` does not; with biases where a norm had one."""
    if not cfg.norm.bias:
        return cfg.replace(tied_unembed=False)
    in_blocks = cfg.norm_before
    return cfg.replace(
        tied_unembed=False,
        qkv_bias=cfg.qkv_bias or in_blocks,
        mlp_bias=cfg.mlp_bias or in_blocks,
        unembed_bias=True,
    )


def _fold_block_value_bias(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    if not cfg.qkv_bias:
        return
    b_V, W_O = draft.read(f"{prefix}attn.b_V"), draft.read(f"{prefix}attn.W_O")
    per_head = b_V.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=0)
    moved = torch.einsum("nh,nhd->d", per_head, W_O)
    draft.write(f"{prefix}attn.b_O", draft.read(f"{prefix}attn.b_O") + moved)
    draft.write(f"{prefix}attn.b_V", torch.zeros_like(b_V))


def other_attention(cfg: HookedConfig) -> list[str]:
    """The attention parts of which it is not known that values reach the stream by pattern and `W_O` alone."""
    kinds = sorted({cfg.block(layer).attn.kind for layer in range(cfg.n_layers)} - {"attention"})
    return [f"attention of the kind {kind!r} may do something else with values" for kind in kinds]


FOLD_LN = ProcessingStep(
    name="fold_ln",
    find_obstacles=_folding_obstacles,
    change_config=_config_with_folded_norms,
    change_block=_fold_block_norms,
    change_ends=_fold_norms,
)

FOLD_VALUE_BIASES = ProcessingStep(
    name="fold_value_biases",
    find_obstacles=other_attention,
    change_config=lambda cfg: cfg.replace(out_bias=cfg.out_bias or cfg.qkv_bias),
    change_block=_fold_block_value_bias,
)
