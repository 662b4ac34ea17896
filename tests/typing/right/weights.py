"""The network: its blocks, weights and config."""

import pandas
from torch import Tensor
from typing_extensions import assert_type

import hooklens as hl
from hooklens.model.block import Block

model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")

block = model.blocks[0]
assert_type(block, Block)
assert_type(block.attn.W_Q, Tensor)
assert_type(block.attn.b_Q, Tensor | None)
assert_type(block.mlp.W_in, Tensor)
assert_type(block.hook_resid_pre, hl.HookPoint)
assert_type(block.attn.hook_pattern, hl.HookPoint)
for layer, each in enumerate(model.blocks):
    print(layer, each.attn.W_O.shape, [later.mlp.W_out.shape for later in model.blocks[layer:]])
assert_type(model.W_E, Tensor)
assert_type(model.W_Q[0, 1] @ model.W_K[0, 0].T, Tensor)
assert_type(model.W_U, Tensor)
assert_type(model.QK, hl.FactoredMatrix)
assert_type(model.OV[0, 1].AB, Tensor)
assert_type(model.unembed.W_U, Tensor)
assert_type(model.cfg, hl.HookedConfig)
assert_type(model.cfg.n_layers, int)
assert_type(model.named_weights()["blocks.0.attn.W_Q"], Tensor)
assert_type(model.hook_points(), dict[str, hl.HookPoint])
assert_type(model.hook_table(), pandas.DataFrame)
assert_type(model.all_composition_scores("K"), Tensor)
assert_type(model.accumulated_bias(1), Tensor)

folded = model.process_weights(fold_ln=True)
assert_type(folded, hl.HookedCausalLM)
print(folded.transforms, folded.device, folded.dtype, folded.n_params_total)

cfg = hl.HookedConfig(
    n_layers=2, d_model=32, n_heads=4, d_vocab=50, n_ctx=16, act_fn="gelu", positions=hl.RotaryPositions(dim=8)
)
fresh = hl.HookedCausalLM(cfg)
fresh.initialize(seed=0)
assert_type(fresh([[1, 2, 3]]), Tensor)
