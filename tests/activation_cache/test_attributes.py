"""Activations are entries of a cache; what is asked for as an attribute is told so."""

import copy
import pickle

import pytest
import torch

from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
with torch.no_grad():
    _, CACHE = MODEL.run_with_cache(random_tokens(1, 4))


@pytest.mark.parametrize("name", ["resid_post", "hook_pattern", "q", "mlp_out", "embed", "hook_embed", "scale", "z"])
def test_the_error_says_how_the_activation_is_read(name):
    """`cache.resid_post` said that there was no such attribute, and no more."""
    with pytest.raises(AttributeError, match=f"no attribute '{name}'. Activations are entries: cache\\[") as found:
        getattr(CACHE, name)
    key = str(found.value).partition("cache[")[2].removesuffix("]")
    # What the text says is read as it stands there.
    tensor = CACHE[eval(key, {"layer": 0})]
    assert name.removeprefix("hook_") in next(one for one in CACHE if CACHE[one] is tensor)


def test_other_names():
    with pytest.raises(AttributeError, match=r"no attribute 'tokns'\. Did you mean 'tokens'"):
        CACHE.tokns  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'\.$"):
        CACHE.xyzzy  # noqa: B018
    assert not hasattr(CACHE, "_repr_svg_")
    assert not hasattr(CACHE, "resid_post")


def test_copies_are_made_as_ever():
    assert list(copy.copy(CACHE)) == list(CACHE)
    alone = CACHE.remove_batch_dim()
    for made in (copy.deepcopy(alone), pickle.loads(pickle.dumps(alone))):
        assert list(made) == list(CACHE)
