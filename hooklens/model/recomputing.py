"""Gradient checkpointing (Chen et al. 2016): blocks whose activations are computed again in the backward pass."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from hooklens.arguments import read_flag, read_int, require, show
from hooklens.errors import HookLensError, InputError
from hooklens.hooks import Call, HookPoint
from hooklens.optional import import_package

if TYPE_CHECKING:
    from hooklens.model.block import Block
    from hooklens.model.plan.positions import TokenPlan

_ENABLE = "gradient_checkpointing_enable"
# What each option of torch's function may be.
_OPTIONS: dict[str, tuple[object, ...]] = {"use_reentrant": (False, None), "preserve_rng_state": (True,)}


class GradientCheckpointing:
    """A network whose blocks may be computed again in the backward pass.

    Attributes:
        is_gradient_checkpointing: whether they are.
    """

    is_gradient_checkpointing = False
    _every_n_layers = 1

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, object] | None = None,
        *,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """From here on keep only the stream between blocks for the backward pass, which computes each block again.

        Gradients stay the same, bit for bit. A block that somebody listens to between the stream's entrance and exit,
        or that a key-value cache is read in, runs as ever: every hook fires once, in the call.

        The arguments are those of transformers models.

        Args:
            gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`, of which these are what is
                done: `{"use_reentrant": False, "preserve_rng_state": True}`.
            every_n_layers: compute only every n-th block again, from the first on; the others keep their activations.
            offload: keep the streams in the host's memory, which is not offered.

        Raises:
            InputError: options that would have to be done otherwise, or no number of layers.
        """
        _check_options(gradient_checkpointing_kwargs)
        every = read_int(every_n_layers, what=f"{_ENABLE}: every_n_layers", least=1)
        if read_flag(offload, what=f"{_ENABLE}: offload"):
            raise InputError(
                f"{_ENABLE}: offload=True is not offered; run forward and backward inside "
                "torch.autograd.graph.save_on_cpu(), which keeps what is saved in the host's memory"
            )
        self._every_n_layers = every
        self.is_gradient_checkpointing = True

    def recomputes(self, layer: int) -> bool:
        """Whether the block of a layer is to be computed again."""
        return self.is_gradient_checkpointing and layer % self._every_n_layers == 0

    def gradient_checkpointing_disable(self) -> None:
        """From here on keep all that the backward pass needs."""
        self.is_gradient_checkpointing = False


def _check_options(given: object) -> None:
    """Refuse options of torch's function that are not the ones in use.

    Raises:
        InputError: names them, and why.
    """
    what = f"{_ENABLE}: gradient_checkpointing_kwargs"
    options = require(given, kind=(Mapping, type(None)), what=what, expected="a mapping of options, or None") or {}
    if options.get("use_reentrant") is True:
        raise InputError(
            f"{what} has use_reentrant=True; expected False. The reentrant way runs each block inside an autograd "
            "function of its own: torch.autograd.grad, hooks on gradients and inputs without a gradient fail in it"
        )
    wrong = {
        name: value
        for name, value in options.items()
        if not any(value is allowed for allowed in _OPTIONS.get(name, ()))
    }
    if wrong:
        raise InputError(
            f"{what} has {', '.join(f'{name}={show(value)}' for name, value in wrong.items())}; what is done is "
            "use_reentrant=False and preserve_rng_state=True, and no other option is taken"
        )


def can_recompute(block: "Block", call: Call) -> bool:
    """Whether nobody would hear a block a second time: inside it nobody listens, and no hooks of the model's are in it.

    Those who listen to this call where the stream enters and leaves it hear it outside of what is computed again.
    """
    ends = (block.hook_resid_pre, block.hook_resid_post)
    listeners: Mapping[Any, object] = call.listeners
    return not any(
        point.own is not None or (point in listeners and point not in ends) for point in block.hook_points().values()
    )


def run_checkpointed(
    block: "Block", resid: Float[Tensor, "batch pos d_model"], plan: "TokenPlan", call: Call
) -> Float[Tensor, "batch pos d_model"]:
    """The stream leaving a block, of which only the stream entering it is kept for the backward pass.

    What is drawn at random is drawn again alike.

    Raises:
        HookLensError: in the backward pass, where hooks were attached to the block since.
    """
    unheard = Call(tokens=plan, switches=call.switches)

    def run(entering: Tensor) -> Tensor:
        attached = [name for name, point in block.hook_points().items() if point.own is not None]
        if attached:
            raise HookLensError(
                f"hooks were attached to {attached[0]!r} of a block after its forward and before its backward pass, in "
                "which gradient checkpointing computes it again: they would hear it without having been in the call. "
                "Attach hooks before the call"
            )
        left: Tensor = block(entering, plan, unheard)
        return left

    # A hook point that nobody hears passes its tensor on, so that it can fire here; another module acts only once.
    ends: list[nn.Module] = [block.hook_resid_pre, block.hook_resid_post]
    first, last = (end if isinstance(end, HookPoint) else None for end in ends)
    entering = resid if first is None else first(resid, call)
    # PyTorch 2.6 loads its tracer, half a million calls, with it.
    checkpoint = import_package("torch.utils.checkpoint").checkpoint
    left: Tensor = checkpoint(run, entering, use_reentrant=False)
    return left if last is None else last(left, call)
