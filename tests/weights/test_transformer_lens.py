"""State dicts of TransformerLens's networks, to HookLens names and back."""

import pytest
import torch

from hooklens import HookedCausalLM, HookedConfig
from hooklens.adapters.formats.transformer_lens_config import read_words
from hooklens.weights.transformer_lens import read_state, write_state
from tests.adapters.formats.test_transformer_lens_config import BASE, VARIANTS, make_state

SIZES = {**BASE, "d_mlp": 24}


@pytest.mark.parametrize("name", ["xielu", "mixtral", "gpt oss", "rotary"])
def test_there_and_back(name: str) -> None:
    """The mixture of gpt-oss has biases; its names are told from the network's, which no variant above has."""
    changes = VARIANTS["mixtral"] if name == "gpt oss" else VARIANTS[name]
    state = make_state({**SIZES, **changes})
    words = {**BASE, **changes}
    if name == "gpt oss":
        words["original_architecture"] = "GptOssForCausalLM"
        for key, weight in list(state.items()):
            if ".mlp." in key:
                state[key.replace(".weight", ".bias")] = weight[:, 0].clone()
    cfg = read_words(words, where="config")
    read = read_state(state, cfg)
    assert set(read) == set(cfg.description.weights)
    assert all(tensor.shape == cfg.description.weights[key].shape for key, tensor in read.items())
    if cfg.act_fn == "xielu":
        state |= {f"blocks.{i}.mlp.act_fn.beta": torch.tensor(0.5) for i in range(3)}
        state |= {f"blocks.{i}.mlp.act_fn.eps": torch.tensor(-1e-6) for i in range(3)}
    written = {key.replace("attn._", "attn."): tensor for key, tensor in state.items()}
    again = write_state(read)
    assert again.keys() == written.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in written.items())


def test_a_bias_behind_the_gate_moves_into_the_output() -> None:
    config = {**BASE, **VARIANTS["llama 3.1"]}
    state, cfg = make_state(config), read_words(config, where="config")
    read = read_state(state, cfg)
    assert not any(name.endswith("b_in") for name in read)
    W_out, b_in, b_out = (state[f"blocks.1.mlp.{name}"].double() for name in ("W_out", "b_in", "b_out"))
    wanted = torch.stack([sum(b_in[j] * W_out[j, i] for j in range(24)) + b_out[i] for i in range(16)])  # type: ignore[misc]
    torch.testing.assert_close(read["blocks.1.mlp.b_out"].double(), wanted, rtol=1e-6, atol=1e-6)
    # In a network of HookLens's own, `b_in` stands before the product.
    own: HookedConfig = cfg.replace(mlp_in_bias=True)
    assert torch.equal(read_state(state, own)["blocks.1.mlp.b_in"], state["blocks.1.mlp.b_in"])
    model = HookedCausalLM(own)
    missing = model.load_state_dict({**dict(model.named_weights()), "blocks.1.mlp.b_in": b_in.float()}).missing_keys
    assert missing == []
    assert torch.equal(model.blocks[1].mlp.b_in, b_in.float())
