"""What every step of weight processing is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from hooklens.config import HookedConfig
from hooklens.weights.draft import WeightDraft


def _no_obstacles(cfg: HookedConfig) -> list[str]:
    """The step holds for every config."""
    return []


def _same_config(cfg: HookedConfig) -> HookedConfig:
    """The step leaves the config as it is."""
    return cfg


def _same_block(draft: WeightDraft, cfg: HookedConfig, prefix: str) -> None:
    """The step leaves blocks as they are."""


def _same_ends(draft: WeightDraft, cfg: HookedConfig) -> None:
    """The step leaves embedding, final norm and unembedding as they are."""


@dataclass(frozen=True, kw_only=True)
class ProcessingStep:
    """A change of the weights that leaves the network's log-probabilities as they are.

    Steps change one block at a time, so only one block is held in working precision.

    Attributes:
        name: the step's name in records and messages.
        find_obstacles: why the step cannot hold for a config; empty if it can.
        change_config: the config after the step.
        change_block: changes the block whose names begin with the prefix (`"blocks.3."`).
        change_ends: changes embedding, final norm and unembedding.
    """

    name: str
    find_obstacles: Callable[[HookedConfig], list[str]] = _no_obstacles
    change_config: Callable[[HookedConfig], HookedConfig] = _same_config
    change_block: Callable[[WeightDraft, HookedConfig, str], None] = _same_block
    change_ends: Callable[[WeightDraft, HookedConfig], None] = _same_ends
