"""Tests of hooklens.model.moe.traced."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hooklens.model.moe.traced import declare_operations
from tests.torch_version import traces_whole

CASES = Path(__file__).with_name("compiled_mixtures.py")


def test_operation_and_its_gradients():
    declare_operations()
    operation = torch.ops.hooklens.multiply_groups
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([x[:3] @ weight[0].T, x[3:] @ weight[2].T])
    torch.testing.assert_close(operation(x, weight, ends), expected)
    assert torch.autograd.gradcheck(lambda x, weight: operation(x, weight, ends), (x, weight))
    torch.library.opcheck(operation, (x, weight, ends), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.long
@traces_whole
def test_compiled_mixtures():
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-n", "0", "-p", "no:cacheprovider", str(CASES)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=CASES.parents[3], check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert re.search(r"^\.\. ", ran.stdout, re.MULTILINE), ran.stdout
