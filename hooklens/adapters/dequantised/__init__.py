"""Quantised checkpoints read as plain ones: weights are dequantised one by one, when they are asked for."""

from hooklens.adapters.dequantised.config import open_dequantised, read_quantisation

__all__ = ["open_dequantised", "read_quantisation"]
