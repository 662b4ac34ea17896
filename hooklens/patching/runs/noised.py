"""Noise at work: what is added to the embeddings of prompts that run from their tokens on."""

from jaxtyping import Float
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks import HookPoint
from hooklens.hooks.call import NOBODY, Hook, Listeners, Listening


def add_noise(model: HookedCausalLM, added: Float[Tensor, "rows pos d_model"] | None) -> Listeners:
    """What adds noise to the embeddings of a batch, before any edit acts on them; None adds nothing."""
    if added is None:
        return NOBODY

    def add(tensor: Tensor, hook: HookPoint) -> Tensor:
        return tensor + added

    point = model.hook_points()["hook_embed"]
    return {point: Listening([Hook(add, point, form="point")])}
