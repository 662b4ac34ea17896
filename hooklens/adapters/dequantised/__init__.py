"""Quantised checkpoints read as plain ones: weights are dequantised one by one, when they are asked for."""

from hooklens.adapters.dequantised.config import read_quantisation
from hooklens.adapters.dequantised.tensors import DequantisedTensors, Parts, QuantFormat

__all__ = ["DequantisedTensors", "Parts", "QuantFormat", "read_quantisation"]
