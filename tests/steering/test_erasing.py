"""Erasures fitted on a model: at chance where they act, as values, and one after another."""

import pytest
import torch

from hooklens import HookedCausalLM, steering
from hooklens.errors import CheckpointError
from hooklens.steering import Erasure, SteeringError
from tests.annotations import unchecked
from tests.steering.sentences import NEGATIVE, POSITIVE, naming_prompts, one_by_one, word_model
from tests.steering.test_concept import leace_by_formula, probe_gain

PROMPTS = [*POSITIVE, *NEGATIVE]
LABELS = ["to"] * 4 + ["cut"] * 4


def fit(prompts=PROMPTS, labels=LABELS, **keywords):
    return steering.fit_erasure(word_model(), prompts, labels, **{"progress": False, **keywords})


def tokens_behind(model, prompts, name, edits, take):
    """The tokens at a point in runs with edits, one prompt after another."""
    runs = [model.run_with_cache(one, edits=edits, names_filter=name)[1][name] for one in prompts]
    found = [run[0, take].detach() for run in runs]
    return torch.stack(found) if isinstance(take, int) else torch.cat(found)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize("at", ["blocks.0.hook_resid_post", "z"])
def test_maps_are_those_of_the_formula(at, batch_size):
    model = word_model()
    erasure = fit(at=at, batch_size=batch_size)
    for point in erasure:
        runs = one_by_one(model, PROMPTS, point.name)
        x = torch.cat(runs)
        labels = torch.tensor([int(label == "to") for label, run in zip(LABELS, runs, strict=True) for _ in run])
        grouped = x.reshape(len(x), -1, x.shape[-1])
        expected = torch.stack(
            [torch.from_numpy(leace_by_formula(one.detach(), labels, 2)) for one in grouped.unbind(1)], dim=1
        ).reshape(x.shape)
        # As exact as the root of the covariance.
        torch.testing.assert_close(point.erase(x), expected, rtol=1e-5, atol=1e-6)
        edited = tokens_behind(model, PROMPTS, point.name, point.edits(), slice(None))
        torch.testing.assert_close(edited, point.erase(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["leace", "mean_difference"])
def test_probes_of_a_trained_model_are_at_chance(method):
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    positive, negative = naming_prompts(50, held_out=False, seed=0)
    prompts, labels = [*positive, *negative], [1] * 50 + [0] * 50
    name = "blocks.2.hook_resid_post"
    erasure = steering.fit_erasure(model, prompts, labels, at=name, method=method, positions=-1, progress=False)
    numbered = torch.tensor(labels)
    before = tokens_behind(model, prompts, name, [], -1).double()
    after = tokens_behind(model, prompts, name, erasure.edits(), -1).double()
    # ln 2 = 0.693 is all there is to gain.
    assert probe_gain(before, numbered, 2) > 0.69
    # What float32 leaves of the means is amplified by the search for a probe.
    assert probe_gain(after, numbered, 2) < 1e-3
    assert erasure.provenance.counts == (50, 50)
    if method == "leace":
        orthogonal = steering.fit_erasure(
            model, prompts, labels, at=name, method="mean_difference", positions=-1, progress=False
        )
        assert float(erasure.points[0].removed) < float(orthogonal.points[0].removed)


def test_tokens_may_have_classes_of_their_own():
    model = word_model()
    labels = [[place % 3 for place in range(len(model.to_tokens(one)[0]))] for one in PROMPTS]
    erasure = fit(labels=labels, at="blocks.1.hook_resid_post")
    assert erasure.classes == (0, 1, 2)
    assert sum(erasure.provenance.counts) == sum(map(len, labels))
    x = tokens_behind(model, PROMPTS, "blocks.1.hook_resid_post", erasure.edits(), slice(None))
    flat = torch.tensor([label for row in labels for label in row])
    means = torch.stack([x[flat == k].mean(0) for k in range(3)])
    torch.testing.assert_close(means, x.mean(0).expand_as(means), rtol=1e-6, atol=1e-7)


def test_one_after_another_every_point_is_erased_while_all_act():
    model, names = word_model(), ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    lengths = [len(model.to_tokens(one)[0]) for one in PROMPTS]
    flat = torch.tensor([1] * sum(lengths[:4]) + [0] * sum(lengths[4:]))

    def gap(erasure, name):
        x = tokens_behind(model, PROMPTS, name, erasure.edits(), slice(None))
        return float((x[flat == 1].mean(0) - x[flat == 0].mean(0)).norm())

    apart, scrubbed = fit(at=names), fit(at=names, sequential=True)
    assert gap(apart, names[0]) < 1e-7
    assert gap(apart, names[1]) > 1e-4
    assert [gap(scrubbed, name) < 1e-7 for name in names] == [True, True]
    assert scrubbed.sequential


def test_files_tables_and_texts(tmp_path):
    for at in ("resid_post", "z"):
        made = fit(at=at)
        made.save(tmp_path / "e.safetensors")
        read = Erasure.load(tmp_path / "e.safetensors")
        assert (read.names, read.classes, read.sequential, read.provenance) == (
            made.names, made.classes, made.sequential, made.provenance,
        )  # fmt: skip
        for one, other in zip(read, made, strict=True):
            assert all(
                torch.equal(getattr(one, f), getattr(other, f)) for f in ("mean", "readers", "writers", "removed")
            )
        read.check(word_model())
        assert len(made.to_dataframe()) == (2 if at == "resid_post" else 8)
        assert set(made.to_dataframe()["rank"]) == {1}
        assert "Erasure by leace of 2 classes at 2 points" in repr(made)
    steering.fit(word_model(), POSITIVE, NEGATIVE, progress=False).save(tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match=r"does not hold an erasure; expected a file that Erasure.save wrote"):
        Erasure.load(tmp_path / "v.safetensors")


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"labels": LABELS[:3]}, "labels has 3 entries for 8 prompts"),
        ({"labels": ["to"] * 8}, "all tokens that count are of the class 'to'; expected two classes or more"),
        ({"labels": [0.5] * 8}, "labels of prompt 0 are 0.5, expected whole numbers or texts"),
        ({"labels": [[0, 1]] * 8}, r"labels of prompt 0 are 2, and it has \d+ tokens"),
        ({"labels": "to"}, "labels is 'to', expected a class for each prompt"),
        ({"method": "inlp"}, "method is 'inlp', expected 'leace' or 'mean_difference'"),
        ({"sequential": 1}, "sequential is 1, expected True or False"),
    ],
)
def test_what_is_refused(keywords, text):
    with unchecked(), pytest.raises(SteeringError, match=text):
        fit(**keywords)
