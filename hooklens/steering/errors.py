"""The errors of steering."""

from hooklens.errors import HookLensError


class SteeringError(HookLensError, ValueError):
    """Prompts, directions, concepts or a model do not go together."""
