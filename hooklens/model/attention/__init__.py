"""Attention: how positions enter queries and keys, and the kernels that mix the values."""
