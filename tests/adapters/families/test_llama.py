import json

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hooklens.adapters import open_checkpoint, read_hf_model
from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.projections import project_heads, write_heads
from tests.checkpoints import LLAMA_VARIANTS, build_variant, edit_config, load_apart, save_variant

ROPE = {"rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("name", LLAMA_VARIANTS)
def test_each_head_projects_as_in_transformers(name: str) -> None:
    """Head h of q_proj is rows h * d_head to (h + 1) * d_head; our heads must give the same projections."""
    hf_model = build_variant(name, dtype=torch.float64)
    cfg, state = read_hf_model(hf_model)
    attention, mlp = hf_model.model.layers[1].self_attn, hf_model.model.layers[1].mlp
    x = torch.randn(2, 5, cfg.d_model, dtype=torch.float64)

    for ours, projection in (("Q", attention.q_proj), ("K", attention.k_proj), ("V", attention.v_proj)):
        expected = projection(x).unflatten(-1, (-1, cfg.d_head))
        assert_close(project_heads(x, state, 1, ours), expected)
    z = torch.randn(2, 5, cfg.n_heads, cfg.d_head, dtype=torch.float64)
    assert_close(write_heads(z, state, 1), attention.o_proj(z.flatten(2)))

    def linear(name: str, entering: Tensor) -> Tensor:
        return entering @ state[f"blocks.1.mlp.W_{name}"] + state.get(f"blocks.1.mlp.b_{name}", torch.zeros(()))

    neurons = torch.nn.functional.silu(linear("gate", x)) * linear("in", x)
    assert_close(linear("out", neurons), mlp(x))


@pytest.mark.parametrize("name", LLAMA_VARIANTS)
def test_reading_a_model_copies_nothing(name: str) -> None:
    hf_model = build_variant(name)
    cfg, state = read_hf_model(hf_model)
    theirs = {tensor.data_ptr() for tensor in hf_model.state_dict().values()}
    assert {tensor.data_ptr() for tensor in state.values()} == theirs
    if cfg.tied_unembed:
        assert state["unembed.W_U"].data_ptr() == state["embed.W_E"].data_ptr()


def test_rotates_whole_heads_of_any_size() -> None:
    cfg, _ = read_hf_model(build_variant("llama-head-dim"))
    assert (cfg.d_head, cfg.n_heads * cfg.d_head, cfg.d_model) == (12, 48, 32)
    assert cfg.positions == RotaryPositions(dim=12)


SPELLINGS = {
    "default": ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}, None),
    "linear": (
        {"rope_type": "linear", **ROPE},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        RotaryScaling(kind="linear", factor=4.0),
    ),
    "dynamic": (
        {"rope_type": "dynamic", **ROPE},
        {"rope_theta": 10000, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        RotaryScaling(kind="dynamic", factor=4.0, original_n_ctx=64),
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            **ROPE,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {
            "rope_theta": 10000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        RotaryScaling(kind="llama3", factor=4.0, original_n_ctx=16, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "yarn": (
        {"rope_type": "yarn", **ROPE, "original_max_position_embeddings": 16},
        {
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "finetuned": True,
            },
        },
        RotaryScaling(kind="yarn", factor=4.0, original_n_ctx=16),
    ),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_old_and_new_rotary_spellings_mean_the_same(kind, tmp_path) -> None:
    new, old, scaling = SPELLINGS[kind]
    save_variant("llama-gqa", tmp_path)
    from_new = open_checkpoint(edit_config(tmp_path, rope_parameters=new)).cfg
    from_old = open_checkpoint(edit_config(tmp_path, remove=["rope_parameters"], **old)).cfg
    assert from_new == from_old
    assert isinstance(from_new.positions, RotaryPositions)
    assert from_new.positions.scaling == scaling
    assert from_new.n_ctx == (256 if kind == "dynamic" else 64)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "original_max_position_embeddings": 32,
        },
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
        {
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        },
    ],
)
def test_spellings_that_compete_rank_as_in_transformers(rope, tmp_path) -> None:
    """The frequencies that transformers really computes tell which of two values it took."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    edit_config(save_variant("llama-gqa", tmp_path), remove=["rope_parameters"], **rope)
    positions = open_checkpoint(tmp_path).cfg.positions
    assert isinstance(positions, RotaryPositions)
    assert positions.scaling is not None
    ours = {"rope_type": positions.scaling.kind, "rope_theta": positions.base, "factor": positions.scaling.factor}
    if positions.scaling.original_n_ctx is not None:
        ours["original_max_position_embeddings"] = positions.scaling.original_n_ctx

    compute = ROPE_INIT_FUNCTIONS[positions.scaling.kind]
    theirs = compute(AutoConfig.from_pretrained(tmp_path))[0]
    edit_config(
        tmp_path, remove=["rope_scaling", "rope_theta", "original_max_position_embeddings"], rope_parameters=ours
    )
    assert torch.equal(compute(AutoConfig.from_pretrained(tmp_path))[0], theirs)


def test_another_rotary_scaling_is_refused_by_name(tmp_path) -> None:
    save_variant("llama-gqa", tmp_path)
    edit_config(tmp_path, rope_parameters={"rope_type": "proportional", "rope_theta": 10000.0, "factor": 4.0})
    with pytest.raises(UnsupportedModelError, match=r"rope_parameters.rope_type is 'proportional'; expected one of"):
        open_checkpoint(tmp_path)


def test_biases_follow_the_tensors_where_only_some_maps_have_them(tmp_path) -> None:
    """Qwen rewritten as Llama: attention_bias is true, and o_proj has no bias."""
    from safetensors.torch import save_file

    save_variant("llama-biases", tmp_path)
    weights = load_apart(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("o_proj.bias")}
    save_file(kept, tmp_path / "model.safetensors")
    cfg = open_checkpoint(tmp_path).cfg
    assert (cfg.qkv_bias, cfg.out_bias, cfg.mlp_bias) == (True, False, True)


def test_an_absent_head_dim_is_the_quotient(tmp_path) -> None:
    save_variant("llama-gqa", tmp_path)
    expected = open_checkpoint(tmp_path).cfg
    assert "head_dim" in json.loads((tmp_path / "config.json").read_text())
    assert open_checkpoint(edit_config(tmp_path, remove=["head_dim"])).cfg == expected
