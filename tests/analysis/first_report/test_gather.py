"""The first report: its calls make its tables, its sentences are read from them, and it copes with any network."""

import re

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch.testing import assert_close

import hooklens as hl
from hooklens import analysis
from hooklens.activation_cache import MissingActivationError
from hooklens.analysis.first_report import report
from hooklens.analysis.lens import JacobianLens
from hooklens.config import HookedConfig, NoPositions
from hooklens.errors import InputError, TransformError
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, make_config, make_model, random_tokens
from tests.slow_cases import slow_but
from tests.word_models import make_word_model

PROMPT = "When Mary and John went to the store , John gave a drink to"
NAMES = ["predictions", "lens", "components", "heads", "sources", "kinds"]


def rerun(found, model, transport=None, **given):
    """The tables that the report's own code makes, as somebody who copies it gets them."""
    space = {"model": model, "transport": transport, **given}
    exec("import torch\n" + "\n".join(found.setup), space)
    return {one.name: eval(one.code, space) for one in found.findings}


def check_code(found, model, transport=None):
    """A copied call runs with gradients, where another kernel gives norms' denominators: the last bit may differ."""
    close = {"rtol": 1e-5, "atol": 1e-6} if model.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for name, table in rerun(found, model, transport).items():
        assert_frame_equal(table, found[name], **close)


# What networks have and lack is tried on all configurations below.
@pytest.fixture(scope="module", params=slow_but(["tiny-gpt-neox", "tiny-llama", "tiny-falcon"], ["tiny-gpt-neox"]))
def model(request):
    return hl.HookedCausalLM.from_pretrained(f"bundled:{request.param}")


@pytest.fixture(scope="module")
def found(model):
    return report(model, PROMPT)


def test_each_call_makes_its_table(model, found):
    assert [one.name for one in found.findings] == NAMES
    assert not found.skipped
    check_code(found, model)


def test_sentences_are_read_from_the_tables(model, found):
    """Numbers and names of the sentences, taken from the tables by hand."""
    told = {one.name: " ".join(one.sentences) for one in found.findings}
    logits = model(PROMPT)[0, -1].detach()
    probabilities, best = logits.softmax(-1).topk(2)
    answer, second = map(model.to_single_str_token, best.tolist())
    assert answer == "Mary"
    assert f"'{answer}' with probability {probabilities[0]:.3f}, then '{second}' at" in told["predictions"]
    components = found["components"].set_index("component").value
    assert (
        f"{components.idxmax()} speaks most for it ({components.max():+.2f} of the difference of " in told["components"]
    )
    difference = float(logits[best[0]] - logits[best[1]])
    # Float32 sums of some ten terms.
    assert float(components.sum()) == pytest.approx(difference, abs=1e-3)
    heads = found["heads"].set_index("component").value.drop(["remainder", "bias"])
    assert f"{heads.idxmax()} speaks most for it ({heads.max():+.2f}" in told["heads"]
    assert f"{heads.idxmin()} speaks most against it ({heads.min():+.2f})" in told["heads"]
    assert f"All heads together add {heads.sum():+.2f}" in told["heads"]
    sources = found["sources"]
    sums = sources.groupby("source").value.sum()
    place = sums.abs().idxmax()
    token = model.to_str_tokens(PROMPT)[place]
    assert f"'{token}' at position {place} counts most: {sums[place]:+.2f}" in told["sources"]
    lens = found["lens"]
    assert lens.target_rank.iloc[-1] == 0
    steps = (lens.kl.shift() - lens.kl).iloc[1:]
    below, above = lens.stream[steps.idxmax() - 1], lens.stream[steps.idxmax()]
    assert (
        f"from {below} to {above}: KL {lens.kl[steps.idxmax() - 1]:.2f} to {lens.kl[steps.idxmax()]:.2f}"
        in told["lens"]
    )
    kinds = found["kinds"]
    for kind in ("previous_token", "induction"):
        named = kinds[kinds[kind] >= 0.5].index
        assert len(named)
        for label in named:
            assert f"{label} ({kinds[kind][label]:.2f})" in told["kinds"]
    assert "L0H0" not in told["kinds"]


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_any_network_has_a_report_or_is_told_why_not(network):
    """Networks without a tokenizer, some without attention in layers, norms or biases; in float64, exactly."""
    model = make_model(network)
    tokens = random_tokens(1, 6)
    found = report(model, tokens)
    check_code(found, model)
    assert {one.name for one in found.findings} | {name for name, _ in found.skipped} == set(NAMES)
    assert found.prompt == str(tokens[0].tolist())
    assert "token " in found.asked
    assert not found.skipped
    if "components" in {one.name for one in found.findings}:
        logits = model(tokens)[0, -1]
        cap = model.cfg.logits_softcap
        logits = logits if cap is None else cap * torch.atanh(logits / cap)
        first, second = (int(found["predictions"].token[place]) for place in (0, 1))
        total = torch.tensor(found["components"].value.sum(), dtype=torch.float64)
        assert_close(total, (logits[first] - logits[second]).detach(), rtol=1e-8, atol=1e-8)
    assert len(str(found).splitlines()) <= 60
    assert len(repr(found).splitlines()) <= 20


