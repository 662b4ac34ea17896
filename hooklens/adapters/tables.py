"""Weight rules that families share: a norm, a linear map, attention, an MLP, experts, and Llama's whole table.

Each gives the rules of all that such a part can have (weights, biases, gates, norms of queries and keys); which of them
apply is said by the network (see `hooklens.adapters.rules`). Names on disk are given without `.weight` and `.bias`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from hooklens.adapters.rules import Condition, Copy, Fused, FusedQKV, RowOrder, RowPieces, WeightRule, applies_always
from hooklens.config import HookedConfig
from hooklens.config.latent import find_latent

BLOCK = "blocks.{i}"
_PRE_NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
POST_NORMS = {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}
"""Norms behind each branch only, as families without others call them."""
SANDWICH_NORMS = {"ln1": "input_layernorm", "ln2": "pre_feedforward_layernorm", **POST_NORMS}
"""The same, and norms before each branch."""

Rules = tuple[WeightRule, ...]


def norm_rules(hub: str, name: str, *, when: Condition = applies_always) -> tuple[Copy, ...]:
    """A norm: `<hub>.weight` is `<name>.w`, `<hub>.bias` is `<name>.b`."""
    return (Copy(f"{hub}.weight", f"{name}.w", when=when), Copy(f"{hub}.bias", f"{name}.b", when=when))


def decoder_rules(
    blocks: Rules, *, embed: str, final_norm: str | None, head: str = "lm_head", pos_embed: str | None = None
) -> Rules:
    """A decoder around its blocks.

    Args:
        blocks: the rules of the blocks.
        embed: name on disk of the token embedding.
        final_norm: of the final norm; None: there is none.
        head: of the unembedding.
        pos_embed: of a table of learned positions; None: there is none.
    """
    table = () if pos_embed is None else (Copy(f"{pos_embed}.weight", "pos_embed.W_pos"),)
    return (
        Copy(f"{embed}.weight", "embed.W_E"),
        *table,
        *blocks,
        *(() if final_norm is None else norm_rules(final_norm, "ln_final")),
        Copy(f"{head}.weight", "unembed.W_U", "v m -> m v"),
        Copy(f"{head}.bias", "unembed.b_U"),
    )


def projection_rules(hub: str, letter: str) -> Rules:
    """A map of the stream to heads, `letter` one of `"Q"`, `"K"`, `"V"`."""
    attn = f"{BLOCK}.attn"
    return (
        Copy(f"{hub}.weight", f"{attn}.W_{letter}", "(n h) m -> n m h"),
        Copy(f"{hub}.bias", f"{attn}.b_{letter}", "(n h) -> n h"),
    )


def out_rules(hub: str, *, conv1d: bool = False) -> Rules:
    """The output map of attention.

    Args:
        hub: its name on disk.
        conv1d: its weight is `[in, out]`, as in transformers' `Conv1D`.
    """
    pattern = "(n h) m -> n h m" if conv1d else "m (n h) -> n h m"
    return (Copy(f"{hub}.weight", f"{BLOCK}.attn.W_O", pattern), Copy(f"{hub}.bias", f"{BLOCK}.attn.b_O"))


def attention_rules(hub: str, *, q: str = "q_proj", k: str = "k_proj", v: str = "v_proj", o: str = "o_proj") -> Rules:
    """Attention with a tensor for each map."""
    maps = (("Q", q), ("K", k), ("V", v))
    projections = (rule for letter, name in maps for rule in projection_rules(f"{hub}.{name}", letter))
    return (*projections, *out_rules(f"{hub}.{o}"))


def qk_norm_rules(hub: str, *, q: str = "q_norm", k: str = "k_norm", heads_flat: bool = False) -> Rules:
    """Norms of queries and keys.

    Args:
        hub: name on disk of attention.
        q, k: of the norms.
        heads_flat: weights of several heads lie in one axis, as those of norms over all heads do.
    """
    attn = f"{BLOCK}.attn"
    rules = (*norm_rules(f"{hub}.{q}", f"{attn}.q_norm"), *norm_rules(f"{hub}.{k}", f"{attn}.k_norm"))
    return tuple(replace(rule, pattern="(n h) -> n h") for rule in rules) if heads_flat else rules


def fused_qkv_rules(hub: str, *, order: RowOrder) -> Rules:
    """Queries, keys and values in one tensor; see `FusedQKV`."""
    attn = f"{BLOCK}.attn"
    return (
        FusedQKV(f"{hub}.weight", (f"{attn}.W_Q", f"{attn}.W_K", f"{attn}.W_V"), order),
        FusedQKV(f"{hub}.bias", (f"{attn}.b_Q", f"{attn}.b_K", f"{attn}.b_V"), order),
    )


def fused_conv1d_qkv_rules(hub: str) -> Rules:
    """Queries, keys and values, of as many heads each, in one `Conv1D` (`[in, out]`): three blocks of columns."""
    attn = f"{BLOCK}.attn"
    return (
        Fused(f"{hub}.weight", (f"{attn}.W_Q", f"{attn}.W_K", f"{attn}.W_V"), "m (s n h) -> s n m h"),
        Fused(f"{hub}.bias", (f"{attn}.b_Q", f"{attn}.b_K", f"{attn}.b_V"), "(s n h) -> s n h"),
    )


def _latent_sizes(cfg: HookedConfig) -> Mapping[str, int]:
    """Rows of the pieces of tensors of latent attention."""
    latent = find_latent(cfg.attn)
    assert latent is not None
    return {"latent": latent.kv_rank, "turning": latent.d_rope, "still": latent.d_nope, "value": latent.d_head_v}


def latent_attention_rules(hub: str) -> Rules:
    """Multi-head latent attention, with DeepSeek's names; in a head there, the entries that turn are the last ones."""
    attn, head = f"{BLOCK}.attn", ("turning", "still")
    queries = {"q_b_proj": f"{attn}.W_UQ", "q_proj": f"{attn}.W_Q"}
    split: Callable[..., RowPieces] = partial(RowPieces, sizes=_latent_sizes)
    return (
        Copy(f"{hub}.q_a_proj.weight", f"{attn}.W_DQ", "l m -> m l"),
        Copy(f"{hub}.q_a_proj.bias", f"{attn}.b_DQ"),
        *norm_rules(f"{hub}.q_a_layernorm", f"{attn}.q_latent_norm"),
        *(split(f"{hub}.{name}.weight", ((ours, head),), head[::-1], heads=True) for name, ours in queries.items()),
        *(
            split(
                f"{hub}.kv_a_proj_with_mqa.{kind}",
                ((f"{attn}.{letter}_DKV", ("latent",)), (f"{attn}.{letter}_KR", ("turning",))),
                ("latent", "turning"),
            )
            for kind, letter in (("weight", "W"), ("bias", "b"))
        ),
        *norm_rules(f"{hub}.kv_a_layernorm", f"{attn}.kv_latent_norm"),
        split(
            f"{hub}.kv_b_proj.weight",
            ((f"{attn}.W_UK", ("still",)), (f"{attn}.W_UV", ("value",))),
            ("still", "value"),
            heads=True,
        ),
        Copy(f"{hub}.o_proj.weight", f"{attn}.W_O", "m (n w) -> n w m"),
        Copy(f"{hub}.o_proj.bias", f"{attn}.b_O"),
    )


