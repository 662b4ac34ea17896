"""Processes with a GPU each, which talk through NCCL: everything equals the same network in one process."""

from pathlib import Path

import pytest
import torch

from tests.checkpoints import save_variant
from tests.parallel.comparing import compare_by_nccl
from tests.parallel.launching import run_in_processes
from tests.parallel.test_shared_networks import COMPARED, FOUR, TWO

pytestmark = pytest.mark.gpu


def compare(folder: Path, variant: str, config: dict[str, int], *, n: int) -> None:
    if torch.cuda.device_count() < n:
        pytest.skip(f"NCCL takes a GPU for each process, and there are fewer than {n}")
    source = save_variant(variant, folder / variant)
    for backend, device, problems, worst in run_in_processes(n, compare_by_nccl, str(source), config):
        assert (backend, device, problems) == ("nccl", "cuda", [])
        assert set(worst) == COMPARED


def test_one_process(tmp_path: Path) -> None:
    """Where there is one GPU: the same code, on it."""
    compare(tmp_path, "llama-gqa", {"tensor": 1}, n=1)


@pytest.mark.parametrize("variant", ["llama-gqa", "falcon-7b", "neox-sequential"])
@pytest.mark.parametrize("config", TWO, ids=str)
def test_two_processes(variant: str, config: dict[str, int], tmp_path: Path) -> None:
    compare(tmp_path, variant, config, n=2)


@pytest.mark.slow
@pytest.mark.parametrize("config", FOUR, ids=str)
def test_four_processes(config: dict[str, int], tmp_path: Path) -> None:
    compare(tmp_path, "llama-gqa", config, n=4)
