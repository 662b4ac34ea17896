"""Networks whose layers lack attention, an MLP or norms: what the rest of the package makes of them.

Values and gradients are compared with a plain network in `tests/combinations`.
"""

import pytest
import torch
from torch.testing import assert_close

from hooklens import HookedCausalLM, HookedKeyValueCache
from hooklens.activation_cache import MissingActivationError
from hooklens.analysis.attribution import attribute_to_heads, attribute_to_neurons
from hooklens.analysis.circuits import read_mlp_directions, read_ov_directions
from hooklens.analysis.heads import detect_heads, score_heads
from hooklens.analysis.lens import logit_lens
from hooklens.config import NoPositions, NormConfig, RotaryPositions
from hooklens.errors import CacheError, ConfigError, InputError, UnsupportedModelError
from tests.model.networks import ATTENTION, MLP, PARTIAL_CONFIGS, RMS_NORM, make_config, make_model, random_tokens

MIXED = "layers that lack parts"
MORE = {
    **PARTIAL_CONFIGS,
    "MLPs alone": make_config(attn=None, wiring="parallel", shared_norm=True),
    "nothing": make_config(attn=None, mlp=None, norm=None),
    "norms differ": make_config(
        norm=(RMS_NORM, NormConfig(kind="layer", eps=1e-5, weight=False)), norm_before=(True, False),
        norm_after=(False, True), final_norm=NormConfig(kind="layer", eps=1e-5, weight=False), gated_mlp=True,
    ),
    "MLPs of two widths": make_config(mlp=(MLP, type(MLP)(kind="mlp", options={"d_mlp": 7}))),
}  # fmt: skip


def run(network, **keywords):
    model = make_model(MORE[network])
    _, cache = model.run_with_cache(random_tokens(2, 5), **keywords)
    return model, cache


