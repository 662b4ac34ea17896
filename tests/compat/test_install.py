"""`import transformer_lens` finds the layer, once it is installed."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hooklens.compat import install_transformer_lens
from hooklens.errors import HookLensError

ROOT = Path(__file__).parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    lines = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)


def test_modules_are_the_same_under_both_names_and_none_comes_with_hooklens() -> None:
    code = """
import hooklens, hooklens.patching
assert not [one for one in sys.modules if one.startswith("hooklens.compat")]
import hooklens.compat.transformer_lens.install
import transformer_lens, transformer_lens.utils
import transformer_lens.HookedTransformer as module
from transformer_lens.hook_points import HookPoint, HookedRootModule
from transformer_lens.components.mlps.can_be_used_as_mlp import CanBeUsedAsMLP
from transformer_lens.HookedTransformer import HookedTransformer
import hooklens.compat.transformer_lens as layer
from hooklens.compat import install_transformer_lens
install_transformer_lens()
assert transformer_lens is layer
assert transformer_lens.HookedTransformer is HookedTransformer is layer.HookedTransformer
assert HookPoint is layer.hook_points.HookPoint
assert not isinstance(layer.HookedTransformer, type(sys))
try:
    import transformer_lens.no_such_module
except ModuleNotFoundError:
    print("fine")
"""
    done = run(code)
    assert done.stdout.endswith("fine\n"), done.stderr


def test_the_real_package_must_not_have_been_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformer_lens.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    # Put back behind the test, whatever stood there.
    monkeypatch.setitem(sys.modules, "transformer_lens", ModuleType("transformer_lens"))
    del sys.modules["transformer_lens"]
    importlib.import_module("transformer_lens")
    with pytest.raises(HookLensError, match="has already been imported from") as caught:
        install_transformer_lens()
    assert str(tmp_path) in str(caught.value)
