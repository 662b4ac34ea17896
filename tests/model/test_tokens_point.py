"""Tests of `hook_tokens`: the ids that run, as they enter the model."""

import pytest
import torch

from hooklens import edits
from hooklens.errors import HookNameError, InputError
from tests.model.networks import make_model, random_tokens

TOKENS = random_tokens(2, 5)


def test_it_is_listed_and_selected_by_its_name_alone():
    model = make_model("learned, tied")
    line = model.hook_table().set_index("name").loc["hook_tokens"]
    assert line["axes"] == line["shape"] == ("batch", "pos")
    for everything in (None, "*", "hook_*", lambda name: True, ["*", "pattern"]):
        assert "hook_tokens" not in model.run_with_cache(TOKENS, names_filter=everything)[1]
    for own in ("hook_tokens", "tokens", ["*", "hook_tokens"], lambda name: name == "hook_tokens"):
        assert torch.equal(model.run_with_cache(TOKENS, names_filter=own)[1]["hook_tokens"], TOKENS)


def test_functions_of_activations_may_be_hung_on_everything():
    model = make_model("rotary")
    model.run_with_hooks(TOKENS, fwd_hooks=[("*", lambda tensor, hook: tensor * 0.5)])


def test_watching_changes_nothing_and_ids_stay_ids():
    model, plain = make_model("rotary"), make_model("rotary")(TOKENS)
    logits, cache = model.run_with_cache(TOKENS, names_filter=["hook_tokens", "resid_pre"], dtype=torch.float32)
    assert torch.equal(logits, plain)
    assert cache["hook_tokens"].dtype == torch.int64
    assert cache["resid_pre", 0].dtype == torch.float32
    loss, cache = model.run_with_cache(
        TOKENS, names_filter=["hook_tokens", "hook_embed"], return_type="loss", incl_bwd=True
    )
    assert set(cache) == {"hook_tokens", "hook_embed", "hook_embed_grad"}
    assert torch.equal(loss, model(TOKENS, return_type="loss"))


@pytest.mark.parametrize("in_place", [True, False])
def test_an_edit_reaches_the_embedding_and_leaves_the_callers_ids(in_place):
    model, given = make_model("rotary"), TOKENS.clone()

    def put(tensor, hook):
        changed = tensor if in_place else tensor.clone()
        changed[:, 2] = 7
        return None if in_place else changed

    other = TOKENS.clone()
    other[:, 2] = 7
    assert torch.equal(model.run_with_hooks(given, fwd_hooks=[("hook_tokens", put)]), model(other))
    assert torch.equal(given, TOKENS)
    replaced = edits.Replace("hook_tokens", torch.tensor(7), pos=2)
    assert torch.equal(model.run_with_hooks(given, edits=[replaced]), model(other))


def test_ids_that_are_none_are_refused():
    model = make_model("rotary")
    with pytest.raises(InputError, match=r"put in the ids \[-1, 23\]; this model has d_vocab=23, ids 0 to 22"):
        model.run_with_hooks(
            TOKENS, fwd_hooks=[("hook_tokens", lambda t, hook: t * 0 + torch.tensor([-1, 23, 0, 1, 2]))]
        )


def test_a_call_that_starts_above_it_does_not_reach_it():
    model = make_model("rotary")
    stream = model(TOKENS, stop_at_layer=1)
    with pytest.raises(HookNameError, match="which this call does not reach"):
        model.run_with_cache(stream, start_at_layer=1, names_filter="hook_tokens")
