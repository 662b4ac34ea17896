"""Gradient checkpointing (Chen et al. 2016): blocks whose activations are computed again in the backward pass."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hooklens.errors import HookLensError
from hooklens.hooks import Call

if TYPE_CHECKING:
    from hooklens.model.block import Block
    from hooklens.model.positions import TokenPlan


class GradientCheckpointing:
    """A network whose blocks may be computed again in the backward pass.

    Attributes:
        is_gradient_checkpointing: whether they are.
    """

    is_gradient_checkpointing = False

    def gradient_checkpointing_enable(self) -> None:
        """From here on keep only the stream between blocks for the backward pass, which computes each block again.

        Gradients stay the same, bit for bit. A block that somebody listens to between the stream's entrance and exit,
        or that a key-value cache is read in, runs as ever: every hook fires once, in the call.
        """
        self.is_gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """From here on keep all that the backward pass needs."""
        self.is_gradient_checkpointing = False


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
    unheard = Call(tokens=plan)

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

    entering = block.hook_resid_pre(resid, call)
    left: Tensor = checkpoint(run, entering, use_reentrant=False)
    return block.hook_resid_post(left, call)
