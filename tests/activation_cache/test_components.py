"""Decompositions against sums over plain loops, on every wiring, norm and kind of position."""

import functools

import pytest
import torch
from torch.testing import assert_close

from hooklens import HookedCausalLM
from hooklens.activation_cache import MissingActivationError
from hooklens.config import LearnedPositions
from hooklens.errors import CacheError, InputError
from tests.annotations import unchecked
from tests.checkpoints import build_variant
from tests.model.networks import CONFIGS, Allocations, make_model, random_tokens
from tests.patching.variants import variants

SEQUENTIAL = [name for name, cfg in CONFIGS.items() if cfg.wiring == "sequential"]
PARALLEL = [name for name, cfg in CONFIGS.items() if cfg.wiring == "parallel"]


@pytest.fixture(params=CONFIGS)
def network(request):
    return request.param


@functools.cache
def _run(network, dtype, names_filter, keywords):
    model = make_model(network, dtype=dtype)
    names = list(names_filter) if isinstance(names_filter, tuple) else names_filter
    logits, cache = model.run_with_cache(random_tokens(2, 5), names_filter=names, **dict(keywords))
    return model, logits, cache


def run(network, *, dtype=torch.float64, names_filter=None, **keywords):
    """A model, its logits and its activations, which tests share: nothing here writes to them."""
    names = tuple(names_filter) if isinstance(names_filter, list) else names_filter
    return _run(network, dtype, names, tuple(keywords.items()))


@functools.cache
def whole_stack(network, method, apply_ln):
    """A stack of all positions and components."""
    return getattr(run(network)[2], method)(apply_ln=apply_ln)


def stream_entering(cache, layer):
    return cache["resid_post", layer - 1] if layer else cache["resid_pre", 0]


def plain_norm(norm, x):
    """The norm written out, from its parameters."""
    centred = x - x.mean(-1, keepdim=True) if norm.norm.kind == "layer" else x
    scale = (centred.square().mean(-1, keepdim=True) + norm.norm.eps).sqrt()
    gain = 1 + norm.w if norm.norm.unit_offset else norm.w
    return centred / scale * gain + (norm.b if norm.b is not None else 0)


