"""What it costs to start: the import, and loading a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hooklens import HookedCausalLM
from tests.benchmarks.alternate import time_alternating
from tests.benchmarks.models import FAMILIES, build_pair
from tests.benchmarks.peak import run_fresh

_IMPORT = """
    import time
    import torch
    start = time.perf_counter()
    import hooklens
    print(time.perf_counter() - start)
"""


def test_import_on_top_of_torch(record: Any) -> None:
    """Seconds that `import hooklens` adds to `import torch`: the median of five fresh processes."""
    seconds = sorted(float(run_fresh(_IMPORT)) for _ in range(5))[2]
    record("import hooklens after import torch, seconds", seconds, at_most=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading(family: str, record: Any, tmp_path: Path) -> None:
    """A checkpoint of some 100 MB, every weight read, against transformers."""
    reference, _ = build_pair(family, n_layers=4, d_model=768, n_heads=12)
    reference.save_pretrained(tmp_path)
    del reference

    def read(model: torch.nn.Module) -> float:
        return sum(float(parameter.detach().sum()) for parameter in model.parameters())

    seconds = time_alternating(
        {
            "transformers": lambda: read(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)),
            "hooklens": lambda: read(HookedCausalLM.from_pretrained(tmp_path)),
        },
        rounds=5,
        warm_up=1,
    )
    record(f"load time, {family}: / transformers", seconds["hooklens"] / seconds["transformers"], at_most=1.0)
