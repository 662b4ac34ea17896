"""The error of processes that work for a call."""

from hooklens.errors import HookLensError


class WorkerError(HookLensError, RuntimeError):
    """Processes that work for a call died again and again, or cannot do its work."""
