"""Names of models, and where they are found, as in TransformerLens 2.18. Nothing is downloaded: folders stand in."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.adapters import model_names
from hooklens.bundled import bundled_path
from hooklens.compat.transformer_lens import loading_from_pretrained as loading
from hooklens.compat.transformer_lens.loading_from_pretrained import find_source
from tests.adapters.formats.test_transformer_lens import CONFIG, make_state, save

# Facts of the library.
OFFICIAL = {
    "gpt2-small": "gpt2",
    "distilgpt2": "distilgpt2",
    "attn-only-2l": "NeelNanda/Attn_Only_2L512W_C4_Code",
    "attn-only-2l-demo": "NeelNanda/Attn-Only-2L512W-Shortformer-6B-big-lr",
    "solu-1l-pile": "NeelNanda/SoLU_1L_v9_old",
    "gelu-4l": "NeelNanda/GELU_4L512W_C4_Code",
    "redwood_attn_2l": "ArthurConmy/redwood_attn_2l",
    "othello-gpt": "Baidicoot/Othello-GPT-Transformer-Lens",
    "Pythia-70M": "EleutherAI/pythia-70m",
    "pythia-70m-deduped-v0": "EleutherAI/pythia-70m-deduped-v0",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
    "gemma-2-2b": "google/gemma-2-2b",
    "stanford-gpt2-small-a": "stanford-crfm/alias-gpt2-small-x21",
    "bloom-560m": "bigscience/bloom-560m",
}


@pytest.mark.parametrize(("alias", "official"), OFFICIAL.items())
def test_aliases(alias: str, official: str) -> None:
    assert loading.get_official_model_name(alias) == official
    found = find_source(alias)
    assert (found.source, found.keywords) == (official, {})
    assert found.words == {"model_name": official.rpartition("/")[2], "tokenizer_name": official}


def test_tables_hold_what_they_hold_there() -> None:
    assert (len(loading.OFFICIAL_MODEL_NAMES), len(loading.MODEL_ALIASES)) == (237, 220)
    assert len(set(loading.OFFICIAL_MODEL_NAMES)) == len(loading.DEFAULT_MODEL_ALIASES) == 237
    assert loading.DEFAULT_MODEL_ALIASES[0] == "gpt2-small"
    every = loading.make_model_alias_map()
    assert len(every) == 635
    assert set(every.values()) == set(loading.OFFICIAL_MODEL_NAMES)
    counts = (loading.STANFORD_CRFM_CHECKPOINTS, loading.PYTHIA_CHECKPOINTS, loading.PYTHIA_V0_CHECKPOINTS)
    assert [(len(one), one[0], one[10], one[-1]) for one in counts] == [
        (609, 0, 100, 400000), (154, 0, 512, 143000), (143, 1000, 11000, 143000),
    ]  # fmt: skip


def test_names_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"gpt2-tiny not found.* Valid official model names"):
        find_source("gpt2-tiny")
    with pytest.raises(NotImplementedError, match="give hf_model="):
        find_source("llama-7b")
    assert find_source("somebody/something").source == "somebody/something"
    assert find_source("bundled:tiny-llama").source == "bundled:tiny-llama"


@pytest.mark.parametrize(
    ("name", "which", "keywords", "index"),
    [
        ("pythia-70m", {"checkpoint_value": 512}, {"revision": "step512"}, 10),
        ("pythia-70m-v0", {"checkpoint_index": 1}, {"revision": "step2000"}, 1),
        ("stanford-gpt2-small-a", {"checkpoint_index": 20}, {"revision": "checkpoint-600"}, 20),
    ],
)
def test_checkpoints_in_branches(name: str, which: dict[str, int], keywords: dict[str, str], index: int) -> None:
    found = find_source(name, **which)
    assert found.keywords == keywords
    value = int("".join(filter(str.isdigit, next(iter(keywords.values())))))
    assert {key: found.words[key] for key in found.words if "checkpoint" in key} == {
        "from_checkpoint": True, "checkpoint_label_type": "step", "checkpoint_value": value, "checkpoint_index": index,
    }  # fmt: skip


def test_checkpoints_that_there_are_not() -> None:
    with pytest.raises(AssertionError, match="Checkpoint value 3 is not in list of available checkpoints"):
        find_source("pythia-70m", checkpoint_value=3)
    with pytest.raises(ValueError, match="Model gpt2 is not checkpointed"):
        find_source("gpt2", checkpoint_index=0)


def test_checkpoints_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(CONFIG)
    save(tmp_path, CONFIG, state)
    (tmp_path / "checkpoints").mkdir()
    for label in (100, 20000):
        earlier = {**state, "unembed.b_U": state["unembed.b_U"] + label}
        torch.save(earlier, tmp_path / "checkpoints" / f"SoLU_2L_{label:09}.pth")
    assert loading.get_checkpoint_labels(str(tmp_path)) == ([100, 20000], "step")
    for which in ({"checkpoint_index": 1}, {"checkpoint_value": 20000}):
        found = find_source(str(tmp_path), **which)
        model = HookedCausalLM.from_pretrained(found.source, **found.keywords)
        assert torch.equal(model.b_U, state["unembed.b_U"] + 20000)
    files = [f"checkpoints/SoLU_1L_{label:012}.pth" for label in (22 * 10**9, 2 * 10**6)]
    monkeypatch.setattr(model_names, "list_files", lambda name: ["config.json", "SoLU_1L_final.pth", *files])
    assert loading.get_checkpoint_labels("solu-1l") == ([2 * 10**6, 22 * 10**9], "token")
    assert find_source("solu-1l", checkpoint_index=0).keywords == {"variant": "2000000"}


@pytest.mark.parametrize(
    ("name", "n_ctx"),
    [("meta-llama/Llama-3.1-8B", 2048), ("tiny-stories-1M", 512), ("gemma-3-1b-it", 8192), ("gpt2", None)],
)
def test_lengths_that_are_capped(name: str, n_ctx: int | None) -> None:
    assert find_source(name).n_ctx == n_ctx


def test_configs_of_models() -> None:
    cfg = loading.get_pretrained_model_config("bundled:tiny-llama", fold_ln=True, first_n_layers=2, device="cpu")
    wanted: dict[str, Any] = {
        "n_layers": 2, "normalization_type": "RMSPre", "n_key_value_heads": 2, "gated_mlp": True, "act_fn": "silu",
        "positional_embedding_type": "rotary", "init_weights": False, "from_checkpoint": False, "final_rms": True,
        "default_prepend_bos": True, "device": "cpu", "original_architecture": "LlamaForCausalLM",
    }  # fmt: skip
    assert {key: getattr(cfg, key) for key in wanted} == wanted
    unfolded = loading.get_pretrained_model_config(str(bundled_path("tiny-gpt-neox")), n_ctx=17, device="cpu")
    assert (unfolded.normalization_type, unfolded.n_ctx, unfolded.parallel_attn_mlp) == ("LN", 17, True)
    assert loading.get_num_params_of_pretrained("bundled:tiny-llama") == 2 * (cfg.n_params or 0)
    assert loading.get_basic_config("bundled:tiny-llama").d_mlp == cfg.d_mlp


def test_missing_keys_are_filled(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Module()
    for name in ("W_U", "b_U", "w"):
        model.register_parameter(name, torch.nn.Parameter(torch.ones(2)))
    state = {"w": torch.zeros(2)}
    filled = loading.fill_missing_keys(model, state)
    assert sorted(filled) == ["W_U", "b_U", "w"]
    assert float(filled["w"].detach().sum()) == 0
    assert [record.message for record in caplog.records] == [
        "W_U is missing in the state dict; it stays as the model has it"
    ]
