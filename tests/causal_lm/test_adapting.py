"""Adapters kept beside a model's weights, against peft's own models that are not merged."""

import copy
import pickle
import threading

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hooklens import HookedCausalLM, edits, patching, verify
from hooklens.errors import CheckpointError, ConfigError, InputError, TransformError, UnsupportedModelError
from hooklens.model.parts.adapted import adapted_maps
from hooklens.pool import load_peft_causal_lm
from hooklens.training import TrainConfig, train
from tests.adapted_models import CASES, TOKENS, gradients, load, make_adapted, randomise_adapter
from tests.checkpoints import _neox

# float32 logits of some ten, of two computations of the same function.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# float64; float32's where transformers narrows to that on the way (the norms and angles of some families).
EXACT = {"rtol": 1e-9, "atol": 1e-9}
NARROWED = {"rtol": 1e-5, "atol": 2e-5}


ORDINARY = [case for case in CASES if case not in ("tied", "latent")]


def bounds_of(case):
    return NARROWED if case in ("llama", "phi3") else EXACT


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Cases by name, made when they are asked for."""
    made = {}

    def make(case, **settings):
        key = (case, *sorted((name, str(value)) for name, value in settings.items()))
        if key not in made:
            made[key] = make_adapted(case, tmp_path_factory.mktemp("adapted"), **settings)
        return made[key]

    return make


def lora_points(model):
    return [name for name in model.hook_points() if name.endswith("hook_lora_out")]


def check_gradients(one, model, bounds):
    """Put together as the parameters are when the adapter is saved, ours are peft's, and there are no others."""
    model(TOKENS, return_type="loss").backward()
    graded = [parameter for parameter in model.parameters() if parameter.grad is not None]
    for parameter in graded:
        parameter.data = parameter.grad
    model.save_adapter(one.adapter.parent / "gradients", "one")
    found = load_file(one.adapter.parent / "gradients" / "adapter_model.safetensors")
    expected = gradients(one)
    assert len(found) >= len(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **bounds, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", ORDINARY)
class TestEqualsPeft:
    def test_logits_in_float32(self, adapted, case):
        one = adapted(case, dtype=torch.float32)
        model = load(one)
        with torch.no_grad():
            expected = one.theirs(TOKENS).logits
            with one.theirs.disable_adapter():
                base = one.theirs(TOKENS).logits
        torch.testing.assert_close(model(TOKENS), expected, **CLOSE)
        assert not torch.allclose(expected, base, atol=0.1)

    def test_logits_and_gradients(self, adapted, case):
        """What one map on disk is of several here adds up to its gradient in `A`, and to its rows of that in `B`."""
        one = adapted(case, unembedding=case != "gpt2", embedding=True)
        model = load(one)
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS), one.theirs(TOKENS).logits, **bounds_of(case))
        check_gradients(one, model, bounds_of(case))

    def test_lora_out_is_what_peft_adds_per_map(self, adapted, case):
        one = adapted(case)
        model = load(one)
        shown = {}

        def note(name):
            def keep(layer, arguments):
                x, active = arguments[0], layer.active_adapters[0]
                shown[name] = layer.lora_B[active](layer.lora_A[active](x)) * layer.scaling[active]

            return keep

        modules = {
            name: module
            for name, module in one.theirs.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        handles = [module.register_forward_pre_hook(note(name)) for name, module in modules.items()]
        with torch.no_grad():
            one.theirs(TOKENS)
        for handle in handles:
            handle.remove()
        _, cache = model.run_with_cache(TOKENS, names_filter="lora_out")
        kept = model._kept_adapters().by_name["one"]
        assert {change.module for change in kept.changes} == {
            name.removeprefix("base_model.model.") for name in modules
        }
        for change in kept.changes:
            path = model.cfg.description.weights[change.weight].parameter.rpartition(".")[0]
            ours = cache[f"{path}.hook_lora_out"].flatten(2)
            theirs = shown[f"base_model.model.{change.module}"][..., change.rows.numbers]
            torch.testing.assert_close(ours, theirs, **bounds_of(case))
        assert set(cache) == set(lora_points(model))

    def test_watching_changes_nothing_and_off_is_the_base(self, adapted, case):
        one = adapted(case)
        model = load(one)
        plain = HookedCausalLM.from_pretrained(one.base)(TOKENS)
        logits = model(TOKENS)
        watched, cache = model.run_with_cache(TOKENS)
        assert torch.equal(watched, logits)
        assert set(lora_points(model)) <= set(cache)
        with model.disable_adapter():
            assert torch.equal(model(TOKENS), plain)
            watched, cache = model.run_with_cache(TOKENS)
            assert torch.equal(watched, plain)
            assert not any(cache[name].any() for name in lora_points(model))
        nothing = [edits.Zero(name) for name in lora_points(model)]
        assert torch.equal(model.run_with_hooks(TOKENS, edits=nothing), plain)
        assert torch.equal(model(TOKENS), logits)
        model.set_adapter(None)
        assert torch.equal(model(TOKENS), plain)
        model.delete_adapter("one")
        assert torch.equal(model(TOKENS), plain)
        assert not lora_points(model)
        assert not adapted_maps(model)

    def test_saved_again_peft_loads_it(self, adapted, case, tmp_path):
        one = adapted(case, unembedding=case != "gpt2", rank_pattern={CASES[case].targets[0]: 5})
        model = load(one)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.mul_(1.1)
        model.save_adapter(tmp_path / "again", "one")
        base = AutoModelForCausalLM.from_pretrained(one.base)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "again")
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, **bounds_of(case))

    def test_merged(self, adapted, case):
        one = adapted(case, unembedding=case != "gpt2", embedding=True)
        model = load(one)
        merged = model.merge_adapter()
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), **EXACT)
        assert not adapted_maps(merged)
        assert not merged.adapters
        assert all(parameter.requires_grad for parameter in merged.parameters())
        # Read under the field's names, weights are those that act.
        torch.testing.assert_close(model.W_Q, merged.W_Q, **EXACT)
        torch.testing.assert_close(model.W_E, merged.W_E, **EXACT)
        with model.disable_adapter():
            torch.testing.assert_close(model.W_out, HookedCausalLM.from_pretrained(one.base).W_out, rtol=0, atol=0)


