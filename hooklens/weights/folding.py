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

from hooklens.config import HookedConfig
from hooklens.weights.draft import WeightDraft
from hooklens.weights.steps import ProcessingStep

_ATTENTION_READERS = ("attn.W_Q", "attn.W_K", "attn.W_V")
_MLP_READERS = ("mlp.W_in", "mlp.W_gate")


def _fold_norm(draft: WeightDraft, cfg: HookedConfig, norm: str, readers: list[str]) -> None:
    """Move the weight and bias of one norm into all maps that read it."""
    weight = draft.read(f"{norm}.w")
    scale = 1 + weight if cfg.norm.unit_offset else weight
    for name in readers:
        W = draft.read(name)
        if cfg.norm.bias:
            module, _, part = name.rpartition(".W")
            bias = f"{module}.b{part}"
            draft.write(bias, draft.read(bias) + draft.read(f"{norm}.b") @ W)
        folded = scale[:, None] * W
        if cfg.norm.kind == "layer":
            folded = folded - folded.mean(dim=-2, keepdim=True)
        draft.write(name, folded)
    draft.write(f"{norm}.w", torch.zeros_like(weight) if cfg.norm.unit_offset else torch.ones_like(weight))
    if cfg.norm.bias:
        draft.write(f"{norm}.b", torch.zeros_like(weight))


def _fold_block_norms(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    if not cfg.norm_before:
        return
    attention = draft.present(prefix + name for name in _ATTENTION_READERS)
    mlp = draft.present(prefix + name for name in _MLP_READERS)
    if cfg.shared_norm:
        _fold_norm(draft, cfg, f"{prefix}ln1", attention + mlp)
    else:
        _fold_norm(draft, cfg, f"{prefix}ln1", attention)
        _fold_norm(draft, cfg, f"{prefix}ln2", mlp)


def _fold_final_norm(draft: WeightDraft, cfg: HookedConfig) -> None:
    _fold_norm(draft, cfg, "ln_final", ["unembed.W_U"])


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


FOLD_LN = ProcessingStep(
    name="fold_ln",
    change_config=_config_with_folded_norms,
    change_block=_fold_block_norms,
    change_ends=_fold_final_norm,
)

FOLD_VALUE_BIASES = ProcessingStep(
    name="fold_value_biases",
    change_config=lambda cfg: cfg.replace(out_bias=cfg.out_bias or cfg.qkv_bias),
    change_block=_fold_block_value_bias,
)