class TestDecompositions:
    """Float64, sums of up to a hundred terms around one: 1e-10 leaves room for rounding only."""

    @pytest.mark.parametrize("network", MORE)
    def test_components_sum_to_the_stream_at_every_layer(self, network):
        model, cache = run(network)
        for layer in range(model.cfg.n_layers + 1):
            stream = cache["resid_pre", layer] if layer < model.cfg.n_layers else cache["resid_post", -1]
            stacks = [
                cache.decompose_resid(layer),
                cache.get_full_resid_decomposition(layer),
                cache.get_full_resid_decomposition(layer, expand_neurons=False),
                cache.stack_head_results(layer, incl_remainder=True),
                cache.stack_neuron_results(layer, incl_remainder=True),
                cache.accumulated_resid(layer)[-1:],
            ]
            for stack in stacks:
                assert_close(stack.sum(0), stream, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("network", MORE)
    def test_labels_are_of_what_is_there(self, network):
        model, cache = run(network)
        _, labels = cache.decompose_resid(return_labels=True)
        found = [
            f"{block.layer}_{branch}_out"
            for block in model.cfg.blocks
            for branch, part in (("attn", block.attn), ("mlp", block.mlp))
            if part is not None
        ]
        assert labels == ["embed", *found]

    @pytest.mark.parametrize("network", MORE)
    def test_the_end_is_read_through_the_final_norm_where_there_is_one(self, network):
        model, cache = run(network)
        parts = cache.get_full_resid_decomposition(apply_ln=True).sum(0)
        ends = cache.accumulated_resid(apply_ln=True)[-1]
        assert_close(ends, cache["unembed.hook_in"], rtol=0, atol=1e-10)
        bias = None if model.ln_final is None else model.ln_final.b
        assert_close(parts if bias is None else parts + bias, ends, rtol=0, atol=1e-10)
        logits = model(random_tokens(2, 5))
        whole = cache["resid_post", -1]
        attributed = cache.logit_attrs(whole, tokens=3) + cache.logit_attr_bias(3)
        assert_close(attributed, logits[..., 3].detach(), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("mlp_input", [False, True])
    def test_a_layer_is_read_through_the_norm_of_its_first_reader(self, mlp_input):
        model, cache = run(MIXED)
        if mlp_input:
            assert_close(cache.decompose_resid(0, mlp_input=True).sum(0), cache["mlp_in", 0])
        stack = cache.decompose_resid(0, mlp_input=mlp_input, apply_ln=True)
        normed = cache["normalized", 0, "ln2"] * model.blocks[0].ln2.w
        assert_close(stack.sum(0), normed.detach(), rtol=0, atol=1e-10)
        assert_close(cache.decompose_resid(1, apply_ln=True).sum(0), cache["resid_pre", 1], rtol=0, atol=1e-10)

    def test_what_nothing_reads_is_refused(self):
        _, cache = run(MIXED)
        with pytest.raises(CacheError, match="layer 2 has neither attention nor an MLP, so nothing reads the stream"):
            cache.decompose_resid(2, apply_ln=True)
        with pytest.raises(CacheError, match="mlp_input: layer 1 has no MLP"):
            cache.decompose_resid(1, mlp_input=True)
        with pytest.raises(CacheError, match="there are no heads below layer 1: no layer there has any"):
            cache.stack_head_results(1)
        _, cache = run("attention only")
        with pytest.raises(CacheError, match="incl_mid: no block has attention and an MLP"):
            cache.accumulated_resid(incl_mid=True)
        with pytest.raises(CacheError, match="there are no neurons below layer 2: no layer there has any"):
            cache.stack_neuron_results()

    def test_middles_where_the_stream_has_them(self):
        _, cache = run(MIXED)
        streams, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
        assert labels == ["0_pre", "1_pre", "2_pre", "3_pre", "3_mid", "final_post"]
        assert torch.equal(streams[4], cache["resid_mid", 3])

    def test_neurons_of_layers_of_two_widths(self):
        """Labels and choices went by cfg.d_mlp, whatever the layer's own width was."""
        _, cache = run("MLPs of two widths")
        _, labels = cache.stack_neuron_results(return_labels=True)
        assert labels == [f"L0N{n}" for n in range(20)] + [f"L1N{n}" for n in range(7)]
        _, labels = cache.stack_neuron_results(neuron_slice=[0, -1], return_labels=True)
        assert labels == ["L0N0", "L0N19", "L1N0", "L1N6"]
        with pytest.raises(CacheError, match=r"neuron_slice: \[7\] out of range; there are 7 neurons"):
            cache.stack_neuron_results(neuron_slice=[7])

    def test_head_results_are_computed_where_there_are_heads(self):
        model, cache = run(MIXED)
        named = run(MIXED, names_filter="*")[1]
        for layer in (1, 3):
            with pytest.raises(MissingActivationError, match="compute_head_results"):
                cache["result", layer]
            assert_close(cache.compute_head_results()["result", layer], named["result", layer], rtol=0, atol=1e-12)
        assert cache.stack_head_results(return_labels=True)[1] == model.all_head_labels()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("blocks.0.attn.hook_pattern", "this layer has no attention"),
        ("blocks.0.hook_attn_out", "this layer has no attention"),
        ("blocks.2.hook_q_input", "this layer has no attention"),
        ("blocks.1.mlp.hook_post", "this layer has no MLP"),
        ("blocks.1.hook_mlp_in", "this layer has no MLP"),
        ("blocks.0.hook_resid_mid", "this layer has no attention"),
        ("blocks.1.hook_resid_mid", "this layer has no MLP"),
        ("blocks.0.ln1_post.hook_scale", "this layer has no attention"),
        ("blocks.1.ln1.hook_scale", "this layer has no norms"),
        ("blocks.3.attn.hook_rot_q", "its positions are not rotary"),
    ],
)
def test_an_activation_that_is_not_there_says_why(name, reason):
    model, cache = run(MIXED)
    with pytest.raises(MissingActivationError, match=f"the model has no activation '{name}': {reason}"):
        cache[name]
    assert name not in model.hook_points()


def test_without_a_final_norm_there_is_none_to_ask():
    _, cache = run("attention only")
    with pytest.raises(MissingActivationError, match=r"no activation 'ln_final\.hook_scale': it has no final norm"):
        cache["scale"]


