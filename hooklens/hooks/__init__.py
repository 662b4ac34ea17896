"""Hook points, the module class that manages them, and edits as values. Works without a transformer."""

from hooklens.hooks.capture import Capture
from hooklens.hooks.module import HookedModule
from hooklens.hooks.names import NamesFilter, select_names
from hooklens.hooks.point import HookHandle, HookPoint

__all__ = ["Capture", "HookHandle", "HookPoint", "HookedModule", "NamesFilter", "select_names"]
