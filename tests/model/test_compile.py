"""What `torch.compile` makes of a model, in an interpreter without the checks of annotations (compiled_calls.py)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model.networks import ALL_CONFIGS

CASES = Path(__file__).with_name("compiled_calls.py")


TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])


@pytest.mark.skipif(
    TORCH < (2, 11), reason="earlier tracers follow neither `isinstance(x, A | B)` nor context variables"
)
def test_compiled_calls():
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-n", "0", "-p", "no:cacheprovider", str(CASES)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=CASES.parents[2], check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    # Six calls of every network, documents in four of them said in two ways, and two tests more.
    assert len(re.findall(r"^[.]+", ran.stdout, re.MULTILINE)[0]) == min(72, 6 * len(ALL_CONFIGS) + 8 + 2)
