"""What 2.x has in its weights goes into them, and changes no logits."""

import pytest
import torch

from hooklens import HookedCausalLM, HookedConfig, LearnedPositions, NormConfig, RotaryPositions, ShortformerPositions
from hooklens.compat.transformer_lens._loading import bake

RMS = NormConfig(kind="rms", eps=1e-5, bias=False, unit_offset=True)
CHANGES = {
    "scaled embedding, norms with an offset": {
        "positions": RotaryPositions(dim=8), "embed_scale": 4.0, "norm": RMS, "qk_norm": RMS, "tied_unembed": True,
    },
    "rows before the first position": {"positions": LearnedPositions(offset=2)},
    "the same for queries and keys": {"positions": ShortformerPositions(offset=2)},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_baked_models_compute_the_same(name: str) -> None:
    cfg = HookedConfig(d_model=16, n_layers=2, n_heads=2, d_vocab=31, n_ctx=12, **CHANGES[name])
    model = HookedCausalLM(cfg).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    baked = bake(model)
    ids = torch.arange(1, 11)[None]
    with torch.no_grad():
        # The factor of the embedding is rounded to the dtype of the weights, twice.
        torch.testing.assert_close(baked(ids), model(ids), rtol=1e-9, atol=1e-9)
    assert baked.cfg.embed_scale is None
    assert not any(norm.unit_offset for norm in baked.cfg.description.norms.values())
    if "rows" in name:
        assert baked.W_pos.shape == (12, 16)