SETTINGS = {
    "rslora": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"dense": 5, "o_proj": 2}, "alpha_pattern": {"query_key_value": 11, "v_proj": 1}},
    "biases of the maps": {"bias": "lora_only"},
    "biases of its own": {"lora_bias": True},
    "a head of its own": {"modules_to_save": ["lm_head", "embed_out"]},
    "an embedding of its own": {"modules_to_save": ["embed_tokens", "embed_in"]},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("case", ["neox", "llama"])
def test_kinds_of_adapters(adapted, case, kind, tmp_path):
    one = adapted(case, embedding=kind in ("rslora", "DoRA"), **SETTINGS[kind])
    model = load(one)
    plain = HookedCausalLM.from_pretrained(one.base)(TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), one.theirs(TOKENS).logits, **bounds_of(case))
    torch.testing.assert_close(model.merge_adapter()(TOKENS), model(TOKENS), **EXACT)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS), plain)
    model.save_adapter(tmp_path, "one")
    written, read = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, one.adapter))
    assert written.keys() == read.keys()
    for name, tensor in read.items():
        assert torch.equal(written[name], tensor), name
    check_gradients(one, model, bounds_of(case))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A base with two adapters, and peft's model with both."""
    first = make_adapted("neox", tmp_path_factory.mktemp("two"))
    second = make_adapted(
        "neox", tmp_path_factory.mktemp("two"), seed=5, r=2, target_modules=["query_key_value", "dense_4h_to_h"]
    )
    first.theirs.load_adapter(second.adapter, "other")
    model = load(first)
    model.add_adapter("other", second.adapter)
    return first.theirs, model


