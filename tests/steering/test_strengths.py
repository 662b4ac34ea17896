"""Tables of strengths against one edited forward for each prompt and cell."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import HookedCausalLM, patching, steering
from hooklens.errors import CheckpointError, TransformError
from hooklens.steering import SteeringError, SteeringTable
from tests.annotations import unchecked
from tests.steering.sentences import NEGATIVE, POSITIVE, name_ids, naming_prompts, word_model

NEUTRAL = ["the red cat saw the dog", "John met Mary", "Paul left"]
STRENGTHS = [1.0, -3.0]


def fit(**keywords):
    return steering.fit(word_model(), POSITIVE, NEGATIVE, **{"progress": False, **keywords})


def sweep(vectors, prompts, strengths, metric, **keywords):
    return steering.sweep_strength(
        word_model(), vectors, prompts, strengths, metric, **{"neutral": NEUTRAL, "progress": False, **keywords}
    )


def run(text, acting=()):
    return word_model().run_with_hooks(text, edits=acting).detach()


METRICS = {
    "difference": patching.LogitDiff("Mary", "John"),
    "probability": patching.Probability([["Mary", "John"]], over="logsumexp"),
    "one for each": patching.LogProb([["Mary"], ["John"], ["red"], ["book"]]),
    "all positions": patching.LogProb("Mary", pos=None),
}


def by_hand(kind, logits, place):
    model = word_model()
    logprobs = logits[0].log_softmax(-1)
    mary, john = (model.to_single_token(one) for one in ("Mary", "John"))
    if kind == "difference":
        return float(logits[0, -1, mary] - logits[0, -1, john])
    if kind == "probability":
        return float(logprobs[-1, [mary, john]].exp().sum())
    if kind == "one for each":
        return float(logprobs[-1, model.to_single_token(["Mary", "John", "red", "book"][place])])
    return float(logprobs[:, mary].mean())


@settings(max_examples=3)
@given(
    kind=st.sampled_from(list(METRICS)), how=st.sampled_from(["add", "clamp"]), pos=st.sampled_from([None, -1, 0]),
    batch_size=st.sampled_from([1, 5, "auto"]),
    at=st.sampled_from(["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "z1", "hook_embed"]),
)  # fmt: skip
def test_every_cell_is_the_edited_run(kind, how, pos, batch_size, at):
    vectors = fit(at=at)
    found = sweep(vectors, POSITIVE, STRENGTHS, METRICS[kind], how=how, pos=pos, batch_size=batch_size)
    plain = [by_hand(kind, run(text), place) for place, text in enumerate(POSITIVE)]
    assert found.plain_effect == pytest.approx(sum(plain) / 4, rel=1e-9)
    for i, vector in enumerate(vectors):
        for j, strength in enumerate(STRENGTHS):
            acting = vector.edits(strength=strength, how=how, pos=pos)
            values = np.array([by_hand(kind, run(text, acting), place) for place, text in enumerate(POSITIVE)])
            assert float(found.effect[i, j]) == pytest.approx(float(values.mean()), rel=1e-9, abs=1e-12)
            assert float(found.standard_error[i, j]) == pytest.approx(
                float(values.std(ddof=1)) / 2, rel=1e-7, abs=1e-10
            )
            kl, loss, n, n_next = 0.0, 0.0, 0, 0
            for text in NEUTRAL:
                ids = word_model().to_tokens(text)[0]
                p, q = run(text)[0].log_softmax(-1), run(text, acting)[0].log_softmax(-1)
                kl += float((p.exp() * (p - q)).sum())
                loss -= float(q[:-1].gather(1, ids[1:, None]).sum())
                n, n_next = n + len(ids), n_next + len(ids) - 1
            assert float(found.kl[i, j]) == pytest.approx(kl / n, rel=1e-8, abs=1e-12)
            assert float(found.perplexity[i, j]) == pytest.approx(math.exp(loss / n_next), rel=1e-9)
    assert found.n_neutral_tokens == n


def test_nothing_at_strength_zero():
    found = sweep(fit(), POSITIVE, [0.0], patching.LogitDiff("Mary", "John"))
    torch.testing.assert_close(found.effect, torch.full_like(found.effect, found.plain_effect))
    assert float(found.kl.abs().max()) < 1e-12
    torch.testing.assert_close(found.perplexity, torch.full_like(found.kl, found.plain_perplexity))


def test_functions_see_all_prompts_in_their_order():
    prompts = ["Mary gave a book to", "John sent the ring to", "Tom gave a book to"]
    seen = []

    def metric(logits):
        seen.append(len(logits))
        return logits[:, -1, 7] * torch.arange(1, len(logits) + 1)

    found = sweep(fit(at="blocks.1.hook_resid_post"), prompts, [1.0], metric, batch_size=1)
    [edit] = fit(at="blocks.1.hook_resid_post").edits()
    values = [float(run(text, [edit])[0, -1, 7]) * place for place, text in enumerate(prompts, start=1)]
    assert float(found.effect[0, 0]) == pytest.approx(sum(values) / 3)
    assert set(seen) == {3}
    with pytest.raises(SteeringError, match=r"effect_metric is a function, and prompts have 3 to 6 tokens"):
        sweep(fit(), ["Tom met", *prompts], [1.0], metric)


def test_blocks_below_a_vector_run_once():
    model, vectors = word_model(), fit(at="blocks.1.hook_resid_post")
    counts = {0: 0, 1: 0}

    def count(layer):
        return (
            f"blocks.{layer}.hook_attn_out",
            lambda tensor, hook: counts.update({layer: counts[layer] + len(tensor)}),
        )

    with model.hooks(fwd_hooks=[count(0), count(1)]):
        sweep(vectors, POSITIVE, STRENGTHS, patching.LogitDiff("Mary", "John"))
    rows = len(POSITIVE) + len(NEUTRAL)
    assert counts == {0: rows, 1: rows * (1 + len(STRENGTHS))}


def test_the_best_within_a_damage():
    found = sweep(fit(), POSITIVE, STRENGTHS, patching.LogitDiff("Mary", "John"))
    frame = found.to_dataframe()
    limit = float(frame["kl"].median())
    within = frame[frame["kl"] <= limit]
    for want, row in (
        ("most", within.loc[within["effect"].idxmax()]),
        ("least", within.loc[within["effect"].idxmin()]),
    ):
        best = found.best(max_kl=limit, want=want)
        assert (best.name, best.strength, best.effect) == (row["name"], row["strength"], pytest.approx(row["effect"]))
    damaging = sweep(fit(), POSITIVE, [3.0], patching.LogitDiff("Mary", "John"))
    with pytest.raises(SteeringError, match=r"no vector at any strength has KL <= 0: the least is"):
        damaging.best(max_kl=0)


def test_files_and_charts(tmp_path):
    found = sweep(fit(), POSITIVE, STRENGTHS, patching.LogitDiff("Mary", "John"))
    found.save(tmp_path / "t.safetensors")
    read = SteeringTable.load(tmp_path / "t.safetensors")
    assert repr(read) == repr(found)
    assert read.to_dataframe().equals(found.to_dataframe())
    assert read.provenance == found.provenance
    assert len(found.plot(backend="plotly").data) == 6
    found.plot(backend="matplotlib")
    # A title, three facts, the names of columns, and a line for each cell.
    assert len(repr(found).splitlines()) == 5 + found.effect.numel()
    fit().save(tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match=r"does not hold a table of strengths"):
        SteeringTable.load(tmp_path / "v.safetensors")


def test_steering_a_trained_model_costs_what_the_table_says():
    """More of the vector names more people; the damage on other text grows with it."""
    model = HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox")
    vectors = steering.fit(
        model, *naming_prompts(64, held_out=False, seed=0), at="blocks.2.hook_resid_post", progress=False
    )
    _, negative = naming_prompts(32, held_out=True, seed=1)
    found = steering.sweep_strength(
        model,
        vectors,
        negative,
        [0.25, 0.5, 1.0, 2.0],
        patching.Probability([name_ids(model)], over="logsumexp"),
        neutral=["The capital of France is Paris .", "The city of Rome lies in Italy ."],
        progress=False,
    )
    assert found.plain_effect < 0.01
    assert found.effect[0].tolist() == sorted(found.effect[0].tolist())
    assert float(found.effect[0, -1]) > 0.5
    assert found.kl[0].tolist() == sorted(found.kl[0].tolist())
    assert found.best(max_kl=float(found.kl[0, 1])).strength == 0.5


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"strengths": []}, r"strengths is \[\], expected a list of at least one number"),
        ({"strengths": [1.0, "2"]}, r"strengths: entry 1 is '2', expected a finite number"),
        ({"pos": 6}, r"pos: 6 out of range; there are 6 tokens in prompts 0"),
        ({"pos": [-1, -4], "neutral": [[5, 6, 7]]}, r"pos: \[-4\] out of range; there are 3 tokens in neutral 0"),
        ({"neutral": [[5], "Tom"]}, r"neutral: texts \[0\] have one token"),
        ({"how": "ablate"}, r"how is 'ablate', expected 'add' or 'clamp'"),
        ({"vectors": 3}, r"vectors is 3, expected steering vectors"),
        ({"prompts": []}, r"prompts is \[\], expected a list of at least one prompt"),
    ],
)
def test_what_is_refused(keywords, text):
    call = {"vectors": fit(), "prompts": POSITIVE, "strengths": [1.0], **keywords}
    given = [call.pop(name) for name in ("vectors", "prompts", "strengths")]
    with unchecked(), pytest.raises(SteeringError, match=text):
        sweep(*given, patching.LogitDiff("Mary", "John"), **call)


def test_weights_processed_otherwise():
    processed = word_model().process_weights(fold_ln=True)
    with pytest.raises(TransformError, match=r"processed differently"):
        steering.sweep_strength(
            processed, fit(), POSITIVE, [1.0], patching.LogitDiff("Mary", "John"), neutral=NEUTRAL, progress=False
        )
