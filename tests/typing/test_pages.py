"""What pyright and mypy, both strict, say of the Python on pages: README, docs and tutorials, a page as one script.

A reader copies them, and an editor then underlines what is wrong. What other libraries' types leave open is not ours,
and stands in `ACCEPTED` with the page where it occurs.
"""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import tomllib

from tests.typing.test_scripts import need

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("tutorials/*.ipynb"))]

# torch: what a module has under a name that its class does not declare is a tensor or a module.
_MODULES = r'for class "(Tensor|Module)"|not defined on type "Module"'
# Packages that no extra installs, which a page compares with or hands something to.
_OTHER_PACKAGES = r'Import "(transformer_lens|circuitsvis|vllm)" could not be resolved'
ACCEPTED: dict[str, str] = {
    # pandas-stubs: what stands in a cell is any scalar, which `float` does not take.
    "08_training_a_toy_model.ipynb": r'ScalarOrNA|Argument 1 to "float"',
    # `W_dec /= ...` of a parameter gives a tensor, says torch.
    "10_sparse_autoencoders.ipynb": r'attribute "W_dec"|Result type of /',
    # transformers: keywords of a config of any kind.
    "11_adding_an_architecture.ipynb": r'parameter "model_type"',
    "12_coming_from_other_libraries.ipynb": _MODULES,
    # lm_eval: which may be absent, has no stubs, and makes its functions when they are asked for.
    "harness.md": r'"lm_eval|"lm", "task_dict"|No parameter named "(model|tasks|task_manager)"|EvalResults|type "None"',
    # The same name from the layer, and from the package in whose place it stands.
    "transformer_lens.md": rf"{_OTHER_PACKAGES}|HookedTransformer\" (is imported more|already defined)",
    "views.md": _OTHER_PACKAGES,
    # vllm: its wheel brings a CUDA build of torch, and no test installs it.
    "serving.md": rf'{_OTHER_PACKAGES}|Import "vllm"|module named "vllm"|"(LLM|SamplingParams)"',
    # Examples of errors: what they do is wrong, or done behind the back of the types.
    "AlignmentInterruptedError.md": r'"forward"|Cannot assign to a method|Incompatible types in assignment',
    "HookLensError.md": "HookPoint",
    "MissingDependencyError.md": r'"?None"?\b',
    "PaddingWarning.md": r"pad_token|eos_token",
}
# A cell ends in what it shows, and a page imports what the next block needs. What other libraries leave open is unknown
# here as it is in the package, whose settings these are otherwise.
PYRIGHT = {
    "typeCheckingMode": "strict",
    "reportUnusedExpression": False,
    "reportUnusedImport": False,
    **{name: value for name, value in SETTINGS["pyright"].items() if name.startswith("report")},
}
MYPY = (
    "--strict", "--ignore-missing-imports", "--allow-untyped-calls", "--allow-subclassing-any", "--no-warn-return-any",
    "--no-warn-unused-ignores",
)  # fmt: skip


def blocks_of(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def write_script(page: Path, folder: Path) -> Path:
    """The blocks of a page as one script, without what only notebooks understand."""
    lines = "\n\n".join(blocks_of(page)).splitlines()
    script = folder / f"{page.name.replace('.', '_')}.py"
    script.write_text("\n".join(re.sub(r"^(\s*)[%!]", r"\1# ", line) for line in lines) + "\n", encoding="utf-8")
    return script


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """The pages as scripts in one folder, and the name of each one's page."""
    need("basedpyright")
    folder = tmp_path_factory.mktemp("pages")
    return {write_script(page, folder): page.name for page in PAGES if blocks_of(page)}


@pytest.fixture(scope="module")
def pyright_reports(scripts: dict[Path, str]) -> dict[str, list[str]]:
    """What pyright reports of each page: line of the script, rule and text."""
    folder = next(iter(scripts)).parent
    settings = {**PYRIGHT, "include": ["."], "extraPaths": [str(ROOT), str(ROOT / "tutorials")]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(scripts) > 10
    found = defaultdict(list)
    for one in report["generalDiagnostics"]:
        if one["severity"] == "error":
            line = one["range"]["start"]["line"] + 1
            found[scripts[Path(one["file"]).resolve()]].append(f"{line}: {one.get('rule')}: {one['message']}")
    return found


@pytest.fixture(scope="module")
def mypy_reports(scripts: dict[Path, str]) -> dict[str, list[str]]:
    """What mypy reports of each page: line of the script and text."""
    folder = next(iter(scripts)).parent
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tutorials")))
    command = [sys.executable, "-m", "mypy", *MYPY, "--config-file", str(ROOT / "pyproject.toml"), "."]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "MYPYPATH": paths}, capture_output=True, text=True, check=False
    )
    assert re.search(rf"checked {len(scripts)} source files", done.stdout), done.stdout + done.stderr
    found = defaultdict(list)
    for name, text in re.findall(r"^(\w+\.py):(\d+: error: .*)$", done.stdout, re.MULTILINE):
        found[scripts[folder / name]].append(text)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", [page.name for page in PAGES if blocks_of(page)])
def test_pages_are_typed(page: str, pyright_reports: dict[str, list[str]], mypy_reports: dict[str, list[str]]) -> None:
    accepted, reported = ACCEPTED.get(page), [*pyright_reports[page], *mypy_reports[page]]
    wrong = [one for one in reported if accepted is None or not re.search(accepted, one)]
    assert wrong == []
    assert accepted is None or reported, "what was accepted is no longer reported: take the page from ACCEPTED"
