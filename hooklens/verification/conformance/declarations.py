"""Checks of what parts declare: shapes of weights, that each takes part, and that they make the same network anew."""

from collections.abc import Iterator

import safetensors.torch
import torch

from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig
from hooklens.errors import join_names
from hooklens.verification.probe import Probe, as_logits, largest_difference, same_bits
from hooklens.verification.report import CheckResult
from hooklens.verification.stages import Stage, report_errors

GROUP = "declarations"
DECLARED = "weights have their declared shapes"
TAKES_PART = "every weight takes part in the logits"
ANEW = "a model made anew of its weights is the same"


def declaration_stages(probe: Probe) -> list[Stage]:
    """The checks of declarations, on a model as it was loaded."""
    found = [(DECLARED, lambda: _check_shapes(probe)), (TAKES_PART, lambda: _check_taking_part(probe))]
    return [report_errors(stage) for stage in [*found, (ANEW, lambda: _check_anew(probe))]]


def _check_shapes(probe: Probe) -> Iterator[CheckResult]:
    """The views that the field's names give have the shapes that the config derives from the declarations."""
    weights, declared = probe.model.named_weights(), probe.model.cfg.description.weights
    for name in sorted({*weights, *declared}):
        expected = list(declared[name].shape) if name in declared else None
        found = list(weights[name].shape) if name in weights else None
        message = "" if found == expected else f"found {found}, declared {expected}"
        yield CheckResult(check=DECLARED, subject=name, measured=float(found != expected), bound=0.0, message=message)


def _check_taking_part(probe: Probe) -> Iterator[CheckResult]:
    """Each parameter is on the way to the logits, and their gradient there is finite.

    That it is 0 may be right: a bias of all keys changes no pattern.
    """
    model = probe.model
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    wanted = [parameter.requires_grad for parameter in parameters.values()]
    try:
        for parameter in parameters.values():
            parameter.requires_grad_()
        with torch.enable_grad():
            logits = probe.run()
            generator = torch.Generator().manual_seed(probe.seed)
            direction = torch.randn(logits.shape, generator=generator).to(logits)
            gradients = torch.autograd.grad((logits * direction).sum(), list(parameters.values()), allow_unused=True)
    finally:
        for parameter, was_wanted in zip(parameters.values(), wanted, strict=True):
            parameter.requires_grad_(was_wanted)
    for name, gradient in zip(parameters, gradients, strict=True):
        problem = (
            "no gradient reaches it: the network is built with it, and does not use it" if gradient is None else ""
        )
        if gradient is not None and not bool(gradient.isfinite().all()):
            problem = "its gradient is not finite"
        yield CheckResult(check=TAKES_PART, subject=name, measured=float(bool(problem)), bound=0.0, message=problem)


def _check_anew(probe: Probe) -> Iterator[CheckResult]:
    """Config and weights, taken out and put together again in each way, give the same weights to the bit, and logits.

    Weights may lie otherwise in memory then, so that products sum in another order: logits are the same up to rounding.
    """
    model = probe.model
    cfg = HookedConfig.from_dict(model.cfg.to_dict())
    same = cfg == model.cfg
    yield CheckResult(
        check=ANEW,
        subject="config as a dict",
        measured=float(not same),
        bound=0.0,
        message="" if same else f"read back as {cfg}, was {model.cfg}",
    )
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    # A file holds no tensor twice, and each in the order of its axes.
    packed = {name: one.clone(memory_format=torch.contiguous_format) for name, one in state.items()}
    in_file = safetensors.torch.load(safetensors.torch.save(packed))
    on_device = {name: tensor.to(model.device) for name, tensor in in_file.items()}
    named = {name: tensor.detach() for name, tensor in model.named_weights().items()}
    for subject, weights in (("state_dict", state), ("named weights", named), ("safetensors", on_device)):
        yield _compare(probe, subject, HookedCausalLM.from_state_dict(weights, cfg))
    copied = HookedCausalLM.from_state_dict(named, cfg)
    copied.load_state_dict(state)
    yield _compare(probe, "load_state_dict", copied)


def _compare(probe: Probe, subject: str, made: HookedCausalLM) -> CheckResult:
    made.train(probe.model.training)
    before, after = probe.model.state_dict(), made.state_dict()
    changed = sorted(
        name
        for name in {*before, *after}
        if name not in before or name not in after or not same_bits(before[name], after[name])
    )
    found = as_logits(made(probe.tokens, attention_mask=torch.ones_like(probe.tokens)))
    measured = float("nan") if changed else largest_difference(found, probe.clean_logits)
    message = f"other weights: {join_names(changed)}" if changed else ""
    if measured > probe.rounding:
        message = "the logits differ: something that they depend on is in neither weights nor config"
    return CheckResult(check=ANEW, subject=subject, measured=measured, bound=probe.rounding, message=message)
