"""What an experiment asks of the model, and of activations from elsewhere, before it runs anything."""

from hooklens.activation_cache import ActivationCache
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import ShortformerPositions
from hooklens.errors import InputError
from hooklens.hooks.call import thread_listeners
from hooklens.weights.processing import check_transforms_match


def check_model(model: HookedCausalLM, *, allow_training: bool) -> None:
    """Refuse models whose runs would not be the plain ones.

    Raises:
        InputError: a network that is not causal or lies on several devices, training mode that was not asked for or
            drops entries, hooks attached to the model, or one at positions that every layer reads.
    """
    if not model.cfg.causal:
        raise InputError(
            "this network is not causal (cfg.causal=False): a patch changes every position, and none can be gone on "
            "from; run each patch whole, with model.run_with_hooks(input, edits=[...])"
        )
    if len(model.devices) > 1:
        raise InputError(
            f"the model lies on several devices ({', '.join(map(str, model.devices))}), and "
            "an experiment runs its blocks by themselves on one; bring it there with model.to(device), or run each "
            "patch as a call of the whole model: model.run_with_hooks(input, edits=[...])"
        )
    if model.training and not allow_training:
        raise InputError("the model is in training mode; call model.eval() first, or pass allow_training=True")
    if model.drops:
        raise InputError(
            "the model is in training mode with dropout, so no two runs are alike; call model.eval() first"
        )
    attached = [name for name, point in model.hook_points().items() if point.own is not None]
    if attached:
        raise InputError(
            f"hooks are attached to {len(attached)} hook points, such as {attached[0]!r}, which a sweep would show "
            "parts of sequences and rows of other cells; remove them (model.reset_hooks(including_permanent=True)) and "
            "give the experiment what they do as edits=[...]; a function of the tensor is edits.Custom(name, fn)"
        )
    if isinstance(model.cfg.positions, ShortformerPositions) and model.hook_pos_embed in thread_listeners():
        raise InputError(
            "somebody listens at hook_pos_embed (with model.hooks(...)), whose positions every layer reads; "
            "an experiment runs layers without it: leave the hook out, or use it in model.run_with_hooks"
        )


def check_source(model: HookedCausalLM, source: object) -> None:
    """Refuse the cache of a model whose weights were processed otherwise.

    Raises:
        TransformError: names both records.
    """
    if isinstance(source, ActivationCache):
        check_transforms_match(source.transforms, model.transforms)
