"""Mixtures of experts inside a model: caches, padding, weights, decompositions, patching, verification."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from hooklens import HookedCausalLM, HookedConfig, MoEConfig, NormConfig, PartConfig, edits, get_act_name, patching
from hooklens.activation_cache import MissingActivationError
from hooklens.analysis.circuits import read_mlp_directions
from hooklens.errors import ConfigError, EditError, HookLensError, InputError, TransformError
from hooklens.patching import LogitDiff, SiteError
from hooklens.verification.explicit import Batch, ExplicitRun
from tests.annotations import unchecked
from tests.model.moe.layers import MIXTURES, compute_by_hand, make_mixed_model
from tests.model.networks import MLP, RMS_NORM, make_config, make_model, pad_rows, random_tokens
from tests.patching.estimates import published
from tests.patching.masked_reference import MaskedReference
from tests.patching.naive import patch_naively
from tests.patching.path_reference import PathTree

LAYER_NORM = NormConfig(kind="layer", eps=1e-5)
METRIC = LogitDiff(3, 5)
RICH = replace(MIXTURES["gated shared expert"], gate_norm=1.0)
# float64, a few layers: rounding only.
EXACT = {"rtol": 0, "atol": 1e-10}


def mixed(**changes):
    """A dense layer below two mixtures of different sizes."""
    return make_model(
        make_config(n_layers=3, act_fn="silu", mlp=(MLP, RICH, MIXTURES["sigmoid with correction"]), **changes)
    )


class TestConfig:
    @pytest.mark.parametrize("name", MIXTURES)
    def test_there_and_back(self, name):
        cfg = make_config(act_fn="silu", mlp=(MLP, MIXTURES[name]))
        again = HookedConfig.from_json(cfg.to_json())
        assert again == cfg
        assert hash(again) == hash(cfg)
        assert again.fingerprint == cfg.fingerprint
        assert type(again.mlp[1]) is MoEConfig
        by_options = PartConfig(kind="moe", options=MIXTURES[name].options)
        assert make_config(act_fn="silu", mlp=(MLP, by_options)) == cfg
        assert cfg.take_layers([1]).mlp == (MIXTURES[name],)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"experts_per_token": 7}, "experts_per_token=7 of 6 experts"),
            ({"n_groups": 3}, "n_groups and groups_per_token go together"),
            (
                {"n_groups": 4, "groups_per_token": 5},
                "(?s)not a multiple of n_groups=4.*groups_per_token=5 of n_groups",
            ),
            ({"n_groups": 3, "groups_per_token": 1, "experts_per_token": 3}, "of 2 experts in a token's groups"),
            ({"n_groups": 3, "groups_per_token": 1, "group_top": 3}, "group_top=3 of the 2 experts of a group"),
            ({"group_top": 2}, "group_top=2 without n_groups"),
            ({"router": "sparsemixer", "gate_norm": 1.0, "experts_per_token": 1}, "(?s)gate_norm=1.0 go.*chooses two"),
            ({"router": "sigmoid_input", "expert_bias": True}, "the gate would not weigh the biases"),
            ({"sparsemixer_eps": 0.1}, "sparsemixer_eps=0.1 with router='softmax'"),
            ({"swiglu_limit": 7.0}, "swiglu_limit belong to act_fn='clamped_swiglu'"),
            ({"shared_gate": True}, "shared_gate without a shared expert"),
            ({"router": "hash"}, "router is 'hash'; expected one of 'softmax'"),
            ({"act_fn": "sine"}, "act_fn is 'sine'"),
            ({"n_experts": 0}, "n_experts=0; expected whole numbers from 1 on"),
            ({"d_expert": None}, "d_expert must be given, found None"),
            ({"router_bias": 1}, "router_bias=1; expected True or False"),
            ({"gate_norm": -1.0}, "gate_norm=-1.0; expected finite numbers above 0"),
        ],
    )
    def test_refused(self, changes, message):
        with unchecked(), pytest.raises(ConfigError, match=message):
            MoEConfig(**{"n_experts": 6, "experts_per_token": 2, "d_expert": 5, **changes})

    def test_unknown_options_are_refused(self):
        with pytest.raises(ConfigError, match=r"part of the kind 'moe'.*n_expert"):
            make_config(mlp=PartConfig(kind="moe", options={"n_expert": 3}))

    def test_sizes_and_names(self):
        model = mixed()
        shapes = {name: tuple(weight.shape) for name, weight in model.named_weights().items()}
        assert shapes["blocks.1.mlp.W_router"] == (12, 6)
        assert shapes["blocks.1.mlp.W_in"] == shapes["blocks.1.mlp.W_gate"] == (6, 12, 5)
        assert shapes["blocks.1.mlp.W_out"] == (6, 5, 12)
        assert shapes["blocks.1.mlp.b_out"] == (6, 12)
        assert shapes["blocks.1.mlp.shared.W_in"] == (12, 7)
        assert shapes["blocks.1.mlp.shared.W_shared_gate"] == (12, 1)
        assert shapes["blocks.2.mlp.b_choice"] == (6,)
        table = model.hook_table().set_index("name")
        assert table.loc["blocks.1.mlp.router.hook_weights", "axes"] == ("batch", "pos", "expert")
        assert table.loc["blocks.2.mlp.experts.hook_post", "axes"] == ("batch", "pos", "choice", "d_expert")

    def test_words_without_a_module_are_the_mlp_s(self):
        """They were the only ones of their name, until experts had points of the same name inside the MLP."""
        assert get_act_name("post", 3) == "blocks.3.mlp.hook_post"
        assert get_act_name("pre3") == "blocks.3.mlp.hook_pre"
        assert get_act_name("result", 3) == "blocks.3.attn.hook_result"
        assert get_act_name("post", 3, "experts") == "blocks.3.mlp.experts.hook_post"
        assert get_act_name("choice", 3) == "blocks.3.mlp.router.hook_choice"


class TestRunning:
    @pytest.mark.parametrize("name", MIXTURES)
    def test_the_layer_reads_the_normed_stream_and_writes_mlp_out(self, name):
        model = make_mixed_model(MIXTURES[name], norm=RMS_NORM)
        _, cache = model.run_with_cache(random_tokens(2, 5))
        block = model.blocks[1]
        normed = cache["normalized", 1, "ln2"] * block.ln2.w
        expected = compute_by_hand(block.mlp, MIXTURES[name], normed)
        assert_close(cache["mlp_out", 1].detach(), expected.detach(), **EXACT)

    def test_cache_padding_and_chosen_logits(self):
        model = mixed()
        tokens = random_tokens(3, 7)
        whole = model(tokens)
        cache = model.prefill(tokens[:, :4])
        assert_close(model(tokens[:, 4:], past_kv_cache=cache), whole[:, 4:], **EXACT)
        assert_close(model(tokens, logits_at=-1), whole[:, -1:], **EXACT)
        for side in ("left", "right"):
            rows = [tokens[0, :3], tokens[1], tokens[2, :5]]
            padded, mask = pad_rows(rows, side)
            together = model(padded, attention_mask=mask)
            for row, alone in enumerate(rows):
                assert_close(together[row][mask[row].bool()], model(alone[None])[0], **EXACT)

    def test_a_state_dict_there_and_back(self):
        model, other = mixed(), HookedCausalLM(mixed().cfg).double()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(random_tokens(2, 5)), model(random_tokens(2, 5)))
        third = HookedCausalLM.from_state_dict(model.named_weights(), model.cfg)
        assert torch.equal(third(random_tokens(2, 5)), model(random_tokens(2, 5)))

    def test_fresh_weights(self):
        model = HookedCausalLM(mixed().cfg)
        model.initialize(seed=0)
        moe = model.blocks[1].mlp
        assert float(moe.W_in.std()) == pytest.approx(model.cfg.init_std, rel=0.2)
        assert float(moe.W_out.std()) == pytest.approx(model.cfg.init_std / 6**0.5, rel=0.2)
        assert not moe.b_router.any()
        assert not model.blocks[2].mlp.b_choice.any()
        again = HookedCausalLM(mixed().cfg)
        again.initialize(seed=0)
        assert torch.equal(moe.W_router, again.blocks[1].mlp.W_router)

    def test_training_moves_every_weight(self):
        model = make_mixed_model(RICH)
        model(random_tokens(4, 8), return_type="loss").backward()
        still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
        assert still == []

    def test_captures_in_another_dtype_keep_numbers_that_name_experts(self):
        """They became floating numbers, in which not every expert's number has a place."""
        _, cache = mixed().run_with_cache(random_tokens(1, 5), dtype=torch.bfloat16)
        assert cache["choice", 1].dtype == torch.int64
        assert cache["weights", 1].dtype == torch.bfloat16
        again = cache.to(dtype=torch.float16)
        assert again["choice", 1].dtype == torch.int64