def test_a_model_without_attention():
    model = make_model(make_config(attn=None, wiring="parallel", shared_norm=True))
    found = report(model, [3, 4, 5])
    assert [one.name for one in found.findings] == ["predictions", "lens", "components"]
    assert dict(found.skipped)["heads"] == "the model has no attention"
    assert "-- left out: kinds: the model has no attention" in str(found)
    with pytest.raises(
        InputError, match=r"no table 'heads' \(the model has no attention\); it has 'predictions', 'lens'"
    ):
        found["heads"]
    check_code(found, model)


def test_a_stream_that_is_no_sum():
    """Attribution has nothing to say of it, and the report says why."""
    model = make_model(make_config(wiring="sequential", norm_stream=True, norm_before=False))
    found = report(model, random_tokens(1, 5))
    assert {"components", "heads"} <= dict(found.skipped).keys()
    assert "it is no sum of what was written" in dict(found.skipped)["components"]
    assert [one.name for one in found.findings][:2] == ["predictions", "lens"]
    check_code(found, model)


def test_tokens_and_a_position_of_ones_own(model):
    found = report(model, PROMPT, answer="John", wrong="Mary", pos=2, k=2)
    assert found.asked.startswith("'John' against 'Mary': a difference of ")
    assert found.asked.endswith("at position 2")
    check_code(found, model)
    logits = model(PROMPT)[0, 2].detach()
    john, mary = map(model.to_single_token, ("John", "Mary"))
    assert float(found["components"].value.sum()) == pytest.approx(float(logits[john] - logits[mary]), abs=1e-3)
    assert found["lens"].pos.unique().tolist() == [2]
    assert found["sources"].source.max() == 2


def test_the_lens_reads_through_a_transport():
    model = make_model("rotary")
    tokens = random_tokens(1, 5)
    lens = JacobianLens.fit(model, random_tokens(2, 5, seed=4), skip_first=1, progress=False)
    found = report(model, tokens, transport=lens)
    check_code(found, model, transport=lens)
    assert not found["lens"].equals(report(model, tokens)["lens"])
    with pytest.raises(TransformError, match="do not belong together"):
        report(model.process_weights(fold_ln=True), tokens, transport=lens)


def test_ids_are_the_text_that_they_are():
    model = make_word_model(d_model=16, n_ctx=32, init_std=0.2)
    text = "Mary and John went to the store"
    ids = model.to_tokens(text)
    by_ids, by_text = report(model, ids), report(model, text)
    for name in NAMES:
        assert by_ids[name].equals(by_text[name])
    assert "Mary and John" in by_ids.prompt
    check_code(by_ids, model)
    assert report(model, ids[0].tolist())["heads"].equals(by_ids["heads"])
    padded = torch.cat([ids, torch.full((1, 3), model.tokenizer.pad_token_id)], 1)
    assert report(model, padded)["components"].equals(by_ids["components"])


