"""Tests of hooklens.model.embed."""

import copy
import io
import pickle

import pytest
import torch
import transformers

from hooklens.analysis.circuit_weights import embedding
from hooklens.config import LearnedPositions
from hooklens.model.embed import Embed
from tests.model.networks import make_config, make_model, random_tokens

FACTOR = 12**0.5
SCALED = {False: FACTOR, True: torch.tensor(FACTOR).bfloat16().item()}


@pytest.mark.parametrize("rounded", SCALED)
def test_embed_scale_is_rounded_to_the_weights_dtype_where_the_config_says_so(rounded):
    """It was rounded in every network, so those trained with the factor as it is were off by 1 in 256 in bfloat16."""
    embed = Embed(make_config(embed_scale=FACTOR, embed_scale_rounded=rounded)).to(torch.bfloat16)
    torch.nn.init.normal_(embed.W_E)
    tokens = torch.arange(embed.W_E.shape[0])[None]
    expected = (embed.W_E.double() * SCALED[rounded]).bfloat16()
    other = (embed.W_E.double() * SCALED[not rounded]).bfloat16()
    assert torch.equal(embed(tokens)[0], expected)
    assert not torch.equal(expected, other)
    for dtype in (torch.float32, torch.float64):
        expected = embed.to(dtype).W_E * torch.tensor(FACTOR, dtype=dtype)
        assert torch.equal(embed(tokens)[0], expected)


@pytest.mark.parametrize("rounded", SCALED)
def test_embed_scale_is_what_transformers_models_multiply_by(rounded):
    sizes = {
        "vocab_size": 40, "hidden_size": 12, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    if rounded:
        theirs = transformers.GemmaModel(transformers.GemmaConfig(**sizes, head_dim=6))
    else:
        theirs = transformers.GraniteModel(transformers.GraniteConfig(**sizes, embedding_multiplier=FACTOR))
    theirs = theirs.bfloat16()
    torch.nn.init.normal_(theirs.embed_tokens.weight)
    ours = Embed(make_config(d_model=12, d_vocab=40, embed_scale=FACTOR, embed_scale_rounded=rounded)).bfloat16()
    with torch.no_grad():
        ours.W_E.copy_(theirs.embed_tokens.weight)
        tokens = torch.arange(40)[None]
        assert torch.equal(ours(tokens), theirs(tokens, output_hidden_states=True).hidden_states[0])


@pytest.mark.parametrize("rounded", SCALED)
def test_the_circuit_of_tokens_is_scaled_as_the_network_scales_them(rounded):
    model = make_model(make_config(embed_scale=FACTOR, embed_scale_rounded=rounded), dtype=torch.bfloat16)
    torch.testing.assert_close(embedding(model), model.W_E.float() * SCALED[rounded], rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_learned_positions_start_after_the_offset_and_skip_padding(side):
    model = make_model("learned, tied")
    mask = torch.tensor([[0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]])
    _, cache = model.run_with_cache(random_tokens(1, 4), attention_mask=mask)
    assert torch.equal(cache["pos_embed"][0][mask[0].bool()], model.pos_embed.W_pos[2:4])
    assert torch.equal(model.W_pos, model.pos_embed.W_pos[2:])


def test_an_in_place_edit_of_positions_leaves_the_table_alone():
    model, tokens = make_model("learned, tied"), random_tokens(2, 4)
    before = model.pos_embed.W_pos.clone()

    def clear(tensor, hook):
        with torch.no_grad():
            tensor[0, 1].zero_()

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[("hook_pos_embed", clear)])
    assert torch.equal(model.pos_embed.W_pos, before)


def deep_copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def loaded(model):
    twin = make_model("learned, tied", seed=5)
    twin.load_state_dict(model.state_dict())
    return twin


def stepped(model):
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(random_tokens(2, 4), return_type="loss").backward()
    optimiser.step()
    optimiser.zero_grad()
    return model


@pytest.mark.parametrize("journey", [deep_copied, pickled, saved, loaded, stepped, lambda m: m.to(torch.float32)])
def test_a_tied_unembedding_stays_one_parameter(journey):
    model = journey(make_model("learned, tied"))
    assert "unembed.W_U" not in model.state_dict()
    assert model.unembed.W_U.data_ptr() == model.embed.W_E.data_ptr()
    with torch.no_grad():
        before = model(random_tokens(1, 3))
        model.embed.W_E.mul_(2)
        assert not torch.equal(model(random_tokens(1, 3), stop_at_layer=0), before)
        assert torch.equal(model.W_U, model.embed.W_E.T)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("d_embed", [None, 8])
def test_the_gradient_of_a_tied_unembedding_is_the_sum(bias, d_embed):
    """A tied unembedding had no bias: checkpoints that keep it where the weight is tied were refused."""
    tied = make_model(make_config(positions=LearnedPositions(), tied_unembed=True, unembed_bias=bias, d_embed=d_embed))
    state = {
        **{name: p.detach() for name, p in tied.named_parameters()},
        "unembed.W_U": tied.unembed.W_U.detach().clone(),
    }
    loose = type(tied).from_state_dict(state, tied.cfg.replace(tied_unembed=False))
    for model in (tied, loose):
        model(random_tokens(2, 5), return_type="loss").backward()
        assert ("unembed.b_U" in model.cfg.description.weights) == bias
    if bias:
        assert bool(tied.b_U.all())
        torch.testing.assert_close(tied.unembed.b_U.grad, loose.unembed.proj.bias.grad, rtol=1e-12, atol=1e-12)
    total = loose.embed.W_E.grad + loose.unembed.W_U.grad.T
    torch.testing.assert_close(tied.embed.W_E.grad, total, rtol=1e-12, atol=1e-12)
