import pytest
import torch
from torch.testing import assert_close

from hooklens.adapters import open_checkpoint, read_hf_model, write_checkpoint
from hooklens.config import AlibiPositions, RotaryPositions
from hooklens.errors import UnsupportedModelError
from tests.adapters.families.projections import project_heads, write_heads
from tests.checkpoints import FALCON_VARIANTS, build_variant, edit_config, save_variant


@pytest.mark.parametrize("name", FALCON_VARIANTS)
def test_each_head_projects_as_in_transformers(name: str) -> None:
    """transformers' own `_split_heads` gives one key-value head per query head; ours are the distinct ones."""
    hf_model = build_variant(name, dtype=torch.float64)
    cfg, state = read_hf_model(hf_model)
    attention = hf_model.transformer.h[1].self_attention
    x = torch.randn(2, 5, cfg.d_model, dtype=torch.float64)

    split = attention._split_heads(attention.query_key_value(x))
    for ours, expected in zip("QKV", split, strict=True):
        projected = project_heads(x, state, 1, ours)
        assert_close(projected.repeat_interleave(expected.shape[2] // projected.shape[2], dim=2), expected)
    z = torch.randn(2, 5, cfg.n_heads, cfg.d_head, dtype=torch.float64)
    assert_close(write_heads(z, state, 1), attention.dense(z.flatten(2)))


@pytest.mark.parametrize(
    ("name", "wiring", "shared_norm", "n_kv_heads", "bias"),
    [
        ("falcon-7b", "parallel", True, 1, False),
        ("falcon-rw", "sequential", False, 4, True),
        ("falcon-40b", "parallel", False, 2, False),
        ("falcon-11b", "parallel", True, 2, False),
        ("falcon-sequential-mqa", "sequential", False, 1, False),
        ("falcon-parallel-mha", "parallel", True, 4, True),
    ],
)
def test_structure_of_the_variants(name, wiring, shared_norm, n_kv_heads, bias) -> None:
    cfg, _ = read_hf_model(build_variant(name))
    found = (cfg.wiring, cfg.shared_norm, cfg.n_kv_heads, cfg.qkv_bias, cfg.out_bias, cfg.mlp_bias)
    assert found == (wiring, shared_norm, n_kv_heads, bias, bias, bias)


def test_norms_stand_where_transformers_reads_them() -> None:
    hf_model = build_variant("falcon-40b")
    _, state = read_hf_model(hf_model)
    block = hf_model.transformer.h[0]
    assert torch.equal(state["blocks.0.ln1.w"], block.ln_attn.weight)
    assert torch.equal(state["blocks.0.ln2.b"], block.ln_mlp.bias)
    hf_model = build_variant("falcon-rw")
    _, state = read_hf_model(hf_model)
    assert torch.equal(state["blocks.0.ln2.w"], hf_model.transformer.h[0].post_attention_layernorm.weight)


def test_alibi_is_read_as_transformers_computes_it() -> None:
    assert read_hf_model(build_variant("falcon-rw"))[0].positions == AlibiPositions(scaled=True, bfloat16=True)
    assert read_hf_model(build_variant("falcon-11b"))[0].positions == RotaryPositions(dim=8, base=500042.0)


def test_exact_alibi_cannot_be_saved_for_transformers(tmp_path) -> None:
    cfg, state = read_hf_model(build_variant("falcon-rw"))
    exact = cfg.replace(positions=AlibiPositions(scaled=True, bfloat16=False))
    with pytest.raises(UnsupportedModelError, match=r"falcon checkpoint cannot express positions=AlibiPositions"):
        write_checkpoint(tmp_path, exact, state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "model_type", "remove"),
    [
        ("falcon-7b", "RefinedWebModel", ["num_kv_heads", "new_decoder_architecture", "num_ln_in_parallel_attn"]),
        ("falcon-rw", "RefinedWebModel", ["num_kv_heads", "new_decoder_architecture", "num_ln_in_parallel_attn",
                                          "multi_query", "parallel_attn"]),
        ("falcon-40b", "RefinedWeb", ["new_decoder_architecture", "num_ln_in_parallel_attn", "multi_query"]),
    ],
)  # fmt: skip
def test_refined_web_dialect_gives_the_same_network(name, model_type, remove, tmp_path) -> None:
    """The first releases: other key names, other defaults, and a new decoder known only by `n_head_kv`."""
    save_variant(name, tmp_path)
    mainline = open_checkpoint(tmp_path)
    old_names = {"n_head": 4, "n_layer": 2} | ({"n_head_kv": 2} if name == "falcon-40b" else {})
    edit_config(
        tmp_path,
        remove=[*remove, "num_attention_heads", "num_hidden_layers", "num_kv_heads", "rope_parameters"],
        model_type=model_type,
        architectures=["RWForCausalLM"],
        apply_residual_connection_post_layernorm=False,
        auto_map={"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
        **old_names,
    )
    old = open_checkpoint(tmp_path)
    assert old.cfg == mainline.cfg
    state = dict(old.tensors())
    for tensor_name, tensor in mainline.tensors():
        assert torch.equal(state[tensor_name], tensor)

    write_checkpoint(tmp_path / "saved", old.cfg, state)
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(reloaded(ids).logits, build_variant(name)(ids).logits)


def test_width_of_the_mlp_and_old_name_of_the_width(tmp_path) -> None:
    cfg = open_checkpoint(save_variant("falcon-ffn-size", tmp_path)).cfg
    assert (cfg.d_mlp, cfg.act_fn) == (40, "gelu_tanh")
    assert open_checkpoint(edit_config(tmp_path, remove=["hidden_size"], n_embed=32)).cfg == cfg


def test_two_norms_in_the_old_decoder_are_refused(tmp_path) -> None:
    edit_config(save_variant("falcon-7b", tmp_path), num_ln_in_parallel_attn=2)
    with pytest.raises(UnsupportedModelError, match="num_ln_in_parallel_attn is 2; expected 1 with new_decoder"):
        open_checkpoint(tmp_path)


def test_residual_after_the_norm_is_refused(tmp_path) -> None:
    edit_config(save_variant("falcon-rw", tmp_path), apply_residual_connection_post_layernorm=True)
    with pytest.raises(UnsupportedModelError, match="apply_residual_connection_post_layernorm is True; expected False"):
        open_checkpoint(tmp_path)
