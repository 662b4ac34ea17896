"""What a network cannot do whose weights several processes share."""

from torch import nn

from hooklens.errors import HookLensError


def refuse_shared(network: nn.Module, what: str, error: type[HookLensError]) -> None:
    """Refuse what needs all weights where this process has some.

    Args:
        network: the network.
        what: is asked for: the beginning of the text.
        error: the kind of error.

    Raises:
        HookLensError: of that kind.
    """
    if getattr(network, "processes", None) is not None:
        raise error(
            f"{what}: several processes share this network (hooklens.parallel), and none of them has all its weights; "
            "load the checkpoint whole in one process for this, HookedCausalLM.from_pretrained(source)"
        )
