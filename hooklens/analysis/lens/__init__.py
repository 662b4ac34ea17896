"""Lenses: what the stream at each layer would be read as.

- `logit_lens`, `read_streams`: what each layer would predict, as a table and as distributions;
- `Transport`: what carries a stream to the end before it is read.
"""

from hooklens.analysis.lens.streams import LensReading, read_streams
from hooklens.analysis.lens.table import logit_lens
from hooklens.analysis.lens.transport import Transport

__all__ = ["LensReading", "Transport", "logit_lens", "read_streams"]