class TestEditsAsValues:
    def test_experts_are_replaced_at_some_tokens(self):
        model, tokens = mixed(), random_tokens(2, 5)
        point = "blocks.1.mlp.router.hook_choice"
        edit = edits.Replace(point, torch.tensor([3, 0]), pos=-1, rows=0)
        _, cache = model.run_with_cache(tokens, edits=[edit], names_filter=point)
        _, plain = model.run_with_cache(tokens, names_filter=point)
        expected = plain[point].clone()
        expected[0, -1] = torch.tensor([3, 0])
        assert torch.equal(cache[point], expected)

    @pytest.mark.parametrize("kind", ["Add", "Scale", "Zero", "Mean", "Project"])
    def test_no_arithmetic_with_numbers_of_experts(self, kind):
        point = "blocks.1.mlp.router.hook_choice"
        value = {"Add": [1], "Scale": [2.0], "Project": [torch.ones(2)]}.get(kind, [])
        with pytest.raises(EditError, match=r"the numbers there name something .*use Replace or Custom"):
            mixed().run_with_hooks(random_tokens(1, 4), edits=[getattr(edits, kind)(point, *value)])
        with pytest.raises(EditError, match=r"1\.5 among whole numbers"):
            mixed().run_with_hooks(random_tokens(1, 4), edits=[edits.Replace(point, 1.5)])


