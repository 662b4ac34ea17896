"""Small networks with every parameter random, one for each wiring and kind of position, and a record of allocations."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hooklens import HookedCausalLM
from hooklens.config import (
    AlibiPositions,
    HookedConfig,
    LearnedPositions,
    MLAConfig,
    NoPositions,
    NormConfig,
    PartConfig,
    RotaryPositions,
)
from hooklens.hooks.names import is_by_name_only

RMS_NORM = NormConfig(kind="rms", eps=1e-6, bias=False)
ATTENTION, MLP = PartConfig(kind="attention"), PartConfig(kind="mlp")
D_VOCAB = 23
N_CTX = 32


def make_config(**changes) -> HookedConfig:
    sizes = {"d_model": 12, "n_layers": 2, "n_heads": 4, "d_head": 6, "d_mlp": 20, "d_vocab": D_VOCAB, "n_ctx": N_CTX}
    sizes["positions"] = NoPositions()
    return HookedConfig(**{**sizes, **changes})


CONFIGS = {
    "rotary": make_config(wiring="parallel", positions=RotaryPositions(dim=2)),
    "grouped": make_config(
        norm=RMS_NORM, gated_mlp=True, act_fn="silu", n_kv_heads=2, positions=RotaryPositions(dim=6),
        qkv_bias=False, out_bias=False, mlp_bias=False,
    ),
    "alibi": make_config(positions=AlibiPositions(), unembed_bias=True),
    "alibi, grouped": make_config(positions=AlibiPositions(scaled=True), n_kv_heads=2),
    "learned, tied": make_config(positions=LearnedPositions(offset=2), tied_unembed=True),
    "shared norm": make_config(
        wiring="parallel", shared_norm=True, n_kv_heads=1, positions=RotaryPositions(dim=4, layout="interleaved"),
        qkv_bias=False, mlp_bias=False,
    ),
    "capped": make_config(
        norm=NormConfig(kind="rms", eps=1e-6, bias=False, unit_offset=True), norm_after=True, attn_softcap=5.0,
        logits_softcap=3.0, embed_scale=3.5, windows=(3, None), qk_norm=RMS_NORM, tied_unembed=True,
    ),
    "bare": make_config(norm_before=False),
}  # fmt: skip
# Where layers lack what the ones above have.
PARTIAL_CONFIGS = {
    "attention only": make_config(
        attn_only=True, norm=NormConfig(kind="layer", eps=1e-5, weight=False, bias=False), final_norm=None,
        positions=RotaryPositions(dim=6),
    ),
    "layers that lack parts": make_config(
        n_layers=4, attn=(None, ATTENTION, None, ATTENTION), mlp=(MLP, None, None, MLP), n_kv_heads=2,
        norm=(RMS_NORM, None, None, NormConfig(kind="layer", eps=1e-5)), final_norm=RMS_NORM,
        norm_after=(True, False, False, True), positions=AlibiPositions(), qk_norm=(None, None, None, RMS_NORM),
    ),
    "heads and MLPs apart": make_config(
        n_layers=4, attn=(ATTENTION, None, None, ATTENTION), mlp=(None, None, MLP, MLP), n_kv_heads=2,
        norm=(RMS_NORM, RMS_NORM, None, NormConfig(kind="layer", eps=1e-5)), final_norm=RMS_NORM,
        positions=RotaryPositions(dim=4),
    ),
    "latent attention": make_config(
        norm=RMS_NORM, gated_mlp=True, act_fn="silu", mlp_bias=False, d_head=5, out_bias=False,
        attn=MLAConfig(q_rank=5, kv_rank=8, d_nope=3, d_rope=2, d_head_v=3), positions=RotaryPositions(dim=2),
    ),
}  # fmt: skip
ALL_CONFIGS = {**CONFIGS, **PARTIAL_CONFIGS}


@torch.no_grad()
def make_model(network: str | HookedConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> HookedCausalLM:
    """A model of a named configuration (or a given one), norm weights and biases random, too."""
    model = HookedCausalLM(ALL_CONFIGS[network] if isinstance(network, str) else network).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def activations_of(model: HookedCausalLM) -> list[str]:
    """The hook points of a model, but for those of ids."""
    return [name for name in model.hook_points() if not is_by_name_only(name)]


def random_tokens(batch: int, n: int, *, d_vocab: int = D_VOCAB, seed: int = 1) -> Tensor:
    return torch.randint(d_vocab, (batch, n), generator=torch.Generator().manual_seed(seed))


def pad_rows(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different length in one batch, with its mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


class Allocations(TorchDispatchMode):
    """Records the tensors that operations give back in memory of their own (views are left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append((str(func), tuple(tensor.shape)))
        return out

    def with_numel(self, *numels: int) -> list[tuple[str, tuple[int, ...]]]:
        """What was allocated with one of these numbers of entries."""
        return [(name, shape) for name, shape in self.sizes if torch.Size(shape).numel() in numels]
