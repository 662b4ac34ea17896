"""Tests of hooklens.adapters.xlstm.config: every field of a LlamaConfig is read, written back, or refused."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hooklens as hl
from hooklens.adapters.xlstm.config import FIELDS, mlp_width
from hooklens.errors import ConfigError, UnsupportedModelError
from tests.adapters import xlstm_reference as reference
from tests.annotations import unchecked

SIZES = {"vocab_size": 61, "embedding_dim": 64, "num_blocks": 2, "head_dim": 16}
PARALLEL = (
    "ParallelConfig(data_axis_size=-1, fsdp_axis_size=1, pipeline_axis_size=1, model_axis_size=1, data_axis_name='dp', "
    "fsdp_axis_name='fsdp', pipeline_axis_name='pp', model_axis_name='tp', remat=[], fsdp_modules=[], "
    "fsdp_min_weight_size=262144, fsdp_gather_dtype=None, fsdp_grad_scatter_dtype=None, tp_async_dense=False)"
)
# What `LlamaConfig(vocab_size=61, embedding_dim=64, num_blocks=2, head_dim=16).to_dict()` gives.
WRITTEN = {
    **SIZES,
    "qk_norm": False,
    "causal": True,
    "theta": 10000.0,
    "ffn_multiple_of": 64,
    "ffn_dim_multiplier": 1.0,
    "use_bias": False,
    "scan_blocks": True,
    "attention_backend": "xla",
    "mask_across_document_boundaries": False,
    "dtype": "float32",
    "dropout_rate": 0.0,
    "add_embedding_dropout": False,
    "logits_soft_cap": "None",
    "parallel": PARALLEL,
}


@dataclass
class ParallelConfig:
    """As xlstm-jax's own; what it has besides does not matter here."""

    data_axis_size: int = -1
    remat: list[str] = field(default_factory=lambda: ["AttnBlock"])


def test_a_config_is_the_network_that_it_describes():
    cfg = hl.HookedConfig.from_xlstm(SIZES)
    norm = hl.NormConfig(kind="rms", eps=1e-6, bias=False)
    assert cfg == hl.HookedConfig(
        d_model=64,
        n_layers=2,
        n_heads=4,
        d_head=16,
        d_mlp=192,
        d_vocab=61,
        n_ctx=8192,
        act_fn="silu",
        gated_mlp=True,
        norm=norm,
        positions=hl.RotaryPositions(dim=16, base=10000.0, layout="interleaved"),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        attn_scale=0.5,
        document_mask=False,
    )
    assert hl.HookedConfig.from_xlstm({**SIZES, "embedding_dim": 256, "head_dim": 128}).score_scale == 2**-0.5
    assert cfg.init_scheme == "wang"
    other = hl.HookedConfig.from_xlstm(
        {**SIZES, "qk_norm": True, "causal": False, "theta": 500, "use_bias": True, "logits_soft_cap": 30.0,
         "mask_across_document_boundaries": True},
        n_ctx=32,
    )  # fmt: skip
    assert other == cfg.replace(
        qk_norm=norm, causal=False, positions=hl.RotaryPositions(dim=16, base=500.0, layout="interleaved"),
        qkv_bias=True, out_bias=True, mlp_bias=True, logits_softcap=30.0, document_mask=True, n_ctx=32,
    )  # fmt: skip


def test_heads_are_128_wide_where_nothing_is_said():
    cfg = hl.HookedConfig.from_xlstm({"vocab_size": 9, "embedding_dim": 512, "num_blocks": 1})
    assert (cfg.n_heads, cfg.d_head, cfg.attn_scale) == (4, 128, 0.5)


@pytest.mark.parametrize(
    ("embedding_dim", "multiple_of", "multiplier", "width"),
    [(64, 64, 1.0, 192), (64, 7, 1.3, 224), (64, 64, None, 192), (64, 64, 0, 192), (64, 1, 1.0, 170), (12, 1, 1.0, 32)],
)
def test_the_width_of_the_mlp(embedding_dim, multiple_of, multiplier, width):
    assert mlp_width(embedding_dim, multiple_of, multiplier) == width


def test_what_is_written_is_what_to_dict_gives():
    assert hl.HookedConfig.from_xlstm(SIZES).to_xlstm() == WRITTEN
    assert list(WRITTEN) == [one.name for one in FIELDS]