class TestSums:
    """Float64, sums of up to a hundred terms around one: 1e-10 leaves room for rounding only."""

    @pytest.mark.parametrize("layer", [None, -1, 0, 1, 2])
    def test_layers_sum_to_the_stream(self, network, layer):
        _, _, cache = run(network)
        stack, labels = cache.decompose_resid(layer, return_labels=True)
        end = 2 if layer in (None, -1) else layer
        assert_close(stack.sum(0), stream_entering(cache, end), rtol=0, atol=1e-10)
        embeds = ["embed", "pos_embed"] if isinstance(cache.cfg.positions, LearnedPositions) else ["embed"]
        assert labels == embeds + [f"{below}_{part}" for below in range(end) for part in ("attn_out", "mlp_out")]

    @pytest.mark.parametrize("expand_neurons", [True, False])
    @pytest.mark.parametrize("layer", [None, 0, 1])
    def test_the_full_decomposition_sums_to_the_stream(self, network, layer, expand_neurons):
        _, _, cache = run(network)
        stack, labels = cache.get_full_resid_decomposition(layer, expand_neurons=expand_neurons, return_labels=True)
        assert_close(stack.sum(0), stream_entering(cache, 2 if layer is None else layer), rtol=0, atol=1e-10)
        assert len(labels) == len(set(labels)) == len(stack)
        assert labels[-1] == "bias"

    def test_the_input_of_an_mlp(self, network):
        _, _, cache = run(network)
        expected = cache["mlp_in", 1]
        for stack in (
            cache.decompose_resid(1, mlp_input=True),
            cache.get_full_resid_decomposition(1, mlp_input=True),
            cache.accumulated_resid(1, mlp_input=True)[-1:],
        ):
            assert_close(stack.sum(0), expected, rtol=0, atol=1e-10)

    @pytest.mark.parametrize("mlp_input", [False, True])
    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_through_the_norm_they_sum_to_its_output(self, network, layer, mlp_input):
        model, _, cache = run(network)
        if layer == 2 and mlp_input:
            return
        block = None if layer == 2 else model.blocks[layer]
        norm = model.ln_final if block is None else block.ln2 if mlp_input and block.ln2 is not None else block.ln1
        stream = cache["mlp_in", layer] if mlp_input else stream_entering(cache, layer)
        expected = stream if norm is None else plain_norm(norm, stream)
        bias = 0 if norm is None or norm.b is None else norm.b
        for stack in (
            cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True),
            cache.get_full_resid_decomposition(layer, mlp_input=mlp_input, apply_ln=True),
            cache.apply_ln_to_stack(cache.decompose_resid(layer, mlp_input=mlp_input), layer, mlp_input=mlp_input),
        ):
            assert_close(stack.sum(0) + bias, expected, rtol=0, atol=1e-9)

    def test_accumulated_streams_through_the_norm_end_with_what_the_unembedding_read(self, network):
        """The norm's bias was left out, so the last entry times W_U was not the logits."""
        model, _, cache = run(network)
        final = cache.accumulated_resid(apply_ln=True)[-1]
        assert_close(final, cache["unembed.hook_in"], rtol=0, atol=1e-9)
        logits = final @ model.W_U + (0 if model.unembed.b_U is None else model.unembed.b_U)
        assert_close(logits, cache["unembed.hook_out"], rtol=0, atol=1e-9)
        norm = model.ln_final
        # All of them over the denominator of the run, as in TransformerLens 2.x.
        stream = cache["resid_pre", 1]
        centred = stream - stream.mean(-1, keepdim=True) if norm.norm.kind == "layer" else stream
        gain = 1 + norm.w if norm.norm.unit_offset else norm.w
        expected = centred / cache["scale"] * gain + (0 if norm.b is None else norm.b)
        assert_close(cache.accumulated_resid(apply_ln=True)[1], expected)

    @pytest.mark.parametrize("mlp_input", [False, True])
    @pytest.mark.parametrize("layer", [0, 1])
    def test_accumulated_streams_through_the_norm_of_a_block(self, network, layer, mlp_input):
        model, _, cache = run(network)
        block = model.blocks[layer]
        norm = block.ln2 if mlp_input and block.ln2 is not None else block.ln1
        stream = cache["mlp_in", layer] if mlp_input else stream_entering(cache, layer)
        expected = stream if norm is None else plain_norm(norm, stream)
        found = cache.accumulated_resid(layer, mlp_input=mlp_input, apply_ln=True)
        assert_close(found[-1], expected, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("method", ["stack_head_results", "stack_neuron_results"])
    @pytest.mark.parametrize("layer", [-1, 0, 1])
    def test_the_remainder_completes_the_sum(self, network, method, layer):
        _, _, cache = run(network)
        stack, labels = getattr(cache, method)(layer, incl_remainder=True, return_labels=True)
        assert_close(stack.sum(0), stream_entering(cache, 2 if layer == -1 else layer), rtol=0, atol=1e-10)
        assert labels[-1] == "remainder"

    @pytest.mark.parametrize("variant", variants())
    def test_every_checkpoint_variant_in_float32(self, variant):
        """1e-5 of the stream's size: float32 sums of some hundred terms."""
        model = HookedCausalLM.from_hf(build_variant(variant))
        tokens = random_tokens(2, 7, d_vocab=97)
        logits, cache = model.run_with_cache(tokens)
        final = cache["resid_post", -1]
        for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition()):
            assert (stack.sum(0) - final).abs().max() <= 1e-5 * final.abs().max()
        answers, wrong = tokens.roll(1, 1), tokens.roll(2, 1)
        attributed = cache.logit_attrs(stack, answers, wrong).sum(0) + cache.logit_attr_bias(answers, wrong)
        expected = logits.gather(-1, answers[..., None]) - logits.gather(-1, wrong[..., None])
        # Logits of these random networks reach 30; the norm's gain and W_U multiply the stream's rounding.
        assert_close(attributed, expected[..., 0], rtol=0, atol=1e-4)


