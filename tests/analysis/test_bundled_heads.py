"""The heads that the tutorials show are in every bundled checkpoint, and do what they are named for."""

import pytest

from hooklens import HookedCausalLM
from hooklens.analysis.heads import head_scores
from hooklens.analysis.sanity import indirect_object_task, induction_loss
from hooklens.bundled import BUNDLED
from hooklens.hooks.edits import Zero


@pytest.mark.parametrize("name", BUNDLED)
def test_induction_heads_are_found_and_matter(name):
    model = HookedCausalLM.from_pretrained(f"bundled:{name}")
    scores = head_scores(model)
    assert scores.previous_token.max() >= 0.5
    induction_heads = scores[scores.induction >= 0.5]
    assert len(induction_heads) >= 1

    edits = [
        Zero(f"blocks.{layer}.attn.hook_z", head=group["head"].tolist())
        for layer, group in induction_heads.groupby("layer")
    ]
    before = induction_loss(model)
    with model.hooks(edits=edits):
        after = induction_loss(model)
    assert after.second > before.second + 0.1
    assert before.second < before.first - 1


@pytest.mark.parametrize("name", BUNDLED)
def test_indirect_objects(name):
    result = indirect_object_task(HookedCausalLM.from_pretrained(f"bundled:{name}"))
    assert result.accuracy >= 0.95
    assert result.logit_difference > 3
