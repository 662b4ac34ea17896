"""Hook points, the module class that manages them, and edits as values. Works without a transformer."""

from hooklens.hooks.call import Call, HookHandle, open_call
from hooklens.hooks.capture import Capture
from hooklens.hooks.module import HookedModule
from hooklens.hooks.names import NamesFilter, select_names
from hooklens.hooks.point import HookPoint

__all__ = ["Call", "Capture", "HookHandle", "HookPoint", "HookedModule", "NamesFilter", "open_call", "select_names"]
