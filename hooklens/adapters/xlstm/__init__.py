"""The Llama of xlstm-jax (NX-AI): its `LlamaConfig` and its parameter tree, read in both directions.

Peculiarities:
- The scores are scaled with `n_heads ** -0.5`, whatever the width of a head: its attention takes the size of the wrong
  axis. It is what its checkpoints were trained with (`attn_scale`).
- Rotary turns adjacent pairs of entries, on the whole head (`layout="interleaved"`).
- The width of the MLP follows from `embedding_dim` by a rule (`hooklens.adapters.xlstm.config.mlp_width`).
- The query-key norm is RMSNorm with one weight for all heads, after the bias and before rotary.
- Document borders hide other documents only where the config says so (`document_mask`), and positions are what the
  caller gives.
- The embedding is never tied, and has an axis of size 1 before its own: that of the devices that it is spread over.
- With `scan_blocks` the parameters of all blocks lie in one array, along its first axis.

The tables are `FIELDS` (config) and `RULES` (tensors). This is no checkpoint format with a `config.json`, so it is no
family.
"""

from hooklens.adapters.xlstm.config import read_xlstm_config, write_xlstm_config
from hooklens.adapters.xlstm.params import read_xlstm, write_xlstm
from hooklens.config.foreign import translate_with

translate_with("from_xlstm", read_xlstm_config)
translate_with("to_xlstm", write_xlstm_config)

__all__ = ["read_xlstm", "read_xlstm_config", "write_xlstm", "write_xlstm_config"]
