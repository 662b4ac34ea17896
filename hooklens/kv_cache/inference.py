"""Tensors that can be used in every mode, whichever mode they are made in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """Operations inside give normal tensors under `torch.inference_mode`, too; they record no gradients there.

    An inference tensor can outside of the mode neither be written to nor be saved for a backward pass.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    # Leaving the mode turns gradients on.
    with torch.inference_mode(mode=False), torch.no_grad():
        yield
