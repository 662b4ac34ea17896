"""What is published: the files in the wheel and in the source distribution, and what the metadata says.

Both are built by setuptools itself, without a network, from a copy of the checkout.
"""

import email
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hooklens
from hooklens import optional

ROOT = Path(__file__).parents[1]
NOT_PUBLISHED = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


class Published(NamedTuple):
    """Names of files, without the folder of name and version that a source distribution puts around them."""

    wheel: set[str]
    sdist: set[str]
    metadata: Message


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The wheel is built from the unpacked source distribution, as installers do it."""
    folder = tmp_path_factory.mktemp("published")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=NOT_PUBLISHED)
    # What runs and editors leave behind is in no distribution.
    (checkout / "tests" / "__pycache__").mkdir(exist_ok=True)
    (checkout / "tests" / "__pycache__" / "stale.cpython-310.pyc").write_bytes(b"")

    shutil.unpack_archive(build("sdist", checkout, folder), folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    assert unpacked.name == f"hooklens-{hooklens.__version__}"
    sdist = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    with zipfile.ZipFile(build("wheel", unpacked, folder)) as archive:
        wheel = set(archive.namelist())
        (metadata,) = (name for name in wheel if name.endswith(".dist-info/METADATA"))
        message = email.message_from_bytes(archive.read(metadata))
    return Published(wheel, sdist, message)


def build(kind: str, source: Path, target: Path) -> Path:
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


def files_under(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def files_of(*folders: str) -> set[str]:
    """The checkout's files in some of its folders."""
    found = {path.relative_to(ROOT).as_posix() for folder in folders for path in files_under(ROOT / folder)}
    return {name for name in found if ".ipynb_checkpoints" not in name and not name.endswith(".DS_Store")}


def test_wheel_holds_the_whole_package_and_nothing_else(published: Published) -> None:
    package = {name for name in published.wheel if ".dist-info/" not in name}
    assert package == files_of("hooklens")
    assert "hooklens/py.typed" in package
    for name in ("tiny-gpt-neox", "tiny-llama", "tiny-falcon"):
        bundled = {file.rpartition("/")[2] for file in package if file.startswith(f"hooklens/bundled/{name}/")}
        assert bundled >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}


def test_source_distribution_can_be_tested(published: Published) -> None:
    """It lacked the tests' packages, the tutorials, the demos and the constraints."""
    wanted = files_of("hooklens", "tests", "tutorials", "demos", "docs") | {
        ".ci/run",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "README.md",
        "constraints-lowest.txt",
        "constraints.txt",
        "mkdocs.yml",
        "pyproject.toml",
    }
    made = {"MANIFEST.in", "PKG-INFO", "setup.cfg"}
    found = {name for name in published.sdist if not name.startswith("hooklens.egg-info/")}
    assert wanted - found == set()
    assert found - wanted - made == set()


def test_metadata(published: Published) -> None:
    metadata = published.metadata
    assert (metadata["Name"], metadata["Version"]) == ("hooklens", hooklens.__version__)
    assert metadata["Author"] == "HookLens maintainers"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "interpretability" in metadata["Keywords"].split(",")
    labels = {url.partition(",")[0] for url in metadata.get_all("Project-URL", [])}
    assert labels == {"Homepage", "Source", "Issues", "Changelog"}
    classifiers = metadata.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    assert "Programming Language :: Python :: 3.10" in classifiers


def test_extras(published: Published) -> None:
    """An error about a missing package names an extra that installs it; `all` is what users may want."""
    requirements = list_requirements(published)
    for module, extra in optional._EXTRA_OF.items():
        package = {"sklearn": "scikit-learn", "lm_eval": "lm-eval"}.get(module, module)
        assert canonicalize_name(package) in names_of(requirements, extra), (package, extra)
    extras = set(published.metadata.get_all("Provides-Extra", []))
    assert extras == {
        "all",
        "bench",
        "datasets",
        "docs",
        "harness",
        "lint",
        "notebook",
        "peft",
        "placement",
        "plot",
        "pool",
        "probes",
        "quant",
        "ray",
        "stats",
        "test",
    }
    (everything,) = (requirement for requirement in requirements if holds_for(requirement, "all"))
    assert everything.name == "hooklens"
    assert everything.extras == {"datasets", "notebook", "peft", "placement", "plot", "pool", "probes", "stats"}


def test_lowest_constraints_are_the_declared_bounds(published: Published) -> None:
    """Bounds were declared that nobody had installed: typer's crashed, two others could not be resolved together."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(pinned) == len(pins)
    tested = [
        requirement
        for requirement in list_requirements(published)
        if requirement.name != "hooklens" and not any(holds_for(requirement, one) for one in ("bench", "docs", "lint"))
    ]
    assert len(tested) > 20
    wrong = {}
    for requirement in tested:
        (bound,) = requirement.specifier
        found = pinned.get(canonicalize_name(requirement.name), "")
        if bound.operator != ">=" or without_zeros(bound.version) != without_zeros(found):
            wrong[requirement.name] = (str(bound), found)
    assert wrong == {}


def list_requirements(published: Published) -> list[Requirement]:
    return [Requirement(line) for line in published.metadata.get_all("Requires-Dist", [])]


def holds_for(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and f'extra == "{extra}"' in str(requirement.marker)


def names_of(requirements: list[Requirement], extra: str) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements if holds_for(requirement, extra)}


def without_zeros(version: str) -> str:
    """`2.6` and `2.6.0` are one version."""
    while version.endswith(".0"):
        version = version.removesuffix(".0")
    return version