class TestComponents:
    def test_heads_are_the_values_times_w_o(self, network):
        model, _, cache = run(network)
        stack, labels = cache.stack_head_results(return_labels=True)
        for i, (layer, head) in enumerate((layer, head) for layer in range(2) for head in range(4)):
            assert labels[i] == f"L{layer}H{head}"
            block = model.blocks[layer]
            expected = cache["z", layer][:, :, head] @ block.attn.W_O[head]
            if block.ln1_post is not None:
                expected = expected / cache["scale", layer, "ln1_post"] * (1 + block.ln1_post.w)
            assert_close(stack[i], expected)

    def test_neurons_are_the_activations_times_w_out(self, network):
        model, _, cache = run(network)
        stack, labels = cache.stack_neuron_results(1, neuron_slice=[3, -1], return_labels=True)
        assert labels == ["L0N3", "L0N19"]
        block = model.blocks[0]
        for row, neuron in zip(stack, (3, 19), strict=True):
            expected = cache["post", 0][..., neuron, None] * block.mlp.W_out[neuron]
            if block.ln2_post is not None:
                expected = expected / cache["scale", 0, "ln2_post"] * (1 + block.ln2_post.w)
            assert_close(row, expected)

    def test_captured_results_serve_in_the_place_of_values(self, network):
        _, _, full = run(network)
        names = ["result", "scale", "blocks.*.hook_resid_post"]
        _, _, cache = run(network, names_filter=names)
        assert_close(cache.stack_head_results(), full.stack_head_results())
        assert_close(
            cache.stack_head_results(apply_ln=True, project_output_onto=torch.ones(12)),
            full.stack_head_results(apply_ln=True, project_output_onto=torch.ones(12)),
        )

    def test_compute_head_results_gives_what_the_hook_gives(self, network):
        _, _, watched = run(network, names_filter="*result")
        _, _, cache = run(network)
        with_results = cache.compute_head_results()
        assert ("result", 0) not in cache
        for layer in range(2):
            assert_close(with_results["result", layer], watched["result", layer])
        assert with_results.compute_head_results()["result", 0] is with_results["result", 0]

    def test_accumulated_streams(self, network):
        _, _, cache = run(network)
        stack, labels = cache.accumulated_resid(return_labels=True)
        assert labels == ["0_pre", "1_pre", "final_post"]
        assert_close(stack, torch.stack([cache["resid_pre", 0], cache["resid_pre", 1], cache["resid_post", 1]]))

    @pytest.mark.parametrize("network", SEQUENTIAL)
    def test_accumulated_streams_with_middles(self, network):
        _, _, cache = run(network)
        stack, labels = cache.accumulated_resid(1, incl_mid=True, mlp_input=True, return_labels=True)
        assert labels == ["0_pre", "0_mid", "1_pre", "1_mid"]
        assert stack[1].equal(cache["resid_mid", 0])
        assert stack[3].equal(cache["resid_mid", 1])

    @pytest.mark.parametrize("network", PARALLEL)
    def test_parallel_blocks_have_no_middle(self, network):
        _, _, cache = run(network)
        with pytest.raises(CacheError, match="incl_mid: the blocks are parallel, so the stream has no such places"):
            cache.accumulated_resid(incl_mid=True)
        _, labels = cache.accumulated_resid(1, mlp_input=True, return_labels=True)
        assert labels == ["0_pre", "1_pre"]

    def test_modes(self, network):
        _, _, cache = run(network)
        attn, mlp = (cache.decompose_resid(mode=mode, incl_embeds=False) for mode in ("attn", "mlp"))
        assert_close(attn, cache.stack_activation("attn_out"))
        assert_close(mlp, cache.stack_activation("mlp_out"))

    def test_stack_activation(self):
        _, _, cache = run("rotary")
        assert cache.stack_activation("pattern").equal(torch.stack([cache["pattern", 0], cache["pattern", 1]]))
        assert cache.stack_activation("scale", 1, "ln2").equal(cache["scale", 0, "ln2"][None])


POSITIONS = [2, slice(1, 4), -1, slice(None, None, 2), slice(4, 4), [0, -1], torch.tensor([3, 1])]


