"""Mixture of experts: a router sends each token to a few of many gated MLPs."""

from hooklens.model.moe.mixture import MoE

__all__ = ["MoE"]
