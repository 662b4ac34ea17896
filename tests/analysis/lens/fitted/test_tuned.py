"""The tuned lens: what it lowers, what it is, and what it leaves alone."""

import copy

import pytest
import torch
from torch.testing import assert_close

import hooklens as hl
from hooklens.analysis.lens import TunedLens, lens_losses, logit_lens, read_streams
from hooklens.errors import CheckpointError, InputError, TransformError
from hooklens.model.stream_reader import StreamReader
from tests.analysis.lens.corpus import make_texts
from tests.model.networks import make_model, random_tokens
from tests.slow_cases import slow_but


@pytest.mark.parametrize("name", slow_but(["tiny-gpt-neox", "tiny-llama", "tiny-falcon"], ["tiny-falcon"]))
def test_it_lowers_the_losses_of_every_layer_on_held_out_text(name):
    """The contract: divergence and cross-entropy, on text that is drawn apart from what the lens was fitted on."""
    model = hl.HookedCausalLM.from_pretrained(f"bundled:{name}")
    lens = TunedLens.fit(model, make_texts(60, seed=1), steps=20, lr=6e-3, batch_size=16, progress=False)
    unseen = make_texts(16, seed=2)
    plain = lens_losses(model, unseen, progress=False)
    tuned = lens_losses(model, unseen, transport=lens, progress=False)
    assert plain.layer.tolist() == tuned.layer.tolist() == [0, 1, 2, 3, 4]
    for column in ("kl", "cross_entropy"):
        # By a tenth at least: what is learned is no accident of the text.
        assert (tuned[column][:4] < 0.9 * plain[column][:4]).all()
    assert tuned.iloc[4].tolist() == plain.iloc[4].tolist()
    own = lens.to_dataframe()
    assert (own.kl < own.kl_logit_lens).all()
    assert (own.cross_entropy < own.cross_entropy_logit_lens).all()


@pytest.fixture(scope="module")
def model():
    return make_model("rotary")


@pytest.fixture(scope="module")
def lens(model):
    return TunedLens.fit(model, random_tokens(8, 6), steps=3, batch_size=3, held_out=0.3, progress=False)


def test_steps_are_those_of_plain_torch(model):
    """Adam on the mean divergence of all tokens, by autograd from whole distributions; the rate falls in a line."""
    data = random_tokens(3, 5)
    found = TunedLens.fit(model, data, steps=4, lr=0.01, batch_size=2, held_out=0.3, progress=False)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0)).tolist()
    rows = data[order[1:]]
    _, cache = model.run_with_cache(rows)
    read = StreamReader(model).read
    with torch.no_grad():
        wanted = read(cache["resid_post", 1])
    for layer in range(2):
        weight = torch.zeros(12, 12, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(12, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias])
        x = cache["resid_pre", layer].detach()
        for rate in (0.01, 0.0075, 0.005, 0.0025):
            optimizer.zero_grad()
            q = read(x + x @ weight.T + bias)
            (wanted.exp() * (wanted - q)).sum(-1).mean().backward()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        # The same sums in another order; Adam divides by gradients that may be small.
        assert_close(found.weight[layer], weight.detach(), rtol=1e-6, atol=1e-8)
        assert_close(found.bias[layer], bias.detach(), rtol=1e-6, atol=1e-8)
    model.zero_grad()


def test_the_lens_is_read_as_its_formula(model, lens):
    tokens = random_tokens(2, 4)
    _, cache = model.run_with_cache(tokens)
    carried = dict(read_streams(model, cache, transport=lens))
    x = cache["resid_pre", 1]
    expected = StreamReader(model).read(x + x @ lens.weight[1].T + lens.bias[1])
    assert_close(carried["1_pre"], expected)
    assert_close(carried["final_post"], dict(read_streams(model, cache))["final_post"])
    table = logit_lens(model, cache, transport=lens, k=2, target=3)
    line = table[(table.stream == "1_pre") & (table.row == 1)].iloc[0]
    assert line.target_logprob == pytest.approx(expected[1, -1, 3].item())
    assert line.top_tokens == tuple(expected[1, -1].topk(2).indices.tolist())


def test_the_same_seed_gives_the_same_lens(model, lens):
    again = TunedLens.fit(model, random_tokens(8, 6), steps=3, batch_size=3, held_out=0.3, progress=False)
    other = TunedLens.fit(model, random_tokens(8, 6), steps=3, batch_size=3, held_out=0.3, seed=1, progress=False)
    assert again == lens
    assert not torch.equal(other.weight, lens.weight)


