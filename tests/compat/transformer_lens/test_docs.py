"""What docs/transformer_lens.md shows runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "transformer_lens.md").read_text(encoding="utf-8")


def test_its_code_runs(tmp_path: Path) -> None:
    """In a process of its own, since it installs the layer."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
