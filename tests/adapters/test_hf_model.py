"""Tests of what models come in: wrappers, adapters, heads, without values, quantised, of another length."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hooklens import HookedCausalLM
from hooklens.adapters.conversion import config_of_length, crop_positions
from hooklens.config import HookedConfig, LearnedPositions
from hooklens.errors import CheckpointError, HookLensError, InputError, UnsupportedModelError
from tests.checkpoints import VARIANTS, build_variant, edit_config, load_apart, save_variant

IDS = torch.arange(10).view(1, 10)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


class TestWrappers:
    @pytest.mark.parametrize(
        "wrap",
        [nn.DataParallel, torch.compile, lambda model: nn.DataParallel(torch.compile(model))],
        ids=["data parallel", "compiled", "both"],
    )
    def test_what_only_runs_a_model_is_looked_through(self, wrap) -> None:
        hf_model = build_variant("neox-parallel")
        found = HookedCausalLM.from_hf(wrap(hf_model))
        assert torch.equal(logits_of(found), logits_of(HookedCausalLM.from_hf(hf_model)))

    def test_compiled_layers(self) -> None:
        hf_model = build_variant("llama-gqa")
        expected = logits_of(HookedCausalLM.from_hf(hf_model))
        hf_model.model.layers[1] = torch.compile(hf_model.model.layers[1])
        assert any("_orig_mod" in name for name in hf_model.state_dict())
        assert torch.equal(logits_of(HookedCausalLM.from_hf(hf_model)), expected)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "module.module."])
    @pytest.mark.parametrize("base", [False, True])
    def test_their_prefixes_in_files(self, tmp_path, prefix, base) -> None:
        hf_model = build_variant("llama-tied")
        (hf_model.base_model if base else hf_model).save_pretrained(tmp_path)
        weights = load_apart(tmp_path / "model.safetensors")
        save_file({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
        expected = HookedCausalLM.from_hf(hf_model).state_dict()
        found = HookedCausalLM.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
    def test_their_prefixes_in_state_dicts(self, prefix) -> None:
        model = HookedCausalLM.from_hf(build_variant("llama-gqa"))
        for state in (model.state_dict(), dict(model.named_weights())):
            again = HookedCausalLM.from_state_dict({prefix + key: value for key, value in state.items()}, model.cfg)
            assert torch.equal(logits_of(again), logits_of(model))

    def test_one_weight_under_two_names(self, tmp_path) -> None:
        weights = load_apart(save_variant("neox-parallel", tmp_path) / "model.safetensors")
        both = {**weights, "embed_out.weight": torch.zeros(97, 32), "lm_head.weight": torch.ones(97, 32)}
        save_file(both, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"two names of one weight: '.*' and '.*'; keep one"):
            HookedCausalLM.from_pretrained(tmp_path)


class TestAdapters:
    def adapted(self):
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        return peft.get_peft_model(build_variant("llama-gqa"), config)

    def test_a_peft_model_and_what_is_inside_of_it(self) -> None:
        model = self.adapted()
        with torch.no_grad():
            expected = model(IDS).logits
        for given in (model, model.base_model, model.base_model.model):
            # float32, merged weights instead of a sum of two maps.
            torch.testing.assert_close(logits_of(HookedCausalLM.from_hf(given)), expected, rtol=1e-4, atol=1e-4)
        merged = HookedCausalLM.from_hf(model.merge_and_unload())
        torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)

    def test_an_adapter_beside_a_model_is_not_passed_over(self, tmp_path) -> None:
        """transformers would put it on the model."""
        save_variant("llama-gqa", tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
        with pytest.raises(UnsupportedModelError, match=r"for the model 'owner/base' beside a model\. Give the folder"):
            HookedCausalLM.from_pretrained(tmp_path)


class TestValueHeads:
    def test_in_a_file_the_head_is_left_out_and_named(self, tmp_path) -> None:
        weights = load_apart(save_variant("llama-gqa", tmp_path) / "model.safetensors")
        expected = HookedCausalLM.from_pretrained(tmp_path).state_dict()
        head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
        save_file({**weights, **head}, tmp_path / "model.safetensors")
        with pytest.warns(UserWarning, match=r"'v_head\.summary\.bias', 'v_head.* value head, .* left out"):
            found = HookedCausalLM.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())

    def test_in_memory_the_model_inside_is_asked_for(self) -> None:
        class WithValueHead(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.pretrained_model, self.v_head = build_variant("llama-gqa"), nn.Linear(32, 1)
                self.config = self.pretrained_model.config

        with pytest.raises(
            InputError, match=r"hf_model is a WithValueHead.* the one inside this is its pretrained_model"
        ):
            HookedCausalLM.from_hf(WithValueHead())


class TestWithoutValues:
    def test_a_model_on_meta(self) -> None:
        with torch.device("meta"):
            empty = LlamaForCausalLM(
                LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
            )
        with pytest.raises(
            CheckpointError, match=r"LlamaForCausalLM: 12 of 12 tensors hold no values \(device 'meta'\)"
        ):
            HookedCausalLM.from_hf(empty)

    def test_an_offloaded_model(self) -> None:
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.cpu_offload(build_variant("llama-gqa"), execution_device=torch.device("cpu"))
        with pytest.raises(
            CheckpointError, match=r"or they are offloaded: load it without device_map, or give its name"
        ):
            HookedCausalLM.from_hf(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "hqq", "bits": 4}),
        ("quantization_config", {"quant_method": "quark", "quant_type": "int4_weight_only"}),
        ("quantization_config", {"bits": 4, "group_size": 64}),
        ("compression_config", {"format": "pack-quantized"}),
        ("quantization", {"group_size": 64, "bits": 4}),
    ],
)
def test_quantised_checkpoints_say_the_way_out(tmp_path, key, value) -> None:
    edit_config(save_variant("llama-gqa", tmp_path), **{key: value})
    with pytest.raises(
        UnsupportedModelError, match=rf"{key} is .*the weights are quantised.* dequantise this one: Auto"
    ):
        HookedCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("config_at_the_top", [False, True])
def test_a_trainers_folder_names_its_checkpoints(tmp_path, config_at_the_top) -> None:
    for step in (500, 1000):
        save_variant("llama-gqa", tmp_path / f"checkpoint-{step}")
    if config_at_the_top:
        shutil.copy(tmp_path / "checkpoint-500" / "config.json", tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"folders that do: 'checkpoint-500', 'checkpoint-1000'; give one of them, .*checkpoint-1000'",
    ):
        HookedCausalLM.from_pretrained(tmp_path)
    assert HookedCausalLM.from_pretrained(tmp_path / "checkpoint-1000").cfg.n_layers == 3


@pytest.mark.parametrize(
    "key",
    ["is_llama_config", "resid_pdrop", "transformers.js_config", "unsloth_version"],
)
def test_keys_without_meaning_do_not_warn(tmp_path, key) -> None:
    edit_config(save_variant("llama-gqa", tmp_path), rope_interleaved=False, **{key: True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HookedCausalLM.from_pretrained(tmp_path)


def test_another_layout_of_rotary_positions_is_refused(tmp_path) -> None:
    edit_config(save_variant("llama-gqa", tmp_path), rope_interleaved=True)
    with pytest.raises(UnsupportedModelError, match="rope_interleaved is True; expected False"):
        HookedCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_dtypes_by_name(tmp_path, name) -> None:
    assert HookedCausalLM.from_pretrained(save_variant("llama-gqa", tmp_path), dtype=name).dtype == torch.bfloat16


class TestSharing:
    """Half of a fused model's memory was shared, all of another's, and nothing said so."""

    def step(self, hf_model, share) -> bool:
        """Whether changing every weight of the one model changes the other's logits."""
        model = HookedCausalLM.from_hf(hf_model, share=share)
        before = logits_of(model)
        with torch.no_grad():
            for parameter in hf_model.parameters():
                parameter.mul_(1.5)
            theirs = hf_model(IDS).logits
        after = logits_of(model)
        is_changed = not torch.equal(before, after)
        # float32; other kernels than transformers' with which the sums are rounded otherwise.
        assert torch.allclose(after, theirs, rtol=1e-3, atol=1e-3) == is_changed
        return is_changed

    @pytest.mark.parametrize("name", VARIANTS)
    def test_all_or_nothing(self, name) -> None:
        assert not self.step(build_variant(name), share=False)
        by_default = self.step(build_variant(name), share=None)
        if by_default:
            assert self.step(build_variant(name), share=True)
        else:
            with pytest.raises(
                CheckpointError, match=r"share=True: .* weights cannot lie .*q_proj\.weight.*share=False"
            ):
                HookedCausalLM.from_hf(build_variant(name), share=True)

    def test_which_layouts_allow_it(self) -> None:
        for name, allows in (("llama-gqa", True), ("falcon-7b", True), ("neox-parallel", False), ("falcon-40b", False)):
            hf_model = build_variant(name)
            theirs = {one.untyped_storage().data_ptr() for one in hf_model.parameters()}
            model = HookedCausalLM.from_hf(hf_model)
            shared = {one.untyped_storage().data_ptr() in theirs for one in model.parameters()}
            assert shared == {allows}, name