class TestPositionsAndProjections:
    # Positions are chosen in the same way with a norm, which has to choose them among its denominators, too.
    @pytest.mark.parametrize(
        ("apply_ln", "pos_slice"),
        [
            *((True, pos_slice) for pos_slice in POSITIONS),
            *((False, pos_slice) for pos_slice in POSITIONS[:2]),
            *(pytest.param(False, pos_slice, marks=pytest.mark.slow) for pos_slice in POSITIONS[2:]),
        ],
    )
    def test_positions_are_those_of_the_whole(self, network, pos_slice, apply_ln):
        _, _, cache = run(network)
        for method in (
            "accumulated_resid", "decompose_resid", "stack_head_results", "stack_neuron_results",
            "get_full_resid_decomposition",
        ):  # fmt: skip
            part = getattr(cache, method)(pos_slice=pos_slice, apply_ln=apply_ln)
            assert_close(part, whole_stack(network, method, apply_ln)[:, :, pos_slice])

    def test_positions_backwards(self, network):
        """torch has no slices with a negative step, Python's sequences do."""
        _, _, cache = run(network)
        part = cache.decompose_resid(pos_slice=slice(None, None, -2), apply_ln=True)
        assert_close(part, cache.decompose_resid(apply_ln=True)[:, :, [4, 2, 0]])

    @pytest.mark.parametrize("apply_ln", [False, True])
    def test_projections_are_products_with_the_stack(self, network, apply_ln):
        _, _, cache = run(network)
        directions = torch.randn(12, 3, dtype=torch.float64)
        for method in ("stack_head_results", "stack_neuron_results", "get_full_resid_decomposition"):
            whole = whole_stack(network, method, apply_ln)
            assert_close(getattr(cache, method)(apply_ln=apply_ln, project_output_onto=directions), whole @ directions)
            one = getattr(cache, method)(apply_ln=apply_ln, project_output_onto=directions[:, 0], pos_slice=-1)
            assert_close(one, whole[:, :, -1] @ directions[:, 0])

    def test_projected_remainders(self, network):
        _, _, cache = run(network)
        direction = torch.randn(12, dtype=torch.float64)
        for method in ("stack_head_results", "stack_neuron_results"):
            stack = getattr(cache, method)(incl_remainder=True, apply_ln=True, project_output_onto=direction)
            assert_close(stack.sum(0), cache.decompose_resid(apply_ln=True).sum(0) @ direction)

    def test_a_projection_builds_no_component(self, network):
        """Neither [d_mlp, batch, pos, d_model] nor [n_heads, batch, pos, d_model], of one layer or of all."""
        _, _, cache = run(network)
        n_vectors = 2 * 5 * 12
        with Allocations() as allocations:
            cache.get_full_resid_decomposition(apply_ln=True, project_output_onto=torch.randn(12, dtype=torch.float64))
        assert allocations.sizes
        assert allocations.with_numel(*(n_vectors * n for n in (20, 40, 4, 8, 44, 49))) == []

    def test_rows_of_one_prompt(self, network):
        _, _, cache = run(network)
        for single in (cache.apply_slice_to_batch_dim(1), cache.apply_slice_to_batch_dim([1]).remove_batch_dim()):
            stack = single.get_full_resid_decomposition(apply_ln=True)
            assert_close(stack, cache.get_full_resid_decomposition(apply_ln=True)[:, 1])

    def test_apply_ln_to_rows_and_positions(self):
        _, _, cache = run("learned, tied")
        stack = cache.decompose_resid()
        whole = cache.apply_ln_to_stack(stack)
        assert_close(cache.apply_ln_to_stack(stack[:, :, -1], pos_slice=-1), whole[:, :, -1])
        assert_close(cache.apply_ln_to_stack(stack, batch_slice=[1]), whole[:, [1]])
        assert_close(cache.apply_ln_to_stack(stack, batch_slice=1), whole[:, 1])
        assert_close(cache.apply_ln_to_stack(stack[:, 1], batch_slice=1, has_batch_dim=False), whole[:, 1])
        assert_close(cache.apply_ln_to_stack(stack, batch_slice=slice(1, 2)), whole[:, 1:])


class TestPrecision:
    @pytest.mark.parametrize("network", ["rotary", "grouped", "capped"])
    def test_half_precision_is_summed_in_float32(self, network):
        """Against the same bfloat16 numbers in float64; bfloat16 sums would be off by 1e-2 and more."""
        model, _, cache = run(network, dtype=torch.bfloat16)
        wide = cache.to(dtype=torch.float64).with_weights({k: v.double() for k, v in model.named_weights().items()})
        for method in ("stack_head_results", "stack_neuron_results"):
            stack = getattr(cache, method)(apply_ln=True)
            assert stack.dtype == torch.float32
            assert_close(stack.double(), getattr(wide, method)(apply_ln=True), rtol=1e-5, atol=1e-5)

    def test_weights_of_another_dtype(self):
        _, _, cache = run("rotary", dtype=torch.bfloat16)
        stack = cache.to(dtype=torch.float32).get_full_resid_decomposition(apply_ln=True)
        assert stack.dtype == torch.float32


