"""The network: no family names, no files, no tokenizer."""

from hooklens.model.decoder import Decoder

__all__ = ["Decoder"]
