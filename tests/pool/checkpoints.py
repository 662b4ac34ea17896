"""Folders of tiny checkpoints that the tests of pools load: a base and its fine-tunes, saved by transformers."""

from pathlib import Path

import torch

from tests.checkpoints import build_variant


def save_family(folder: Path, *, variant: str = "llama-gqa", tuned: tuple[str, ...] = ("math", "code")) -> Path:
    """Save a base, and fine-tunes that differ from it in one matrix of each block, in folders of their names."""
    model = build_variant(variant)
    model.save_pretrained(folder / "base")
    for step, name in enumerate(tuned):
        generator = torch.Generator().manual_seed(step)
        model = build_variant(variant)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "mlp" in key and parameter.ndim == 2 and "layers" in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        model.save_pretrained(folder / name)
    return folder
