"""What every step of weight processing is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from hooklens.config import HookedConfig
from hooklens.weights.draft import WeightDraft


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
    """

    name: str
    change: Callable[[WeightDraft, HookedConfig, str], None]
    find_obstacles: Callable[[HookedConfig], list[str]] = lambda cfg: []
    change_config: Callable[[HookedConfig], HookedConfig] = lambda cfg: cfg
