"""Several metrics in one run: each has the values that it has alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import patching
from hooklens.hooks import edits
from hooklens.patching import KL, FractionRecovered, LogitDiff, LogProb, MetricError
from hooklens.patching.metrics.group import MetricGroup
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows
from tests.patching.test_edited_models import WIDTH, make_pairs

MODEL = make_model("grouped")


def largest(logits):
    return logits.amax((1, 2))


METRICS = {
    "difference": LogitDiff(3, 5),
    "earlier": LogitDiff([1, 2, 4], 5, pos=[-2, 0]),
    "earlier probability": LogProb(7, pos=[-2, 0]),
    "everywhere": LogProb(3, pos=None),
    "fraction": FractionRecovered(LogitDiff(3, 5)),
    "shift": KL(),
    "function": largest,
}


@settings(max_examples=8)
@given(
    st.lists(st.sampled_from(list(METRICS)), min_size=1, max_size=4, unique=True),
    st.sampled_from([(WIDTH, WIDTH, WIDTH), (WIDTH, 4, 5)]),
    st.sampled_from(["denoise", "noise"]),
    st.sampled_from(["auto", 2]),
    st.sampled_from([(), (edits.Scale("blocks.0.attn.hook_z", 0.5, head=1),), (edits.Custom("mlp_out", torch.sin),)]),
)
def test_metrics_measured_together_are_those_measured_alone(names, lengths, direction, batch_size, given_edits):
    cleans, corrupteds = make_pairs(lengths)
    (clean, mask), (corrupted, _) = pad_rows(cleans, "right"), pad_rows(corrupteds, "right")
    options = {"attention_mask": mask, "direction": direction, "batch_size": batch_size, "edits": given_edits}
    sites = [patching.grid("resid_mid", positions=[-1, 1]), patching.grid("z", positions=[-2])]

    def run(metric):
        return patching.sweep(MODEL, clean, corrupted, sites, metric, progress=False, **options)

    together = run({name: METRICS[name] for name in names})
    assert list(together) == names
    for name in names:
        alone, one = run(METRICS[name]), together[name]
        # float64 rounding: another batch, or more columns.
        for field in ("per_pair", "clean_per_pair", "corrupted_per_pair"):
            torch.testing.assert_close(getattr(one, field), getattr(alone, field), rtol=1e-11, atol=1e-11)
        assert one.metric == name
        assert one.axes == alone.axes


def test_several_metrics_take_the_forwards_of_one():
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    arguments = (MODEL, torch.stack(cleans), torch.stack(corrupteds), "resid_pre")
    alone = patching.sweep(*arguments, LogitDiff(3, 5), progress=False)
    both = patching.sweep(*arguments, {"a": LogitDiff(3, 5), "b": KL(), "c": LogProb(2)}, progress=False)
    assert all(one.stats == alone.stats for one in both.values())


def test_only_the_tokens_that_some_metric_reads_are_unembedded(monkeypatch):
    model = make_model("grouped")
    cleans, corrupteds = make_pairs((WIDTH,))
    made = []
    final = type(model.unembed).final_logits

    def record(self, stream, tokens=None):
        made.append(None if tokens is None else tokens.tolist())
        return final(self, stream, tokens)

    monkeypatch.setattr(type(model.unembed), "final_logits", record)
    arguments = (model, cleans[0][None], corrupteds[0][None], "resid_pre")
    patching.sweep(*arguments, {"a": LogitDiff(3, 5), "b": LogProb(2, pos=0)}, progress=False)
    assert all(tokens is None for tokens in made)
    made.clear()
    patching.sweep(*arguments, {"a": LogitDiff(9, 5), "b": LogitDiff(4, 5, pos=0)}, progress=False)
    assert made
    assert all(tokens == [4, 5, 9] for tokens in made)


def test_what_is_no_group_of_metrics_is_refused():
    with pytest.raises(MetricError, match="empty mapping"):
        MetricGroup.read({})
    with unchecked():
        with pytest.raises(MetricError, match=r"names \[3\] are no texts"):
            MetricGroup.read({3: KL()})
        with pytest.raises(MetricError, match="'a' is 3, 'b' is 'x'; expected metrics"):
            MetricGroup.read({"a": 3, "b": "x", "c": KL()})


def test_a_metric_that_is_not_a_number_is_named():
    cleans, corrupteds = make_pairs((WIDTH,))

    def broken(logits):
        return torch.full((len(logits),), float("nan"))

    with pytest.raises(MetricError, match="metric broken is NaN for the unpatched runs"):
        patching.sweep(MODEL, cleans[0][None], corrupteds[0][None], "z", {"fine": KL(), "bad": broken}, progress=False)
