"""Models that steer by themselves against edited runs, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import (
    HookedCausalLM,
    HookedConfig,
    LearnedPositions,
    NormConfig,
    RotaryPositions,
    SinusoidalPositions,
    steering,
)
from hooklens.errors import TransformError
from hooklens.steering import SteeringError, SteeringVector, SteeringVectors, ablate_everywhere
from tests.annotations import unchecked
from tests.steering.sentences import NEGATIVE, POSITIVE, random_model, word_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
# An identity in float64, over two layers.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SIZES = {"d_model": 12, "n_layers": 2, "n_heads": 3, "n_kv_heads": 3, "d_vocab": 11, "n_ctx": 16}


def make_model(**options):
    options = {"positions": RotaryPositions(dim=4), **options}
    return random_model(HookedConfig(**{**SIZES, **options}))


def make_vector(model, name, seed=0):
    shape = [model.cfg.size(axis) for axis in model.cfg.description.points[name].axes[2:]]
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    provenance = steering.fit(word_model(), POSITIVE, NEGATIVE, progress=False).vectors[0].provenance
    levels = torch.zeros(2, *shape[:-1], dtype=torch.float64)
    return SteeringVector(name=name, direction=direction, levels=levels, provenance=provenance)


OPTIONS = st.fixed_dictionaries(
    {
        "wiring": st.sampled_from(["sequential", "parallel"]),
        "positions": st.sampled_from([RotaryPositions(dim=4), LearnedPositions()]),
        "norm": st.sampled_from([NormConfig(kind="layer", eps=1e-5), NormConfig(kind="rms", eps=1e-5, bias=False)]),
        "tied_unembed": st.booleans(),
        "residual_scale": st.sampled_from([1.0, 0.5]),
        "embed_scale": st.sampled_from([None, 3.0]),
        "n_kv_heads": st.sampled_from([1, 3]),
    }
)


@settings(max_examples=12)
@given(
    options=OPTIONS, strength=st.sampled_from([1.0, -2.0]), layer=st.integers(0, 1),
    word=st.sampled_from(["attn_out", "resid_mid", "mlp_out", "resid_post", "resid_pre"]),
)  # fmt: skip
def test_an_addition_in_a_bias_is_the_edited_run(options, strength, layer, word):
    model = make_model(**options)
    if word == "resid_pre":
        layer = 1
    if word == "resid_mid" and options["wiring"] == "parallel":
        word = "resid_post"
    vector = make_vector(model, f"blocks.{layer}.hook_{word}")
    baked = steering.bake(model, vector, strength=strength)
    expected = model.run_with_hooks(IDS, edits=vector.edits(strength=strength))
    assert not torch.allclose(expected, model(IDS), atol=1e-3)
    torch.testing.assert_close(baked(IDS), expected, **EXACT)


@settings(max_examples=12)
@given(options=OPTIONS)
def test_ablation_in_the_writers_is_the_edited_run(options):
    model = make_model(**options)
    vector = make_vector(model, "blocks.1.hook_resid_pre")
    baked = steering.bake(model, vector, how="ablate")
    expected = model.run_with_hooks(IDS, edits=ablate_everywhere(model, vector))
    assert not torch.allclose(expected, model(IDS), atol=1e-3)
    torch.testing.assert_close(baked(IDS), expected, **EXACT)
    _, cache = baked.run_with_cache(IDS)
    unit = vector.direction / vector.direction.norm()
    for layer in range(2):
        assert float((cache["resid_post", layer] @ unit).abs().max()) < 1e-12
    assert baked.cfg.tied_unembed is False
    torch.testing.assert_close(baked.W_U, model.W_U)


def test_the_model_given_stays_and_the_new_one_records_it(tmp_path):
    model = HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox").double()
    before = {name: one.clone() for name, one in model.named_parameters()}
    vectors = steering.fit(model, POSITIVE, NEGATIVE, at="resid_post", progress=False)
    vector = vectors["resid_post", 1]
    baked = steering.bake(steering.bake(model, vector), vectors["resid_post", 2], how="ablate")
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())
    assert [step.split()[:2] for step in baked.transforms] == [["steer:", "add"], ["steer:", "ablate"]]
    assert baked.transforms[0].endswith("at blocks.1.hook_resid_post")
    assert steering.bake(model, vector, strength=2.0).transforms != steering.bake(model, vector).transforms
    text = "Mary gave a book to"
    edits = [*ablate_everywhere(model, vectors["resid_post", 2])]
    once = steering.bake(model, vector)
    torch.testing.assert_close(baked(text), once.run_with_hooks(text, edits=edits), rtol=1e-9, atol=1e-9)
    baked.save_pretrained(tmp_path / "baked")
    read = HookedCausalLM.from_pretrained(str(tmp_path / "baked"))
    assert read.transforms == baked.transforms
    written, weights = read.state_dict(), baked.state_dict()
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], one) for name, one in weights.items())
    # Products of a matrix that lies otherwise in memory are summed in another order.
    torch.testing.assert_close(read(text), baked(text), rtol=1e-10, atol=1e-10)
    # Other steps change what a direction means.
    with pytest.raises(TransformError, match=r"processed differently"):
        vector.check(baked.process_weights(fold_ln=True))


def test_several_bakings_add_up():
    model = make_model()
    one, other = make_vector(model, "blocks.0.hook_mlp_out", 1), make_vector(model, "blocks.1.hook_resid_post", 2)
    baked = steering.bake(steering.bake(model, one, strength=2.0), other)
    expected = model.run_with_hooks(IDS, edits=[*one.edits(strength=2.0), *other.edits()])
    torch.testing.assert_close(baked(IDS), expected, **EXACT)
    assert len(baked.transforms) == 2


@pytest.mark.parametrize(
    ("options", "how", "text"),
    [
        ({"mlp_bias": False}, "add", r"there is no blocks.1.mlp.b_out .*keep the edit"),
        ({"norm_after": True}, "add", r"cfg.norm_after in layer 1: a norm stands between"),
        ({"norm_after": True}, "ablate", r"cfg.norm_after is True: norms, not weights, write to the stream"),
        ({"norm_after": (False, True)}, "ablate", r"cfg.norm_after is True in layers \[1\]"),
        ({"embed_norm": NormConfig(kind="layer", eps=1e-5)}, "ablate", r"cfg.embed_norm: a norm, not weights"),
        ({"positions": SinusoidalPositions()}, "ablate", r"positions are sinusoidal"),
    ],
)
def test_architectures_without_a_place(options, how, text):
    model = make_model(**options)
    with pytest.raises(TransformError, match=text):
        steering.bake(model, make_vector(model, "blocks.1.hook_resid_post"), how=how)


@pytest.mark.parametrize(
    ("name", "keywords", "text"),
    [
        ("hook_embed", {}, r"no bias writes what is added at 'hook_embed'; expected a vector at resid_pre"),
        ("blocks.0.hook_resid_pre", {}, r"no bias writes what is added at 'blocks.0.hook_resid_pre'"),
        ("blocks.0.attn.hook_z", {}, r"expected a direction of the stream, \[12\] at one point"),
        (
            "blocks.1.hook_resid_post",
            {"how": "ablate", "strength": 0.5},
            r"how='ablate' removes all .* strength is 0.5",
        ),
        ("blocks.1.hook_resid_post", {"how": "clamp"}, r"how is 'clamp', expected 'add' or 'ablate'"),
        ("blocks.1.hook_resid_post", {"strength": None}, r"strength is None, expected a finite number"),
    ],
)
def test_what_is_refused(name, keywords, text):
    model = make_model()
    with unchecked(), pytest.raises(SteeringError, match=text):
        steering.bake(model, make_vector(model, name), **keywords)


def test_several_vectors_are_baked_one_by_one():
    model = make_model()
    with unchecked(), pytest.raises(SteeringError, match=r"vector is a SteeringVectors, expected a SteeringVector"):
        steering.bake(model, SteeringVectors(vectors=(make_vector(model, "blocks.1.hook_resid_post"),)))