@pytest.mark.parametrize("names", ["one", "other", ["one", "other"], ["other"]])
def test_several_adapters_side_by_side(two, names):
    theirs, model = two
    chosen = (names,) if isinstance(names, str) else tuple(names)
    model.set_adapter(names)
    theirs.base_model.set_adapter([{"one": "default"}.get(name, name) for name in chosen])
    assert model.adapters == ("one", "other")
    assert model.active_adapters == chosen
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, **EXACT)
    torch.testing.assert_close(model.merge_adapter()(TOKENS), model(TOKENS), **EXACT)
    trained = {name.split(".lora_")[1].split(".")[1] for name, one in model.named_parameters() if one.requires_grad}
    assert trained == set(chosen)


def test_one_of_several_is_deleted(two):
    _, model = two
    model = copy.deepcopy(model)
    model.set_adapter("one")
    expected = model(TOKENS)
    model.delete_adapter("other")
    assert model.adapters == ("one",)
    assert torch.equal(model(TOKENS), expected)
    model.delete_adapter("one")
    assert (model.adapters, model.active_adapters) == ((), ())


class TestLoading:
    def test_beside_a_tied_embedding(self, adapted):
        """It acts where tokens are looked up; of the tied unembedding peft leaves the weight as it was."""
        one = adapted("tied", embedding=True)
        model = load(one)
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS), one.theirs(TOKENS).logits, **NARROWED)
        merged = model.merge_adapter()
        assert not merged.cfg.tied_unembed
        torch.testing.assert_close(merged(TOKENS), model(TOKENS), **EXACT)
        torch.testing.assert_close(model.to_hf()(TOKENS).logits, model(TOKENS), **NARROWED)

    @pytest.mark.parametrize("case", ["neox", "gpt2"])
    def test_kept_and_merged_are_one_model(self, adapted, case):
        one = adapted(case)
        kept = HookedCausalLM.from_pretrained(one.base, adapter=one.adapter, merge=False)
        assert (kept.adapters, kept.active_adapters) == (("default",), ("default",))
        merged = HookedCausalLM.from_pretrained(one.base, adapter=one.adapter)
        torch.testing.assert_close(kept(TOKENS), merged(TOKENS), **EXACT)

    def test_beside_the_maps_of_latent_attention(self, adapted):
        """Two of which read one map on disk, and share its `A`."""
        one = adapted("latent", dtype=torch.float32)
        model = load(one)
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS), one.theirs(TOKENS).logits, **CLOSE)
        torch.testing.assert_close(model.merge_adapter()(TOKENS), model(TOKENS), **CLOSE)
        logits, cache = model.run_with_cache(TOKENS)
        assert torch.equal(logits, model(TOKENS))
        assert set(lora_points(model)) <= set(cache)
        assert cache["blocks.1.attn.v_up_proj.hook_lora_out"].shape == (2, 9, 4, 6)
        attn = model.blocks[1].attn
        assert attn.kv_down_proj.lora_A["one"].weight is attn.k_rope_proj.lora_A["one"].weight

    def test_by_the_pools_loader(self, adapted):
        one = adapted("neox", dtype=torch.float32)
        model = load_peft_causal_lm(one.base, one.adapter, torch_dtype="float32")
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS), one.theirs(TOKENS).logits, **CLOSE)
        assert any(parameter.requires_grad for parameter in model.parameters())
        frozen = load_peft_causal_lm(one.base, one.adapter, torch_dtype="float32", is_trainable=False)
        assert not any(parameter.requires_grad for parameter in frozen.parameters())

    def test_generation_on_a_cache(self, adapted):
        one = adapted("llama")
        asked = {"max_new_tokens": 6, "do_sample": False, "return_type": "tokens", "verbose": False}
        model = load(one)
        found = model.generate(TOKENS[:, :4], **asked)
        assert torch.equal(found, model.merge_adapter().generate(TOKENS[:, :4], **asked))
        with model.disable_adapter():
            off = model.generate(TOKENS[:, :4], **asked)
        assert torch.equal(off, HookedCausalLM.from_pretrained(one.base).generate(TOKENS[:, :4], **asked))

    def test_several_by_name(self, adapted):
        one = adapted("neox")
        model = HookedCausalLM.from_pretrained(
            one.base, adapter={"first": one.adapter, "second": str(one.adapter)}, merge=False
        )
        assert (model.adapters, model.active_adapters) == (("first", "second"), ("first",))

    def test_some_of_the_layers(self, adapted):
        """Layers of the model are numbered anew, those of the adapter are the checkpoint's."""
        one = adapted("llama")
        kept = HookedCausalLM.from_pretrained(one.base, adapter=one.adapter, merge=False, layers=[2, 0])
        merged = HookedCausalLM.from_pretrained(one.base, adapter=one.adapter, layers=[2, 0])
        torch.testing.assert_close(kept(TOKENS), merged(TOKENS), **EXACT)
        added = HookedCausalLM.from_pretrained(one.base, layers=[2, 0])
        added.add_adapter("one", one.adapter)
        added.set_adapter("one")
        assert torch.equal(added(TOKENS), kept(TOKENS))

    def test_beside_half_precision_adapters_are_float32(self, adapted):
        """As peft has them."""
        one = adapted("llama")
        model = HookedCausalLM.from_pretrained(one.base, adapter=one.adapter, merge=False, dtype="bfloat16")
        dtypes = {name.partition(".lora_")[1]: value.dtype for name, value in model.named_parameters()}
        assert dtypes == {"": torch.bfloat16, ".lora_": torch.float32}
        base = AutoModelForCausalLM.from_pretrained(one.base, dtype=torch.bfloat16)
        theirs = peft.PeftModel.from_pretrained(base, one.adapter).eval()
        with torch.no_grad():
            error = (model(TOKENS).double() - one.theirs(TOKENS).logits).square().mean().sqrt()
            their_error = (theirs(TOKENS).logits.double() - one.theirs(TOKENS).logits).square().mean().sqrt()
        # Two computations of one function in the same dtype.
        assert error < 1.3 * their_error

    @pytest.mark.parametrize("kind", ["int8", "int4"])
    def test_beside_quantised_weights(self, kind, tmp_path):
        base = _neox(0, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
        base.save_pretrained(tmp_path / "base")
        targets = list(CASES["neox"].targets)
        theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=targets))
        randomise_adapter(theirs, 0)
        theirs.save_pretrained(tmp_path / "adapter")
        places = {"source": tmp_path / "base", "quantize": kind, "dtype": torch.float32}
        model = HookedCausalLM.from_pretrained(**places, adapter=tmp_path / "adapter", merge=False)
        plain = HookedCausalLM.from_pretrained(**places)
        with model.disable_adapter():
            assert torch.equal(model(TOKENS), plain(TOKENS))
        merged = model.merge_adapter()
        torch.testing.assert_close(model(TOKENS), merged(TOKENS), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model(TOKENS), plain(TOKENS), atol=0.1)
        model(TOKENS, return_type="loss").backward()
        assert model.blocks[0].attn.q_proj.lora_A["default"].weight.grad.any()


