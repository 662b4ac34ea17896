"""Other libraries' names for what HookLens has hook points for."""

from hooklens.compat.names.translation import NOTATIONS, Translation, translate

__all__ = ["NOTATIONS", "Translation", "translate"]
