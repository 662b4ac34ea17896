"""What `torch.compile` makes of a model, in an interpreter without the checks of annotations (compiled_calls.py)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.networks import ALL_CONFIGS
from tests.torch_version import traces_whole

CASES = Path(__file__).with_name("compiled_calls.py")

pytestmark = traces_whole


def test_compiled_calls():
    """A call of three networks, documents, and hooks that outlive a call."""
    assert run("not slow and not long") == 3 + 1 + 1


@pytest.mark.long
def test_calls_of_every_network():
    """A call of every other network, six more of one, documents, offloaded weights, and the compiler's own code."""
    assert run("long and not slow") == len(ALL_CONFIGS) - 3 + 6 + 1 + 2 + 1


@pytest.mark.slow
def test_more_compiled_calls():
    assert run("slow") == 6 * (len(ALL_CONFIGS) - 1) + 6


def run(marks: str) -> int:
    """How many cases of compiled_calls.py pass; all do."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", marks]
    ran = subprocess.run([*command, str(CASES)], capture_output=True, text=True, cwd=CASES.parents[2], check=False)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return sum(len(dots) for dots in re.findall(r"^([.]+)(?= )", ran.stdout, re.MULTILINE))