class TestBelongsToTheModel:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head", "embed_out"]}])
    def test_copies(self, adapted, copied, settings):
        model = load(adapted("neox", **settings))
        other = copied(model)
        # Memory begins at another byte, so that kernels may sum in another order.
        torch.testing.assert_close(other(TOKENS), model(TOKENS), **EXACT)
        attn = other.blocks[0].attn
        assert attn.q_proj.lora_A["one"].weight is attn.v_proj.lora_A["one"].weight
        with other.disable_adapter():
            assert not torch.allclose(other(TOKENS), model(TOKENS))
        other.set_adapter(None)
        assert not torch.allclose(other(TOKENS), model(TOKENS))

    def test_parameters_and_state(self, adapted):
        one = adapted("neox")
        model, other = load(one), load(one)
        names = [name for name, _ in model.named_parameters()]
        # One `A` beside the maps of queries, keys and values.
        assert sum("lora_A" in name for name in names) == 4 * model.cfg.n_layers
        assert sum("lora_B" in name for name in names) == 6 * model.cfg.n_layers
        expected = model(TOKENS)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(TOKENS), expected)
        narrow = other.to(torch.bfloat16)
        attn = narrow.blocks[0].attn
        assert attn.q_proj.lora_A["one"].weight is attn.k_proj.lora_A["one"].weight
        assert narrow(TOKENS).dtype == torch.bfloat16

    def test_what_maps_share_stays_shared_where_torch_makes_new_parameters(self, adapted):
        """They were three from there on, trained each on its own, and only one of them was saved."""
        attn = load(adapted("neox")).to("meta").blocks[0].attn
        assert attn.q_proj.lora_A["one"].weight is attn.k_proj.lora_A["one"].weight
        assert attn.q_proj.lora_A["one"].weight is attn.v_proj.lora_A["one"].weight

    def test_other_threads_are_outside_of_a_block(self, adapted):
        model = load(adapted("neox"))
        other_model = load(adapted("neox"))
        expected, elsewhere = model(TOKENS), []
        with model.disable_adapter():
            thread = threading.Thread(target=lambda: elsewhere.append((model(TOKENS), model.active_adapters)))
            thread.start()
            thread.join()
            assert torch.equal(other_model(TOKENS), expected)
            assert model.active_adapters == ()
            assert not torch.allclose(model(TOKENS), expected)
        logits, active = elsewhere[0]
        assert torch.equal(logits, expected)
        assert active == ("one",)

    def test_a_call_keeps_what_it_was_opened_with(self, adapted):
        """Blocks that are computed again in the backward pass would be others, were that said where it runs."""
        model = load(adapted("neox"))
        model.requires_grad_()
        with model.disable_adapter():
            model(TOKENS, return_type="loss").backward()
        expected = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert not any("lora" in name for name in expected)
        model.zero_grad()
        model.gradient_checkpointing_enable()
        with model.disable_adapter():
            loss = model(TOKENS, return_type="loss")
        loss.backward()
        found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_an_error_leaves_a_block(self, adapted):
        model = load(adapted("neox"))
        expected = model(TOKENS)
        with pytest.raises(KeyError), model.disable_adapter():
            raise KeyError
        assert torch.equal(model(TOKENS), expected)

    def test_training_trains_the_adapter_alone(self, adapted, tmp_path):
        model = load(adapted("neox", dtype=torch.float32))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        train(
            model,
            [TOKENS],
            TrainConfig(steps=2, learning_rate=1e-2, checkpoint_every=1),
            folder=tmp_path,
            progress=False,
        )
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert changed == {name for name in before if "lora_" in name}

    def test_dropout_is_drawn_in_training_alone(self, adapted):
        model = load(adapted("neox", lora_dropout=0.5))
        expected = model(TOKENS)
        model.train()
        assert not torch.allclose(model(TOKENS), expected)
        model.eval()
        assert torch.equal(model(TOKENS), expected)


