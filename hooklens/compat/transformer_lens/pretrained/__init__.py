"""`transformer_lens.pretrained` of 2.x."""

from hooklens.compat.transformer_lens.pretrained import weight_conversions

__all__ = ["weight_conversions"]