def test_blocks_of_tokens_change_nothing(model, lens, monkeypatch):
    monkeypatch.setattr("hooklens.analysis.lens.fitted.tuning.MOST_LOGITS", 50)
    again = TunedLens.fit(model, random_tokens(8, 6), steps=3, batch_size=3, held_out=0.3, progress=False)
    assert_close(again.weight, lens.weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails, monkeypatch):
    model = make_model("grouped").train()
    model.blocks[0].mlp.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trains = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    if fails:
        monkeypatch.setattr(torch.optim.Adam, "step", lambda *given, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            TunedLens.fit(model, random_tokens(4, 5), steps=2, progress=False)
    else:
        with torch.no_grad():
            TunedLens.fit(model, random_tokens(4, 5), steps=2, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not model.list_hooks()


def test_fitting_inside_inference_mode(model, lens):
    with torch.inference_mode():
        again = TunedLens.fit(model, random_tokens(8, 6), steps=3, batch_size=3, held_out=0.3, progress=False)
    assert again == lens


def test_padding_is_no_token(model):
    """A row in a batch with longer ones, and by itself."""
    words = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama", layers=[0])
    texts = ["Mary gave", "Mary and John went to the store"]
    both = lens_losses(words, texts, progress=False, batch_size=2)
    alone = lens_losses(words, texts, progress=False, batch_size=1)
    # Float32 sums of rows that are padded or not.
    assert both.kl.tolist() == pytest.approx(alone.kl.tolist(), rel=1e-4)
    logits = [words(text)[0].detach().log_softmax(-1) for text in texts]
    tokens = [words.to_tokens(text)[0] for text in texts]
    losses = torch.cat([-row[:-1].gather(1, own[1:, None]) for row, own in zip(logits, tokens, strict=True)])
    assert both.cross_entropy.iloc[-1] == pytest.approx(float(losses.mean()), rel=1e-4)


def test_save_and_load(model, lens, tmp_path):
    lens.save(tmp_path / "lens")
    again = TunedLens.load(tmp_path / "lens", model=model)
    assert again == lens
    assert again.to_dataframe().equals(lens.to_dataframe())
    assert "2 layers, d_model=12; held-out KL" in repr(again)
    with pytest.raises(CheckpointError, match="cannot read a lens from"):
        TunedLens.load(tmp_path / "none")
    data = bytearray((tmp_path / "lens" / "lens.safetensors").read_bytes())
    data[20] ^= 1
    (tmp_path / "lens" / "lens.safetensors").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"cannot read a lens from .*lens\.safetensors"):
        TunedLens.load(tmp_path / "lens")


def test_another_model_is_refused(model, lens):
    _, cache = model.run_with_cache(random_tokens(1, 4))
    with pytest.raises(InputError, match=r"sublayers=True with a transport"):
        logit_lens(model, cache, transport=lens, sublayers=True)
    with pytest.raises(InputError, match=r"transport is 3, expected a TunedLens, a JacobianLens"):
        logit_lens(model, cache, transport=3)
    other = make_model("rotary", seed=5)
    _, cache = other.run_with_cache(random_tokens(1, 4))
    with pytest.raises(InputError, match=r"fitted on other weights: of \d+ entries compared, \d+ differ.*assume"):
        logit_lens(other, cache, transport=lens)
    assert len(logit_lens(other, cache, transport=lens.assume(other))) == 3
    larger = make_model("alibi")
    with pytest.raises(InputError, match="fitted on a model with another configuration"):
        next(read_streams(larger, larger.run_with_cache(random_tokens(1, 4))[1], transport=lens))


def test_weights_that_were_processed_are_refused(model, lens):
    folded = model.process_weights(fold_ln=True)
    _, cache = folded.run_with_cache(random_tokens(1, 4))
    with pytest.raises(TransformError, match=r"this TunedLens \(first\) and the model \(second\) do not belong"):
        logit_lens(folded, cache, transport=lens)


def test_bad_arguments(model):
    for given, text in {
        "steps": (0, "steps is 0, expected a whole number >= 1"),
        "lr": (0, "lr is 0, expected a number above 0"),
        "held_out": (1, "held_out is 1, expected a number between 0 and 1"),
        "data": ("text", "data is the text 'text'; expected a list of texts"),
    }.items():
        with pytest.raises(InputError, match=text[1]):
            TunedLens.fit(**{"model": model, "data": random_tokens(2, 3), given: text[0]})
    with pytest.raises(InputError, match="data has 1 row; expected at least 2"):
        TunedLens.fit(model, random_tokens(1, 3), progress=False)
    with pytest.raises(InputError, match=r"layer=7: this TunedLens carries the streams that enter layers \[0, 1\]"):
        TunedLens.fit(model, random_tokens(2, 3), steps=1, progress=False).apply(torch.zeros(12), 7)


def test_figures(lens):
    for backend in ("plotly", "matplotlib"):
        assert lens.plot(backend=backend) is not None
