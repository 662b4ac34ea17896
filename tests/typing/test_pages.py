"""What pyright says of the Python on pages: README, docs and tutorials, the blocks of a page as one script.

A reader copies them, and an editor then underlines what is wrong. What other libraries' types leave open is not ours,
and stands in `ACCEPTED` with the page where it occurs.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.typing.test_scripts import need

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("tutorials/*.ipynb"))]

# torch: what a module has under a name that its class does not declare is a tensor or a module.
_MODULES = r'for class "(Tensor|Module)"|not defined on type "Module"'
# Packages that no extra installs, which a page compares with or hands something to.
_OTHER_PACKAGES = r'Import "(transformer_lens|circuitsvis)" could not be resolved'
ACCEPTED: dict[str, str] = {
    # pandas-stubs: what stands in a cell is any scalar, which `float` does not take.
    "08_training_a_toy_model.ipynb": r"ScalarOrNA",
    # `W_dec /= ...` of a parameter gives a tensor, says torch.
    "10_sparse_autoencoders.ipynb": r'attribute "W_dec"',
    "12_coming_from_other_libraries.ipynb": _MODULES,
    "transformer_lens.md": _OTHER_PACKAGES,
    "views.md": _OTHER_PACKAGES,
}


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
def reported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is reported of each page: line of the script, rule and text."""
    need("basedpyright")
    folder = tmp_path_factory.mktemp("pages")
    page_of = {write_script(page, folder): page.name for page in PAGES if blocks_of(page)}
    # A cell ends in what it shows, so an expression that is not used is no mistake: that is in the strict mode only.
    settings = {"typeCheckingMode": "standard", "include": ["."], "extraPaths": [str(ROOT), str(ROOT / "tutorials")]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len(page_of) > 10
    found = defaultdict(list)
    for one in report["generalDiagnostics"]:
        if one["severity"] == "error":
            line = one["range"]["start"]["line"] + 1
            found[page_of[Path(one["file"]).resolve()]].append(f"{line}: {one.get('rule')}: {one['message']}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", [page.name for page in PAGES if blocks_of(page)])
def test_pages_are_typed(page: str, reported: dict[str, list[str]]) -> None:
    accepted = ACCEPTED.get(page)
    wrong = [one for one in reported[page] if accepted is None or not re.search(accepted, one)]
    assert wrong == []
    assert accepted is None or reported[page], "what was accepted is no longer reported: take the page from ACCEPTED"