CONFIGS = st.fixed_dictionaries(
    {
        **{name: st.just(value) for name, value in WRITTEN.items()},
        "qk_norm": st.booleans(),
        "causal": st.booleans(),
        "theta": st.sampled_from([1e4, 5e5]),
        "ffn_multiple_of": st.integers(1, 99),
        "ffn_dim_multiplier": st.sampled_from([1.0, "None", 0.0, 1.3, 2.5]),
        "use_bias": st.booleans(),
        "scan_blocks": st.booleans(),
        "attention_backend": st.sampled_from(["xla", "pallas_triton", "cudnn"]),
        "mask_across_document_boundaries": st.booleans(),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "dropout_rate": st.sampled_from([0.0, 0.1]),
        "add_embedding_dropout": st.booleans(),
        "logits_soft_cap": st.sampled_from(["None", 30.0]),
        "parallel": st.sampled_from(
            [PARALLEL, PARALLEL.replace("remat=[]", "remat=('AttnBlock', 'FFNBlock')"), {"fsdp_axis_size": 8}]
        ),
    }
)


@settings(max_examples=40)
@given(written=CONFIGS, as_json=st.booleans())
def test_a_config_comes_back_as_it_was(written, as_json):
    cfg = hl.HookedConfig.from_xlstm(json.dumps(written) if as_json else written)
    assert cfg.to_xlstm() == written
    again = hl.HookedConfig.from_dict(json.loads(cfg.to_json()))
    assert again == cfg
    assert again.to_xlstm() == written
    # Without knowing where it came from: another way to write the same network.
    assert hl.HookedConfig.from_xlstm(cfg.replace(origin=None).to_xlstm()) == cfg


def test_a_network_that_was_changed_is_written_as_it_is():
    cfg = hl.HookedConfig.from_xlstm({**SIZES, "attention_backend": "cudnn"}).replace(n_layers=5, d_mlp=177)
    written = cfg.to_xlstm()
    assert (written["num_blocks"], written["attention_backend"]) == (5, "cudnn")
    assert hl.HookedConfig.from_xlstm(written) == cfg
    with pytest.raises(UnsupportedModelError) as error:
        cfg.replace(n_kv_heads=2, attn_scale=None, out_bias=True).to_xlstm()
    assert str(error.value) == (
        "no LlamaConfig of xlstm-jax describes this network: n_kv_heads=2 (there 4), out_bias=True (there False), "
        "attn_scale=None (there 0.5). Change these fields back, or keep the model in HookLens' own format (state_dict "
        "and cfg.to_json())"
    )


def test_names_of_hydra_configs():
    hydra = {**SIZES, "add_qk_norm": True, "reset_at_document_boundaries": True, "logits_soft_cap": None}
    named = {**SIZES, "qk_norm": True, "mask_across_document_boundaries": True}
    assert hl.HookedConfig.from_xlstm(hydra) == hl.HookedConfig.from_xlstm(named)
    assert hl.HookedConfig.from_xlstm(hydra).to_xlstm() == hl.HookedConfig.from_xlstm(named).to_xlstm()
    with pytest.raises(ConfigError, match="add_qk_norm=True and qk_norm=False are one field; leave one of them out"):
        hl.HookedConfig.from_xlstm({**hydra, "qk_norm": False})
    with pytest.raises(
        ConfigError, match=r"logits_soft_cap is 30\.0 in a Hydra config, which xlstm-jax does not hand on"
    ):
        hl.HookedConfig.from_xlstm({**hydra, "logits_soft_cap": 30.0})


def test_parallel_is_read_in_every_form():
    for given_ in (ParallelConfig(), {"data_axis_size": -1, "remat": ["AttnBlock"]}):
        written = hl.HookedConfig.from_xlstm({**SIZES, "parallel": given_}).to_xlstm()
        assert written["parallel"] == {"data_axis_size": -1, "remat": ["AttnBlock"]}
    refused = {
        "Parallel()": "parallel is 'Parallel\\(\\)', expected the fields of a ParallelConfig by name, or its text",
        "ParallelConfig(remat=f(1))": "parallel is 'ParallelConfig\\(remat=f\\(1\\)\\)', expected the fields",
        "ParallelConfig(model_axis_size=2)": "parallel.model_axis_size is 2, expected 1: its attention and MLP are",
    }
    for text, reason in refused.items():
        with pytest.raises(ConfigError, match=reason):
            hl.HookedConfig.from_xlstm({**SIZES, "parallel": text})
    with pytest.raises(
        ConfigError, match=r"parallel.tp is no field .*; parallel.fsdp_gather_dtype is 'int8', expected"
    ):
        hl.HookedConfig.from_xlstm({**SIZES, "parallel": {"tp": 1, "fsdp_gather_dtype": "int8"}})


