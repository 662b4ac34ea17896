"""Which parameters a configuration has, with their logical shapes, and whether a state dict holds them."""

from collections.abc import Mapping

from torch import Tensor

from hooklens.config import HookedConfig, LearnedPositions
from hooklens.errors import CheckpointError, join_names

Shape = tuple[int, ...]


def weight_shapes(cfg: HookedConfig) -> dict[str, Shape]:
    """Every parameter of the network and its logical shape, in the order of the computation.

    A tied `unembed.W_U` is listed too; it is `embed.W_E` transposed.
    """
    shapes: dict[str, Shape] = {"embed.W_E": (cfg.d_vocab, cfg.d_model)}
    if isinstance(cfg.positions, LearnedPositions):
        shapes["pos_embed.W_pos"] = (cfg.n_ctx + cfg.positions.offset, cfg.d_model)
    block = _block_shapes(cfg)
    for layer in range(cfg.n_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= _norm_shapes("ln_final", cfg)
    shapes["unembed.W_U"] = (cfg.d_model, cfg.d_vocab)
    if cfg.unembed_bias:
        shapes["unembed.b_U"] = (cfg.d_vocab,)
    return shapes


def _block_shapes(cfg: HookedConfig) -> dict[str, Shape]:
    shapes = _norm_shapes("ln1", cfg) if cfg.norm_before else {}
    shapes |= _attention_shapes(cfg)
    if cfg.norm_after:
        shapes |= _norm_shapes("ln1_post", cfg)
    if cfg.norm_before and not cfg.shared_norm:
        shapes |= _norm_shapes("ln2", cfg)
    shapes |= _mlp_shapes(cfg)
    if cfg.norm_after:
        shapes |= _norm_shapes("ln2_post", cfg)
    return shapes


def _norm_shapes(norm: str, cfg: HookedConfig) -> dict[str, Shape]:
    parts = ("w", "b") if cfg.norm.bias else ("w",)
    return {f"{norm}.{part}": (cfg.d_model,) for part in parts}


def _attention_shapes(cfg: HookedConfig) -> dict[str, Shape]:
    heads = {"Q": cfg.n_heads, "K": cfg.n_kv_heads, "V": cfg.n_kv_heads}
    shapes: dict[str, Shape] = {f"attn.W_{part}": (n, cfg.d_model, cfg.d_head) for part, n in heads.items()}
    shapes["attn.W_O"] = (cfg.n_heads, cfg.d_head, cfg.d_model)
    if cfg.qkv_bias:
        shapes |= {f"attn.b_{part}": (n, cfg.d_head) for part, n in heads.items()}
    if cfg.out_bias:
        shapes["attn.b_O"] = (cfg.d_model,)
    if cfg.qk_norm is not None:
        parts = ("w", "b") if cfg.qk_norm.bias else ("w",)
        shapes |= {f"attn.{norm}.{part}": (cfg.d_head,) for norm in ("q_norm", "k_norm") for part in parts}
    return shapes


def _mlp_shapes(cfg: HookedConfig) -> dict[str, Shape]:
    into = ("in", "gate") if cfg.gated_mlp else ("in",)
    shapes: dict[str, Shape] = {f"mlp.W_{part}": (cfg.d_model, cfg.d_mlp) for part in into}
    shapes["mlp.W_out"] = (cfg.d_mlp, cfg.d_model)
    if cfg.mlp_bias:
        shapes |= {f"mlp.b_{part}": (cfg.d_mlp,) for part in into}
        shapes["mlp.b_out"] = (cfg.d_model,)
    return shapes


def check_state(state: Mapping[str, Tensor], cfg: HookedConfig) -> None:
    """Refuse a state dict that does not hold the floating-point parameters its config promises.

    A tied `unembed.W_U` may be absent, and `pos_embed.W_pos` may have any number of rows.

    Raises:
        CheckpointError: lists all missing and unexpected names, wrong shapes and integer tensors.
    """
    shapes = weight_shapes(cfg)
    optional = {"unembed.W_U"} if cfg.tied_unembed else set()
    problems = []
    if missing := [name for name in shapes if name not in state and name not in optional]:
        problems.append(f"missing: {join_names(missing)}")
    if unexpected := [name for name in state if name not in shapes]:
        problems.append(f"unexpected: {join_names(unexpected)}")
    for name in (name for name in shapes if name in state):
        tensor = state[name]
        free = 1 if name == "pos_embed.W_pos" else 0
        if len(tensor.shape) != len(shapes[name]) or tuple(tensor.shape)[free:] != shapes[name][free:]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}; expected {shapes[name]}")
        if not tensor.is_floating_point():
            problems.append(f"{name} has dtype {tensor.dtype}; expected floating point (dequantise it first)")
    if problems:
        raise CheckpointError("the state dict does not fit its config:\n- " + "\n- ".join(problems))
