"""Tests of hooklens.model.decoder against a forward of plain einsums, and of what it refuses."""

import copy
import pickle

import pytest
import torch

from hooklens.config import RotaryPositions
from hooklens.errors import InputError
from hooklens.model import Decoder
from hooklens.model.plan.positions import check_attention_mask, check_positions
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, make_config, make_model, pad_rows, random_tokens
from tests.weights.reference_network import CONFIGS as REFERENCE_CONFIGS
from tests.weights.reference_network import random_state, run_reference
from tests.weights.reference_network import random_tokens as reference_tokens


@pytest.mark.parametrize("name", REFERENCE_CONFIGS)
def test_logits_against_plain_einsums(name):
    cfg = REFERENCE_CONFIGS[name]
    state = random_state(cfg)
    decoder = Decoder(cfg).double()
    decoder.load_state_dict(state)
    tokens = reference_tokens(cfg)
    # 1e-5: rotary tables are float32, everything else is float64.
    torch.testing.assert_close(decoder(tokens), run_reference(state, cfg, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("network", CONFIGS)
def test_padding_changes_nothing(network, side):
    model = make_model(network)
    rows = [random_tokens(1, n, seed=n)[0] for n in (6, 2, 4)]
    ids, mask = pad_rows(rows, side)
    batched = model(ids, attention_mask=mask)
    for row, tokens in enumerate(rows):
        # 1e-10: other shapes, other order of float64 sums.
        torch.testing.assert_close(batched[row][mask[row].bool()], model(tokens)[0], rtol=1e-10, atol=1e-10)
    assert batched.isfinite().all()


def test_initialize_is_reproducible_and_leaves_nothing_uninitialised():
    decoder = Decoder(CONFIGS["capped"])
    for parameter in decoder.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    decoder.initialize(seed=3)
    first = [parameter.clone() for parameter in decoder.parameters()]
    assert all(parameter.isfinite().all() for parameter in first)
    decoder.initialize(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, decoder.parameters(), strict=True))
    assert_stored(decoder)


def assert_stored(model):
    """Every parameter is a contiguous matrix as declared, and the field's weight a view of it."""
    for declared in model.cfg.description.weights.values():
        path, _, word = declared.name.rpartition(".")
        weight = getattr(model.get_submodule(path), word)
        assert weight.shape == declared.shape
        if declared.name == "unembed.W_U" and model.cfg.tied_unembed:
            assert weight.data_ptr() == model.embed.W_E.data_ptr()
            continue
        parameter = model.get_parameter(declared.parameter)
        assert parameter.shape == declared.stored_shape, declared.name
        assert parameter.is_contiguous(), declared.name
        assert weight.data_ptr() == parameter.data_ptr(), declared.name


JOURNEYS = {
    "to": lambda m: m.to(torch.float32).to(torch.float64),
    "half": lambda m: m.half().double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "load_state_dict": lambda m: (m.load_state_dict({k: v.clone().contiguous() for k, v in m.state_dict().items()}), m)[
        1
    ],
    "assign": lambda m: (m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True), m)[1],
    "requires_grad": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("journey", JOURNEYS)
@pytest.mark.parametrize("network", ["grouped", "learned, tied"])
def test_strides_survive(network, journey):
    model = JOURNEYS[journey](make_model(network))
    assert_stored(model)


def test_strides_survive_an_optimiser_and_its_state():
    model, tokens = make_model("grouped"), random_tokens(2, 5)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(tokens, return_type="loss")
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[2] < losses[0]
    assert_stored(model)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(2, 4), r"attention_mask has shape \[2, 4\]; expected \[2, 3\]$"),
        (torch.ones(1, 3), r"attention_mask has shape \[1, 3\]; expected \[2, 3\]"),
        (torch.tensor([[1, 1, 2], [1, 1, 1]]), r"attention_mask holds values other than 0 \(padding\) and 1 \(token\)"),
        (torch.tensor([[0.0, -torch.inf, 0.0]] * 2), r"holds values other than 0"),
        (torch.tensor([[0, 0, 0], [1, 1, 0]]), r"hides every token of rows \[0\]; leave empty rows out of the batch"),
    ],
)
def test_masks_that_do_not_fit(mask, text):
    with pytest.raises(InputError, match=text):
        make_model("rotary")(random_tokens(2, 3), attention_mask=mask)


def test_masks():
    assert check_attention_mask(None, 2, 3, 0) is None
    assert check_attention_mask(torch.ones(2, 3), 2, 3, 0) is None
    mask = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert torch.equal(check_attention_mask(mask, 2, 3, 0), mask.bool())
    with pytest.raises(InputError, match=r"it covers the new tokens only, not the 5 in the cache"):
        check_attention_mask(torch.ones(2, 8), 2, 3, 5)
    assert check_attention_mask(torch.zeros(2, 3), 2, 3, 5) is not None


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        (torch.arange(4), r"positions are \[1, 4\] torch.int64; expected integers \[3\] or \[2, 3\]"),
        (torch.arange(3.0), r"positions is a tensor \[3\] of torch.float32, expected a tensor"),
        (torch.zeros(3, 3).long(), r"positions are \[3, 3\]"),
        (torch.tensor([0, -1, 2]), r"positions hold -1; expected numbers from 0 to 31 \(n_ctx=32\)"),
        (torch.tensor([0, 1, 32]), r"positions hold 32; expected numbers from 0 to 31 \(n_ctx=32\)"),
        (torch.tensor([True, False, True]), r"positions is a tensor \[3\] of torch.bool, expected a tensor"),
        ([0, 1, 2], r"positions is \[0, 1, 2\], expected a tensor"),
    ],
)
def test_positions_that_do_not_fit(positions, text):
    with unchecked(), pytest.raises(InputError, match=text):
        make_model("rotary")(random_tokens(2, 3), positions=positions)