class TestWeights:
    def test_stacks_name_the_layers_that_lack_the_part(self):
        model = make_model(MIXED)
        for name in ("W_Q", "b_O"):
            with pytest.raises(ConfigError, match=rf"{name}: layers \[0, 2\] have none: this layer has no attention"):
                getattr(model, name)
        with pytest.raises(ConfigError, match=r"W_in: layers \[1, 2\] have none: this layer has no MLP"):
            _ = model.W_in
        with pytest.raises(ConfigError, match=r"W_Q: layers \[0, 2\] have none"):
            model.all_composition_scores("K")
        assert model.all_head_labels() == [f"L{layer}H{head}" for layer in (1, 3) for head in range(4)]

    def test_attention_only_has_all_weights_of_attention(self):
        model = make_model("attention only")
        assert model.W_Q.shape == (2, 4, 12, 6)
        assert model.all_composition_scores("V").shape == (2, 4, 2, 4)
        with pytest.raises(ConfigError, match=r"W_out: layers \[0, 1\] have none: this layer has no MLP$"):
            _ = model.W_out

    @pytest.mark.parametrize("network", [name for name in MORE if name not in (MIXED, "norms differ")])
    def test_the_accumulated_bias_is_that_of_the_full_decomposition(self, network):
        model, cache = run(network)
        for layer in range(3):
            bias = cache.get_full_resid_decomposition(layer)[-1]
            assert_close(model.accumulated_bias(layer).detach().expand_as(bias), bias, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("network", MORE)
    def test_state_dicts_load_under_both_names(self, network):
        model, tokens = make_model(MORE[network]), random_tokens(2, 5)
        logits = model(tokens)
        for state in (model.state_dict(), dict(model.named_weights())):
            assert torch.equal(HookedCausalLM.from_state_dict(dict(state), model.cfg)(tokens), logits)
            other = make_model(MORE[network], seed=3)
            other.load_state_dict(dict(state))
            assert torch.equal(other(tokens), logits)

    @pytest.mark.parametrize("network", MORE)
    def test_folded_norms_leave_the_logits_as_they_are(self, network):
        model, tokens = make_model(MORE[network]), random_tokens(2, 5)
        folded = model.process_weights(fold_ln=True, fold_value_biases=True)
        # Bits move because sums are taken in another order.
        assert_close(folded(tokens), model(tokens), rtol=1e-9, atol=1e-9)


class TestCaches:
    @pytest.mark.parametrize("network", MORE)
    def test_entries_of_layers_without_attention_hold_only_a_length(self, network, tmp_path):
        model, tokens = make_model(MORE[network]), random_tokens(2, 6)
        expected = model(tokens)[:, 4:]
        kv = model.prefill(tokens[:, :4])
        heads = [entry.head_shape[0] for entry in kv.entries]
        assert heads == list(model.cfg.kv_heads)
        assert [len(entry) for entry in kv.entries] == [4] * model.cfg.n_layers
        assert_close(model(tokens[:, 4:], past_kv_cache=kv), expected, rtol=1e-10, atol=1e-10)
        kv.save(tmp_path / "kv")
        loaded = HookedKeyValueCache.load(tmp_path / "kv")
        derived = [
            loaded,
            kv.select([0, 1]),
            kv.crop(4),
            kv.clone(),
            kv.to(dtype=torch.float32).to(dtype=torch.float64),
        ]
        for cache in derived:
            # float32 and back: 7 digits.
            assert_close(model(tokens[:, 4:], past_kv_cache=cache), expected, rtol=1e-4, atol=1e-4)
        growing = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64)
        for column in range(6):
            logits = model(tokens[:, column : column + 1], past_kv_cache=growing)
        assert_close(logits[:, 0], expected[:, -1], rtol=1e-10, atol=1e-10)
        widths = [n * (d_key + d_value) for n, d_key, d_value in model.cfg.head_shapes]
        assert growing.nbytes == 2 * 6 * 8 * sum(widths)

    @pytest.mark.parametrize("network", MORE)
    def test_one_frozen_row_serves_many(self, network):
        model, tokens = make_model(MORE[network]), random_tokens(3, 6)
        tokens[:, :4] = tokens[0, :4]
        kv = model.prefill(tokens[:1, :4])
        assert_close(model(tokens[:, 4:], past_kv_cache=kv), model(tokens)[:, 4:], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("network", MORE)
    def test_generating_with_a_cache_and_without(self, network):
        model, tokens = make_model(MORE[network]), random_tokens(2, 4)
        ways = [
            model.generate(tokens, max_new_tokens=5, do_sample=False, use_past_kv_cache=use, verbose=False)
            for use in (True, False)
        ]
        assert torch.equal(*ways)

    def test_a_failed_call_leaves_the_cache_as_it_was(self):
        model, tokens = make_model(MIXED), random_tokens(2, 4)
        kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64)
        model(tokens, past_kv_cache=kv)

        def fail(tensor, hook):
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            model.run_with_hooks(tokens, past_kv_cache=kv, fwd_hooks=[("blocks.3.hook_resid_post", fail)])
        assert [len(kv), *map(len, kv.entries)] == [4] * 5

    def test_an_empty_cache_takes_the_dtype_of_the_layers_that_attend(self):
        model = make_model(MIXED, dtype=torch.bfloat16)
        kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2)
        with torch.no_grad():
            model(random_tokens(2, 4), past_kv_cache=kv)
            assert kv.dtype == torch.bfloat16
            model(random_tokens(2, 2), past_kv_cache=kv)
        assert len(kv) == 6

    def test_a_cache_with_heads_in_other_layers_is_refused(self):
        cfg = MORE[MIXED]
        model, other = make_model(cfg), make_model(cfg.replace(attn=(ATTENTION, None, ATTENTION, None)))
        kv = other.prefill(random_tokens(2, 4))
        with pytest.raises(CacheError, match=r"in layers with \[0, 2, 0, 2\] key-value heads"):
            model(random_tokens(2, 2), past_kv_cache=kv)


