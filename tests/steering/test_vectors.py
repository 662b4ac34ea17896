"""Steering vectors as values: what their edits do, and their files."""

import json
from functools import partial

import pytest
import torch

from hooklens import evaluation, steering
from hooklens.errors import CheckpointError, TransformError
from hooklens.files import read_safetensors, write_safetensors
from hooklens.hooks.edits import Project
from hooklens.steering import SteeringError, SteeringVector, SteeringVectors
from tests.annotations import unchecked
from tests.steering.sentences import NEGATIVE, POSITIVE, word_model
from tests.word_models import make_word_model

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def vectors() -> SteeringVectors:
    return steering.fit(word_model(), POSITIVE, NEGATIVE, progress=False)


@pytest.fixture(scope="module")
def by_head() -> SteeringVectors:
    return steering.fit(word_model(), POSITIVE, NEGATIVE, at="z", method="pca", progress=False)


def activation(vector, edits):
    run = partial(word_model().run_with_cache, POSITIVE[0], names_filter=vector.name)
    return run()[1][vector.name], run(edits=edits)[1][vector.name]


@pytest.mark.parametrize("which", ["vectors", "by_head"])
@pytest.mark.parametrize("strength", [1.0, -2.5, 0])
def test_adding_clamping_and_ablating(which, strength, request):
    for vector in request.getfixturevalue(which):
        unit = vector.direction / vector.direction.norm(dim=-1, keepdim=True)
        plain, added = activation(vector, vector.edits(strength=strength))
        torch.testing.assert_close(added, plain + strength * vector.direction, **CLOSE)
        plain, clamped = activation(vector, vector.edits(strength=strength, how="clamp"))
        level = vector.levels[0] + strength * (vector.levels[1] - vector.levels[0])
        torch.testing.assert_close((clamped * unit).sum(-1), level.expand(plain.shape[:-1]), **CLOSE)
        across = plain - (plain * unit).sum(-1, keepdim=True) * unit
        torch.testing.assert_close(clamped - (clamped * unit).sum(-1, keepdim=True) * unit, across, **CLOSE)
        plain, ablated = activation(vector, vector.edits(how="ablate"))
        torch.testing.assert_close(ablated, across, **CLOSE)


def test_positions_and_phases_are_those_of_the_edits(vectors):
    [edit] = vectors["resid_post", 1].edits(pos=-1, when="decode")
    assert (edit.pos, edit.when, edit.name) == (-1, "decode", "blocks.1.hook_resid_post")
    assert len(vectors.edits()) == 2


def test_they_steer_generation_and_evaluation(vectors):
    model, edits = word_model(), vectors.edits(strength=6.0)
    plain = model.generate("Mary gave a", max_new_tokens=4, do_sample=False, return_type="tokens", verbose=False)
    steered = model.generate(
        "Mary gave a", max_new_tokens=4, do_sample=False, return_type="tokens", edits=edits, verbose=False
    )
    assert not torch.equal(plain, steered)
    # Step by step on a cache as all at once.
    whole = model.run_with_hooks(steered[:, :-1], edits=edits).argmax(-1)
    assert torch.equal(whole[0, -4:], steered[0, -4:])
    for acting in (edits, vectors.edits(how="clamp"), vectors.edits(how="ablate")):
        scored = evaluation.score_continuations(model, "Mary gave a", [" book to"], edits=acting, progress=False)
        ids = model.to_tokens("Mary gave a book to")
        logprobs = model.run_with_hooks(ids, edits=acting).log_softmax(-1)[0, -3:-1].gather(1, ids[0, -2:, None])
        assert scored["logprob"][0] == pytest.approx(logprobs.sum().item(), rel=1e-10)


def test_random_directions_are_as_long_and_come_again(vectors):
    vector = vectors["resid_post", 0]
    one, again, other = vector.random_like(seed=1), vector.random_like(seed=1), vector.random_like(seed=2)
    torch.testing.assert_close(one.norm, vector.norm)
    assert torch.equal(one.direction, again.direction)
    assert not torch.equal(one.direction, other.direction)
    assert one.provenance.seed == 1
    assert one.levels.isnan().all()


