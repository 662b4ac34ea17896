import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from hooklens.adapters import open_checkpoint, read_hf_model, write_checkpoint
from hooklens.config import RotaryPositions
from hooklens.errors import CheckpointError
from tests.adapters.families.projections import project_heads, write_heads
from tests.checkpoints import NEOX_VARIANTS, build_variant, edit_config, load_apart, save_variant


@pytest.mark.parametrize("name", NEOX_VARIANTS)
def test_each_head_projects_as_in_transformers(name: str) -> None:
    hf_model = build_variant(name, dtype=torch.float64)
    cfg, state = read_hf_model(hf_model)
    attention = hf_model.gpt_neox.layers[2].attention
    x = torch.randn(2, 5, cfg.d_model, dtype=torch.float64)

    # transformers' own split: a chunk of 3 * head_size per head.
    fused = attention.query_key_value(x).view(2, 5, -1, 3 * attention.head_size)
    for ours, expected in zip("QKV", fused.chunk(3, dim=-1), strict=True):
        assert_close(project_heads(x, state, 2, ours), expected)
    z = torch.randn(2, 5, cfg.n_heads, cfg.d_head, dtype=torch.float64)
    assert_close(write_heads(z, state, 2), attention.dense(z.flatten(2)))


def test_wiring_activation_and_rotary_are_read() -> None:
    assert read_hf_model(build_variant("neox-parallel"))[0].wiring == "parallel"
    assert read_hf_model(build_variant("neox-sequential"))[0].wiring == "sequential"
    assert read_hf_model(build_variant("neox-gelu-fast"))[0].act_fn == "gelu_tanh"
    assert read_hf_model(build_variant("neox-full-rotary"))[0].positions == RotaryPositions(dim=8)


def test_old_and_new_rotary_spellings_mean_the_same(tmp_path) -> None:
    save_variant("neox-parallel", tmp_path)
    new = open_checkpoint(tmp_path).cfg
    old = open_checkpoint(edit_config(tmp_path, remove=["rope_parameters"], rotary_pct=0.5, rotary_emb_base=10000)).cfg
    assert old == new
    assert old.positions == RotaryPositions(dim=4)


def test_a_quarter_is_rotated_where_the_config_is_silent(tmp_path) -> None:
    save_variant("neox-parallel", tmp_path)
    assert open_checkpoint(edit_config(tmp_path, remove=["rope_parameters"])).cfg.positions == RotaryPositions(dim=2)


def test_masks_and_tables_of_old_files_are_no_weights(tmp_path) -> None:
    save_variant("neox-parallel", tmp_path)
    weights = load_apart(tmp_path / "model.safetensors")
    buffers = {
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    }
    expected = dict(open_checkpoint(tmp_path).tensors())
    save_file({**weights, **buffers}, tmp_path / "model.safetensors")
    assert dict(open_checkpoint(tmp_path).tensors()).keys() == expected.keys()

    save_file({**weights, "gpt_neox.layers.0.attention.bias_k": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensors: 'gpt_neox.layers.0.attention.bias_k'"):
        open_checkpoint(tmp_path)


def test_both_names_of_the_unembedding_are_read_and_the_one_on_disk_is_written(tmp_path) -> None:
    save_variant("neox-parallel", tmp_path)
    weights = load_apart(tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    # Tensors may be views of the file, which is about to be written anew.
    state = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    renamed = {name.replace("embed_out", "lm_head"): tensor.clone() for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    assert torch.equal(dict(open_checkpoint(tmp_path).tensors())["unembed.W_U"], state["unembed.W_U"])

    write_checkpoint(tmp_path / "saved", checkpoint.cfg, state)
    assert "embed_out.weight" in load_apart(tmp_path / "saved" / "model.safetensors")
