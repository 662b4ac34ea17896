"""Weight processing on every checkpoint variant: what each step preserves, refuses, records and can be saved as."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hooklens import HookedCausalLM
from hooklens.config import HookedConfig, RotaryPositions
from hooklens.errors import TransformError, UnsupportedModelError
from tests.checkpoints import D_VOCAB, VARIANTS, build_variant
from tests.model.networks import CONFIGS, make_model, random_tokens
from tests.weights.reference_network import STEPS

TOKENS = random_tokens(2, 10, d_vocab=D_VOCAB)


def refusal(cfg, step):
    """The words with which a step must refuse a config; None where it must hold. Told from theory, not from code."""
    reasons = {
        "center_writing_weights": {
            "does not subtract the mean": cfg.norm.kind == "rms",
            "cfg.norm_after is True": cfg.norm_after,
            "no norm before their branches": not cfg.norm_before,
        },
        "center_unembed": {"adding a number to all logits changes the softmax": cfg.logits_softcap is not None},
        "refactor_factored_attn_matrices": {
            "rotary positions rotate queries and keys": isinstance(cfg.positions, RotaryPositions),
            "query heads share": cfg.n_kv_heads != cfg.n_heads,
            "query-key norm normalises": cfg.qk_norm is not None,
        },
    }
    return next((words for words, holds in reasons.get(step, {}).items() if holds), None)


def check_step(model, steps, tokens, *, atol):
    with torch.no_grad():
        before = model(tokens).double()
        processed = model.process_weights(**dict.fromkeys(steps, True))
        after = processed(tokens).double()
    # The tolerance is the promise; half of it would leave room for another processor's rounding.
    assert_close(after.log_softmax(-1), before.log_softmax(-1), rtol=0, atol=atol)
    if "center_unembed" not in steps:
        assert_close(after, before, rtol=0, atol=atol)
    assert set(steps) <= set(processed.transforms)
    assert model.transforms == ()
    return processed


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_step_and_all_together_on_every_variant(variant):
    for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model = HookedCausalLM.from_hf(build_variant(variant, dtype=dtype))
        possible = []
        for step in STEPS:
            words = refusal(model.cfg, step)
            if words is None:
                possible.append(step)
                check_step(model, [step], TOKENS, atol=atol)
            else:
                with pytest.raises(TransformError, match=f"leave these steps out:\n- {step}: .*({words})"):
                    model.process_weights(**{step: True})
        check_step(model, possible, TOKENS, atol=atol)


@pytest.mark.parametrize("network", CONFIGS)
def test_each_step_on_what_no_variant_has(network):
    """Learned positions, soft caps, norms after the branches, query-key norm, none at all."""
    model = make_model(network)
    tokens = random_tokens(2, 6)
    possible = [step for step in STEPS if refusal(model.cfg, step) is None]
    for step in set(STEPS) - set(possible):
        with pytest.raises(TransformError, match=refusal(model.cfg, step)):
            model.process_weights(**{step: True})
    for steps in ([step] for step in possible):
        check_step(model, steps, tokens, atol=1e-9)
    check_step(model, possible, tokens, atol=1e-9)


def test_all_refusals_are_told_at_once():
    model = HookedCausalLM.from_hf(build_variant("llama-gqa"))
    with pytest.raises(TransformError) as error:
        model.process_weights(center_writing_weights=True, refactor_factored_attn_matrices=True)
    text = str(error.value)
    assert "- center_writing_weights: cfg.norm.kind is 'rms'" in text
    assert "- refactor_factored_attn_matrices: rotary positions" in text
    assert "4 query heads share the W_K and W_V of 2 key-value heads" in text


def test_records_travel_with_model_cache_and_folder(tmp_path):
    model = HookedCausalLM.from_hf(build_variant("neox-parallel"))
    processed = model.process_weights(center_writing_weights=True)
    assert processed.transforms == ("center_writing_weights",)
    _, cache = processed.run_with_cache(TOKENS, names_filter="hook_embed")
    assert cache.transforms == processed.transforms
    cache.save(tmp_path / "cache")
    assert type(cache).load(tmp_path / "cache").transforms == processed.transforms
    processed.save_pretrained(tmp_path / "model")
    assert HookedCausalLM.from_pretrained(tmp_path / "model").transforms == processed.transforms
    model.save_pretrained(tmp_path / "model")
    assert HookedCausalLM.from_pretrained(tmp_path / "model").transforms == ()


SAVED_VARIANTS = (
    "neox-parallel", "neox-sequential", "neox-no-attention-bias", "neox-tied", "llama-gqa", "llama-biases",
    "llama-tied", "falcon-7b", "falcon-rw", "falcon-40b", "falcon-11b",
)  # fmt: skip


@pytest.mark.parametrize(("variant", "step"), list(itertools.product(SAVED_VARIANTS, STEPS)))
def test_a_processed_model_is_saved_whole_or_not_at_all(variant, step, tmp_path):
    """Either the folder gives equal logits in transformers, or the text names the fields and nothing is written."""
    model = HookedCausalLM.from_hf(build_variant(variant))
    if refusal(model.cfg, step) is not None:
        return
    processed = model.process_weights(**{step: True})
    folder = tmp_path / "saved"
    try:
        processed.save_pretrained(folder)
    except UnsupportedModelError as error:
        text = str(error)
        changed = [
            name for name in ("qkv_bias", "out_bias", "mlp_bias", "unembed_bias", "tied_unembed")
            if getattr(processed.cfg, name) != getattr(model.cfg, name)
        ]  # fmt: skip
        assert changed, text
        assert any(name in text for name in changed), text
        assert f"its weights were processed ({', '.join(processed.transforms)}): save the unprocessed model" in text
        assert "change these fields back" not in text
        assert not folder.exists() or not list(folder.iterdir())
        return
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")(TOKENS).logits
        # Equal weights in float32: what differs is the order of sums. Logits reach 30.
        assert_close(theirs, processed(TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "step"),
    [("llama-gqa", "fold_ln"), ("llama-tied", "center_unembed"), ("neox-parallel", "center_writing_weights"),
     ("neox-tied", "center_writing_weights"), ("falcon-rw", "fold_value_biases")],
)  # fmt: skip
def test_what_a_family_can_express_is_saved(variant, step, tmp_path):
    """Guards the test above against passing by refusing everything; untied weights set tie_word_embeddings."""
    processed = HookedCausalLM.from_hf(build_variant(variant)).process_weights(**{step: True})
    processed.save_pretrained(tmp_path)
    assert HookedCausalLM.from_pretrained(tmp_path).cfg == processed.cfg


def test_an_unembedding_bias_is_refused_with_the_field(tmp_path):
    processed = HookedCausalLM.from_hf(build_variant("neox-parallel")).process_weights(fold_ln=True)
    assert processed.cfg.unembed_bias
    with pytest.raises(UnsupportedModelError, match=r"cannot express .*unembed_bias"):
        processed.save_pretrained(tmp_path)


@pytest.mark.parametrize("write", [lambda model, folder: model.save_pretrained(folder), lambda model, _: model.to_hf()])
def test_the_advice_for_a_processed_model_can_be_followed(write, tmp_path):
    """The text said to change the fields back, which nobody can do to a folded model."""
    model = HookedCausalLM.from_hf(build_variant("neox-parallel", dtype=torch.float64))
    processed = model.process_weights(fold_ln=True, fold_value_biases=True)
    with pytest.raises(
        UnsupportedModelError,
        match=r"cannot express unembed_bias=True; its weights were processed \(fold_ln, fold_value_biases\): save "
        r"the unprocessed model and take these steps after loading it, with model.process_weights\(...\), or keep "
        r"the model in HookLens' own format \(state_dict, cfg.to_json\(\) and transforms\)",
    ):
        write(processed, tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    again = HookedCausalLM.from_pretrained(tmp_path).process_weights(fold_ln=True, fold_value_biases=True)
    assert again.transforms == processed.transforms
    # Weights read from a file have other strides, so sums may be taken in another order.
    assert_close(again(TOKENS), processed(TOKENS), rtol=0, atol=1e-9)
    kept = HookedCausalLM.from_state_dict(processed.state_dict(), HookedConfig.from_json(processed.cfg.to_json()))
    assert torch.equal(kept(TOKENS), processed(TOKENS))


def test_the_advice_for_a_changed_config_stays(tmp_path):
    model = HookedCausalLM.from_hf(build_variant("llama-gqa"))
    changed = HookedCausalLM.from_state_dict(model.state_dict(), model.cfg.replace(embed_scale=2.0))
    with pytest.raises(UnsupportedModelError, match=r"express embed_scale=2.0; change these fields back before saving"):
        changed.save_pretrained(tmp_path)


def test_the_advice_where_no_family_can_express_a_processed_model():
    """A config without an origin goes another way to the same advice."""
    cfg = make_model("learned, tied").cfg
    processed = HookedCausalLM(cfg).process_weights(fold_ln=True)
    with pytest.raises(UnsupportedModelError, match=r"To save it: its weights were processed \(fold_ln\): save"):
        processed.to_hf()
    with pytest.raises(UnsupportedModelError, match="To save it: change these fields back before saving"):
        HookedCausalLM(cfg).to_hf()
