"""Faults that the engine had where two of its features met, each with a test over its whole kind."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hooklens import HookedCausalLM, HookedConfig, HookedKeyValueCache
from hooklens.config import AlibiPositions, LearnedPositions, NormConfig, RotaryPositions, RotaryScaling
from hooklens.errors import CacheError, ConfigError, EditError, HookNameError, InputError
from hooklens.hooks.edits import Add, Replace, Scale, Zero
from tests.annotations import unchecked
from tests.combinations.reference import Reference
from tests.model.networks import CONFIGS, RMS_NORM, activations_of, make_config, make_model, pad_rows, random_tokens

# The same sums in another order, in float64.
CLOSE = {"rtol": 0, "atol": 1e-10}
LEFT = [random_tokens(1, 5, seed=3)[0], random_tokens(1, 3, seed=4)[0]]
PATTERN, Z, V = "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_z", "blocks.0.attn.hook_v"


def assert_finite(tensors: dict[str, Tensor]) -> None:
    assert tensors
    assert {name for name, tensor in tensors.items() if not tensor.isfinite().all()} == set()


# Values, masks and choices.


@pytest.mark.parametrize("name", [V, "blocks.0.attn.hook_k", Z, "blocks.0.hook_resid_pre", PATTERN])
def test_a_tensor_without_axes_is_the_number_that_it_holds(name):
    """`torch.tensor(0.5)` gave a value expanded with strides of 0, which the attention kernel of a prefix misread."""
    model = make_model("grouped", dtype=torch.float32)
    kv = model.prefill(random_tokens(1, 6))
    ids = random_tokens(3, 4)
    for pos in (None, 7):
        with torch.no_grad():
            for keywords in ({"past_kv_cache": kv}, {}):
                at = pos if keywords or pos is None else 2
                one, other = (
                    model.run_with_hooks(ids, edits=[Replace(name, value, pos=at)], **keywords)
                    for value in (0.5, torch.tensor(0.5))
                )
                assert torch.equal(one, other)


@pytest.mark.parametrize("strided", ["expanded", "transposed", "every other"])
def test_values_in_any_layout_of_memory_on_a_frozen_prefix(strided):
    """Keys and values whose last axis is not dense gave wrong attention over a frozen prefix."""
    model = make_model("rotary", dtype=torch.float32)
    kv, ids = model.prefill(random_tokens(1, 6)), random_tokens(2, 4)
    shape = (2, 4, 4, 6)
    value = {
        "expanded": torch.randn(1, 1, 1, 1).expand(shape),
        "transposed": torch.randn(6, 4, 4, 2).permute(3, 2, 1, 0),
        "every other": torch.randn(2, 4, 4, 12)[..., ::2],
    }[strided]
    with torch.no_grad():
        for name in (V, "blocks.0.attn.hook_k", "blocks.0.attn.hook_q", "blocks.0.attn.hook_rot_k"):
            dense = model.run_with_hooks(ids, past_kv_cache=kv, edits=[Replace(name, value.contiguous())])
            hooked = model.run_with_hooks(ids, past_kv_cache=kv, fwd_hooks=[(name, lambda t, hook: value)])
            edited = model.run_with_hooks(ids, past_kv_cache=kv, edits=[Replace(name, value)])
            assert torch.equal(edited, dense)
            # Kernels may take another way through memory of another layout.
            torch.testing.assert_close(hooked, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("field", ["head", "rows", "pos", "query_head"])
@pytest.mark.parametrize(
    "mask", [[False, True], np.array([False, True]), torch.tensor([False, True]), True], ids=["list", "np", "pt", "one"]
)
def test_masks_are_no_choice(field, mask):
    """`head=[False, True]` chose heads 0 and 1: to Python a bool is an int."""
    with unchecked(), pytest.raises(EditError, match=field):
        Zero(Z, **{field: mask})


@pytest.mark.parametrize("field", ["head", "rows", "pos"])
@pytest.mark.parametrize("twice", [[0, 0], [1, 0, 1], torch.tensor([0, 0]), np.array([0, 0])])
def test_entries_that_are_named_twice(field, twice):
    """`rows=[0, 0]` wrote one of two values, whichever came last."""
    with pytest.raises(EditError, match="once"):
        Zero(Z, **{field: twice})


@pytest.mark.parametrize(("field", "twice"), [("rows", [0, -2]), ("pos", [1, -4]), ("head", [0, -4])])
def test_entries_that_are_named_from_both_ends(field, twice):
    """The same entry under two numbers is seen once the sizes are known."""
    model = make_model("rotary")
    with pytest.raises(EditError, match=r"once|twice"):
        model.run_with_hooks(random_tokens(2, 5), edits=[Zero(Z, **{field: twice})])


@pytest.mark.parametrize("field", ["head", "rows", "pos"])
def test_choices_of_every_numeric_kind_are_the_same_choice(field):
    """numpy's integers and tensors without axes were refused, or kept an axis that an int drops."""
    model, ids = make_model("rotary"), random_tokens(3, 4)
    one = [1, np.int64(1), np.int32(1), torch.tensor(1), np.array(1)]
    several = [[0, 2], np.array([0, 2]), torch.tensor([0, 2]), [np.int64(0), torch.tensor(2)], slice(0, 3, 2), (0, 2)]
    with unchecked(), torch.no_grad():
        for choices in (one, several):
            logits = [model.run_with_hooks(ids, edits=[Zero(Z, **{field: choice})]) for choice in choices]
            assert all(torch.equal(logits[0], other) for other in logits[1:])
            assert not torch.equal(logits[0], model(ids))


