"""A count of changes to any module tree, so that a model's table of hook points is made once and stays true."""

_n_changes = 0


def note_change() -> None:
    """Say that some module tree has changed."""
    global _n_changes  # noqa: PLW0603
    _n_changes += 1


def count_changes() -> int:
    """How many there were."""
    return _n_changes
