"""An autoencoder at a hook point of a model, with hook points on its latents.

With `x` the activation, `f` its latents and `D(f)` their reconstruction, the activation goes on as

    error="drop":   D(f')
    error="keep":   x + D(f') - D(f)  =  D(f') + error

where `f'` is what listeners make of `f`. Without an edit the second is `x` itself, bit for bit. The error is held
constant (Marks et al. 2024): gradients flow through the latents. (At a tensor that is shown beside the computation, a
norm's `hook_normalized` or the pattern, the network goes on from what it is handed where gradients are wanted, and its
outputs differ by rounding.)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hooklens.axes import HookSite, declare_axis, declare_site
from hooklens.errors import InputError
from hooklens.hooks import HookPoint
from hooklens.hooks.call import Call
from hooklens.hooks.splice import Splice, SpliceFunction
from hooklens.sae.fit import explain_misfit

if TYPE_CHECKING:
    from hooklens.sae.sae import SAE

declare_axis("d_sae", "latents of a sparse autoencoder")
declare_axis("d_in", "width of what a sparse autoencoder reads")
declare_axis("d_out", "width of what a sparse autoencoder gives")
_POINTS = {
    "hook_sae_input": ("d_in", "what the autoencoder reads"),
    "hook_sae_acts_pre": ("d_sae", "before the activation; gated: magnitudes before the gate"),
    "hook_sae_acts": ("d_sae", "latents"),
    "hook_sae_recons": ("d_out", "reconstruction by the latents"),
    "hook_sae_error": ("d_out", "what the reconstruction misses, held constant in gradients"),
    "hook_sae_output": ("d_out", "what goes on"),
}


class SAESplice(Splice):
    """An autoencoder at a hook point.

    Its points are `hook_sae_input`, `hook_sae_acts_pre`, `hook_sae_acts` (the latents, `[batch pos d_sae]`),
    `hook_sae_recons`, `hook_sae_error` and `hook_sae_output`, below the name of the place. Where heads are read
    together their axes are one. Nothing is computed unless somebody listens there, a gradient is wanted, or the error
    is dropped.

    Attributes:
        sae: the autoencoder.
        name: the hook point that it reads.
        name_out: the one whose tensor it gives.
        error: `"keep"` or `"drop"`.
    """

    def __init__(self, sae: "SAE", name: str | None, *, error: str, name_out: str | None, check: bool) -> None:
        trained = sae.cfg.training
        self.sae, self.error, self._checks = sae, error, check
        self.name, self.name_out = _settle(sae, name, name_out, check=check)
        self.head = trained.head
        self._points: dict[str, HookPoint] = {}
        for word, (axis, description) in _POINTS.items():
            full = f"{self.name_out}.{word}"
            template = _template(full)
            axes = ("batch", "pos", axis)
            point = HookPoint(
                declare_site(HookSite(template=template, axes=axes, description=description, on_request=True))
            )
            point.__dict__["name"] = full
            self._points[full] = point

    @property
    def points(self) -> Mapping[str, HookPoint]:
        """The hook points, by name."""
        return self._points

    def point(self, word: str) -> HookPoint:
        """One of the hook points: `"hook_sae_acts"`."""
        return self._points[f"{self.name_out}.{word}"]

    def check(self, model: nn.Module) -> None:
        """Refuse a model that the autoencoder does not fit.

        Raises:
            InputError: all that differs.
        """
        problems = explain_misfit(self.sae.cfg, model, self.name, self.name_out, thorough=self._checks)
        if problems:
            hint = "; `sae.at(..., check=False)` leaves out what was trained on" if self._checks else ""
            raise InputError(f"the autoencoder does not fit at {self.name!r}: {'; '.join(problems)}{hint}")

    def start(self) -> Sequence[tuple[str, SpliceFunction]]:
        """What it does, for one call or block."""
        if self.name == self.name_out:
            return [(self.name, self._replace)]
        held: list[Tensor] = []

        def read(x: Tensor, call: Call) -> None:
            held[:] = [x]

        def write(out: Tensor, call: Call) -> Tensor | None:
            return self._run(held.pop(), out, call)

        return [(self.name, read), (self.name_out, write)]

    def _replace(self, x: Tensor, call: Call) -> Tensor | None:
        return self._run(x, x, call)

    def _run(self, x: Tensor, out: Tensor, call: Call) -> Tensor | None:
        """What goes on in the place of `out`, given what the autoencoder reads."""
        heard = any(call.hears(point) for point in self._points.values())
        wants_gradient = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.sae.parameters())
        )
        if self.error == "keep" and not (heard or wants_gradient):
            return None
        rows, whole = self._take(x), self._take(out)
        given = self._fire("hook_sae_input", rows, call)
        acts, undo = self._read(given, call)
        recons = self._fire("hook_sae_recons", self.sae.write(acts, undo, given), call)
        if self.error == "drop":
            return self._put(out, self._fire("hook_sae_output", recons.to(out.dtype), call))
        clean = self._reconstruct(rows) if heard else recons.detach()
        error = whole.detach() - clean.to(whole.dtype)
        left_error = self._fire("hook_sae_error", error, call)
        # Nothing, exactly, where nobody changed latents, reconstruction or error.
        difference = (recons - clean).to(whole.dtype) + (left_error - error)
        is_changed = difference.requires_grad or bool(difference.any())
        going = whole.detach() + difference if is_changed else whole
        if call.hears(self.point("hook_sae_output")):
            going, edited = self.point("hook_sae_output").watch(going, call)
            is_changed = is_changed or edited
        # The very tensor, so that what was made beside it need not be made of it anew.
        return self._put(out, going) if is_changed else None

    def _read(self, given: Tensor, call: Call) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Latents as listeners leave them, and what takes the norm back."""
        sae = self.sae
        pre, acts, undo = sae.read(given)
        if call.hears(self.point("hook_sae_acts_pre")):
            pre, changed = self.point("hook_sae_acts_pre").watch(pre, call)
            if changed:
                normed, _ = sae._norm(given.to(sae.dtype))
                acts = sae.activate(pre, sae._centre(normed))
        return self._fire("hook_sae_acts", acts, call), undo

    @torch.no_grad()
    def _reconstruct(self, rows: Tensor) -> Tensor:
        """The reconstruction without edits."""
        _, acts, undo = self.sae.read(rows)
        return self.sae.write(acts, undo, rows)

    def _fire(self, word: str, tensor: Tensor, call: Call) -> Tensor:
        return self.point(word)(tensor, call)

    def _take(self, tensor: Tensor) -> Tensor:
        """What is read of a tensor: one head of it, all heads beside each other, or the whole."""
        if self.head is not None:
            return tensor[:, :, self.head]
        return tensor.flatten(2) if tensor.ndim == 4 else tensor

    def _put(self, out: Tensor, left: Tensor) -> Tensor:
        """The tensor with what goes on in its place."""
        if self.head is None:
            return left.reshape(out.shape)
        before, behind = out[:, :, : self.head], out[:, :, self.head + 1 :]
        return torch.cat([before, left[:, :, None], behind], 2)


def _settle(sae: "SAE", name: str | None, name_out: str | None, *, check: bool) -> tuple[str, str]:
    """The hook points that are read and given.

    Raises:
        InputError: none is known, or others than the autoencoder was trained on.
    """
    trained = sae.cfg.training
    read = trained.hook_name if name is None else name
    if read is None:
        raise InputError("at: the autoencoder's files do not say which hook point it reads; give its name")
    known_out = trained.hook_name_out or trained.hook_name
    written = name_out or (known_out if sae.cfg.is_transcoder else read)
    if written is None:
        raise InputError("at: the transcoder's files do not say which hook point it gives; give name_out=")
    wrong = [
        f"{given!r} in the place of {own!r}"
        for given, own in ((read, trained.hook_name), (written, known_out if sae.cfg.is_transcoder else None))
        if own is not None and given != own
    ]
    if wrong and check:
        raise InputError(
            f"at: {' and '.join(wrong)}, which it was trained on; put it there, or give check=False for an experiment"
        )
    return read, written


def _template(name: str) -> str:
    """The name with `{i}` in the place of the layer."""
    parts: list[Any] = name.split(".")
    return ".".join("{i}" if part.isdigit() else part for part in parts)