class TestRefusals:
    def test_all_missing_activations_are_told_at_once(self):
        _, _, cache = run("rotary", names_filter=["resid_post", "embed", "attn_out"])
        with pytest.raises(
            MissingActivationError,
            match=r"does not hold: 'blocks.0.hook_mlp_out', 'blocks.1.hook_mlp_out'; add them to names_filter",
        ):
            cache.decompose_resid()
        with pytest.raises(MissingActivationError, match=r"stack_head_results needs .*'blocks.0.attn.hook_z'"):
            cache.stack_head_results()
        with pytest.raises(MissingActivationError, match=r"stack_neuron_results needs .*'blocks.0.mlp.hook_post'"):
            cache.stack_neuron_results()
        with pytest.raises(MissingActivationError, match=r"accumulated_resid needs .*'ln_final.hook_scale'"):
            cache.accumulated_resid(apply_ln=True)
        with pytest.raises(MissingActivationError, match=r"compute_head_results needs .*'blocks.1.attn.hook_z'"):
            cache.compute_head_results()

    def test_norms_at_the_exit_need_their_scale(self):
        _, _, cache = run("capped", names_filter=["z", "resid_post"])
        with pytest.raises(MissingActivationError, match=r"results needs .*'blocks.0.ln1_post.hook_scale'"):
            cache.stack_head_results()

    def test_the_norm_the_components_and_the_stream_are_told_together(self):
        """They were told one after the other, one run of the model for each."""
        _, _, cache = run("capped", names_filter="pattern")
        scales, outputs = ["'ln_final.hook_scale'"], ["'blocks.0.hook_mlp_out'", "'blocks.1.hook_mlp_out'"]
        exits = ["'blocks.0.ln1_post.hook_scale'", "'blocks.1.ln1_post.hook_scale'"]
        heads, end = ["'blocks.0.attn.hook_z'", "'blocks.1.attn.hook_z'", *exits], ["'blocks.1.hook_resid_post'"]
        for ask, expected in (
            (lambda: cache.decompose_resid(mode="mlp", apply_ln=True), ["'hook_embed'", *outputs, *scales]),
            (lambda: cache.stack_head_results(incl_remainder=True, apply_ln=True), [*heads, *end, *scales]),
            (
                lambda: cache.get_full_resid_decomposition(expand_neurons=False, apply_ln=True),
                [*heads, *outputs, "'hook_embed'", *end, *scales],
            ),
        ):
            with pytest.raises(MissingActivationError) as caught:
                ask()
            listed = str(caught.value).partition("does not hold: ")[2].partition(";")[0]
            assert listed.split(", ") == expected

    @pytest.mark.parametrize("layer", [3, -2])
    def test_layers_out_of_range(self, layer):
        _, _, cache = run("rotary")
        with pytest.raises(CacheError, match=rf"layer {layer} is out of range: the stream enters layers 0 to 1, and 2"):
            cache.decompose_resid(layer)

    def test_the_end_of_the_stream_has_no_mlp(self):
        _, _, cache = run("rotary")
        with pytest.raises(CacheError, match="mlp_input: layer None is the end of the stream"):
            cache.decompose_resid(mlp_input=True)

    def test_nothing_to_stack(self):
        _, _, cache = run("rotary")
        for method, what in (("stack_head_results", "heads"), ("stack_neuron_results", "neurons")):
            with pytest.raises(CacheError, match=f"there are no {what} below layer 0: .* give a layer from 1 to 2"):
                getattr(cache, method)(0)
        with pytest.raises(CacheError, match="there are no layer outputs below layer 0"):
            cache.decompose_resid(0, incl_embeds=False)
        with pytest.raises(CacheError, match="there is no layer below layer 0"):
            cache.stack_activation("z", 0)

    def test_neurons_out_of_range(self):
        _, _, cache = run("rotary")
        with pytest.raises(CacheError, match=r"neuron_slice: \[20, -21\] out of range; there are 20 neurons of an MLP"):
            cache.stack_neuron_results(neuron_slice=[1, 20, -21])
        with pytest.raises(CacheError, match=r"neuron_slice=slice\(5, 5, None\) chooses none of the 20 neurons"):
            cache.stack_neuron_results(neuron_slice=slice(5, 5))

    def test_positions_out_of_range(self):
        _, _, cache = run("rotary")
        with pytest.raises(InputError, match="pos_slice: 5 out of range; there are 5 captured positions, 0 to 4"):
            cache.decompose_resid(pos_slice=5)

    @pytest.mark.parametrize(
        "pos_slice",
        [(1, 4), torch.tensor([True, False, True, False, False]), torch.tensor([[0, 1]]), [], [0.5], "last"],
        ids=["tuple", "mask", "two axes", "none", "fraction", "text"],
    )
    def test_positions_that_could_mean_two_things(self, pos_slice):
        """A mask was read as positions 0 and 1, a tuple as a list where TransformerLens reads a range."""
        _, _, cache = run("rotary")
        with unchecked(), pytest.raises(InputError, match=r"pos_slice=.*; expected an int, a slice, or a list of at"):
            cache.decompose_resid(pos_slice=pos_slice)

    @pytest.mark.parametrize(
        "neuron_slice",
        [(1, 4), torch.arange(20) > 3, [True, False], True, [1.0]],
        ids=["tuple", "mask", "list mask", "bool", "fraction"],
    )
    def test_neurons_that_could_mean_two_things(self, neuron_slice):
        """A mask was read as neurons 0 and 1."""
        _, _, cache = run("rotary")
        with unchecked(), pytest.raises(CacheError, match="expected an int, a slice, or a list of at least one int"):
            cache.stack_neuron_results(neuron_slice=neuron_slice)

    def test_rows_that_could_mean_two_things(self):
        """A mask would be rows 0 and 1, a tuple is a range in TransformerLens."""
        _, _, cache = run("rotary")
        stack = cache.decompose_resid()
        for rows in ((0, 2), torch.tensor([True, False]), True, 0.5, [1.0], "all"):
            with unchecked(), pytest.raises(CacheError, match=r"rows=.*; expected an int, a slice, or a list of at"):
                cache.apply_slice_to_batch_dim(rows)
            with (
                unchecked(),
                pytest.raises(CacheError, match=r"batch_slice=.*; expected an int, a slice, or a list of"),
            ):
                cache.apply_ln_to_stack(stack, batch_slice=rows)
        with pytest.raises(CacheError, match=r"batch_slice: 2 out of range; there are 2 rows of the stack, 0 to 1"):
            cache.apply_ln_to_stack(stack, batch_slice=2)

    def test_directions_of_another_width(self):
        _, _, cache = run("rotary")
        with pytest.raises(CacheError, match=r"project_output_onto has shape \[7, 2\]; expected \[12\] or \[12, n\]"):
            cache.stack_head_results(project_output_onto=torch.zeros(7, 2))

    def test_an_unknown_mode(self):
        _, _, cache = run("rotary")
        with unchecked(), pytest.raises(CacheError, match="mode is 'heads'; expected 'all', 'mlp' or 'attn'"):
            cache.decompose_resid(mode="heads")

    def test_stacks_that_do_not_fit_the_norm(self):
        _, _, cache = run("rotary")
        with pytest.raises(
            CacheError, match=r"scale batch and pos axes \[2, 5\]; .* give the pos_slice and batch_slice"
        ):
            cache.apply_ln_to_stack(cache.decompose_resid()[:, :, :3])

    def test_a_cache_without_weights(self, tmp_path):
        _, _, cache = run("rotary")
        cache.save(tmp_path / "cache")
        loaded = type(cache).load(tmp_path / "cache")
        assert loaded.decompose_resid().equal(cache.decompose_resid())
        with pytest.raises(CacheError, match=r"no weights, and 'blocks.0.attn.W_O' is needed; .*connect_cache"):
            loaded.stack_head_results()
        assert loaded.with_weights(cache.weights).stack_head_results().equal(cache.stack_head_results())