class TestContextLength:
    @pytest.mark.parametrize("name", ["llama-gqa", "llama-yarn", "llama-llama3", "llama-dynamic", "falcon-rw"])
    def test_computed_positions_go_on_unchanged(self, name, tmp_path) -> None:
        save_variant(name, tmp_path)
        plain, longer = HookedCausalLM.from_pretrained(tmp_path), HookedCausalLM.from_pretrained(tmp_path, n_ctx=200)
        ids = torch.randint(97, (1, 150), generator=torch.Generator().manual_seed(0))
        assert longer.cfg == plain.cfg.replace(n_ctx=200)
        assert torch.equal(longer(ids[:, :60]), plain(ids[:, :60]))
        with pytest.raises(
            InputError, match=r"n_ctx=64; .* load with a larger one \(from_pretrained\(\.\.\., n_ctx=\.\.\.\)\)"
        ):
            plain(ids)
        with torch.no_grad():
            expected = build_variant(name)(ids).logits
        # float32; other kernels round otherwise.
        torch.testing.assert_close(longer(ids), expected, rtol=1e-3, atol=1e-3)
        assert HookedCausalLM.from_pretrained(tmp_path, n_ctx=20).cfg.n_ctx == 20

    @pytest.mark.parametrize("name", ["llama-gqa", "llama-yarn", "falcon-rw"])
    def test_the_length_is_saved(self, name, tmp_path) -> None:
        longer = HookedCausalLM.from_pretrained(save_variant(name, tmp_path), n_ctx=200)
        longer.save_pretrained(tmp_path / "longer")
        again = HookedCausalLM.from_pretrained(tmp_path / "longer")
        assert again.cfg == longer.cfg
        assert torch.equal(again(IDS), longer(IDS))

    def test_of_learned_positions_there_are_those_that_were_learned(self) -> None:
        cfg = HookedConfig(d_model=8, n_layers=1, n_heads=2, d_vocab=5, n_ctx=10, positions=LearnedPositions(offset=2))
        table, other = torch.randn(12, 8), torch.randn(3)
        shorter = config_of_length(cfg, 4)
        found = crop_positions(("pos_embed.W_pos", "x"), (table, other), shorter)
        assert torch.equal(found[0], table[:6])
        assert found[1] is other
        model = HookedCausalLM(cfg)
        model.pos_embed.W_pos = table
        weights = dict(model.named_weights())
        weights["pos_embed.W_pos"] = crop_positions(("pos_embed.W_pos",), (table,), shorter)[0]
        cut = HookedCausalLM.from_state_dict(weights, shorter)
        ids = torch.tensor([[1, 2, 3, 4]])
        assert torch.equal(cut(ids), model(ids))
        with pytest.raises(InputError, match=r"n_ctx=11: .* learned 10 positions and none past them"):
            config_of_length(cfg, 11)

    @pytest.mark.parametrize("n_ctx", [0, -3, 2.5, "64", True])
    def test_what_is_no_length(self, n_ctx) -> None:
        with pytest.raises(HookLensError, match="n_ctx is"):
            HookedCausalLM.from_pretrained("bundled:tiny-llama", n_ctx=n_ctx)
