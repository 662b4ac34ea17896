"""What a mixture's routers choose, layer by layer, held against transformers' own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hooklens import HookedCausalLM
from tests.adapters.families.checks import batch, load_reference
from tests.annotations import unchecked

# Two float32 computations of one logit or gate differ by less, as a share of 1 or of the logits' deviation.
_ROUNDING = 2e-5


class Routing(NamedTuple):
    """What the routers of one layer make of all tokens.

    Attributes:
        logits: `[token expert]`.
        gates: `[token expert]`, 0 for experts that were not chosen.
        is_chosen: `[token expert]`.
    """

    logits: Tensor
    gates: Tensor
    is_chosen: Tensor


def check_routing(model: HookedCausalLM, folder: Path) -> int:
    """The experts that each token is sent to, and their gates, are transformers', in every layer with a mixture.

    A token between whose last chosen expert and the next one the logits do not decide (a tie, up to rounding) may be
    sent to either.

    Returns:
        How many such ties there were, in all layers.
    """
    ids = batch("right")[0]
    with unchecked(), torch.no_grad():
        ours = _route(model, ids)
        theirs = _route_in_transformers(load_reference(folder, torch.float32), ids)
    assert ours.keys() == theirs.keys()
    assert ours
    return sum(_compare(layer, ours[layer], theirs[layer]) for layer in ours)


def _compare(layer: int, ours: Routing, theirs: Routing) -> int:
    """How many tokens are tied; fails where others differ."""
    scale = theirs.logits.std()
    error = (ours.logits - theirs.logits).abs().max() / scale
    assert error <= _ROUNDING, f"layer {layer}: router logits differ by {error} of their deviation"
    n_chosen = int(theirs.is_chosen[0].sum())
    ranked = theirs.logits.sort(-1, descending=True).values
    if n_chosen == ranked.shape[-1]:
        is_tied = torch.zeros(len(ranked), dtype=torch.bool)
    else:
        is_tied = ranked[:, n_chosen - 1] - ranked[:, n_chosen] <= _ROUNDING * scale
    differs = (ours.is_chosen != theirs.is_chosen).any(-1)
    assert not (differs & ~is_tied).any(), f"layer {layer}: {int((differs & ~is_tied).sum())} tokens go elsewhere"
    gates = (ours.gates - theirs.gates)[~differs].abs().max()
    assert gates <= _ROUNDING, f"layer {layer}: gates differ by {gates}"
    return int(is_tied.sum())


def _route(model: HookedCausalLM, ids: Tensor) -> dict[int, Routing]:
    _, cache = model.run_with_cache(ids, names_filter=lambda name: ".mlp.router." in name)
    routed = {}
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.mlp.router"
        if f"{name}.hook_choice" in cache:
            logits, gates = (cache[f"{name}.{hook}"].flatten(0, 1) for hook in ("hook_logits", "hook_weights"))
            choice = cache[f"{name}.hook_choice"].flatten(0, 1)
            routed[layer] = Routing(logits, gates, _mark(choice, logits))
    return routed


def _mark(choice: Tensor, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, choice, value=True)


def _route_in_transformers(reference: nn.Module, ids: Tensor) -> dict[int, Routing]:
    """The same, from what the modules whose class is a router give."""
    given: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: given.update({name: out}))
        for name, module in reference.named_modules()
        if type(module).__name__.endswith("Router")
    ]
    reference(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {layer: _read(reference.get_submodule(name.rpartition(".")[0]), out) for layer, name, out in _sort(given)}


def _sort(given: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    for name, out in given.items():
        yield next(int(part) for part in name.split(".") if part.isdigit()), name, out


def _read(mixture: nn.Module, out: Any) -> Routing:
    """The routing, from what a router gives and the module around it."""
    if isinstance(out, Tensor):  # Logits, of which the module around the router makes the rest.
        gates, choice = mixture.route_tokens_to_experts(out)
        logits = out
    elif len(out) == 2:  # Gates of all experts, those of others 0, and logits.
        gates, logits = out
        return Routing(logits, gates, gates > 0)
    else:
        # Some give the three in the other order.
        logits, gates, choice = out if out[0].is_floating_point() else out[::-1]
    everywhere = torch.zeros_like(logits).scatter(-1, choice, gates.to(logits.dtype))
    return Routing(logits, everywhere, _mark(choice, logits))
