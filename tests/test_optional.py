"""Tests of hooklens.optional."""

import sys

import pytest

from hooklens.errors import MissingDependencyError
from hooklens.optional import import_package


def test_imports_packages_and_submodules():
    assert import_package("json") is sys.modules["json"]
    assert import_package("json.decoder") is sys.modules["json.decoder"]


@pytest.mark.parametrize(
    ("name", "install"),
    [("plotly", "pip install 'hooklens[plot]'"), ("peft.tuners", "pip install 'hooklens[peft]'")],
)
def test_a_missing_extra_says_which(monkeypatch, name, install):
    root = name.partition(".")[0]

    def find_nothing(wanted):
        raise ModuleNotFoundError(f"No module named {root!r}", name=root)

    monkeypatch.setattr("importlib.import_module", find_nothing)
    with pytest.raises(MissingDependencyError) as caught:
        import_package(name)
    assert str(caught.value) == f"the package {root!r} is needed here and is not installed; install it with: {install}"
    assert caught.value.__cause__ is not None


def test_a_missing_package_that_is_no_extra():
    with pytest.raises(MissingDependencyError, match=r"install it with: pip install no_such_package_of_anybody$"):
        import_package("no_such_package_of_anybody")


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    """A package that is installed but fails on an import of its own must not be reported as not installed."""
    (tmp_path / "broken_package_for_test.py").write_text("import no_such_package_of_anybody\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_anybody") as caught:
        import_package("broken_package_for_test")
    assert not isinstance(caught.value, MissingDependencyError)
