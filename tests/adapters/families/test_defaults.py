"""What a config leaves out is what transformers takes for it, key by key."""

import importlib
from typing import Any

import pytest
from transformers import AutoConfig

from hooklens.adapters.families import load_families
from hooklens.adapters.family import Family
from hooklens.errors import UnsupportedModelError

FAMILIES = {
    family.name: family
    for family in load_families()
    if family.name
    in (
        "biogpt", "bloom", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt", "openai_gpt", "opt", "xglm",
    )
}  # fmt: skip


def read(family: Family, config: dict[str, Any]) -> Any:
    return family.read_config(config, where="here", warn=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_absent_key_is_transformers_default(name: str) -> None:
    """Each key left out of a config, and all that may be: the config that transformers makes of it reads the same."""
    family = FAMILIES[name]
    module = importlib.import_module(f"tests.adapters.families.test_{name}")
    whole = {"model_type": family.model_types[0], **next(iter(module.PUBLISHED.values()))[0]}
    left_out = [key for part in family.config.parts for key in part.keys if key in whole]
    silent = dict(whole)
    compared, refused = 0, {}
    for key in left_out:
        without = {other: value for other, value in whole.items() if other != key}
        try:
            cfg = read(family, without)
        except UnsupportedModelError as error:
            refused[key] = str(error)
            continue
        silent.pop(key)
        assert cfg == read(family, AutoConfig.for_model(**without).to_dict()), key
        compared += 1
    assert compared > 1
    # Sizes that are one checkpoint's in transformers, told under their first names.
    assert all("is missing" in told or key in told for key, told in refused.items())
    assert read(family, silent) == read(family, AutoConfig.for_model(**silent).to_dict())