@pytest.mark.parametrize("network", [MIXED, "attention only", "MLPs alone", "nothing"])
def test_an_in_place_edit_of_a_block_that_changes_nothing_leaves_its_input_alone(network):
    """What leaves a layer without any part is the tensor that entered it."""
    model, tokens = make_model(MORE[network]), random_tokens(2, 5)
    with torch.no_grad():
        _, plain = model.run_with_cache(tokens)
    for block in model.cfg.blocks:
        edited = f"blocks.{block.layer}.hook_resid_post"
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, fwd_hooks=[(edited, lambda t, hook: t.mul_(2))])
        assert torch.equal(cache[edited], 2 * plain[edited])
        above = [name for name in plain if name.startswith(tuple(f"blocks.{i}." for i in range(block.layer + 1)))]
        for name in set(above) - {edited}:
            assert torch.equal(cache[name], plain[name]), name


class TestAnalysis:
    def test_heads_are_scored_where_there_are_any(self):
        model, tokens = make_model(MIXED), random_tokens(2, 5)
        target = torch.ones(5, 5).tril(-1).bool()
        scores = score_heads(model, tokens, target)
        assert scores.isnan().all(1).tolist() == [True, False, True, False]
        assert sorted(detect_heads(model, tokens, target).index) == model.all_head_labels()

    def test_circuits_of_parts_that_are_not_there_are_refused(self):
        model = make_model(MIXED)
        with pytest.raises(InputError, match="layer 0 has no circuit to read: this layer has no attention"):
            read_ov_directions(model, 0, 0)
        with pytest.raises(InputError, match="layer 1 has no circuit to read: this layer has no MLP"):
            read_mlp_directions(model, 1)

    @pytest.mark.parametrize("network", [MIXED, "norms differ"])
    def test_circuits_behind_norms_of_every_kind(self, network):
        model = make_model(MORE[network])
        assert len(read_ov_directions(model, 1, 0, n_directions=2))
        assert len(read_mlp_directions(model, 0, weight="in", n_directions=2))

    @pytest.mark.parametrize("network", MORE)
    def test_the_lens_ends_with_the_model(self, network):
        model, cache = run(network)
        table = logit_lens(model, cache, k=1)
        last = table[table["stream"] == "final_post"]
        assert last["kl"].abs().max() < 1e-12
        assert [row[0] for row in last["top_tokens"]] == model(random_tokens(2, 5))[:, -1].argmax(-1).tolist()

    def test_logits_are_attributed_without_a_final_norm(self):
        model, cache = run("attention only")
        logits = model(random_tokens(2, 5))[:, -1, 3]
        table = attribute_to_heads(model, cache, 3)
        assert_close(torch.tensor(table.groupby("row")["value"].sum().tolist()), logits.float(), rtol=1e-5, atol=1e-5)
        model, cache = run(MIXED)
        logits = model(random_tokens(2, 5))[:, -1, 3]
        sums = attribute_to_neurons(model, cache, 3, k=4).groupby("row")["value"].sum()
        assert_close(torch.tensor(sums.tolist()), logits.float(), rtol=1e-5, atol=1e-5)


def test_positions_that_no_layer_reads_are_refused():
    model, ids = make_model(make_config(attn=None, positions=RotaryPositions(dim=2))), random_tokens(1, 3)
    with pytest.raises(InputError, match="nothing in this network reads them"):
        model(ids, positions=torch.arange(3))
    one = make_config(attn=(None, ATTENTION), positions=(RotaryPositions(dim=2), NoPositions()), windows=(3, None))
    with pytest.raises(InputError, match="nothing in this network reads them"):
        make_model(one)(ids, positions=torch.arange(3))


@pytest.mark.parametrize("network", MORE)
def test_formats_that_cannot_express_it_say_so(network):
    with pytest.raises(UnsupportedModelError, match="no family can express"):
        make_model(MORE[network]).to_hf()


def test_attributions_of_rows_and_positions_without_a_final_norm():
    """The axes of rows and positions were those of the final norm's denominator."""
    model, cache = run("attention only")
    logits = model(random_tokens(2, 5)).detach()
    whole = cache["resid_post", -1]
    ids = torch.tensor([3, 4])
    expected = torch.stack([logits[0, :, 3], logits[1, :, 4]])
    assert_close(cache.logit_attrs(whole[None], ids)[0], expected, rtol=0, atol=1e-10)
    assert_close(cache.logit_attrs(whole[:, -1], ids, pos_slice=-1), expected[:, -1], rtol=0, atol=1e-10)
    one = cache.logit_attrs(whole, 4, batch_slice=1)
    assert_close(one, expected[1], rtol=0, atol=1e-10)
    single = cache.apply_slice_to_batch_dim(1)
    assert_close(single.logit_attrs(whole[1], torch.tensor([4] * 5)), expected[1], rtol=0, atol=1e-10)
    with pytest.raises(CacheError, match=r"the stack has shape \[2, 5, 7\]; expected \[\*components, batch, pos, 12\]"):
        cache.logit_attrs(whole[..., :7], 3)
