"""The parameters a `HookedConfig` promises: every HookLens name with its logical shape."""

from hooklens.config import HookedConfig, LearnedPositions, NormConfig

Shapes = dict[str, tuple[int, ...]]


def _norm_shapes(prefix: str, norm: NormConfig, size: int) -> Shapes:
    shapes: Shapes = {f"{prefix}.w": (size,)}
    if norm.bias:
        shapes[f"{prefix}.b"] = (size,)
    return shapes


def _attention_shapes(prefix: str, cfg: HookedConfig) -> Shapes:
    q_heads, kv_heads, d_model, d_head = cfg.n_heads, cfg.n_kv_heads, cfg.d_model, cfg.d_head
    shapes: Shapes = {
        f"{prefix}.W_Q": (q_heads, d_model, d_head),
        f"{prefix}.W_K": (kv_heads, d_model, d_head),
        f"{prefix}.W_V": (kv_heads, d_model, d_head),
        f"{prefix}.W_O": (q_heads, d_head, d_model),
    }
    if cfg.qkv_bias:
        shapes[f"{prefix}.b_Q"] = (q_heads, d_head)
        shapes[f"{prefix}.b_K"] = shapes[f"{prefix}.b_V"] = (kv_heads, d_head)
    if cfg.out_bias:
        shapes[f"{prefix}.b_O"] = (d_model,)
    if cfg.qk_norm is not None:
        shapes |= _norm_shapes(f"{prefix}.q_norm", cfg.qk_norm, d_head)
        shapes |= _norm_shapes(f"{prefix}.k_norm", cfg.qk_norm, d_head)
    return shapes


def _mlp_shapes(prefix: str, cfg: HookedConfig) -> Shapes:
    shapes: Shapes = {f"{prefix}.W_in": (cfg.d_model, cfg.d_mlp), f"{prefix}.W_out": (cfg.d_mlp, cfg.d_model)}
    if cfg.gated_mlp:
        shapes[f"{prefix}.W_gate"] = (cfg.d_model, cfg.d_mlp)
    if cfg.mlp_bias:
        shapes[f"{prefix}.b_in"] = (cfg.d_mlp,)
        shapes[f"{prefix}.b_out"] = (cfg.d_model,)
    if cfg.mlp_bias and cfg.gated_mlp:
        shapes[f"{prefix}.b_gate"] = (cfg.d_mlp,)
    return shapes


def _block_shapes(prefix: str, cfg: HookedConfig) -> Shapes:
    norms = []
    if cfg.norm_before:
        norms += ["ln1"] if cfg.shared_norm else ["ln1", "ln2"]
    if cfg.norm_after:
        norms += ["ln1_post", "ln2_post"]
    shapes: Shapes = {}
    for norm in norms:
        shapes |= _norm_shapes(f"{prefix}.{norm}", cfg.norm, cfg.d_model)
    return shapes | _attention_shapes(f"{prefix}.attn", cfg) | _mlp_shapes(f"{prefix}.mlp", cfg)


def parameter_shapes(cfg: HookedConfig) -> Shapes:
    """The logical shape of every HookLens parameter of the network that `cfg` describes.

    A tied unembedding is listed too: `unembed.W_U` is `embed.W_E` transposed, the same storage.
    """
    shapes: Shapes = {"embed.W_E": (cfg.d_vocab, cfg.d_model)}
    if isinstance(cfg.positions, LearnedPositions):
        shapes["pos_embed.W_pos"] = (cfg.n_ctx + cfg.positions.offset, cfg.d_model)
    for layer in range(cfg.n_layers):
        shapes |= _block_shapes(f"blocks.{layer}", cfg)
    shapes |= _norm_shapes("ln_final", cfg.norm, cfg.d_model)
    shapes["unembed.W_U"] = (cfg.d_model, cfg.d_vocab)
    if cfg.unembed_bias:
        shapes["unembed.b_U"] = (cfg.d_vocab,)
    return shapes
