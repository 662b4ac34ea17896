"""Families of other packages, found through an entry point."""

import dataclasses
from importlib.metadata import EntryPoint

import pytest

from hooklens.adapters import Family, families
from hooklens.adapters.choice import find_family

LLAMA = next(family for family in families.load_families() if family.name == "llama")
OTHER = dataclasses.replace(LLAMA, name="other", model_types=("other",), architectures=("OtherForCausalLM",))
TAKEN, NO_FAMILY = LLAMA, {"name": "other"}


@pytest.fixture
def install(monkeypatch):
    def make(*names: str) -> tuple[Family, ...]:
        entries = [EntryPoint(name.lower(), f"{__name__}:{name}", families.PLUGINS) for name in names]
        monkeypatch.setattr(families, "entry_points", lambda group: entries if group == families.PLUGINS else [])
        return families.load_families()

    families.load_families.cache_clear()
    yield make
    families.load_families.cache_clear()


def test_a_family_of_another_package_reads_checkpoints(install) -> None:
    found = install("OTHER")
    assert found[-1].name == "other"
    assert find_family({"model_type": "other"}, found, where="here") is OTHER


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("TAKEN", "'LlamaForCausalLM', .*'llama' is supported already"),
        ("NO_FAMILY", "it is {'name': 'other'}; expected a hooklens.adapters.Family"),
        ("MISSING", "loading it failed with AttributeError"),
    ],
)
def test_a_broken_one_is_left_out_and_told_of(install, name, reason) -> None:
    """What another package does wrong keeps nobody from loading Llama."""
    with pytest.warns(UserWarning, match=reason):
        found = install(name, "OTHER")
    assert [family.name for family in found if family.name in ("llama", "other")] == ["llama", "other"]
