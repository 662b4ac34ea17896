"""What an analysis reads: a run that was captured, or a prompt that is run for it.

A function that reads activations takes either. Of a prompt the activations that the function reads are captured, and
nothing else, in a run without gradients; a cache of such a run gives the same numbers, bit for bit.
"""

from hooklens import tokens as tokenization
from hooklens.activation_cache import ActivationCache
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.tokens import Prompt

Run = ActivationCache | Prompt
"""A cache, or text, a list of texts or token ids."""


def read_run_or_prompt(given: object, *, what: str, error: type[HookLensError] = InputError) -> Run:
    """A cache, or something that a model can run.

    Raises:
        HookLensError: anything else.
    """
    if isinstance(given, ActivationCache):
        return given
    hint = "; or give an ActivationCache: _, cache = model.run_with_cache(...)"
    try:
        tokenization.read_input(given, what=what, hint=hint)
    except HookLensError as problem:
        raise error(str(problem)) from None
    return given  # type: ignore[return-value]


def take_run(model: HookedCausalLM, given: Run, ends: tuple[str, ...]) -> ActivationCache:
    """The cache that was given, or that of the prompt, with the hook points whose names end so.

    Args:
        model: runs the prompt.
        given: a cache, or a prompt.
        ends: ends of the names of hook points, such as `"hook_z"`.

    Raises:
        InputError: the model cannot run the prompt.
    """
    if isinstance(given, ActivationCache):
        return given
    names = [name for name in model.hook_points() if name.endswith(ends)]
    _, cache = model.run_with_cache(given, return_type=None, names_filter=names)
    return cache