class TestHookPoints:
    def test_names_and_axes(self, adapted):
        model = load(adapted("llama", unembedding=True, embedding=True))
        table = model.hook_table().set_index("name")
        rows = {
            "blocks.1.attn.q_proj.hook_lora_out": ("batch", "pos", 4, 8),
            "blocks.1.attn.v_proj.hook_lora_out": ("batch", "pos", 2, 8),
            "blocks.1.attn.o_proj.hook_lora_out": ("batch", "pos", 32),
            "blocks.1.mlp.gate_proj.hook_lora_out": ("batch", "pos", 48),
            "embed.table.hook_lora_out": ("batch", "pos", 32),
            "unembed.proj.hook_lora_out": ("batch", "pos", 97),
        }
        assert {name: table["shape"][name] for name in rows} == rows
        _, cache = model.run_with_cache(TOKENS)
        assert cache["lora_out", 1, "q_proj"].shape == (2, 9, 4, 8)
        assert cache["embed.table.hook_lora_out"].shape == (2, 9, 32)

    @pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
    def test_an_edit_reaches_what_reads_it_and_nothing_else(self, adapted, settings):
        """An edit is as if the adapter had added that: held against the map's output with as much more."""
        model = load(adapted("llama", **settings))
        for name, reader in {
            "attn.q_proj": "attn.hook_q", "attn.v_proj": "attn.hook_v", "attn.o_proj": "hook_attn_out",
            "mlp.in_proj": "mlp.hook_pre_linear", "mlp.out_proj": "hook_mlp_out",
        }.items():  # fmt: skip
            edited = model.run_with_hooks(
                TOKENS, edits=[edits.Add(f"blocks.1.{name}.hook_lora_out", torch.tensor(0.25).double())]
            )
            expected = model.run_with_hooks(
                TOKENS, edits=[edits.Add(f"blocks.1.{reader}", torch.tensor(0.25).double())]
            )
            torch.testing.assert_close(edited, expected, **EXACT)

    def test_with_edits_of_single_heads(self, adapted):
        """Heads that read or write otherwise take the adapter along, and its point fires once."""
        model = load(adapted("llama"))
        merged, fired = model.merge_adapter(), []
        for name, act in {
            "blocks.1.hook_q_input": lambda x, hook: x * torch.linspace(0.5, 1, x.shape[2])[:, None],
            "blocks.1.hook_v_input": lambda x, hook: x + 0.1,
            "blocks.1.attn.hook_result": lambda x, hook: x * torch.linspace(0.5, 1, x.shape[2])[:, None],
        }.items():
            found = model.run_with_hooks(
                TOKENS, fwd_hooks=[(name, act), ("lora_out", lambda x, hook: fired.append(hook.name))]
            )
            torch.testing.assert_close(found, merged.run_with_hooks(TOKENS, fwd_hooks=[(name, act)]), **EXACT)
            assert sorted(fired) == sorted(lora_points(model))
            fired.clear()
        result = ("blocks.1.attn.hook_result", lambda x, hook: x * 0.5)
        both = model.run_with_hooks(
            TOKENS, fwd_hooks=[result, ("blocks.1.attn.o_proj.hook_lora_out", lambda x, hook: x + 0.25)]
        )
        expected = model.run_with_hooks(
            TOKENS, fwd_hooks=[result, ("blocks.1.hook_attn_out", lambda x, hook: x + 0.25)]
        )
        torch.testing.assert_close(both, expected, **EXACT)

    def test_a_switched_off_adapter_can_be_written_in(self, adapted):
        model = load(adapted("neox"))
        name = "blocks.1.attn.q_proj.hook_lora_out"
        _, cache = model.run_with_cache(TOKENS, names_filter=name)
        model.set_adapter(None)
        written = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x + cache[name])])
        assert not torch.allclose(written, model(TOKENS))

    def test_gradients_and_caches_and_sweeps(self, adapted):
        model = load(adapted("neox"))
        name = "blocks.1.attn.q_proj.hook_lora_out"
        _, cache = model.run_with_cache(TOKENS, names_filter=name, return_type="loss", incl_bwd=True)
        assert cache[f"{name}_grad"].shape == cache[name].shape
        whole = model(TOKENS)
        past = model.prefill(TOKENS[:1, :4])
        torch.testing.assert_close(model(TOKENS[:1, 4:], past_kv_cache=past), whole[:1, 4:], **EXACT)
        # Read by their fields' names, a cache's weights are those that acted in its run.
        _, run = model.run_with_cache(TOKENS)
        model.set_adapter(None)
        heads = run.stack_head_results(layer=-1)
        assert heads is not None
        model.set_adapter("one")
        clean, corrupted = TOKENS[:1], TOKENS[1:]
        site = "blocks.1.mlp.in_proj.hook_lora_out"
        swept = patching.sweep(model, clean, corrupted, site, patching.LogitDiff(3, 4), progress=False)
        assert swept.values.numel()


