"""The logit lens against the model's own last layers."""

import math
import weakref

import pytest
import torch
from torch.testing import assert_close

from hooklens.activation_cache import MissingActivationError
from hooklens.analysis.lens import logit_lens, read_streams
from hooklens.errors import InputError
from hooklens.model.stream_reader import StreamReader
from tests.model.networks import CONFIGS, make_config, make_model, random_tokens


@pytest.mark.parametrize("network", CONFIGS)
def test_each_stream_is_read_as_the_model_reads_its_last_one(network):
    """The reference ends the network there: the model without its upper blocks."""
    model = make_model(network)
    tokens = random_tokens(2, 4)
    logits, cache = model.run_with_cache(tokens)
    readings = dict(read_streams(model, cache))
    assert list(readings) == ["0_pre", "1_pre", "final_post"]
    assert_close(readings["final_post"], logits.log_softmax(-1))
    short_cfg = model.cfg.replace(n_layers=1, windows=None if model.cfg.windows is None else model.cfg.windows[:1])
    weights = {name: w for name, w in model.named_weights().items() if not name.startswith("blocks.1.")}
    short = type(model).from_state_dict(weights, short_cfg)
    assert_close(readings["1_pre"], short(tokens).log_softmax(-1))


def test_the_table_holds_kl_entropy_and_ranks():
    model = make_model("learned, tied")
    _, cache = model.run_with_cache(random_tokens(2, 4))
    table = logit_lens(model, cache, sublayers=True, pos_slice=[0, -1], k=3, target=5)
    assert table["stream"].unique().tolist() == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    assert len(table) == 5 * 2 * 2
    assert set(table["pos"]) == {0, 3}
    readings = {stream: logprobs.detach() for stream, logprobs in read_streams(model, cache, sublayers=True)}
    final = readings["final_post"]
    line = table[(table.stream == "1_mid") & (table.row == 1) & (table.pos == 3)].iloc[0]
    p, q = final[1, 3].exp(), readings["1_mid"][1, 3].exp()
    assert line.kl == pytest.approx(float((p * (p / q).log()).sum()))
    assert line.entropy == pytest.approx(float(-(q * q.log()).sum()))
    order = q.argsort(descending=True).tolist()
    assert line.top_tokens == tuple(order[:3])
    assert line.top_probs == pytest.approx(tuple(q[order[:3]].tolist()))
    assert line.target_rank == order.index(5)
    assert line.target_logprob == pytest.approx(math.log(q[5]))
    assert (table[table.stream == "final_post"].kl.abs() < 1e-12).all()
    assert (table.kl > -1e-12).all()


def test_padding_has_no_lines_and_no_number():
    model = make_model("rotary")
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    _, cache = model.run_with_cache(random_tokens(2, 4), attention_mask=mask)
    for pos_slice, expected in (
        (None, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]),
        (slice(-3, None), [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]),
        ([-1, 0], [(0, 3), (0, 0), (1, 1), (1, 0)]),
    ):
        table = logit_lens(model, cache, pos_slice=pos_slice)
        lines = table[table.stream == "0_pre"]
        assert list(zip(lines.row, lines.pos, strict=True)) == expected


def test_streams_at_positions_of_each_row():
    model = make_model("rotary")
    tokens, mask = random_tokens(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    last = dict(read_streams(model, cache, pos_slice=-1))["final_post"]
    assert_close(last, logits.log_softmax(-1)[[0, 1], [3, 1]][:, None])
    with pytest.raises(InputError, match=r"pos_slice=slice\(-3, None, None\) selects from 2 to 3 tokens of a row"):
        next(read_streams(model, cache, pos_slice=slice(-3, None)))


def test_positions_in_any_order():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4))
    table = logit_lens(model, cache, pos_slice=slice(None, None, -2))
    assert table.pos.tolist() == [3, 1] * 3
    assert table.equals(logit_lens(model, cache, pos_slice=[3, 1]))


def test_one_distribution_at_a_time(monkeypatch):
    """All distributions were held until the table was made: streams x positions x d_vocab numbers."""
    model = make_model(make_config(n_layers=6))
    _, cache = model.run_with_cache(random_tokens(1, 4))
    made, alive = [], []

    unembed = StreamReader.unembed

    def predict(*args):
        logits = unembed(*args)
        made.append(weakref.ref(logits))
        alive.append(sum(reference() is not None for reference in made))
        return logits

    monkeypatch.setattr(StreamReader, "unembed", predict)
    logit_lens(model, cache, pos_slice=None)
    assert len(made) == 8
    # The final one, the one in the loop, and the one that takes its place.
    assert max(alive) <= 3


def test_one_row_without_a_batch_axis():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4))
    assert logit_lens(model, cache.remove_batch_dim()).equals(logit_lens(model, cache))


def test_bad_input():
    model = make_model("rotary")
    _, cache = model.run_with_cache(random_tokens(1, 4), names_filter="resid_post")
    with pytest.raises(InputError, match="k=24; expected 1 to 23, the size of the vocabulary"):
        logit_lens(model, cache, k=24)
    for target in (23, -1):
        with pytest.raises(InputError, match=rf"target={target}; expected a token id from 0 to 22"):
            logit_lens(model, cache, target=target)
    with pytest.raises(MissingActivationError, match=r"accumulated_resid needs .*'blocks.0.hook_resid_pre'"):
        logit_lens(model, cache)
