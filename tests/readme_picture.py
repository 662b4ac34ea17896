"""`python -m tests.readme_picture`: draw the picture of the README anew.

Activation patching on a bundled model: the stream entering each block, at each token, is carried from a run in which
Mary receives into one in which John does.
"""

from pathlib import Path

import torch

import hooklens as hl
from hooklens import patching

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "patching.png"
CLEAN = "When Mary and John went to the store , John gave a drink to"
CORRUPTED = "When Mary and John went to the store , Mary gave a drink to"


@torch.no_grad()
def measure() -> hl.viz.Grid:
    """How far each patch restores the clean run's logit difference."""
    model = hl.HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox")
    metric = patching.LogitDiff(" Mary", " John")
    result = patching.sweep(model, CLEAN, CORRUPTED, "resid_pre", metric, progress=False)
    return hl.viz.grid(
        result.normalized,
        rows="layer",
        columns=("position", [token.strip() for token in model.to_str_tokens(CLEAN)]),
        title="Patching the residual stream: 0 says John as before, 1 says Mary",
    )


if __name__ == "__main__":
    measure().save(PICTURE)