def test_positions():
    assert check_positions(None, 2, 3, 9) is None
    assert check_positions(torch.arange(3), 2, 3, 9).tolist() == [[0, 1, 2]]
    narrow = check_positions(torch.arange(3, dtype=torch.int16)[None].expand(2, -1), 2, 3, 3)
    assert (narrow.dtype, narrow.tolist()) == (torch.int64, [[0, 1, 2], [0, 1, 2]])
    model, tokens = make_model("learned, tied"), random_tokens(2, 3)
    assert torch.equal(model(tokens, positions=torch.arange(3)), model(tokens))
    _, cache = model.run_with_cache(tokens, positions=torch.tensor([5, 0, 9]))
    assert torch.equal(cache["pos_embed"][0], model.W_pos[[5, 0, 9]])


def test_positions_that_nothing_reads_are_refused():
    with pytest.raises(InputError, match=r"nothing in this network reads them \(cfg.positions is none\)"):
        make_model("bare")(random_tokens(2, 3), positions=torch.arange(3))
    model, tokens = make_model(make_config(windows=(2, None))), random_tokens(1, 4)
    assert torch.equal(model(tokens, positions=torch.arange(4)), model(tokens))
    # Far apart, no token of the first layer sees another.
    far = model(tokens, positions=torch.tensor([0, 5, 10, 15]))
    assert not torch.allclose(far[:, 1:], model(tokens)[:, 1:])
    alone = make_model(make_config(windows=(1, None)))
    torch.testing.assert_close(far, alone(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "cfg", [CONFIGS["alibi"], make_config(positions=RotaryPositions(dim=2), windows=(None, 4))], ids=["alibi", "window"]
)
def test_positions_that_need_those_of_cached_keys_are_refused(cfg):
    model = make_model(cfg)
    with pytest.raises(InputError, match=r"with a key-value cache: linear biases, sliding windows and chunks need"):
        model(random_tokens(1, 2), positions=torch.tensor([3, 4]), past_kv_cache=model.prefill(random_tokens(1, 3)))


def test_positions_with_a_cache():
    model, tokens = make_model("rotary"), random_tokens(1, 5)
    kv = model.prefill(tokens[:, :3])
    # 1e-10: attention in two parts, another order of float64 sums.
    found = model(tokens[:, 3:], positions=torch.tensor([3, 4]), past_kv_cache=kv)
    torch.testing.assert_close(found, model(tokens)[:, 3:], rtol=1e-10, atol=1e-10)
    moved = model(tokens, positions=torch.tensor([0, 1, 2, 7, 9]))[:, 3:]
    found = model(tokens[:, 3:], positions=torch.tensor([7, 9]), past_kv_cache=kv)
    torch.testing.assert_close(found, moved, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("start", "stop", "text"),
    [
        (None, 3, r"stop_at_layer=3 is out of range: the model has 2 layers, so 0 to 2 \(negative ones count"),
        (None, -3, r"stop_at_layer=-3 is out of range"),
        (7, None, r"start_at_layer=7 is out of range"),
        (2, 1, r"start_at_layer=2 lies above stop_at_layer=1: no block would run"),
        (-1, 0, r"start_at_layer=-1 lies above stop_at_layer=0"),
    ],
)
def test_layers_that_do_not_fit(start, stop, text):
    model = make_model("rotary")
    given = random_tokens(1, 3) if start is None else torch.zeros(1, 3, 12, dtype=torch.float64)
    with pytest.raises(InputError, match=text):
        model(given, start_at_layer=start, stop_at_layer=stop)


def test_more_positions_than_the_model_has():
    model = make_model("rotary")
    model(random_tokens(1, 32))
    with pytest.raises(InputError, match=r"the input needs 33 positions, the model has n_ctx=32; shorten the input"):
        model(random_tokens(1, 33))
    mask = torch.ones(1, 33)
    mask[0, 0] = 0
    assert model(random_tokens(1, 33), attention_mask=mask).shape == (1, 33, 23)
    cache = model.prefill(random_tokens(1, 30))
    with pytest.raises(InputError, match=r"needs 33 positions \(30 of them in the cache\)"):
        model(random_tokens(1, 3), past_kv_cache=cache)
    with pytest.raises(InputError, match=r"positions hold 40; expected numbers from 0 to 31"):
        model(random_tokens(1, 1), positions=torch.tensor([40]))