def test_the_model_is_as_it_was(model):
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report(model, PROMPT)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.list_hooks()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"prompt": ""}, "prompt is '', expected a text that is not empty"),
        ({"prompt": 3}, "prompt is an int; expected text"),
        ({"prompt": [[1, 2], [3, 4]]}, "prompt has 2 rows; expected a text, or token ids of one row"),
        ({"prompt": ["a", "b"]}, "prompt is ['a', 'b'], expected one text, token ids of one row, or a cache"),
        ({"prompt": [[99]]}, "99"),
        ({"answer": 3, "wrong": 3}, "answer and wrong are both token 3"),
        ({"answer": 99}, "answer=99; expected a token id from 0 to 22"),
        ({"pos": 9}, "9"),
        ({"k": 0}, "k is 0, expected a whole number >= 1"),
        ({"k": 24}, "k=24; expected 1 to 23"),
        ({"transport": 3}, "transport is 3, expected a TunedLens"),
    ],
)
def test_bad_arguments(given, text):
    with unchecked(), pytest.raises(InputError, match=re.escape(text)):
        report(make_model("rotary"), **{"prompt": [[1, 2, 3]], **given})


def test_a_model_of_other_outputs():
    cfg = HookedConfig(
        d_model=8, n_layers=1, n_heads=2, d_head=4, d_mlp=8, d_vocab=9, d_vocab_out=2, n_ctx=8, positions=NoPositions()
    )
    with pytest.raises(InputError, match="a report is on the next token"):
        analysis.report(hl.HookedCausalLM(cfg), [[1, 2]])


class TestOfACache:
    """`report` took a prompt alone, while every other analysis takes the cache of a run, too."""

    def test_it_is_the_prompts(self, model, found):
        _, cache = model.run_with_cache(PROMPT)
        made = report(model, cache)
        assert made.asked == found.asked
        assert not made.skipped
        for name in NAMES:
            assert_frame_equal(made[name], found[name], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("pos", [-1, 4])
    def test_an_edited_run_is_reported_as_it_was(self, model, pos):
        edits = [hl.edits.Zero("blocks.1.attn.hook_z", head=[0])]
        with model.hooks(edits=edits):
            logits, cache = model.run_with_cache(PROMPT)
        made = report(model, cache, pos=pos)
        assert made["predictions"].token.tolist() == logits[0, pos].topk(3).indices.tolist()
        assert_close(
            torch.tensor(made["predictions"].logit.to_numpy(), dtype=torch.float32), logits[0, pos].topk(3).values,
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        for name, table in rerun(made, model, cache=cache).items():
            assert_frame_equal(table, made[name], rtol=1e-5, atol=1e-6)

    def test_padding_and_a_cache_without_a_batch_axis(self, model):
        _, cache = model.run_with_cache([PROMPT, "Mary went"], padding_side="left")
        made, alone = report(model, cache.unpad(1)), report(model, "Mary went")
        assert made.asked == alone.asked
        for name in NAMES:
            assert_frame_equal(made[name], alone[name], rtol=1e-4, atol=1e-5)
        _, cache = model.run_with_cache("Mary went")
        assert report(model, cache.remove_batch_dim()).asked == alone.asked

    def test_what_a_cache_lacks_is_left_out_and_told(self, model):
        _, cache = model.run_with_cache(PROMPT, names_filter=["resid_pre", "resid_post"])
        made = report(model, cache)
        assert [one.name for one in made.findings] == ["predictions", "lens", "kinds"]
        assert dict(made.skipped).keys() == {"components", "heads", "sources"}
        assert "hook_z" in dict(made.skipped)["heads"]

    def test_what_cannot_be_read_is_refused(self, model):
        _, cache = model.run_with_cache(PROMPT, names_filter="z")
        with pytest.raises(MissingActivationError, match="hook_resid_post"):
            report(model, cache)
        _, cache = model.run_with_cache([PROMPT, PROMPT])
        with pytest.raises(InputError, match=r"cache of 2 rows; expected one: cache.unpad"):
            report(model, cache)
        _, cache = model.run_with_cache(PROMPT, pos_slice=[0, -1])
        with pytest.raises(InputError, match="cache of some positions"):
            report(model, cache)
        stream = torch.zeros(1, 3, model.cfg.d_model)
        _, cache = model.run_with_cache(stream, start_at_layer=0)
        with pytest.raises(InputError, match="does not know its tokens"):
            report(model, cache)
        other = model.process_weights(fold_ln=True)
        _, cache = model.run_with_cache(PROMPT)
        with pytest.raises(TransformError):
            report(other, cache)
