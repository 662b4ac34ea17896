"""Fresh weights as TransformerLens 2.x draws them: one seed gives the same numbers, since each is drawn in its turn."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hooklens.causal_lm import HookedCausalLM
from hooklens.compat.transformer_lens import utils
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig


@torch.no_grad()
def draw_weights(hooked: HookedCausalLM, cfg: HookedTransformerConfig) -> None:
    """Draw all maps and embeddings anew, on the host; biases and norms stay."""
    if cfg.seed is not None:
        torch.manual_seed(cfg.seed)
    for name, weight in _in_turn(hooked, cfg):
        drawn = torch.empty(weight.shape, dtype=cfg.dtype)
        _draw(drawn, name, cfg)
        weight.copy_(drawn)


def _in_turn(hooked: HookedCausalLM, cfg: HookedTransformerConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights in the order and shape of 2.x's parameters."""
    yield "embed.W_E", hooked.embed.W_E
    if cfg.positional_embedding_type != "rotary":
        # Networks with linear biases have such a table there.
        yield "pos_embed.W_pos", getattr(hooked.pos_embed, "W_pos", torch.empty(cfg.n_ctx, cfg.d_model))
    for block in hooked.block_list():
        for name in ("W_Q", "W_O", "W_K", "W_V"):
            yield name, block.attn.read_weight(name)
        if not block.has_mlp:
            continue
        if cfg.num_experts:
            for expert in range(cfg.num_experts):
                yield from ((name, getattr(block.mlp, name)[expert].mT) for name in ("W_in", "W_out", "W_gate"))
            yield "W_gate", block.mlp.W_router.mT
            continue
        for name in ("W_in", "W_out", "W_gate") if cfg.gated_mlp else ("W_in", "W_out"):
            yield name, getattr(block.mlp, name)
    yield "unembed.W_U", hooked.unembed.W_U


def _draw(weight: Tensor, name: str, cfg: HookedTransformerConfig) -> None:
    gain, mode = float(cfg.initializer_range), cfg.init_mode
    if mode == "gpt2":
        nn.init.normal_(weight, std=gain)
    elif mode == "muP":
        # There, the unembedding counts as an embedding.
        fan_in, _ = utils.calc_fan_in_and_fan_out(weight)
        nn.init.normal_(weight, std=1.0 if "embed" in name else 1 / math.sqrt(fan_in))
    else:
        getattr(utils, f"init_{mode}_")(weight, gain=gain)