class TestWeights:
    @pytest.mark.parametrize("norm", [RMS_NORM, LAYER_NORM], ids=["rms", "layer"])
    @pytest.mark.parametrize("name", MIXTURES)
    def test_norms_fold_into_router_experts_and_shared_expert(self, name, norm):
        model = make_mixed_model(MIXTURES[name], norm=norm)
        if norm.bias and MIXTURES[name].router == "sigmoid_input":
            with pytest.raises(TransformError, match=r"mlp.W_gate.* have no bias, which the bias of the norms"):
                model.process_weights(fold_ln=True)
            return
        tokens = random_tokens(2, 6)
        folded = model.process_weights(fold_ln=True)
        assert_close(folded(tokens), model(tokens), **EXACT)
        assert bool((folded.blocks[0].ln2.w == 1).all())
        if norm is LAYER_NORM:
            centred = folded.process_weights(center_writing_weights=True)
            assert_close(centred(tokens), model(tokens), **EXACT)
            assert centred.blocks[0].mlp.W_out.mean(-1).abs().max() < 1e-12

    def test_only_layers_that_read_a_biased_norm_get_biases(self):
        cfg = make_config(
            n_layers=2, act_fn="silu", mlp=(MIXTURES["softmax"], MIXTURES["softmax"]), norm=(RMS_NORM, LAYER_NORM),
            final_norm=RMS_NORM,
        )  # fmt: skip
        folded = make_model(cfg).process_weights(fold_ln=True)
        assert [one.expert_bias for one in folded.cfg.mlp] == [False, True]
        assert [one.router_bias for one in folded.cfg.mlp] == [False, True]

    def test_stacks_name_the_layers_that_have_other_axes(self):
        with pytest.raises(
            ConfigError, match=r"W_in: layers \[1, 2\] have none: it is \['expert', 'd_model', 'd_expert'\]"
        ):
            mixed().W_in  # noqa: B018
        with pytest.raises(ConfigError, match=r"b_out: layers \[1\] have none"):
            mixed().b_out  # noqa: B018

    def test_biases_behind_gates_are_no_constant(self):
        model = mixed()
        assert_close(model.accumulated_bias(1), model.blocks[0].attn.b_O + model.blocks[0].mlp.b_out)
        with pytest.raises(ConfigError, match=r"layers \[1\] are mixtures of experts with biases"):
            model.accumulated_bias(3)
        model.accumulated_bias(3, include_mlp_biases=False)


