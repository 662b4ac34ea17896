"""`import transformer_lens` finds the layer, once it is installed; in processes of their own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    path = [str(ROOT), *map(str, paths)]
    lines = f"import sys; sys.path[:0] = {path!r}\n{code}"
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False)


def test_modules_are_the_same_under_both_names() -> None:
    code = """
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


def test_the_real_package_must_not_have_been_imported(tmp_path: Path) -> None:
    (tmp_path / "transformer_lens.py").write_text("")
    code = """
import transformer_lens
from hooklens.compat import install_transformer_lens
from hooklens.errors import HookLensError
try:
    install_transformer_lens()
except HookLensError as error:
    print(error)
"""
    done = run(code, tmp_path)
    assert "has already been imported from" in done.stdout, done.stderr
    assert str(tmp_path) in done.stdout


def test_nothing_of_the_layer_is_imported_with_hooklens() -> None:
    code = (
        "import hooklens, hooklens.patching\nprint([one for one in sys.modules if one.startswith('hooklens.compat')])"
    )
    assert run(code).stdout == "[]\n"
