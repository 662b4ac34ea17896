"""Steering vectors against one forward per prompt and the definitions written out."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import edits, steering
from hooklens.errors import HookNameError, InputError
from hooklens.steering import SteeringError
from tests.annotations import unchecked
from tests.steering.sentences import NEGATIVE, POSITIVE, one_by_one, word_model

# Sums in another order, in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def fit(*given, **keywords):
    return steering.fit(word_model(), *given, **{"progress": False, **keywords})


@settings(max_examples=12)
@given(
    at=st.sampled_from(["resid_post", "resid_pre", "z", "mlp_out", "k1", "hook_embed", "ln_final.hook_normalized"]),
    positions=st.sampled_from([-1, None, [0, -1], slice(1, None), slice(-2, None)]),
    batch_size=st.sampled_from([1, 2, 3, "auto"]),
    n_negative=st.integers(1, 4),
)  # fmt: skip
def test_mean_differences_are_those_of_prompts_run_alone(at, positions, batch_size, n_negative):
    model, negative = word_model(), NEGATIVE[:n_negative]
    vectors = fit(POSITIVE, negative, at=at, positions=positions, batch_size=batch_size)
    assert vectors.names == list(model.select_hook_points(at))
    index = [positions] if isinstance(positions, int) else slice(None) if positions is None else positions
    for vector in vectors:
        means = [
            torch.stack([one[index].mean(0) for one in one_by_one(model, side, vector.name)]).mean(0)
            for side in (POSITIVE, negative)
        ]
        torch.testing.assert_close(vector.direction, means[0] - means[1], **CLOSE)
        unit = vector.direction / vector.direction.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(vector.levels, torch.stack([(m * unit).sum(-1) for m in means[::-1]]), **CLOSE)
        torch.testing.assert_close(vector.levels[1] - vector.levels[0], vector.norm, **CLOSE)
        assert vector.share is None
        assert vector.provenance.counts == (4, n_negative)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize("at", ["resid_post", "z"])
def test_principal_axes_are_those_of_differences_with_both_signs(at, batch_size):
    model = word_model()
    for vector in fit(POSITIVE, NEGATIVE, at=at, method="pca", batch_size=batch_size):
        sides = [
            torch.stack([one[-1] for one in one_by_one(model, side, vector.name)]) for side in (POSITIVE, NEGATIVE)
        ]
        away = (sides[0] - sides[1]).reshape(4, -1, vector.direction.shape[-1]).numpy()
        for group, found in enumerate(vector.direction.reshape(-1, vector.direction.shape[-1])):
            both = np.concatenate([away[:, group], -away[:, group]])
            _, S, Vt = np.linalg.svd(both - both.mean(0))
            mean = away[:, group].mean(0)
            expected = torch.from_numpy(Vt[0] * (Vt[0] @ mean))
            # Singular vectors are as exact as the gap of the values allows.
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
            assert float(found @ torch.from_numpy(mean)) > 0
            assert float(vector.share.reshape(-1)[group]) == pytest.approx(S[0] ** 2 / (S**2).sum())


def test_all_of_an_answer_counts_and_the_question_does_not():
    model, questions = word_model(), ["Mary gave a", "When Tom left ,"]
    good, bad = [" book to John", " John"], [" red cat", " Tom saw the red cat"]
    [vector] = fit(good, bad, questions=questions, positions="answer", at="blocks.1.hook_resid_post")

    def mean(answers):
        texts = [question + answer for question, answer in zip(questions, answers, strict=True)]
        starts = [len(model.to_tokens(question)[0]) for question in questions]
        runs = one_by_one(model, texts, vector.name)
        return torch.stack([run[start:].mean(0) for run, start in zip(runs, starts, strict=True)]).mean(0)

    torch.testing.assert_close(vector.direction, mean(good) - mean(bad), **CLOSE)


def test_masks_say_token_by_token_what_counts():
    model = word_model()
    lengths = [len(model.to_tokens(one)[0]) for one in (*POSITIVE, *NEGATIVE)]
    drawn = torch.Generator().manual_seed(3)
    masks = [torch.rand(length, generator=drawn) < 0.5 for length in lengths]
    for mask in masks:
        mask[0] = True
    [vector] = fit(POSITIVE, NEGATIVE, positions=masks, at="blocks.0.hook_resid_post")
    runs = one_by_one(model, [*POSITIVE, *NEGATIVE], vector.name)
    means = [run[mask].mean(0) for run, mask in zip(runs, masks, strict=True)]
    expected = torch.stack(means[:4]).mean(0) - torch.stack(means[4:]).mean(0)
    torch.testing.assert_close(vector.direction, expected, **CLOSE)
    as_lists = fit(POSITIVE, NEGATIVE, positions=[mask.tolist() for mask in masks], at="blocks.0.hook_resid_post")
    assert torch.equal(as_lists.vectors[0].direction, vector.direction)


def test_positions_that_are_tensors_are_positions():
    """A list of tensors without axes was taken for masks, and refused since there were not as many as prompts."""
    [vector] = fit(POSITIVE, NEGATIVE, positions=[torch.tensor(0), torch.tensor(-1)], at="blocks.0.hook_resid_post")
    [expected] = fit(POSITIVE, NEGATIVE, positions=[0, -1], at="blocks.0.hook_resid_post")
    assert torch.equal(vector.direction, expected.direction)


def test_ids_and_texts_are_the_same_prompts_and_others_are_not():
    model = word_model()
    ids = [model.to_tokens(one)[0].tolist() for one in POSITIVE]
    one, other = fit(POSITIVE, NEGATIVE), fit(ids, NEGATIVE)
    assert all(torch.equal(a.direction, b.direction) for a, b in zip(one, other, strict=True))
    assert one.vectors[0].provenance == other.vectors[0].provenance
    assert fit(POSITIVE, NEGATIVE[::-1]).vectors[0].provenance.prompts != one.vectors[0].provenance.prompts
    assert fit(POSITIVE, NEGATIVE, positions=-2).vectors[0].provenance.prompts != one.vectors[0].provenance.prompts


def test_edits_act_in_the_runs():
    [vector] = fit(POSITIVE, NEGATIVE, at="blocks.1.hook_resid_post", edits=[edits.Zero("blocks.0.hook_attn_out")])
    runs = []
    for side in (POSITIVE, NEGATIVE):
        found = []
        for one in side:
            acting = [edits.Zero("blocks.0.hook_attn_out")]
            cache = word_model().run_with_cache(one, edits=acting, names_filter=vector.name)[1]
            found.append(cache[vector.name][0, -1])
        runs.append(torch.stack(found).mean(0))
    torch.testing.assert_close(vector.direction, runs[0] - runs[1], **CLOSE)


def test_nothing_is_left_behind():
    model = word_model()
    before = {name: one.clone() for name, one in model.named_parameters()}
    state = torch.get_rng_state()
    fit(POSITIVE, NEGATIVE, method="pca")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) and one.grad is None for name, one in model.named_parameters())
    assert all(point.own is None for point in model.hook_points().values())


def test_half_precision_is_summed_in_a_wide_dtype():
    model = copy.deepcopy(word_model()).bfloat16()
    [vector] = steering.fit(model, POSITIVE, NEGATIVE, at="blocks.1.hook_resid_post", progress=False)
    assert vector.direction.dtype == torch.float32
    assert vector.provenance.dtype == "bfloat16"
    # The edit fits the activations as they are.
    model.run_with_hooks("Mary gave a", edits=vector.edits())


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"positive": []}, SteeringError, r"positive is \[\], expected a list of at least one prompt"),
        ({"positive": [3.5]}, SteeringError, r"positive: prompt 0: "),
        ({"negative": [[]]}, SteeringError, r"negative: prompt 0"),
        ({"positions": 5}, SteeringError, r"negative: prompt 0: positions.*5"),
        ({"positions": "end"}, SteeringError, r"positions is 'end', expected positions, 'answer', or a mask"),
        ({"positions": "answer"}, SteeringError, r"give questions=\[...\], one for each answer"),
        ({"questions": ["Mary"]}, SteeringError, r"positive has 4 answers to 1 questions; give one to each"),
        ({"positions": [[True]]}, SteeringError, r"positions has 1 masks; expected one for each.* 8 in all"),
        ({"positions": [[True]] * 8}, SteeringError, r"mask 0 is a tensor \[1\] of torch.bool, expected \["),
        ({"negative": NEGATIVE[:2], "method": "pca"}, SteeringError, r"4 positive and 2 negative prompts"),
        ({"method": "svd"}, SteeringError, r"method is 'svd', expected 'mean_difference' or 'pca'"),
        ({"at": "pattern"}, SteeringError, r"hook_pattern' \(axes \['batch', 'head', 'query', 'key'\]\)"),
        ({"at": None}, SteeringError, r"at is None, expected hook points"),
        ({"at": "hook_nothing"}, HookNameError, "hook_nothing"),
        ({"batch_size": 0}, InputError, "batch_size is 0"),
        ({"progress": 1}, SteeringError, "progress is 1, expected True or False"),
        ({"positive": ["Mary " * 40]}, (SteeringError, InputError), r"32"),
    ],
)  # fmt: skip
def test_what_is_refused(keywords, error, text):
    call = {"positive": POSITIVE, "negative": NEGATIVE, **keywords}
    with unchecked(), pytest.raises(error, match=text):
        fit(call.pop("positive"), call.pop("negative"), **call)