class TestReading:
    def test_components_sum_to_the_stream(self):
        model = mixed()
        _, cache = model.run_with_cache(random_tokens(2, 5))
        stream = cache["resid_post", -1]
        for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition(expand_neurons=False)):
            assert_close(stack.sum(0), stream, **EXACT)
        assert_close(cache.stack_neuron_results(1, incl_remainder=True).sum(0), cache["resid_pre", 1], **EXACT)
        parts = cache["out", 1, "experts"] + cache["out", 1, "shared"]
        assert_close(parts, cache["mlp_out", 1], **EXACT)

    def test_single_neurons_are_refused_with_the_reason(self):
        model = mixed()
        _, cache = model.run_with_cache(random_tokens(2, 5))
        reason = "a mixture of experts stands in the MLP's place"
        with pytest.raises(MissingActivationError, match=reason):
            cache["post", 1]
        for method in (cache.stack_neuron_results, cache.get_full_resid_decomposition):
            with pytest.raises(HookLensError, match=reason):
                method()
        with pytest.raises(InputError, match=reason):
            read_mlp_directions(model, 1)

    def test_rows_positions_and_files(self, tmp_path):
        model = mixed()
        tokens = random_tokens(2, 6)
        _, whole = model.run_with_cache(tokens)
        _, some = model.run_with_cache(tokens, pos_slice=[1, 4])
        for point in ("router.hook_choice", "router.hook_weights", "experts.hook_post", "shared.hook_gate"):
            name = f"blocks.1.mlp.{point}"
            assert torch.equal(some[name], whole[name][:, [1, 4]])
        whole.save(tmp_path / "cache.safetensors")
        again = type(whole).load(tmp_path / "cache.safetensors")
        assert torch.equal(again["choice", 1], whole["choice", 1])
        assert whole.apply_slice_to_batch_dim(1)["blocks.1.mlp.experts.hook_post"].shape == (6, 2, 5)


