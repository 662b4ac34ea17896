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

from hooklens.config import DeclaredWeight, HookedConfig, NormConfig, PartConfig, ShortformerPositions
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
        _fold_norm(draft, cfg.description.norms[name], name, maps, over="d_model")
    for name, weight in draft.declared.items():
        # The norm of the neurons, which one map reads.
        norm = cfg.description.norms.get(f"{name.removesuffix('W_out')}ln") if name.endswith("mlp.W_out") else None
        if norm is not None:
            _fold_norm(draft, norm, f"{name.removesuffix('W_out')}ln", [weight], over="d_mlp")


def _fold_norm(draft: WeightDraft, norm: NormConfig, name: str, readers: list[DeclaredWeight], *, over: str) -> None:
    weight = draft.read(f"{name}.w") if norm.weight else None
    bias = draft.read(f"{name}.b") if norm.bias else None
    for reader in readers:
        tensor, axis = draft.read(reader.name), reader.axes.index(over)
        if bias is not None:
            assert reader.bias is not None
            moved = torch.tensordot(bias, tensor.movedim(axis, 0), dims=1)
            draft.write(reader.bias, draft.read(reader.bias) + moved)
        if weight is not None:
            scale = 1 + weight if norm.unit_offset else weight
            tensor = scale.view([-1 if place == axis else 1 for place in range(tensor.ndim)]) * tensor
        if norm.kind == "layer":
            tensor = tensor - tensor.mean(dim=axis, keepdim=True)
        draft.write(reader.name, tensor)
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
    obstacles = []
    if isinstance(cfg.positions, ShortformerPositions) and any(block.attn_norm is not None for block in cfg.blocks):
        obstacles.append(
            "shortformer positions (cfg.positions) are added behind the norm, so W_Q and W_K read more than its output"
        )
    if not without:
        return obstacles
    return [
        *obstacles,
        f"{join_names(without, limit=5)} have no bias, which the bias of the norms would have to move into",
    ]


def _config_with_folded_norms(cfg: HookedConfig) -> HookedConfig:
    """Untied, because `W_U` takes the final norm and `W_E` does not; with biases where a norm had one."""
    biased = [block for block in cfg.blocks if block.norm is not None and block.norm.bias]
    return cfg.replace(
        # A projection before it reads the norm in its place.
        tied_unembed=cfg.tied_unembed and (cfg.final_norm is None or cfg.d_embed is not None),
        **_with_biases(
            ("qkv_bias", "q_bias", "k_bias", "v_bias"), any(block.attn_norm is not None for block in biased)
        ),
        **_with_biases(
            ("mlp_bias", "mlp_in_bias", "mlp_gate_bias"), any(block.mlp_norm is not None for block in biased)
        ),
        **({"mlp_out_bias": True} if cfg.act_norm is not None and cfg.act_norm.bias and not cfg.attn_only else {}),
        mlp=_mlps_with_biases(cfg, [block.layer for block in biased if block.mlp_norm is not None]),
        unembed_bias=cfg.unembed_bias or (cfg.final_norm is not None and cfg.final_norm.bias),
    )


def _with_biases(flags: tuple[str, ...], needed: bool) -> dict[str, bool | None]:  # noqa: FBT001
    """Changes of a config that give all maps of a flag their biases, where these are needed."""
    several, *single = flags
    return {several: True, **dict.fromkeys(single)} if needed else {}


def _mlps_with_biases(cfg: HookedConfig, layers: list[int]) -> PartConfig | tuple[PartConfig | None, ...] | None:
    """The parts at the MLP's place, in some layers with biases."""
    if not isinstance(cfg.mlp, tuple):
        return cfg.mlp.with_biases() if cfg.mlp is not None and layers else cfg.mlp
    return tuple(part.with_biases() if part and layer in layers else part for layer, part in enumerate(cfg.mlp))


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
    # Values of latent attention have no bias.
    kinds = sorted({block.attn.kind for block in cfg.blocks if block.attn is not None} - {"attention", "mla"})
    return [f"attention of the kind {kind!r} may do something else with values" for kind in kinds]


def _has_value_biases(cfg: HookedConfig) -> bool:
    return any(name.endswith(".attn.b_V") for name in cfg.description.weights)


def _value_obstacles(cfg: HookedConfig) -> list[str]:
    """Why a bias of the values does not reach every position alike."""
    obstacles = other_attention(cfg)
    biased = _has_value_biases(cfg)
    if biased and cfg.attn_sinks:
        obstacles.append("attention sinks take a part of every row of the pattern, which sums to less than 1")
    if biased and cfg.clip_qkv is not None:
        obstacles.append(f"values are clipped with their bias (cfg.clip_qkv={cfg.clip_qkv})")
    return obstacles


fold_ln = ProcessingStep(
    name="fold_ln",
    find_obstacles=_folding_obstacles,
    change_config=_config_with_folded_norms,
    change=_fold_norms,
)
"""Moves weight and bias of `ln1`, `ln2`, `ln_final` and of the norm of neurons into the maps that read them.

The norms are left with weight 1 (0 with `unit_offset`) and bias 0, where they have these. Biases come into being where
a norm had one: `qkv_bias`, `mlp_bias` and `unembed_bias` are switched on, with zeros for the maps of a flag that read
no such norm. A tied unembedding is untied, where there is a final norm. Norms after a branch, query-key norms and those
of the latents of latent attention stay.
"""

fold_value_biases = ProcessingStep(
    name="fold_value_biases",
    find_obstacles=_value_obstacles,
    change_config=lambda cfg: cfg.replace(out_bias=cfg.out_bias or _has_value_biases(cfg)),
    change=_fold_value_bias,
)
"""Moves `b_V` through `W_O` into `b_O` (switched on if need be) and leaves zeros; nothing to do without biases.

Exact wherever a position attends to anything: rows of the pattern sum to one. Refused with sinks or clipped values.
"""
