"""Networks whose logits are no predictions of tokens (`d_vocab_out`): classifiers, run, read and patched."""

import re

import pytest
import torch
import torch.nn.functional as F

from hooklens import HookedCausalLM, analysis, evaluation, patching
from hooklens.config import LearnedPositions
from hooklens.errors import ConfigError, InputError
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, random_tokens

CLEAN, CORRUPTED = random_tokens(3, 6), random_tokens(3, 6, seed=2)
# Sums in another order, in float64.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
REASON = "the logits of this network are of d_vocab_out=2 outputs, not of the d_vocab=23 tokens that it reads"


@pytest.fixture
def model() -> HookedCausalLM:
    """A classifier of brackets: read at position 0, which attends to all."""
    return make_model(make_config(d_vocab_out=2, positions=LearnedPositions(), unembed_bias=True))


def test_shapes(model):
    assert model(CLEAN).shape == (3, 6, 2)
    assert model(CLEAN, logits_at=0).shape == (3, 1, 2)
    assert model.W_U.shape == (12, 2)
    assert model.b_U.shape == (2,)
    assert model.W_E.shape == (23, 12)
    table = model.hook_table().set_index("name")
    assert table.loc["unembed.hook_out", "axes"] == ("batch", "pos", "d_vocab_out")
    assert table.loc["unembed.hook_out", "shape"] == ("batch", "pos", 2)


def test_a_bidirectional_classifier_learns_what_only_all_tokens_tell():
    """Which of two tokens stands more often in a row, read at position 0."""
    model = HookedCausalLM(make_config(d_vocab_out=2, causal=False, positions=LearnedPositions()))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, (256, 7), generator=generator)
    labels = (tokens.sum(1) > 3).long()
    model.initialize(seed=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        with unchecked():
            F.cross_entropy(model(tokens, logits_at=0)[:, 0], labels).backward()
        optimiser.step()
    fresh = torch.randint(2, (256, 7), generator=generator)
    found = model(fresh, logits_at=0)[:, 0].argmax(-1)
    assert float((found == (fresh.sum(1) > 3)).double().mean()) > 0.9


def test_it_may_be_said_where_it_is_no_other():
    assert make_config(d_vocab_out=23) == make_config()
    assert make_config().replace(d_vocab=50).d_vocab_out == 50
    assert make_config(d_vocab_out=2).replace(d_vocab=50).d_vocab_out == 2


def test_a_tied_unembedding_is_refused():
    with pytest.raises(ConfigError, match="has an entry for each of d_vocab=23 tokens, and d_vocab_out is 2"):
        make_config(d_vocab_out=2, tied_unembed=True)


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model(CLEAN, return_type="loss"),
        lambda model: model.run_with_cache(CLEAN, return_type="both"),
        lambda model: model.generate(CLEAN, verbose=False),
        lambda model: next(model.generate_stream(CLEAN)),
        lambda model: evaluation.score_continuations(model, CLEAN[0], [CLEAN[1]]),
        lambda model: evaluation.multiple_choice(model, [{"question": [1], "choices": [[2], [3]]}], progress=False),
        lambda model: patching.sweep(model, CLEAN, CORRUPTED, "z", patching.Loss(), progress=False),
        lambda model: patching.sweep(model, CLEAN, CORRUPTED, "z", patching.LogitDiff(" a", " b"), progress=False),
        lambda model: analysis.lens.logit_lens(model, model.run_with_cache(CLEAN)[1]),
        analysis.copying.copying_scores,
        lambda model: analysis.circuits.top_ov_pairs(model, 0, 0),
        lambda model: analysis.attribution.attribute_to_components(model, model.run_with_cache(CLEAN)[1], " a"),
    ],
)
def test_what_reads_logits_as_tokens_is_refused(model, run):
    with pytest.raises(InputError, match=re.escape(REASON)):
        run(model)


def test_metrics_of_outputs(model):
    """Outputs are named by number, and every cell is that of a run with the patch."""
    metric = patching.LogitDiff(1, 0, pos=0)
    model = HookedCausalLM.from_state_dict(model.state_dict(), model.cfg.replace(d_vocab_out=2))
    found = patching.sweep(model, CLEAN, CORRUPTED, patching.grid("resid_pre", positions=0), metric, progress=False)
    clean, corrupted = model(CLEAN).detach(), model(CORRUPTED).detach()
    _, cache = model.run_with_cache(CLEAN)
    for layer in range(2):

        def put(tensor, hook, layer=layer):
            tensor[:, 0] = cache["resid_pre", layer][:, 0]

        logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", put)]).detach()
        torch.testing.assert_close(found.values[layer, 0], (logits[:, 0, 1] - logits[:, 0, 0]).mean(), **CLOSE)
    assert not torch.equal(clean[:, 0], corrupted[:, 0])
    with pytest.raises(InputError, match=r"token ids \[2\] are outside the vocabulary, 0 to 1"):
        patching.sweep(model, CLEAN, CORRUPTED, "z", patching.LogitDiff(1, 2), progress=False)


def test_attribution_to_an_output(model):
    _, cache = model.run_with_cache(CLEAN)
    whole = cache.logit_attrs(cache.get_full_resid_decomposition(), tokens=1, incorrect_tokens=0).sum(0)
    bias = cache.logit_attr_bias(1, 0)
    logits = cache["unembed.hook_out"]
    torch.testing.assert_close(whole + bias, logits[..., 1] - logits[..., 0], **CLOSE)
    with pytest.raises(Exception, match="expected token ids from 0 to 1"):
        cache.logit_attrs(cache.decompose_resid(), tokens=2)
    table = analysis.attribution.attribute_to_components(model, cache, 1, incorrect_tokens=0)
    assert len(table)
    with pytest.raises(InputError, match="expected outputs from 0 to 1"):
        analysis.attribution.attribute_to_components(model, cache, 2)