class TestRefusals:
    def test_what_needs_plain_weights(self, adapted, tmp_path):
        model = load(adapted("neox"))
        for kind, run in (
            (UnsupportedModelError, lambda: model.save_pretrained(tmp_path / "saved")),
            (TransformError, lambda: model.process_weights(fold_ln=True)),
            (InputError, model.dequantize),
        ):
            with pytest.raises(
                kind, match=r"adapters are kept beside 18 maps, 'blocks.0.attn.q_proj' first.*merge_adapter"
            ):
                run()
        with pytest.raises(InputError, match="initialize: fresh weights would have adapters beside them"):
            model.initialize()
        with pytest.raises(CheckpointError, match="assign=True would part"):
            model.load_state_dict(model.state_dict(), assign=True)
        with pytest.raises(ConfigError, match=r"adapters stand beside q_proj.*q_proj\.base_layer\.weight"):
            model.blocks[0].attn.W_Q = model.blocks[0].attn.W_Q.detach()
        with torch.no_grad():
            torch.testing.assert_close(model.to_hf()(TOKENS).logits, model(TOKENS), **EXACT)

    def test_names(self, adapted):
        model = load(adapted("neox"))
        folder = adapted("neox").adapter
        with pytest.raises(InputError, match=r"no adapter is called 'ones'.*those of this model are 'one'"):
            model.set_adapter("ones")
        with pytest.raises(InputError, match="there is an adapter 'one' already"):
            model.add_adapter("one", folder)
        for wrong in ("a.b", "keys"):
            with pytest.raises(InputError, match="expected a name for an adapter, without dots"):
                model.add_adapter(wrong, folder)
        with pytest.raises(InputError, match="this model has none"):
            HookedCausalLM.from_pretrained(adapted("neox").base).delete_adapter("one")
        with pytest.raises(InputError, match="merged into the weights they have none"):
            HookedCausalLM.from_pretrained(adapted("neox").base, adapter={"one": folder})
        with pytest.raises(InputError, match="adapters without names given"):
            HookedCausalLM.from_pretrained(adapted("neox").base, adapter=[folder, folder], merge=False)
        with pytest.raises(InputError, match="no adapter given"):
            HookedCausalLM.from_pretrained(adapted("neox").base, merge=False)

    def test_two_tensors_for_one_place(self, adapted):
        one = adapted("neox", modules_to_save=["lm_head", "embed_out"])
        model = load(one)
        model.add_adapter("other", one.adapter)
        with pytest.raises(InputError, match=r"each have a tensor of their own for 'unembed.proj'"):
            model.set_adapter(["one", "other"])
        assert model.active_adapters == ("one",)

    def test_what_cannot_be_beside_the_weights(self, adapted):
        """The way out is named, and is one; the model stays as it was."""
        one = adapted("neox", modules_to_save=["final_layer_norm"])
        model = HookedCausalLM.from_pretrained(one.base)
        expected = model(TOKENS)
        with pytest.raises(UnsupportedModelError, match=r"final_layer_norm.*no linear map's.*merge=True\)"):
            model.add_adapter("one", one.adapter)
        assert model.adapters == ()
        assert torch.equal(model(TOKENS), expected)
        assert all(parameter.requires_grad for parameter in model.parameters())
        merged = HookedCausalLM.from_pretrained(one.base, adapter=one.adapter)
        with torch.no_grad():
            torch.testing.assert_close(merged(TOKENS), one.theirs(TOKENS).logits, **EXACT)

    def test_a_tied_unembedding(self, adapted):
        one = adapted("tied", unembedding=True)
        with pytest.raises(UnsupportedModelError, match=r"lm_head.weight.*tied to"):
            HookedCausalLM.from_pretrained(one.base, adapter=one.adapter, merge=False)

    def test_processed_weights(self, adapted):
        one = adapted("neox")
        model = HookedCausalLM.from_pretrained(one.base).process_weights(fold_ln=True)
        with pytest.raises(InputError, match="the weights were processed"):
            model.add_adapter("one", one.adapter)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ORDINARY, "latent"])
def test_verify(adapted, case):
    report = verify(load(adapted(case, dtype=torch.float32)), progress=False)
    assert report.passed, str(report)
