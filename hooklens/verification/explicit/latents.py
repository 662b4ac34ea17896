"""Latent attention's queries, keys and values from their definition (arXiv:2405.04434, eq. 9 to 19), head by head."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hooklens.config import MLAConfig

if TYPE_CHECKING:
    from hooklens.verification.explicit.network import ExplicitNetwork


class Latents:
    """The definitions of one layer.

    Args:
        latent: its widths.
        network: whose.
        place: the layer's name.
        read: gives what a hook point shows.
    """

    def __init__(
        self, latent: MLAConfig, network: "ExplicitNetwork", place: str, read: Callable[[str], Tensor]
    ) -> None:
        self._latent, self._network, self._place, self._read = latent, network, place, read

    def formulas(self) -> dict[str, Callable[[], Tensor]]:
        """What the points in attention show."""
        return {
            "hook_q_latent": lambda: self._apply("q_down_proj", self._stream()),
            "hook_kv_latent": lambda: self._apply("kv_down_proj", self._stream()),
            "hook_k_rope": lambda: self._apply("k_rope_proj", self._stream()),
            "hook_q": lambda: self._by_head("q", self._query),
            "hook_k": lambda: self._by_head("k", self._key),
            "hook_v": lambda: self._by_head("v", self._value),
        }

    def _query(self, head: int, x: Tensor) -> Tensor:
        if self._latent.q_rank is None:
            return self._of_head("q_proj", head, self._latent.d_head, x)
        return self._of_head("q_up_proj", head, self._latent.d_head, self._compress("q", x))

    def _key(self, head: int, x: Tensor) -> Tensor:
        shown, ours = self._at("hook_k_rope"), self._apply("k_rope_proj", self._stream())
        turning = shown + (self._apply("k_rope_proj", x) - ours)
        still = self._of_head("k_up_proj", head, self._latent.d_nope, self._compress("kv", x))
        return torch.cat([turning, still], -1)

    def _value(self, head: int, x: Tensor) -> Tensor:
        return self._of_head("v_up_proj", head, self._latent.d_head_v, self._compress("kv", x))

    def _by_head(self, letter: str, formula: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Each head's own, of its own copy of the normed stream."""
        resid, copies, ln1 = (
            self._read(f"{self._place}.hook_resid_pre"),
            self._read(f"{self._place}.hook_{letter}_input"),
            f"{self._place}.ln1",
        )
        heads = []
        for head in range(copies.shape[2]):
            # What was changed in the copy, beside what was changed inside the norm.
            moved = self._network.norm_of(ln1, copies[:, :, head]) - self._network.norm_of(ln1, resid)
            heads.append(formula(head, self._stream() + moved))
        return torch.stack(heads, 2)

    def _compress(self, which: str, x: Tensor) -> Tensor:
        """The normed latent as it is shown, moved by what another input than the stream makes of it."""
        norm, down = f"{self._place}.attn.{which}_latent_norm", f"{which}_down_proj"
        shown = self._network.normed(norm, self._at(f"hook_{which}_latent"), self._read)
        ours = self._network.norm_of(norm, self._apply(down, self._stream()))
        return shown + (self._network.norm_of(norm, self._apply(down, x)) - ours)

    def _stream(self) -> Tensor:
        return self._network.normed(f"{self._place}.ln1", self._read(f"{self._place}.hook_resid_pre"), self._read)

    def _at(self, own: str) -> Tensor:
        return self._read(f"{self._place}.attn.{own}")

    def _apply(self, linear: str, x: Tensor) -> Tensor:
        return self._network.weights.apply(f"{self._place}.attn.{linear}", x)

    def _of_head(self, linear: str, head: int, width: int, x: Tensor) -> Tensor:
        weight, bias = self._network.weights.of_head(f"{self._place}.attn.{linear}", head, width)
        return x @ weight.T + bias
