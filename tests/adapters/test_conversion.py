import json
import re
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hooklens.adapters import open_checkpoint, read_hf_model, to_hub
from hooklens.adapters.conversion import HubModel, MemoryTensors, config_of_layers
from hooklens.errors import CheckpointError, InputError
from hooklens.weights.shapes import weight_shapes
from tests.checkpoints import VARIANTS, build_variant, load_apart, save_variant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_load_then_save_gives_every_tensor_back(name, dtype, tmp_path) -> None:
    weights = load_apart(save_variant(name, tmp_path, dtype=dtype) / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    state = dict(checkpoint.tensors())
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == weight_shapes(checkpoint.cfg)
    config, saved = to_hub(checkpoint.cfg, state)
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert saved.keys() == weights.keys()
    for key, tensor in weights.items():
        assert saved[key].dtype == dtype
        assert saved[key].is_contiguous()
        assert torch.equal(saved[key], tensor), key


@pytest.mark.parametrize("name", VARIANTS)
def test_memory_and_disk_give_the_same(name, tmp_path) -> None:
    checkpoint = open_checkpoint(save_variant(name, tmp_path))
    cfg, state = read_hf_model(build_variant(name))
    assert cfg == checkpoint.cfg
    stored = dict(checkpoint.tensors())
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], state[key]) for key in state)


def test_parameters_lie_as_linear_weights_do() -> None:
    """Where those of all heads lie in one tensor, head by head."""
    for name in ("neox-parallel", "llama-gqa", "falcon-40b", "falcon-7b"):
        _, state = read_hf_model(build_variant(name))
        for key, tensor in state.items():
            part = key.rsplit(".", 1)[-1]
            stored = tensor
            if part in ("W_Q", "W_K", "W_V"):
                assert all(head.T.is_contiguous() for head in tensor), (name, key)
                continue
            elif part == "W_O":
                stored = tensor.permute(2, 0, 1)
            elif part in ("b_Q", "b_K", "b_V"):
                stored = tensor[0]
            elif part in ("W_in", "W_gate", "W_out", "W_U"):
                stored = tensor.T
            assert stored.is_contiguous(), (name, key)


def test_all_that_is_wrong_with_the_tensors_is_told_at_once(tmp_path) -> None:
    weights = load_apart(save_variant("llama-gqa", tmp_path) / "model.safetensors")
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 16)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    text = str(caught.value)
    assert str(tmp_path) in text
    assert "missing tensors: 'model.layers.1.mlp.up_proj.weight', 'model.norm.weight'" in text
    assert "unexpected tensors: 'model.layers.7.mlp.up_proj.weight'" in text
    assert "'model.layers.0.self_attn.q_proj.weight' is [32, 16], expected [32, 32]" in text
    assert "download is whole" in text


class TestTiedUnembedding:
    """transformers 5.23 ties, unties and swaps as these tests say; each compares with it."""

    @staticmethod
    def check_against_transformers(folder) -> bool:
        from transformers import AutoModelForCausalLM

        hf_model = AutoModelForCausalLM.from_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        state = dict(checkpoint.tensors())
        assert torch.equal(state["embed.W_E"], hf_model.get_input_embeddings().weight)
        assert torch.equal(state["unembed.W_U"], hf_model.get_output_embeddings().weight.T)
        tied = hf_model.get_input_embeddings().weight is hf_model.get_output_embeddings().weight
        assert checkpoint.cfg.tied_unembed == tied
        assert (state["unembed.W_U"].data_ptr() == state["embed.W_E"].data_ptr()) == tied
        return tied

    def test_absent(self, tmp_path) -> None:
        assert self.check_against_transformers(save_variant("llama-tied", tmp_path))

    def test_stored_and_equal(self, tmp_path) -> None:
        weights = load_apart(save_variant("llama-tied", tmp_path) / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, tmp_path / "model.safetensors")
        assert self.check_against_transformers(tmp_path)

    def test_stored_and_different(self, tmp_path) -> None:
        weights = load_apart(save_variant("falcon-7b", tmp_path) / "model.safetensors")
        weights["lm_head.weight"] = torch.randn(97, 32)
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.warns(UserWarning, match="tie_word_embeddings is true, but 'lm_head.weight' and .* differ"):
            assert not self.check_against_transformers(tmp_path)
        with pytest.warns(UserWarning, match="differ"):
            checkpoint = open_checkpoint(tmp_path)
        config, saved = to_hub(checkpoint.cfg, dict(checkpoint.tensors()))
        assert config["tie_word_embeddings"] is False
        assert torch.equal(saved["lm_head.weight"], weights["lm_head.weight"])

    def test_only_the_unembedding_is_stored(self, tmp_path) -> None:
        weights = load_apart(save_variant("neox-tied", tmp_path) / "model.safetensors")
        weights["embed_out.weight"] = weights.pop("gpt_neox.embed_in.weight")
        save_file(weights, tmp_path / "model.safetensors")
        assert self.check_against_transformers(tmp_path)

    def test_a_state_that_is_not_tied_is_not_saved_as_tied(self) -> None:
        cfg, state = read_hf_model(build_variant("llama-tied"))
        to_hub(cfg, {name: tensor for name, tensor in state.items() if name != "unembed.W_U"})
        with pytest.raises(CheckpointError, match=r"unembed.W_U differs from embed.W_E .* tied_unembed=False"):
            to_hub(cfg, {**state, "unembed.W_U": state["unembed.W_U"] + 1})


