"""Checkpoints in old formats of the field, read and never written: TransformerLens's, nanoGPT's, Meta's."""

from hooklens.adapters.formats.choice import OldFiles, find_format
from hooklens.adapters.formats.opened import OldCheckpoint, OpenedModel

__all__ = ["OldCheckpoint", "OldFiles", "OpenedModel", "find_format"]
