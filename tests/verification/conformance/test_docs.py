"""The page's examples are what they say: they run as a test file, and print what it shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "conformance.md"


@pytest.mark.long
def test_the_page_is_a_test_file_that_passes(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    (tmp_path / "test_page.py").write_text("\n\n".join(blocks), encoding="utf-8")
    # The whole suite of a part and a family is run elsewhere; here one network of each.
    chosen = "alone or fires or gradient or every_weight or (plain and logits)"
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-rs", "-p", "no:cacheprovider", "-k", chosen, "test_page.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "ConformanceReport: 4 passed, 0 excepted, 0 failed, 0 not applicable" in found.stdout
    assert "no transformers architecture holds this network" in found.stdout
