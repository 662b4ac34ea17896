"""Hook points that carry a vector for each token, as recordings and directions take them."""

from collections.abc import Sequence

from hooklens.axes import layer_of
from hooklens.errors import HookLensError, InputError
from hooklens.hooks.module import HookedModule
from hooklens.hooks.names import NamesFilter


def choose_vectors(
    model: HookedModule, chosen: NamesFilter, *, what: str, error: type[HookLensError] = InputError
) -> list[str]:
    """The hook points that a filter selects, each with a vector at every token, or one for each head.

    Args:
        model: whose hook points.
        chosen: a name, a word such as `"resid_post"`, a glob, or a list.
        what: the argument, for messages.
        error: what to raise for points that carry something else.

    Raises:
        HookNameError: nothing is selected.
        HookLensError: of the class `error`: no choice, or a point whose tensor has no vector at each token.
    """
    if chosen is None:
        raise error(f"{what} is None, expected hook points: a name, a word such as 'resid_post', a glob, or a list")
    points = model.select_hook_points(chosen)
    wrong = {
        name: list(point.site.axes) if point.site else "unknown"
        for name, point in points.items()
        if point.site is None
        or point.site.discrete
        or point.site.axes[:2] != ("batch", "pos")
        or len(point.site.axes) not in (3, 4)
        or name.startswith("unembed.")
    }
    if wrong:
        listed = ", ".join(f"{name!r} (axes {axes})" for name, axes in list(wrong.items())[:5])
        raise error(f"{what}: {listed} hold no vector for each token; choose points such as 'resid_post' or 'z'")
    return list(points)


def stop_behind(names: Sequence[str]) -> int | None:
    """The first block that no hook point needs, for `stop_at_layer`; None where one lies behind the blocks."""
    layers = [layer_of(name) for name in names]
    if any(
        layer is None and name.startswith(("ln_final", "unembed")) for layer, name in zip(layers, names, strict=True)
    ):
        return None
    return max(-1 if layer is None else layer for layer in layers) + 1
