"""Parts by themselves compute what they compute in their network."""

import pytest
import torch

from hooklens import HookedCausalLM, HookedKeyValueCache
from hooklens.model.parts.alone import load_weights, plan_alone, weights_of
from tests.model.networks import CONFIGS, make_model, random_tokens


@pytest.mark.parametrize("network", CONFIGS)
def test_a_block_by_itself(network: str) -> None:
    model = make_model(network)
    tokens = random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
        for layer, block in enumerate(model.block_list()):
            plan, call = plan_alone(cache["resid_pre", layer], model.cfg, attention_mask=mask)
            out = block(cache["resid_pre", layer], plan, call)
            assert torch.equal(out[mask.bool()], cache["resid_post", layer][mask.bool()])


def test_attention_by_itself_with_a_past() -> None:
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    attn, x = model.block_list()[1].attn, torch.randn(2, 7, model.cfg.d_model)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    entry = HookedKeyValueCache.init_cache(model.cfg, "cpu", batch_size=2).entries[1]
    outs = []
    with torch.no_grad():
        whole = attn(x, x, x, *plan_alone(x, model.cfg, attention_mask=mask))
        for new, known in ((x[:, :4], mask[:, :4]), (x[:, 4:], mask)):
            outs.append(attn(new, new, new, *plan_alone(new, model.cfg, entry, known), entry))
    torch.testing.assert_close(torch.cat(outs, 1), whole)


@pytest.mark.parametrize("network", CONFIGS)
def test_weights_go_from_part_to_part(network: str) -> None:
    source, target = make_model(network), make_model(network, seed=1)
    block, other = source.block_list()[0], target.block_list()[0]
    weights = weights_of(block)
    wanted = {name.removeprefix("blocks.0.") for name in source.cfg.description.weights if name.startswith("blocks.0.")}
    assert set(weights) == wanted
    assert load_weights(other, weights) == ([], [])
    assert all(torch.equal(one, weights[name]) for name, one in weights_of(other).items())