@pytest.mark.parametrize("which", ["vectors", "by_head"])
def test_files(which, request, tmp_path):
    made = request.getfixturevalue(which)
    made.save(tmp_path / "v.safetensors")
    read = SteeringVectors.load(tmp_path / "v.safetensors")
    assert read.names == made.names
    for one, other in zip(read, made, strict=True):
        assert torch.equal(one.direction, other.direction)
        assert torch.equal(one.levels, other.levels)
        assert (one.share is None) == (other.share is None)
        assert one.share is None or torch.equal(one.share, other.share)
        assert one.provenance == other.provenance
    made.vectors[0].save(tmp_path / "one.safetensors")
    assert torch.equal(SteeringVector.load(tmp_path / "one.safetensors").direction, made.vectors[0].direction)
    with pytest.raises(SteeringError, match=r"holds 2 vectors; read it with SteeringVectors.load"):
        SteeringVector.load(tmp_path / "v.safetensors")


def test_damaged_files_are_named(vectors, tmp_path):
    path = tmp_path / "v.safetensors"
    vectors.save(path)
    tensors, metadata = read_safetensors(path)
    write_safetensors(path, {**tensors, "0.levels": torch.zeros(3, dtype=torch.float64)}, metadata)
    with pytest.raises(CheckpointError, match=r"key '0.levels' is a tensor \[3\] .* expected \[2\]"):
        SteeringVectors.load(path)
    described = json.loads(metadata["description"])
    described["vectors"][0]["provenance"].pop("model")
    write_safetensors(path, tensors, {**metadata, "description": json.dumps(described)})
    with pytest.raises(CheckpointError, match=r"key 'vectors' is .* expected a list of vectors"):
        SteeringVectors.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"cannot read steering vectors"):
        SteeringVectors.load(path)


def test_tables_and_texts(vectors, by_head):
    frame = vectors.to_dataframe()
    assert list(frame["layer"]) == [0, 1]
    assert list(frame["norm"]) == pytest.approx([float(one.norm) for one in vectors])
    assert len(by_head.to_dataframe()) == 2 * 4
    # A title, two facts, the names of columns, and a line for each vector.
    assert len(repr(vectors).splitlines()) == 4 + len(vectors)
    assert {line.split()[-1] for line in repr(by_head).splitlines()[4:]} == {"4"}
    assert "4 heads" in repr(by_head.vectors[0])


def test_models_that_do_not_fit(vectors):
    vectors.check(word_model())
    with pytest.raises(
        SteeringError, match=r"'blocks.0.hook_resid_post', where a token has \[8\] entries and .* \[16\]"
    ):
        vectors.check(make_word_model(d_model=8, n_ctx=16, init_std=0.2))
    with pytest.raises(TransformError, match=r"processed differently"):
        vectors.check(word_model().process_weights(fold_ln=True))


def test_what_is_refused(vectors, by_head):
    vector = vectors["resid_post", 0]
    with pytest.raises(SteeringError, match=r"how='ablate' removes all .* strength is 2"):
        vector.edits(how="ablate", strength=2.0)
    with unchecked(), pytest.raises(SteeringError, match=r"how is 'push', expected 'add', 'ablate' or 'clamp'"):
        vector.edits(how="push")
    with pytest.raises(SteeringError, match=r"strength is nan"):
        vector.edits(strength=float("nan"))
    with pytest.raises(SteeringError, match=r"'resid_post' selects .* expected one vector"):
        vectors["resid_post"]
    with pytest.raises(SteeringError, match=r"expected at least one"):
        SteeringVectors(vectors=())
    zero = steering.fit(word_model(), POSITIVE, POSITIVE, progress=False)
    with pytest.raises(SteeringError, match=r"is zero: there is no component to clamp"):
        zero.edits(how="clamp")
    assert isinstance(vector.edits(how="ablate")[0], Project)
