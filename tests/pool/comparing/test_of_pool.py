import pytest
import torch

from hooklens import HookedCausalLM, pool
from hooklens.errors import InputError
from tests.annotations import unchecked

TEXTS = ["When Mary and John went to the store", "Mary gave a drink"]
QUIET = {"progress": False}


def moved(seed):
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return model


@pytest.fixture(scope="module")
def models():
    return pool.CausalLMPool(
        {"one": moved(1), "_merged_": moved(3), "_pretrained_": "bundled:tiny-llama", "two": moved(2)}
    )


def test_the_pretrained_model_is_the_base(models):
    result = models.compare(TEXTS, **QUIET)
    assert result.names == ("_pretrained_", "one", "two")
    loaded = {name: models.load_model(name) for name in result.names}
    expected = pool.compare_models(loaded, TEXTS, **QUIET)
    assert result.frame.equals(expected.frame)
    assert result.weights.equals(expected.weights)


def test_names_and_a_base_of_ones_own(models):
    assert models.compare(TEXTS, ["one", "_merged_"], **QUIET).names == ("one", "_merged_")
    named = models.compare(TEXTS, ["one", "two", "_pretrained_"], base="two", weights=False, site="mlp_out", **QUIET)
    assert named.names == ("two", "one", "_pretrained_")
    assert set(named.frame["first"]) == {"two"}
    half = models.compare(TEXTS, ["one", "two"], load_kwargs={"dtype": "bfloat16"}, **QUIET)
    assert half.frame["cosine"].iloc[0] != models.compare(TEXTS, ["one", "two"], **QUIET).frame["cosine"].iloc[0]


def test_names_that_are_none_are_refused_before_a_model_is_loaded(models, monkeypatch):
    monkeypatch.setattr(pool.CausalLMPool, "load_model", lambda *arguments, **keywords: pytest.fail("it loaded"))
    with pytest.raises(KeyError, match="three"):
        models.compare(TEXTS, ["one", "three"], **QUIET)
    with pytest.raises(InputError, match=r"base is 'two'; the models to compare are \['one'\]"):
        models.compare(TEXTS, ["one"], base="two", **QUIET)
    with unchecked(), pytest.raises(InputError, match="names is 'one', expected a list of names, or None"):
        models.compare(TEXTS, "one", **QUIET)
