"""Language models inside of others, against transformers' own."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from hooklens import HookedCausalLM, is_supported
from hooklens.adapters.wrapping import unwrap_names
from hooklens.errors import UnsupportedModelError
from tests.checkpoints import edit_config

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def save(folder, text) -> LlavaForConditionalGeneration:
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=96)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("text", [LlamaConfig(**SIZES), MistralConfig(**SIZES, head_dim=8, sliding_window=5)])
def test_the_language_model_of_a_whole_computes_what_it_does_there(text, tmp_path) -> None:
    theirs = save(tmp_path, text)
    assert is_supported(tmp_path)
    with pytest.warns(UserWarning, match="belong to other parts of the model than the language model"):
        model = HookedCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(90, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits, atol=2e-5, rtol=0)
    assert model.cfg.origin.family == text.model_type
    model.save_pretrained(tmp_path / "text")
    assert torch.equal(HookedCausalLM.from_pretrained(tmp_path / "text")(ids), model(ids))


def test_another_language_model_inside_is_told_of_as_such(tmp_path) -> None:
    save(tmp_path, Qwen2Config(**SIZES))
    edit_config(tmp_path, text_config={**SIZES, "model_type": "mamba"})
    with pytest.raises(UnsupportedModelError, match="'llava' is not supported"):
        HookedCausalLM.from_config_of(tmp_path)


def test_names_of_old_and_new_files() -> None:
    names = [
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "tower.language.weight",
    ]
    assert unwrap_names(names) == (
        {"model.embed_tokens.weight": names[0], "lm_head.weight": names[1]},
        ["tower.language.weight"],
    )
    names = ["model.language_model.embed_tokens.weight", "lm_head.weight", "model.vision_tower.weight"]
    assert unwrap_names(names) == (
        {"model.embed_tokens.weight": names[0], "lm_head.weight": names[1]},
        ["model.vision_tower.weight"],
    )
