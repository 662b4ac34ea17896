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

from hooklens.config import DeclaredWeight, HookedConfig, NormConfig
from hooklens.errors import join_names
from hooklens.weights.draft import WeightDraft
from hooklens.weights.steps import ProcessingStep


def _fold_norms(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    """Move the weight and bias of each norm into all maps that read it."""
    readers: dict[str, list[DeclaredWeight]] = {}
    for weight in draft.declared.values():
        if weight.reads is not None:
            readers.setdefault(weight.reads, []).append(weight)
    for name, maps in readers.items():
        _fold_norm(draft, cfg.description.norms[name], name, maps)


def _fold_norm(draft: WeightDraft, norm: NormConfig, name: str, readers: list[DeclaredWeight]) -> None:
    weight = draft.read(f"{name}.w") if norm.weight else None
    bias = draft.read(f"{name}.b") if norm.bias else None
    for reader in readers:
        W, axis = draft.read(reader.name), reader.axes.index("d_model")
        if bias is not None:
            assert reader.bias is not None
            moved = torch.tensordot(bias, W, dims=([0], [axis]))
            draft.write(reader.bias, draft.read(reader.bias) + moved)
        if weight is not None:
            scale = 1 + weight if norm.unit_offset else weight
            W = scale.view([-1 if place == axis else 1 for place in range(W.ndim)]) * W
        if norm.kind == "layer":
            W = W - W.mean(dim=axis, keepdim=True)
        draft.write(reader.name, W)
    if weight is not None:
        draft.write(f"{name}.w", torch.zeros_like(weight) if norm.unit_offset else torch.ones_like(weight))
    if bias is not None:
        draft.write(f"{name}.b", torch.zeros_like(bias))


def _folding_obstacles(cfg: HookedConfig) -> list[str]:
    folded = _config_with_folded_norms(cfg).description
    without = [
        weight.name
        for weight in folded.weights.values()
        if weight.reads is not None and folded.norms[weight.reads].bias and weight.bias not in folded.weights
    ]
    if not without:
        return []
    return [f"{join_names(without, limit=5)} have no bias, which the bias of the norms would have to move into"]


def _config_with_folded_norms(cfg: HookedConfig) -> HookedConfig:
    """Untied, because `W_U` takes the final norm and `W_E` does not; with biases where a norm had one."""
    biased = [block for block in cfg.blocks if block.norm is not None and block.norm.bias]
    return cfg.replace(
        tied_unembed=cfg.tied_unembed and cfg.final_norm is None,
        qkv_bias=cfg.qkv_bias or any(block.attn_norm is not None for block in biased),
        mlp_bias=cfg.mlp_bias or any(block.mlp_norm is not None for block in biased),
        unembed_bias=cfg.unembed_bias or (cfg.final_norm is not None and cfg.final_norm.bias),
    )


def _fold_value_bias(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    if f"{prefix}attn.b_V" not in draft.declared:
        return
    b_V, W_O = draft.read(f"{prefix}attn.b_V"), draft.read(f"{prefix}attn.W_O")
    per_head = b_V.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=0)
    moved = torch.einsum("nh,nhd->d", per_head, W_O)
    draft.write(f"{prefix}attn.b_O", draft.read(f"{prefix}attn.b_O") + moved)
    draft.write(f"{prefix}attn.b_V", torch.zeros_like(b_V))


def other_attention(cfg: HookedConfig) -> list[str]:
    """The attention parts of which it is not known that values reach the stream by pattern and `W_O` alone."""
    kinds = sorted({block.attn.kind for block in cfg.blocks if block.attn is not None} - {"attention"})
    return [f"attention of the kind {kind!r} may do something else with values" for kind in kinds]


FOLD_LN = ProcessingStep(
    name="fold_ln",
    find_obstacles=_folding_obstacles,
    change_config=_config_with_folded_norms,
    change=_fold_norms,
)

FOLD_VALUE_BIASES = ProcessingStep(
    name="fold_value_biases",
    find_obstacles=other_attention,
    change_config=lambda cfg: cfg.replace(out_bias=cfg.out_bias or cfg.qkv_bias),
    change=_fold_value_bias,
)
