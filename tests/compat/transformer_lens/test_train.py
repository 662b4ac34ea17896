"""2.x's `train` and its progress bars."""

import subprocess
import sys

_RUN = """
import torch
from hooklens.compat.transformer_lens import HookedTransformer, HookedTransformerConfig, evals, train
cfg = dict(n_layers=1, d_model=8, n_ctx=12, d_head=4, n_heads=2, d_vocab=30, act_fn="gelu", seed=3, device="cpu")
model = HookedTransformer(HookedTransformerConfig(**cfg))
rows = [{"tokens": (torch.arange(12) + start) % 30} for start in range(8)]
loader = [{"tokens": torch.stack([row["tokens"] for row in rows])}]
before = evals.evaluate_on_dataset(model, loader, device="cpu")
settings = train.HookedTransformerTrainConfig(num_epochs=5, batch_size=4, lr=1e-2, device="cpu")
train.train(model, settings, rows)
assert evals.evaluate_on_dataset(model, loader, device="cpu") < before
"""


def test_runs_in_a_process_where_nobody_has_imported_progress_bars() -> None:
    """`tqdm.auto` was read as an attribute of `tqdm`, which it is only after somebody else has imported it.

    Without a warm-up the rate stayed that of a warm-up's first step, 0: the loss did not fall.
    """
    done = subprocess.run([sys.executable, "-c", _RUN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