def mlp_rules(hub: str, *, up: str, down: str, gate: str | None = None, conv1d: bool = False) -> Rules:
    """An MLP, or the dense one of layers without experts.

    Args:
        hub: the part's name on disk.
        up, down, gate: its maps.
        conv1d: weights are `[in, out]`, as in transformers' `Conv1D`.
    """
    mlp = f"{BLOCK}.mlp"
    into, out = (None, None) if conv1d else ("f m -> m f", "m f -> f m")
    rules: tuple[Copy, ...] = (
        Copy(f"{hub}.{up}.weight", f"{mlp}.W_in", into),
        Copy(f"{hub}.{up}.bias", f"{mlp}.b_in"),
        Copy(f"{hub}.{down}.weight", f"{mlp}.W_out", out),
        Copy(f"{hub}.{down}.bias", f"{mlp}.b_out"),
    )
    if gate is not None:
        rules += (Copy(f"{hub}.{gate}.weight", f"{mlp}.W_gate", into), Copy(f"{hub}.{gate}.bias", f"{mlp}.b_gate"))
    return tuple(replace(rule, part="mlp") for rule in rules)


def gated_mlp_rules(hub: str) -> Rules:
    """The MLP with Llama's names."""
    return mlp_rules(hub, up="up_proj", down="down_proj", gate="gate_proj")


def fused_gate_rules(hub: str, *, gate_up: str = "gate_up_proj", down: str = "down_proj") -> Rules:
    """A gated MLP whose gate and linear half lie in one tensor, the gate's rows first."""
    mlp = f"{BLOCK}.mlp"
    return (
        Fused(f"{hub}.{gate_up}.weight", (f"{mlp}.W_gate", f"{mlp}.W_in"), "(s f) m -> s m f", part="mlp"),
        Fused(f"{hub}.{gate_up}.bias", (f"{mlp}.b_gate", f"{mlp}.b_in"), "(s f) -> s f", part="mlp"),
        Copy(f"{hub}.{down}.weight", f"{mlp}.W_out", "m f -> f m", part="mlp"),
        Copy(f"{hub}.{down}.bias", f"{mlp}.b_out", part="mlp"),
    )


