"""Checkpoints in old formats of the field, read and never written: TransformerLens's, nanoGPT's, Meta's."""

from hooklens.adapters.formats.choice import SUFFIXES, OldFiles, find_format
from hooklens.adapters.formats.opened import OldCheckpoint, OpenedModel
from hooklens.adapters.formats.place import EARLIER, Place

__all__ = ["EARLIER", "SUFFIXES", "OldCheckpoint", "OldFiles", "OpenedModel", "Place", "find_format"]