@pytest.mark.parametrize("name", ["llama-tied", "falcon-7b", "neox-tied"])
def test_files_of_the_base_model_lack_the_prefix(name, tmp_path) -> None:
    """transformers loads them into the causal model, and so do we."""
    build_variant(name).base_model.save_pretrained(tmp_path)
    expected = dict(read_hf_model(build_variant(name))[1])
    found = dict(open_checkpoint(tmp_path).tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["neox-parallel", "llama-gqa", "falcon-40b"])
def test_a_subset_of_layers_is_renumbered(name, tmp_path) -> None:
    checkpoint = open_checkpoint(save_variant(name, tmp_path))
    everything, last = dict(checkpoint.tensors()), checkpoint.cfg.n_layers - 1
    subset = dict(checkpoint.tensors([last, 0]))
    assert {key: tuple(tensor.shape) for key, tensor in subset.items()} == weight_shapes(
        checkpoint.config_for([last, 0])
    )
    for key, tensor in subset.items():
        original = key.replace("blocks.0.", "blocks.X.").replace("blocks.1.", "blocks.0.")
        assert torch.equal(tensor, everything[original.replace("blocks.X.", f"blocks.{last}.")])
    assert len(dict(checkpoint.tensors(range(0)))) == len([key for key in everything if "blocks" not in key])


def test_layers_that_are_not_there_are_named() -> None:
    cfg, _ = read_hf_model(build_variant("llama-gqa"))
    with pytest.raises(InputError, match=r"layers=\[0, 3, -1\]: \[3, -1\] are not layers .* from 0 to 2"):
        config_of_layers(cfg, [0, 3, -1])
    with pytest.raises(InputError, match=r"\[1\] are given more than once"):
        config_of_layers(cfg, [1, 1])
    assert config_of_layers(cfg.replace(windows=(None, 4, 8)), [2, 0]).windows == (8, None)


def test_a_state_that_is_not_that_of_the_config_is_refused() -> None:
    cfg, state = read_hf_model(build_variant("llama-gqa"))
    wrong = {**state, "extra": torch.zeros(1), "ln_final.w": torch.zeros(3)}
    del wrong["embed.W_E"]
    with pytest.raises(
        CheckpointError, match=r"missing: 'embed.W_E'. unexpected: 'extra'. of the wrong shape: 'ln_final.w' is \[3\]"
    ):
        to_hub(cfg, wrong)


def test_partial_biases_stay_partial() -> None:
    """A conversion with biases on query, key and value only is saved with those only."""
    hf_model = build_variant("llama-biases")
    cfg, state = read_hf_model(hf_model)
    cfg = cfg.replace(out_bias=False)
    state = {key: tensor for key, tensor in state.items() if not key.endswith("b_O")}
    config, saved = to_hub(cfg, state)
    assert config["attention_bias"] is True
    assert saved.keys() == {key for key in hf_model.state_dict() if not key.endswith("o_proj.bias")}


@pytest.mark.parametrize(
    ("name", "copied"),
    [
        ("llama-gqa", set()),
        ("neox-parallel", {"attention.query_key_value.weight", "attention.query_key_value.bias"}),
        ("gpt2", {"attn.c_attn.weight", "attn.c_attn.bias"}),
    ],
)
def test_what_cannot_stay_as_it_lies_is_read_apart(name, copied) -> None:
    """Maps that are copied left the pages of their file in memory beside the copies: half as much again."""
    if name == "gpt2":
        sizes = GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
        hf_model: PreTrainedModel = GPT2LMHeadModel(sizes)
    else:
        hf_model = build_variant(name)
    source = _Recording(hf_model.state_dict())
    model = HubModel(json.loads(hf_model.config.to_json_string()), source, where="here")
    dict(model.tensors())
    assert {re.sub(r".*\.\d+\.", "", tensor) for tensor, apart in source.apart.items() if apart} == copied
    assert {tensor for tensor, apart in source.apart.items() if not apart}


class _Recording(MemoryTensors):
    """Remembers which tensors were read apart."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self.apart: dict[str, bool] = {}

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        self.apart[name] = apart
        return super().read(name, apart=apart)
