"""What every step of weight processing is made of, and how steps are taken."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import TransformError
from hooklens.progress import progress_bar
from hooklens.weights.draft import WeightDraft
from hooklens.weights.shapes import check_state, weight_shapes


@dataclass(frozen=True)
class Processed:
    """The outcome of weight processing.

    Attributes:
        state: the parameters, HookLens names in the order of the computation.
        cfg: the config they belong to: biases may have come into being, and a tied unembedding may be untied.
        steps: names of the steps taken, in order.
    """

    state: dict[str, Tensor]
    cfg: HookedConfig
    steps: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ProcessingStep:
    """A change of the weights that leaves the network's log-probabilities as they are.

    Steps change one block at a time, so only one block is held in working precision. What is outside the blocks is
    changed together.

    Attributes:
        name: the step's name in records and messages.
        change: changes the weights of a draft, all of whose names begin with the prefix: `"blocks.3."`, or nothing
            outside the blocks. What the draft does not cover is left to the call that does.
        find_obstacles: why the step cannot hold for a config; empty if it can.
        change_config: the config after the step.
        needs: steps that are taken before it, and recorded with it.
    """

    name: str
    change: Callable[[WeightDraft, HookedConfig, str], None]
    find_obstacles: Callable[[HookedConfig], list[str]] = lambda cfg: []
    change_config: Callable[[HookedConfig], HookedConfig] = lambda cfg: cfg
    needs: tuple["ProcessingStep", ...] = ()

    def __call__(self, state: Mapping[str, Tensor], cfg: HookedConfig) -> Processed:
        """Take this step alone, after those that it needs; see `take_steps`."""
        return take_steps([self], state, cfg)


def take_steps(chosen: Iterable[ProcessingStep], state: Mapping[str, Tensor], cfg: HookedConfig) -> Processed:
    """Take some steps in their order, each after those that it needs.

    Args:
        chosen: the steps.
        state: all parameters of the network under their HookLens names; a tied `unembed.W_U` may be absent.
        cfg: its config.

    Raises:
        TransformError: lists every step that cannot hold for this config and why; raised before any work.
        CheckpointError: the state dict does not hold the parameters of the config.
    """
    steps = list(dict.fromkeys(step for one in chosen for step in (*one.needs, one)))
    _refuse_obstacles(steps, cfg)
    check_state(state, cfg)
    new_cfg = reduce(lambda config, step: step.change_config(config), steps, cfg)
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()}, torch.float32)
    new_state: dict[str, Tensor] = {}
    groups = _weights_by_layer(new_cfg).items()
    with torch.no_grad(), progress_bar("processing weights", groups, unit="layer", progress=None) as bar:
        for layer, declared in bar:
            draft = WeightDraft(state, declared, dtype=dtype, tied=cfg.tied_unembed)
            for step in steps:
                step.change(draft, new_cfg, "" if layer is None else f"blocks.{layer}.")
            new_state |= draft.finish()
    ordered = {name: new_state[name] for name in weight_shapes(new_cfg)}
    return Processed(ordered, new_cfg, tuple(step.name for step in steps))


def _refuse_obstacles(steps: Iterable[ProcessingStep], cfg: HookedConfig) -> None:
    refusals = [f"{step.name}: {reason}" for step in steps for reason in step.find_obstacles(cfg)]
    if refusals:
        raise TransformError(
            "this architecture does not allow the weight processing asked for; leave these steps out:\n- "
            + "\n- ".join(refusals)
        )


def _weights_by_layer(cfg: HookedConfig) -> dict[int | None, dict[str, DeclaredWeight]]:
    """The weights of each block, and under None those outside the blocks."""
    groups: dict[int | None, dict[str, DeclaredWeight]] = {}
    for name, weight in cfg.description.weights.items():
        groups.setdefault(layer_of(name), {})[name] = weight
    return groups
