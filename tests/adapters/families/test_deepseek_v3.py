"""DeepSeek-V3 against transformers, in every variant."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hooklens import HookedCausalLM
from hooklens.adapters import open_checkpoint
from hooklens.adapters.dequantised.config import read_quantisation
from hooklens.config import MLAConfig, MoEConfig
from hooklens.errors import CheckpointError, UnsupportedModelError
from tests.adapters.families.checks import D_VOCAB, cases, check, read_config, read_published, save, verify_folder
from tests.adapters.families.routers import check_routing
from tests.adapters.families.test_deepseek_v2 import YARN
from tests.annotations import unchecked
from tests.checkpoints import edit_config, load_apart

TINY = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "kv_lora_rank": 14,
    "q_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "as published": {"rope_parameters": YARN},
    "one group, no latent of queries": {
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "rms_norm_eps": 0.05,
        "routed_scaling_factor": 2.446,
    },
    "halves": {"rope_interleave": False, "norm_topk_prob": False, "v_head_dim": 20, "num_hidden_layers": 3},
    "halves with biases, tied": {
        "rope_interleave": False,
        "rope_parameters": YARN,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0,
    },
    "biases without a latent of queries": {"attention_bias": True, "q_lora_rank": None, "topk_group": 1},
}
LARGE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT = {
    **{key: value for key, value in LARGE.items() if key != "quantization_config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "seq_aux": True,
    "topk_group": 1,
    "vocab_size": 163840,
}
K2 = {
    **LARGE,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**LARGE["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "vocab_size": 163840,
}
# Of the language model, the corrections of routers among them; files hold further layers besides.
PUBLISHED = {
    "DeepSeek-V3": (LARGE, 671_026_419_200),
    "Moonlight-16B-A3B": (MOONLIGHT, 15_960_110_208),
    "Kimi-K2-Base": (K2, 1_026_408_232_448),
}


@pytest.mark.parametrize(("variant", "whole"), cases(VARIANTS))
def test_variant_equals_transformers(variant: str, whole: bool, tmp_path) -> None:
    # RMSNorm and the router compute in float32 in transformers, whatever the model's dtype.
    folder = save(tmp_path, "deepseek_v3", **{**TINY, **VARIANTS[variant]})
    check_routing(check(folder, whole=whole, float64=1e-5), folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_passes_verify(variant: str, tmp_path) -> None:
    verify_folder(save(tmp_path, "deepseek_v3", **{**TINY, **VARIANTS[variant]}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_is_read(name: str) -> None:
    config, n_parameters = PUBLISHED[name]
    plain, scheme = read_quantisation(config, where="here")
    assert (scheme is None) == ("quantization_config" not in config)
    read_published(plain, n_parameters)


def test_absent_keys_mean_what_transformers_takes(tmp_path) -> None:
    folder = save(tmp_path, "deepseek_v3", **{**TINY, "num_hidden_layers": 4, "n_routed_experts": 16, "n_group": 8})
    written = json.loads((folder / "config.json").read_text())
    kept = {*TINY, "model_type"} - {"first_k_dense_replace", "n_group", "topk_group", "max_position_embeddings"}
    edit_config(folder, remove=[key for key in written if key not in kept])
    cfg = read_config(json.loads((folder / "config.json").read_text()))
    assert cfg.attn == MLAConfig(q_rank=18, kv_rank=14, d_nope=10, d_rope=6, d_head_v=9, norm_eps=1e-6)
    assert isinstance(cfg.mlp, tuple)
    assert [isinstance(part, MoEConfig) for part in cfg.mlp] == [False, False, False, True]
    assert cfg.mlp[3] == MoEConfig(
        n_experts=16, experts_per_token=2, d_expert=12, d_shared=12, router="sigmoid", choice_bias=True, group_top=2,
        n_groups=8, groups_per_token=4, gate_norm=1.0, gate_scale=2.5, router_float32=True,
    )  # fmt: skip
    assert (cfg.n_ctx, cfg.positions.layout) == (4096, "interleaved")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; expected 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; expected 'noaux_tc'"),
        ({"n_group": 6}, "group_top=2 of the 1 experts of a group"),
    ],
)
def test_what_is_not_implemented_is_refused(given, message: str, tmp_path) -> None:
    folder = save(tmp_path, "deepseek_v3", **TINY)
    edit_config(folder, **given)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(folder)


def add_a_further_layer(folder: Path) -> None:
    """Tensors of the layer that predicts further tokens, as the published files have them."""
    tensors = load_apart(folder / "model.safetensors")
    further = {
        name.replace("layers.1.", "layers.2."): one.clone() for name, one in tensors.items() if "layers.1." in name
    }
    further |= {f"model.layers.2.{own}.weight": torch.ones(32) for own in ("enorm", "hnorm", "shared_head.norm")}
    further["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)
    save_file(tensors | further, folder / "model.safetensors", metadata={"format": "pt"})


def test_layers_past_the_last_are_left_out(tmp_path) -> None:
    folder = save(tmp_path, "deepseek_v3", **TINY)
    with unchecked(), torch.no_grad():
        expected = HookedCausalLM.from_pretrained(folder)(torch.arange(7)[None])
        add_a_further_layer(folder)
        with pytest.warns(match=r"36 tensors belong to layers \[2\], past the 2 of the language model .* are left out"):
            model = HookedCausalLM.from_pretrained(folder)
        assert torch.equal(model(torch.arange(7)[None]), expected)


def test_other_tensors_that_are_too_many_are_refused(tmp_path) -> None:
    folder = save(tmp_path, "deepseek_v3", **TINY)
    tensors = load_apart(folder / "model.safetensors")
    tensors["model.layers.1.eh_proj.weight"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected tensors: 'model\.layers\.1\.eh_proj\.weight'"):
        open_checkpoint(folder)


def quantise(folder: Path, block: int) -> dict[str, torch.Tensor]:
    """Make a folder's maps float8 with a scale for each block, and give what they then are."""
    tensors, plain = load_apart(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if "_proj" not in name or weight.ndim != 2:
            continue
        rows, columns = (-(-size // block) for size in weight.shape)
        scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(len(name))) + 0.5
        spread = scales.repeat_interleave(block, 0)[: len(weight)].repeat_interleave(block, 1)[:, : weight.shape[1]]
        entries = (weight / spread).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = entries, scales
        plain[name] = entries.float() * spread
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    edit_config(folder, quantization_config=method)
    return plain


def test_float8_checkpoints_are_dequantised(tmp_path) -> None:
    """The rows of a map that holds two are taken apart once they are plain; blocks do not end where those do."""
    folder = save(tmp_path / "quantised", "deepseek_v3", **TINY)
    twin = save(tmp_path / "plain", "deepseek_v3", **TINY)
    plain = quantise(folder, 4)
    assert {name.rpartition(".layers.1.")[2] for name in plain} >= {
        f"self_attn.{own}.weight" for own in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    }
    tensors = load_apart(twin / "model.safetensors") | plain
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    with unchecked():
        found, expected = (
            HookedCausalLM.from_pretrained(one, dtype=torch.float32).state_dict() for one in (folder, twin)
        )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