@pytest.mark.parametrize("pos_slice", [[0], [2, 0], np.array([1]), torch.tensor([1, 2]), 1, slice(1, 3)])
def test_a_capturing_block_takes_the_positions_that_run_with_cache_takes(pos_slice):
    """`model.capture(pos_slice=[0])` was refused inside of the forward: the list had become a tuple on the way."""
    model, ids = make_model("rotary"), random_tokens(2, 4)
    with torch.no_grad(), model.capture("*", pos_slice=pos_slice) as found:
        model(ids)
    with torch.no_grad():
        _, expected = model.run_with_cache(ids, names_filter="*", pos_slice=pos_slice)
    assert found.keys() == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


# Positions.


@pytest.mark.parametrize("logits_at", [-1, 2, [0, 1], [4, 0], slice(1, 3), [3, 4]])
@pytest.mark.parametrize("point", ["unembed.hook_in", "unembed.hook_out"])
@pytest.mark.parametrize("pos", [-1, 4, 0])
def test_an_edit_of_the_unembedding_means_the_calls_positions(point, logits_at, pos):
    """`pos=-1` under `logits_at=[0, 1]` edited position 1, the last that was computed."""
    model, ids = make_model("rotary"), random_tokens(2, 5)
    chosen = [range(5)[one] for one in ([logits_at] if isinstance(logits_at, int) else [])] or (
        list(range(5))[logits_at] if isinstance(logits_at, slice) else logits_at
    )
    with torch.no_grad():
        whole = model.run_with_hooks(ids, edits=[Add(point, 1.0, pos=pos)])
        found = model.run_with_hooks(ids, edits=[Add(point, 1.0, pos=pos)], logits_at=logits_at)
    torch.testing.assert_close(found, whole[:, chosen], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_an_edit_of_the_unembedding_of_padded_rows(side):
    """The same, where the last token stands in another column of every row."""
    model = make_model("rotary")
    ids, mask = pad_rows(LEFT, side)
    edits = [Add("unembed.hook_out", 1.0, pos=-1)]
    with torch.no_grad():
        found = model.run_with_hooks(ids, attention_mask=mask, edits=edits, logits_at=slice(-2, None))
        for row, tokens in zip(found, LEFT, strict=True):
            torch.testing.assert_close(row, model.run_with_hooks(tokens[None], edits=edits)[0, -2:], **CLOSE)


@pytest.mark.parametrize("inference", [False, True])
def test_a_hook_in_place_after_an_edit_keeps_the_edits_value(inference):
    """The edit's own tensor passed on as the activation, so a later hook in place changed the edit, and its source."""
    model, ids = make_model("rotary"), random_tokens(2, 4)
    with torch.inference_mode(inference), torch.no_grad():
        _, cache = model.run_with_cache(random_tokens(2, 4, seed=9), names_filter="*")
        for name in activations_of(model):
            value, before = cache[name], cache[name].clone()
            edit = Replace(name, value)
            plain = model.run_with_hooks(ids, edits=[edit])
            with model.add_edit(edit):
                model.run_with_hooks(ids, fwd_hooks=[(name, lambda t, hook: _double(t))])
            assert torch.equal(value, before), name
            # The other way round, and through functions that return the value itself.
            model.run_with_hooks(
                ids, fwd_hooks=[(name, lambda t, hook, value=value: value), (name, lambda t, hook: _double(t))]
            )
            assert torch.equal(value, before), name
            assert torch.equal(model.run_with_hooks(ids, edits=[edit]), plain), name


def _double(tensor: Tensor) -> None:
    tensor.mul_(2.0)


@pytest.mark.parametrize(
    "network",
    [
        make_config(positions=AlibiPositions()),
        make_config(positions=AlibiPositions(scaled=True), windows=(None, 3)),
        make_config(windows=(2, 3)),
        make_config(positions=LearnedPositions(offset=1), windows=(2, None)),
        make_config(positions=RotaryPositions(dim=4), windows=(4, None), n_kv_heads=2),
        make_config(positions=(RotaryPositions(dim=4), AlibiPositions())),
    ],
)
@pytest.mark.parametrize("given", [[3, 4, 5, 9, 10, 20], [0, 0, 1, 1, 2, 2], [9, 7, 5, 3, 1, 0]])
def test_given_positions_count_wherever_positions_are_read(network, given):
    """Linear biases and windows went on counting columns where positions were given."""
    model, ids = make_model(network), random_tokens(2, 6)
    with torch.no_grad():
        found = model(ids, positions=torch.tensor(given))
        expected = Reference(model).run(ids.tolist(), positions=[given, given])
    torch.testing.assert_close(found, torch.stack([row.logits for row in expected]), **CLOSE)


def test_positions_that_nothing_reads_are_refused():
    """They were dropped in silence."""
    with pytest.raises(InputError, match="positions"):
        make_model("bare")(random_tokens(1, 3), positions=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("network", ["rotary", "alibi", "learned, tied"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("outside", [32, -1])
def test_positions_outside_of_the_context_are_refused(network, masked, outside):
    """With a mask they were not looked at: rotary went on past n_ctx, learned positions failed in a look-up."""
    keywords = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])} if masked else {}
    with pytest.raises(InputError, match="n_ctx"):
        make_model(network)(random_tokens(2, 3), positions=torch.tensor([0, 1, outside]), **keywords)


@pytest.mark.parametrize("n_new", [1, 2])
@pytest.mark.parametrize("padded", [0, 1, 2])
def test_a_padded_row_does_not_decide_what_others_see_of_a_shared_prefix(n_new, padded):
    """With one new column a window's mask of the first row was taken for all, also where that row is padding."""
    model = make_model(make_config(windows=(1, 2)))
    prefix, ids = random_tokens(1, 4), random_tokens(3, n_new)
    mask = torch.ones(3, n_new, dtype=torch.long)
    mask[padded, 0] = 0
    with torch.no_grad():
        found = model(ids, past_kv_cache=model.prefill(prefix), attention_mask=mask)
        for row in range(3):
            tokens = ids[row][mask[row].bool()]
            expected = model(torch.cat([prefix[0], tokens])[None])[0, 4:]
            torch.testing.assert_close(found[row][mask[row].bool()], expected, **CLOSE)


# Parts of the model that do not run.

IDLE = [
    ({"stop_at_layer": 1}, "blocks.1.attn.hook_z"),
    ({"stop_at_layer": 1}, "ln_final.hook_scale"),
    ({"stop_at_layer": 0}, "blocks.0.hook_resid_pre"),
    ({"start_at_layer": 1}, "blocks.0.attn.hook_z"),
    ({"start_at_layer": 1}, "hook_embed"),
]


def _call_part(model: HookedCausalLM, keywords: dict, **more):
    ids = torch.randn(2, 3, 12, dtype=torch.float64) if "start_at_layer" in keywords else random_tokens(2, 3)
    return model.run_with_hooks(ids, **keywords, **more)


@torch.no_grad()
@pytest.mark.parametrize(("keywords", "name"), IDLE)
def test_edits_and_captures_in_blocks_that_do_not_run_are_refused(keywords, name):
    """They did nothing, and nobody was told."""
    model = make_model("rotary")
    with pytest.raises(HookNameError, match="does not reach"):
        _call_part(model, keywords, edits=[Zero(name)])
    with pytest.raises(HookNameError, match="does not reach"):
        _call_part(model, keywords, fwd_hooks=[(name, lambda t, hook: None)])
    ids = torch.randn(2, 3, 12, dtype=torch.float64) if "start_at_layer" in keywords else random_tokens(2, 3)
    with pytest.raises(HookNameError, match="does not reach"):
        model.run_with_cache(ids, names_filter=name, **keywords)


@torch.no_grad()
def test_globs_act_where_the_call_runs():
    """A glob over all layers selects those that run."""
    model, ids, fired = make_model("rotary"), random_tokens(2, 3), []
    stream = model(ids, stop_at_layer=1)
    _, below = model.run_with_cache(ids, names_filter="*hook_z", stop_at_layer=1)
    _, above = model.run_with_cache(stream, names_filter="*hook_z", start_at_layer=1)
    assert (set(below), set(above)) == ({"blocks.0.attn.hook_z"}, {"blocks.1.attn.hook_z"})
    model.run_with_hooks(stream, fwd_hooks=[("*hook_z", lambda t, hook: fired.append(hook.name))], start_at_layer=1)
    assert fired == ["blocks.1.attn.hook_z"]
    halves = model.run_with_hooks(
        model.run_with_hooks(ids, edits=[Zero("*hook_z", head=1)], stop_at_layer=1),
        edits=[Zero("*hook_z", head=1)],
        start_at_layer=1,
    )
    assert torch.equal(halves, model.run_with_hooks(ids, edits=[Zero("*hook_z", head=1)]))


# Configurations.


def test_a_config_has_to_say_how_positions_enter():
    """A forgotten field gave a network without positions, which runs and is wrong."""
    with pytest.raises(ConfigError, match="NoPositions"):
        HookedConfig(d_model=4, n_layers=1, n_heads=1, d_vocab=5, n_ctx=8)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number):
    """NaN passes every comparison that asks what is wrong: `eps < 0` is False for it."""
    llama3 = {"kind": "llama3", "factor": 8.0, "original_n_ctx": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = {"kind": "yarn", "factor": 2.0, "original_n_ctx": 8}
    makers = [
        lambda: NormConfig(kind="layer", eps=number),
        lambda: NormConfig(kind="rms", eps=number, bias=False),
        lambda: RotaryPositions(dim=2, base=number),
        *[
            lambda f=f: RotaryScaling(**{**llama3, f: number})
            for f in ("factor", "low_freq_factor", "high_freq_factor")
        ],
        *[
            lambda f=f: RotaryScaling(**{**yarn, f: number})
            for f in ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
        ],
        *[
            lambda f=f: make_config(**{f: number})
            for f in ("attn_scale", "attn_softcap", "logits_softcap", "embed_scale", "init_std")
        ],
    ]
    for make in makers:
        with pytest.raises(ConfigError, match="finite"):
            make()


# Modes of PyTorch.


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("network", CONFIGS)
def test_calls_under_autocast_stay_close_to_float32(network):
    """Under `torch.autocast` rotary keys are float32 and values bfloat16: caches and edits refused one of them.

    The bound is 4 % of the largest logit: bfloat16 keeps 8 bits, 0.4 %, and two layers have some twenty roundings.
    """
    model, ids = make_model(network, dtype=torch.float32), random_tokens(2, 6)
    edits = [Scale("*hook_resid_post", 1.5, pos=-1), Zero("*hook_z", head=1), Scale("*hook_pattern", 0.5, head=0)]
    late = [Scale("*hook_resid_post", 1.5, pos=-1)]
    with torch.no_grad():
        plain, edited = model(ids), model.run_with_hooks(ids, edits=edits)
        edited_late = model.run_with_hooks(ids, edits=late)
        _, captured = model.run_with_cache(ids, names_filter="*")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = {"once": (model(ids), plain), "edited": (model.run_with_hooks(ids, edits=edits), edited)}
            logits, cache = model.run_with_cache(ids, names_filter="*")
            assert torch.equal(logits, found["once"][0])
            growing = HookedKeyValueCache.init_cache(model.cfg, None, 2)
            parts = [model(ids[:, a:b], past_kv_cache=growing) for a, b in ((0, 2), (2, 3), (3, 6))]
            found["growing"] = (torch.cat(parts, 1), plain)
            frozen = model.prefill(ids[:, :3])
            found["frozen"] = (model(ids[:, 3:], past_kv_cache=frozen), plain[:, 3:])
            on_frozen = model.run_with_hooks(ids[:, 3:], past_kv_cache=frozen, edits=late)
            found["frozen, edited"] = (on_frozen, edited_late[:, 3:])
            shared = model.prefill(ids[:1, :3])
            found["shared"] = (model(ids[:1, 3:].repeat(3, 1), past_kv_cache=shared), plain[:1, 3:].repeat(3, 1, 1))
    assert set(cache) == set(captured)
    for what, (one, other) in found.items():
        assert float((one.float() - other).abs().max()) <= 0.04 * max(1.0, float(other.abs().max())), what


def _fresh() -> HookedCausalLM:
    return HookedCausalLM(make_config(positions=RotaryPositions(dim=4), qk_norm=RMS_NORM, attn_softcap=4.0))


def _from_state_dict() -> HookedCausalLM:
    source = make_model("learned, tied")
    return HookedCausalLM.from_state_dict(
        {name: tensor.clone() for name, tensor in source.named_weights().items()}, source.cfg
    )


@pytest.mark.parametrize(
    "build", [_fresh, _from_state_dict, lambda: HookedCausalLM.from_pretrained("bundled:tiny-llama")]
)
def test_models_made_under_inference_mode_can_be_trained_outside_of_it(build):
    """Their weights were inference tensors, with which no later call could compute gradients."""
    with torch.inference_mode():
        model = build()
        ids = random_tokens(2, 4)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    _, cache = model.run_with_cache(random_tokens(2, 4), names_filter="*", return_type="loss", incl_bwd=True)
    assert_finite({name: cache[name] for name in cache if name.endswith("_grad")})
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        kv = model.prefill(ids[:1])
    model(ids, past_kv_cache=kv).sum().backward()


def test_a_growing_cache_refuses_edits_that_it_could_not_keep():
    """Keys of single query heads are in no cache: later calls would have read them without the edit."""
    model = make_model("grouped")
    cache = HookedKeyValueCache.init_cache(model.cfg, None, 2, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(CacheError, match="key-value head"):
        model.run_with_hooks(random_tokens(2, 3), past_kv_cache=cache, edits=[Zero(V, query_head=1)])
    assert len(cache) == 0