class TestPatching:
    def prompts(self):
        clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
        corrupted[:, :1] = clean[:, :1]
        return clean, corrupted

    @pytest.mark.parametrize(
        "site", ["mlp_out", "mlp_in", "blocks.*.mlp.router.hook_logits", "blocks.*.mlp.router.hook_choice",
                 "blocks.*.mlp.router.hook_weights", "blocks.*.mlp.shared.hook_post", "z"],
    )  # fmt: skip
    def test_sweeps_equal_one_forward_per_cell(self, site):
        model = make_mixed_model(RICH, norm=RMS_NORM)
        clean, corrupted = self.prompts()
        positions = "each" if site != "z" else "all"
        result = patching.sweep(
            model, clean, corrupted, patching.grid(site, positions=positions), METRIC, progress=False
        )
        for index, values in enumerate(result.per_pair.reshape(-1, 2)):
            assert_close(values, patch_naively(model, clean, corrupted, result.cells[index], METRIC), **EXACT)

    @pytest.mark.parametrize("point", ["hook_pre", "hook_post", "hook_result"])
    def test_neurons_of_other_experts_are_not_put_in(self, point):
        model, (clean, corrupted) = make_mixed_model(RICH), self.prompts()
        with pytest.raises(SiteError, match="belongs to other experts in another run"):
            patching.sweep(model, clean, corrupted, f"blocks.*.mlp.experts.{point}", METRIC, progress=False)
        alone = make_mixed_model(MIXTURES["softmax"])
        with pytest.raises(SiteError, match="belongs to other experts in another run"):
            patching.sweep(alone, clean, corrupted, "post", METRIC, progress=False)
        with pytest.raises(HookLensError, match=r"no hook point is called 'blocks\.0\.mlp\.hook_post'"):
            patching.sweep(alone, clean, corrupted, "blocks.0.mlp.hook_post", METRIC, progress=False)

    def test_attribution(self):
        model, (clean, corrupted) = make_mixed_model(RICH), self.prompts()
        found = patching.attribution(model, clean, corrupted, "mlp_out", METRIC, progress=False)
        assert found.per_pair.isfinite().all()
        with pytest.raises(SiteError, match=r"nothing between two values of 'blocks.0.mlp.router.hook_choice'"):
            patching.attribution(model, clean, corrupted, "blocks.*.mlp.router.hook_choice", METRIC, progress=False)

    @pytest.mark.parametrize(("method", "reference"), [("eap", published.eap), ("exact", published.exact)])
    def test_edges(self, method, reference):
        model, (clean, corrupted) = make_mixed_model(RICH), self.prompts()
        found = patching.edge_attribution(
            model, clean, corrupted, METRIC, method=method, rules="gradient", progress=False
        )
        table = reference(model, clean, corrupted, METRIC)
        for (writer, reader), expected in table.items():
            w, r = found.writers.index(writer), found.readers.index(reader)
            assert_close(found.per_pair[w, r], expected, **EXACT)

    def test_paths(self, monkeypatch):
        model = make_mixed_model(RICH, n_heads=2)
        clean, corrupted = self.prompts()
        monkeypatch.setattr(PathTree, "mlp", lambda self, mlp, x: compute_by_hand(mlp, RICH, x))
        tree = PathTree(model, corrupted, clean)
        senders, receivers = ["embed", "a0.h1", "m0"], ["m1", "logits"]
        result = patching.path_patch(model, clean, corrupted, senders, receivers, METRIC, progress=False)
        for values, sender in zip(result.per_pair, senders, strict=True):
            logits = tree.logits(sender, receivers)
            assert_close(values, logits[:, -1, 3] - logits[:, -1, 5], rtol=0, atol=1e-9)

    def test_circuits(self):
        model, (clean, corrupted) = make_mixed_model(RICH), self.prompts()
        circuit = patching.Circuit([("m0", "m1"), ("embed", "m0"), ("m1", "logits"), ("a0.h1", "m1")])
        result = patching.evaluate_circuits(model, clean, corrupted, [circuit], METRIC, progress=False)
        logits = MaskedReference(model, clean, corrupted).logits(circuit)
        found = result.per_pair.reshape(-1, 2)[0]
        assert_close(found, logits[:, -1, 3] - logits[:, -1, 5], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MIXTURES)
def test_verification_knows_how_router_and_experts_are_defined(name):
    """From the tokens on, in float64, by plain arithmetic on all experts; `tests/verification` runs all its checks."""
    model = make_mixed_model(MIXTURES[name], norm=RMS_NORM)
    tokens = random_tokens(2, 5)
    explicit = ExplicitRun(model, Batch(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool)))
    logits, cache = model.run_with_cache(tokens, names_filter="*")
    assert_close(logits.detach(), explicit.logits, **EXACT)
    for point, tensor in cache.items():
        assert_close(tensor.double().detach(), explicit.values[point], **EXACT)