def router_rules(hub: str) -> Rules:
    """The router of a mixture of experts."""
    return (Copy(f"{hub}.weight", f"{BLOCK}.mlp.W_router", "e m -> m e"), Copy(f"{hub}.bias", f"{BLOCK}.mlp.b_router"))


def expert_rules(hub: str, *, up: str = "up_proj", down: str = "down_proj", gate: str = "gate_proj") -> Rules:
    """Experts with tensors of their own; `hub` has `{e}` in the place of the expert."""
    mlp = f"{BLOCK}.mlp"
    return (
        Copy(f"{hub}.{gate}.weight", f"{mlp}.W_gate", "f m -> m f", part="moe"),
        Copy(f"{hub}.{up}.weight", f"{mlp}.W_in", "f m -> m f", part="moe"),
        Copy(f"{hub}.{down}.weight", f"{mlp}.W_out", "m f -> f m", part="moe"),
    )


def stacked_expert_rules(hub: str, *, gate_up: str = "gate_up_proj", down: str = "down_proj") -> Rules:
    """Experts as transformers 5 holds them in memory: all in one tensor, the gate's rows before the linear half's.

    Args:
        hub: the name of the experts.
        gate_up, down: of their tensors, in full.
    """
    mlp = f"{BLOCK}.mlp"
    return (
        Fused(f"{hub}.{gate_up}", (f"{mlp}.W_gate", f"{mlp}.W_in"), "e (s f) m -> s e m f", part="moe"),
        Copy(f"{hub}.{down}", f"{mlp}.W_out", "e m f -> e f m", part="moe"),
    )


def shared_expert_rules(hub: str, *, gate: str | None = None) -> Rules:
    """The expert that sees every token, with Llama's names.

    Args:
        hub: its name on disk.
        gate: that of the map whose sigmoid its output is multiplied by; None: there is none.
    """
    shared = f"{BLOCK}.mlp.shared"
    gated = () if gate is None else (Copy(f"{gate}.weight", f"{shared}.W_shared_gate", "o m -> m o"),)
    return (
        Copy(f"{hub}.gate_proj.weight", f"{shared}.W_gate", "f m -> m f"),
        Copy(f"{hub}.up_proj.weight", f"{shared}.W_in", "f m -> m f"),
        Copy(f"{hub}.down_proj.weight", f"{shared}.W_out", "m f -> f m"),
        *gated,
    )


def llama_rules(
    *,
    norms: Mapping[str, str] = _PRE_NORMS,
    mlp: Rules | None = None,
    attention: Rules | None = None,
    final_norm: str = "norm",
    model: str = "model",
) -> Rules:
    """Llama's table, which most families vary.

    Args:
        norms: names on disk of the block's norms, by ours (`ln1`, `ln2`, `ln1_post`, `ln2_post`).
        mlp: the rules of what stands at the MLP's place; None: the gated MLP with Llama's names.
        attention: the rules of attention; None: a tensor for each map, norms of queries and keys as `q_norm` and
            `k_norm`.
        final_norm: name on disk of the final norm.
        model: what names begin with.
    """
    layer = f"{model}.layers.{{i}}"
    if attention is None:
        attention = (*attention_rules(f"{layer}.self_attn"), *qk_norm_rules(f"{layer}.self_attn"))
    block_norms = (rule for ours, hub in norms.items() for rule in norm_rules(f"{layer}.{hub}", f"{BLOCK}.{ours}"))
    blocks = (*block_norms, *attention, *(gated_mlp_rules(f"{layer}.mlp") if mlp is None else mlp))
    return decoder_rules(blocks, embed=f"{model}.embed_tokens", final_norm=f"{model}.{final_norm}")


def fairseq_block_rules(layer: str) -> Rules:
    """A block as fairseq names it: the norm before the MLP is `final_layer_norm`, and the MLP is `fc1` and `fc2`."""
    return (
        *norm_rules(f"{layer}.self_attn_layer_norm", f"{BLOCK}.ln1"),
        *attention_rules(f"{layer}.self_attn", o="out_proj"),
        *norm_rules(f"{layer}.final_layer_norm", f"{BLOCK}.ln2"),
        *mlp_rules(layer, up="fc1", down="fc2"),
    )
