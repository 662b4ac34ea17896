"""Lenses: what the stream at each layer would be read as.

- `logit_lens`, `read_streams`: what each layer would predict, as a table and as distributions;
- `lens_losses`: how well each layer predicts, on any amount of text;
- `Transport`: what carries a stream to the end before it is read: a `TunedLens` or a `JacobianLens`.
"""

from hooklens.analysis.lens.fitted.jacobian import JacobianLens
from hooklens.analysis.lens.fitted.swap import SwapCoordinates
from hooklens.analysis.lens.fitted.tuned import TunedLens
from hooklens.analysis.lens.losses import lens_losses
from hooklens.analysis.lens.streams import LensReading, read_streams
from hooklens.analysis.lens.table import logit_lens
from hooklens.analysis.lens.transport import Transport

__all__ = [
    "JacobianLens",
    "LensReading",
    "SwapCoordinates",
    "Transport",
    "TunedLens",
    "lens_losses",
    "logit_lens",
    "read_streams",
]
