"""Hand-made captures whose every entry is known."""

import torch

from hooklens.activation_cache import ActivationCache
from hooklens.config import HookedConfig, NormConfig, RotaryPositions

CFG = HookedConfig(
    d_model=8, n_layers=3, n_heads=4, n_kv_heads=2, d_vocab=11, n_ctx=16, positions=RotaryPositions(dim=2),
    norm=NormConfig(kind="rms", eps=1e-6, bias=False), windows=(None, 4, None),
)  # fmt: skip


def make_cache(batch=2, pos=5, *, past=0, cfg=CFG, with_grad=False, **inputs):
    """A capture with a fused query-key-value tensor, and with the stream shared by neighbouring blocks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"hook_embed": draw(batch, pos, cfg.d_model)}
    stream = tensors["hook_embed"]
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        # detach() gives another object for the same tensor, as captures do
        tensors[f"{block}.hook_resid_pre"] = stream.detach()
        tensors[f"{block}.ln1.hook_scale"] = draw(batch, pos, 1)
        fused = draw(batch, pos, cfg.n_heads + 2 * cfg.n_kv_heads, cfg.d_head)
        q, k, v = fused.split([cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads], dim=2)
        tensors |= {f"{block}.attn.hook_q": q, f"{block}.attn.hook_k": k, f"{block}.attn.hook_v": v}
        tensors[f"{block}.attn.hook_pattern"] = draw(batch, cfg.n_heads, pos, past + pos).softmax(-1)
        stream = stream + draw(batch, pos, cfg.d_model)
        tensors[f"{block}.hook_resid_post"] = stream
    if with_grad:
        tensors["blocks.1.attn.hook_pattern_grad"] = draw(batch, cfg.n_heads, pos, past + pos)
    return ActivationCache(tensors, cfg=cfg, **inputs)


def distinct_bytes(cache):
    """Bytes of the distinct storages, counted by hand."""
    return sum(
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in cache.values()}.values()
    )


def assert_same_tensors(cache, expected):
    assert list(cache) == list(expected)
    for name, tensor in cache.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.equal(expected[name]), name


def assert_aliases_kept(cache):
    for layer in range(1, CFG.n_layers):
        assert cache["resid_pre", layer].data_ptr() == cache["resid_post", layer - 1].data_ptr()
    assert cache["resid_pre", 0].data_ptr() == cache["hook_embed"].data_ptr()