def test_all_that_is_wrong_is_said_at_once():
    wrong = {
        "vocab_size": 0, "num_blocks": 2, "embedding_dim": 70, "head_dim": 15, "qk_norm": 1, "theta": -1.0,
        "use_bias": "True", "attention_backend": "foo", "dtype": "int8", "logits_soft_cap": 0, "ffn_multiple_of": 2.5,
        "ffn_dim_multiplier": -1, "dropout_rate": 1.0, "parallel": 3, "add_qk_norms": True,
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        hl.HookedConfig.from_xlstm(wrong)
    assert str(error.value) == (
        "xlstm-jax config: vocab_size is 0, expected a whole number >= 1, below 2**31; qk_norm is 1, expected True or "
        "False; theta is -1.0, expected a number above 0; use_bias is 'True', expected True or False; "
        "attention_backend is 'foo', expected 'xla', 'pallas_triton' or 'cudnn'; dtype is 'int8', expected 'float32', "
        "'bfloat16', 'float16' or 'float64'; logits_soft_cap is 0, expected a number above 0, or None; "
        "ffn_multiple_of is 2.5, expected a whole number >= 1, below 2**31; ffn_dim_multiplier is -1, expected a "
        "number >= 0, or None; dropout_rate is 1.0, expected a number from 0 on, below 1; parallel is 3, expected the "
        "fields of a ParallelConfig by name, or its text 'ParallelConfig(...)'; add_qk_norms is no field that HookLens "
        "knows. Did you mean 'add_qk_norm' or 'qk_norm'?; embedding_dim=70 is no multiple of head_dim=15, and all "
        "heads together are as wide; head_dim=15 is odd, and rotary turns pairs of entries"
    )
    with pytest.raises(ConfigError, match="vocab_size is missing; embedding_dim is missing; num_blocks is missing"):
        hl.HookedConfig.from_xlstm({})
    with pytest.raises(ConfigError, match="xlstm-jax config: the text is no JSON"):
        hl.HookedConfig.from_xlstm("config.json")
    for given_ in (3, "[1]"):
        with unchecked(), pytest.raises(ConfigError, match="expected the fields of a LlamaConfig by name, or JSON"):
            hl.HookedConfig.from_xlstm(given_)


def test_dropout_is_that_of_the_branches_and_of_the_embedding_where_asked():
    """Dropout is no part of a config's equality, so each is looked at by itself."""
    rates = [(0.0, False), (0.0, True), (0.1, False), (0.1, True)]
    for rate, at_embedding in rates:
        given_ = {**WRITTEN, "dropout_rate": rate, "add_embedding_dropout": at_embedding}
        cfg = hl.HookedConfig.from_xlstm(given_)
        assert (cfg.resid_dropout, cfg.embed_dropout, cfg.attn_dropout) == (rate, rate * at_embedding, 0.0)
        assert cfg.to_xlstm() == given_
    with pytest.raises(UnsupportedModelError, match=r"attn_dropout=0.2 \(there 0.0\)"):
        cfg.replace(attn_dropout=0.2).to_xlstm()
    with pytest.raises(UnsupportedModelError, match=r"embed_dropout=0.2 \(there 0.1\)"):
        cfg.replace(embed_dropout=0.2).to_xlstm()
    with pytest.raises(UnsupportedModelError, match=r"embed_dropout=0.1 \(there 0.0\)"):
        cfg.replace(resid_dropout=0.0).to_xlstm()


def test_dropout_acts_in_training_as_xlstm_jax_has_it():
    """A rate of 0.5 drops what the branches add, scaled up by 2, and nothing of the embedding unless asked."""
    params = reference.draw_params(SIZES, 1, "float32")
    ids = torch.arange(61)[None]
    for at_embedding in (False, True):
        config = {**SIZES, "dropout_rate": 0.5, "add_embedding_dropout": at_embedding}
        model = hl.HookedCausalLM.from_xlstm(params, config)
        _, still = model.run_with_cache(ids)
        model.train()
        _, cache = model.run_with_cache(ids)
        dropped = {"hook_attn_out": cache["attn_out", 0], "hook_mlp_out": cache["mlp_out", 0]}
        dropped |= {"hook_embed": cache["hook_embed"]} if at_embedding else {}
        for name, tensor in dropped.items():
            # Of 3904 entries: five standard errors are 0.04.
            assert abs((tensor == 0).double().mean() - 0.5) < 0.04, name
        if not at_embedding:
            torch.testing.assert_close(cache["hook_embed"], still["hook_embed"], rtol=0, atol=0)
            kept = cache["attn_out", 0] != 0
            # The same sums; 1e-5: float32.
            expected = 2 * still["attn_out", 0][kept]
            torch.testing.assert_close(cache["attn_out", 0][kept], expected, rtol=1e-5, atol=1e-5)
