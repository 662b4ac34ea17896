"""Gradients at hook points are the derivatives of edits there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.hooks import HookPoint
from hooklens.verification.probe import Probe
from hooklens.verification.report import CheckResult

GRADIENT = "gradient is the derivative of an edit"
ALONE = "gradient at one point alone"

# Central differences in float64 with this relative step: their own error is the step squared, plus rounding
# (1e-16) divided by the step.
_STEP = 1e-6
_RELATIVE_BOUND = 1e-5
_ABSOLUTE_BOUND = 1e-8


def check_gradients(probe: Probe) -> list[CheckResult]:
    """The gradient at each point, with listeners at all of them.

    In float64 against central differences along a random direction; in other dtypes, where these drown in
    rounding, against the gradient of a leaf that a hook adds to the tensor. A backward pass of its own for one
    point takes another way through the graph; that is held against the first in one layer.
    """
    names = [name for name in probe.names if probe.clean_captures[name].is_floating_point()]
    gradients = _gradients_at(probe, names)
    check = _check_by_differences if probe.dtype == torch.float64 else _check_by_leaf
    results = [check(probe, name, gradient) for name, gradient in gradients.items()]
    for name, gradient in gradients.items():
        if layer_of(name) in (None, *probe.layers[-1:]):
            alone = _gradients_at(probe, [name])[name]
            results.append(_compare_gradients(probe, ALONE, name, alone, gradient))
    return results


def _loss(logits: Float[Tensor, "batch pos d_vocab"], tokens: Tensor) -> Tensor:
    """Next-token loss in float64, so that differences of it mean something; of fewer outputs some number of each."""
    return F.cross_entropy(logits[:, :-1].double().flatten(0, 1), tokens[:, 1:].flatten() % logits.shape[-1])


def _gradients_at(probe: Probe, names: Sequence[str]) -> dict[str, Tensor]:
    """What `incl_bwd` keeps, without leaving gradients on the parameters."""
    embeddings = [probe.model.embed.table.weight]
    leaves: list[Tensor] = []

    def make_leaf(tensor: Tensor, hook: HookPoint) -> Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    hooks = []
    if "hook_pos_embed" in probe.model.hook_points():
        parameters = list(probe.model.pos_embed.parameters())
        embeddings += parameters
        # Positions that are computed have no parameter that gradients go on to.
        hooks = [] if parameters else [("hook_pos_embed", make_leaf)]
    with (
        torch.enable_grad(),
        _requiring_gradients(embeddings),
        probe.model.hooks(hooks),
        probe.model.capture(list(names), incl_bwd=True) as captured,
    ):
        loss = _loss(probe.run(), probe.tokens)
        torch.autograd.grad(loss, [*embeddings, *leaves])
    return {name: captured.get(f"{name}_grad", torch.full((), torch.nan)) for name in names}


@contextmanager
def _requiring_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """A model with frozen weights has gradients at its hook points all the same."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad = True
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


def _check_by_differences(probe: Probe, name: str, gradient: Tensor) -> CheckResult:
    tensor = probe.clean_captures[name]
    generator = torch.Generator().manual_seed(probe.seed)
    size = tensor[tensor.isfinite()].square().mean().sqrt()
    direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) * size

    def loss_at(step: float) -> Tensor:
        def move(tensor: Tensor, hook: HookPoint) -> Tensor:
            return tensor + step * direction

        with probe.model.hooks([(name, move)]):
            return _loss(probe.run(), probe.tokens)

    difference = float(loss_at(_STEP) - loss_at(-_STEP)) / (2 * _STEP)
    error = abs(float((gradient * direction).sum()) - difference)
    bound = _RELATIVE_BOUND * float(gradient.norm() * size) + _ABSOLUTE_BOUND
    return _result(GRADIENT, name, error, bound)


def _check_by_leaf(probe: Probe, name: str, gradient: Tensor) -> CheckResult:
    leaves: list[Tensor] = []

    def add_leaf(tensor: Tensor, hook: HookPoint) -> Tensor:
        leaves.append(torch.zeros_like(tensor, requires_grad=True))
        return tensor + leaves[0]

    with torch.enable_grad(), probe.model.hooks([(name, add_leaf)]):
        loss = _loss(probe.run(), probe.tokens)
    [expected] = torch.autograd.grad(loss, leaves, materialize_grads=True) if leaves else [torch.tensor(torch.nan)]
    return _compare_gradients(probe, GRADIENT, name, gradient, expected)


def _compare_gradients(probe: Probe, check: str, name: str, gradient: Tensor, expected: Tensor) -> CheckResult:
    """Relative to the gradient's size the error is that of the logits, to which it owes its rounding.

    A gradient may be next to nothing; below the rounding of the loss, which is of the order of 1, its error tells
    nothing.
    """
    if gradient.shape != expected.shape:
        return _result(check, name, float("nan"), 0.0)
    error = float((gradient.double() - expected.double()).norm())
    relative = probe.rounding / float(probe.clean_logits.abs().max())
    floor = torch.finfo(expected.dtype).eps
    return _result(check, name, error, relative * float(expected.double().norm()) + floor)


def _result(check: str, name: str, error: float, bound: float) -> CheckResult:
    message = "" if error <= bound else "the gradient that listeners see is not that of the computation"
    return CheckResult(check=check, subject=name, measured=error, bound=bound, message=message)
