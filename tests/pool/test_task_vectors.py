"""Tests of hooklens.pool.task_vectors, through `load_pretrained_model_and_task_vectors`."""

from pathlib import Path

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.pool import CausalLMPool, PoolError
from tests.checkpoints import build_variant, save_variant
from tests.pool.checkpoints import save_family


def make_pool(folder: Path, variant: str, **options: bool) -> CausalLMPool:
    save_family(folder, variant=variant)
    models = {"_pretrained_": str(folder / "base"), "math": str(folder / "math"), "code": str(folder / "code")}
    return CausalLMPool(models, **options)


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied", "neox-parallel"])
def test_task_vectors_are_what_training_changed(tmp_path: Path, variant: str) -> None:
    pool = make_pool(tmp_path, variant)
    base, vectors = pool.load_pretrained_model_and_task_vectors()
    assert isinstance(base, HookedCausalLM)
    assert len(vectors) == 2
    for name, vector in zip(pool.model_names, vectors, strict=True):
        tuned, weights = pool.load_model(name).named_weights(), base.named_weights()
        assert list(vector) == list(weights)
        for key, tensor in vector.items():
            assert torch.equal(tensor, tuned[key] - weights[key]), key
        assert not vector["blocks.0.attn.W_Q"].any()
        assert vector["blocks.0.mlp.W_in"].any()
        if variant == "llama-tied":
            assert vector["unembed.W_U"].data_ptr() == vector["embed.W_E"].data_ptr()


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-tied"])
def test_under_the_names_of_transformers(tmp_path: Path, variant: str) -> None:
    pool = make_pool(tmp_path, variant)
    base, vectors = pool.load_pretrained_model_and_task_vectors(hooked=False, dtype="float64")
    state = build_variant(variant, dtype=torch.float64).state_dict()
    tuned = pool.load_model("code", hooked=False, dtype="float64").state_dict()
    assert base.dtype == torch.float64
    assert list(vectors[1]) == list(state)
    assert all(torch.equal(tensor, tuned[key] - state[key]) for key, tensor in vectors[1].items())
    if variant == "llama-tied":
        assert vectors[0]["lm_head.weight"] is vectors[0]["model.embed_tokens.weight"]


@pytest.mark.parametrize("hooked", [True, False])
def test_of_lazy_models(tmp_path: Path, hooked: bool) -> None:
    """In FusionBench lazy models gave no task vectors: theirs is no `state_dict`."""
    pool = make_pool(tmp_path, "llama-tied", enable_lazy_loading=True)
    base, vectors = pool.load_pretrained_model_and_task_vectors(hooked=hooked)
    _, expected = pool.load_pretrained_model_and_task_vectors(hooked=hooked, lazy=False)
    for vector, other in zip(vectors, expected, strict=True):
        assert list(vector) == list(base)
        assert all(torch.equal(tensor, other[name]) for name, tensor in vector.items())


def test_of_models_that_are_no_fine_tunes(tmp_path: Path) -> None:
    paths = {
        "_pretrained_": save_variant("llama-gqa", tmp_path / "base"),
        "other": save_variant("llama-mha", tmp_path / "other"),
    }
    with pytest.raises(PoolError) as caught:
        CausalLMPool(paths).load_pretrained_model_and_task_vectors()
    text = str(caught.value)
    assert text.startswith("models.other is no fine-tune of _pretrained_")
    assert "'blocks.0.attn.W_K' is [4, 32, 8], and [2, 32, 8] there" in text
    paths["other"] = save_variant("llama-biases", tmp_path / "biases")
    with pytest.raises(PoolError, match=r"it alone has 'blocks\.0\.attn\.b_Q'"):
        CausalLMPool(paths).load_pretrained_model_and_task_vectors()
