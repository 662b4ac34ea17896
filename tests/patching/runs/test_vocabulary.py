import pytest
import torch

from hooklens import HookedCausalLM, patching
from hooklens.patching import KL, FractionRecovered, LogitDiff, LogProb
from tests.checkpoints import D_VOCAB, build_variant
from tests.model.networks import CONFIGS, make_model, random_tokens
from tests.patching.variants import variants


def count_tokens(run):
    """How many columns each product with the unembedding had, from the rows of its weight."""
    seen = []
    linear = torch.nn.functional.linear

    def record(x, weight, bias=None):
        seen.append(weight.shape[0])
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", record)
        run()
    return seen


@pytest.mark.parametrize("network", CONFIGS)
@pytest.mark.parametrize("metric", [LogitDiff(3, [5, 9]), FractionRecovered(LogitDiff([[3, 4]], 5, over="logsumexp"))])
def test_answers_alone_give_what_all_logits_give(network, metric, monkeypatch):
    model = make_model(network)
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    found = patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
    monkeypatch.setattr("hooklens.patching.runs.vocabulary._FEW", -1.0)
    whole = patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
    # 1e-10: float64 sums in another order.
    torch.testing.assert_close(found.per_pair, whole.per_pair, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.clean_per_pair, whole.clean_per_pair, rtol=0, atol=1e-10)


# Unembeddings that are the embeddings, and that are not.
TIED_OR_NOT = variants(("neox-parallel", "neox-tied", "llama-gqa", "llama-tied", "falcon-7b"))


@pytest.mark.parametrize("variant", [one for one in TIED_OR_NOT if "dynamic" not in one.values[0]])
def test_checkpoints(variant):
    model = HookedCausalLM.from_hf(build_variant(variant, dtype=torch.float64))
    clean, corrupted = random_tokens(1, 5, d_vocab=D_VOCAB), random_tokens(1, 5, seed=9, d_vocab=D_VOCAB)
    found = patching.sweep(model, clean, corrupted, "mlp_out", LogitDiff(3, 5), progress=False)
    logits = model(corrupted)[:, -1]
    torch.testing.assert_close(found.corrupted_per_pair, logits[:, 3] - logits[:, 5], rtol=0, atol=1e-10)


def test_only_the_answers_are_unembedded():
    """Each patched row was unembedded to the whole vocabulary, of which a logit difference reads two tokens."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)

    def seen(metric, site="resid_pre"):
        return count_tokens(lambda: patching.sweep(model, clean, corrupted, site, metric, progress=False))

    d_vocab = model.cfg.d_vocab
    assert d_vocab not in seen(LogitDiff(3, 5))
    assert 4 in seen(LogitDiff([3, 4], [5, 6]))
    # Whose softmax, or whose edits past the last block, need all of them.
    for metric, site in ((LogProb(3), "z"), (KL(), "z"), (LogitDiff(3, 5), "unembed.hook_in")):
        assert d_vocab in seen(metric, site)
    # A metric that reads most of the vocabulary saves nothing.
    assert d_vocab in seen(LogitDiff([list(range(12))], 20))
    with model.hooks([("unembed.hook_out", lambda tensor, hook: tensor + 1)]):
        assert d_vocab in seen(LogitDiff(3, 5))
