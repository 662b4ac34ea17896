"""Tests of hooklens.model.placement.placed: a call on several devices gives what a call on one gives.

The devices are pretended (`tests.pretended_devices`): the numbers are the CPU's own, so that results are equal up to
the order of sums in attention, and tensors of two devices that meet are an error. Parts alternate between devices, so
that every border is crossed.
"""

import copy

import pytest
import torch

from hooklens import HookedCausalLM, HookedKeyValueCache, ShortformerPositions, SinusoidalPositions, edits
from hooklens.config import MoEConfig, RotaryPositions
from hooklens.errors import CacheError, EditError, InputError
from hooklens.hooks.call import Listening
from tests.model.networks import ALL_CONFIGS, RMS_NORM, make_config, make_model, random_tokens
from tests.pretended_devices import FIRST, SECOND, THIRD, pretending

CONFIGS = {
    **ALL_CONFIGS,
    "shortformer": make_config(positions=ShortformerPositions()),
    "sinusoidal": make_config(positions=SinusoidalPositions(), norm=RMS_NORM),
    "tied, projected, biased": make_config(d_embed=8, tied_unembed=True, unembed_bias=True, attn_sinks=True),
    "experts": make_config(
        mlp=MoEConfig(n_experts=4, experts_per_token=2, d_expert=8), positions=RotaryPositions(dim=6)
    ),
}
# Rotary with a key-value head for several query heads; positions with a table, tied; biased scores; positions in heads;
# layers without attention.
KINDS = ("grouped", "learned, tied", "alibi, grouped", "shortformer", "heads and MLPs apart")
# Attention is computed by other kernels than the CPU's, in float64.
CLOSE = {"rtol": 0, "atol": 1e-10}
IDS = random_tokens(2, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool)


@pytest.fixture(autouse=True)
def _devices():
    with pretending():
        yield


def spread(model, *devices):
    """The model with its parts on the devices by turns; its unembedding, where it may, on one of its own."""
    turns = devices or (FIRST, SECOND)
    places = {part: turns[place % len(turns)] for place, part in enumerate(model.device_map)}
    if model.cfg.tied_unembed:
        places["unembed"] = places["embed"]
    elif not devices:
        places["unembed"] = THIRD
    return model.dispatch(places)


def both(network):
    """The same model on one device, and on two."""
    cfg = CONFIGS[network]
    return make_model(cfg), spread(make_model(cfg))


def close(found, expected):
    torch.testing.assert_close(found.detach().cpu(), expected.detach(), **CLOSE)


def test_the_devices_refuse_tensors_of_two():
    """What the tests here rest on."""
    one, other = torch.ones(2).to(FIRST), torch.ones(2).to(SECOND)
    assert (one.device, other.device) == (FIRST, SECOND)
    for mixed in (
        lambda: one + other,
        lambda: one + torch.ones(2),
        lambda: one[other.long()],
        lambda: torch.cat([one, other]),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed()


@pytest.mark.parametrize("network", CONFIGS)
def test_calls_captures_and_gradients(network):
    plain, placed = both(network)
    logits, cache = placed.run_with_cache(IDS, attention_mask=MASK, names_filter="*")
    expected, wanted = plain.run_with_cache(IDS, attention_mask=MASK, names_filter="*")
    close(logits, expected)
    assert logits.device == placed.device_map["unembed"]
    assert list(cache) == list(wanted)
    for name in wanted:
        close(cache[name], wanted[name])
        part = name.rpartition(".")[0] if not name.startswith("blocks") else ".".join(name.split(".")[:2])
        assert cache[name].device == placed.device_map.get(
            part.partition(".hook")[0].removesuffix(".ln"), placed.device
        )
    for model in (plain, placed):
        model(IDS, attention_mask=MASK, return_type="loss").backward()
    for (name, parameter), (_, reference) in zip(placed.named_parameters(), plain.named_parameters(), strict=True):
        assert (parameter.grad is None) == (reference.grad is None), name
        if reference.grad is not None:
            assert parameter.grad.device == parameter.device
            close(parameter.grad, reference.grad)


@pytest.mark.parametrize("network", KINDS)
def test_what_a_call_can_be_told(network):
    plain, placed = both(network)
    for keywords in (
        {"attention_mask": MASK, "logits_at": [0, -1]},
        {"logits_at": [0, 3]},
        {"document_ids": torch.tensor([0, 0, 0, 1, 1, 1, 1])},
        {"return_type": "loss", "loss_per_token": True, "document_borders": [0, 3]},
    ):
        close(placed(IDS, **keywords), plain(IDS, **keywords))
    stream, expected = placed(IDS, stop_at_layer=1), plain(IDS, stop_at_layer=1)
    assert stream.device == placed.layer_devices[0]
    close(placed(stream, start_at_layer=1), plain(expected, start_at_layer=1))
    close(placed(stream.to(placed.device), start_at_layer=1), plain(expected, start_at_layer=1))
    with pytest.raises(
        InputError, match=r"on cpu, the model torch.float64 on lazy:0 and lazy:1( and lazy:2)?; convert it"
    ):
        placed(stream.cpu(), start_at_layer=1)


@pytest.mark.parametrize("network", KINDS)
def test_key_value_caches(network, tmp_path):
    plain, placed = both(network)
    prefix, suffix = IDS[:1, :4], IDS[:, 4:]
    expected = plain(suffix, past_kv_cache=plain.prefill(prefix), return_type="both")
    kv = placed.prefill(prefix)
    assert {entry.device for entry in kv.entries if entry.head_shape[0]} <= set(placed.layer_devices)
    for cache in (kv, kv.clone(), kv.select([0]), kv.crop(4)):
        close(placed(suffix, past_kv_cache=cache), expected.logits)
    close(placed(suffix, past_kv_cache=kv, return_type="loss"), expected.loss)
    kv.save(tmp_path / "kv.safetensors")
    loaded = HookedKeyValueCache.load(tmp_path / "kv.safetensors").to(placed.layer_devices)
    close(placed(suffix, past_kv_cache=loaded, return_type="loss"), expected.loss)
    with pytest.raises(
        CacheError, match=r"on cpu, its block on lazy:.*elsewhere than the blocks that read them.*model.layer_devices"
    ):
        placed(suffix, past_kv_cache=kv.to("cpu"))
    with pytest.raises(CacheError, match="names 1 devices, the cache has"):
        kv.to([FIRST])
    appended = HookedKeyValueCache.init_cache(placed.cfg, placed.device, 2, dtype=placed.dtype)
    reference = HookedKeyValueCache.init_cache(plain.cfg, batch_size=2, dtype=plain.dtype)
    for columns in (slice(0, 4), slice(4, 7)):
        close(
            placed(IDS[:, columns], past_kv_cache=appended, attention_mask=MASK[:, columns]),
            plain(IDS[:, columns], past_kv_cache=reference, attention_mask=MASK[:, columns]),
        )


@pytest.mark.parametrize("network", KINDS)
def test_generation(network):
    plain, placed = both(network)
    options = {"max_new_tokens": 4, "stop_at_eos": False, "verbose": False, "return_type": "output", "seed": 1}
    last = placed.cfg.n_layers - 1
    for more in (
        {"do_sample": False, "names_filter": ["resid_post", "pattern"]},
        {"do_sample": False, "use_past_kv_cache": False},
        {"num_return_sequences": 2, "edits": [edits.Scale(f"blocks.{last}.hook_resid_post", 2.0, pos=-1, rows=1)]},
    ):
        found, expected = placed.generate(IDS, **options, **more), plain.generate(IDS, **options, **more)
        assert found.tokens.tolist() == expected.tokens.tolist()
        for name in expected.cache or ():
            close(found.cache[name], expected.cache[name])
    kv, reference = placed.prefill(IDS[:1, :4]), plain.prefill(IDS[:1, :4])
    found = placed.generate(IDS[:, 4:], past_kv_cache=kv, do_sample=False, **options)
    expected = plain.generate(IDS[:, 4:], past_kv_cache=reference, do_sample=False, **options)
    assert found.tokens.tolist() == expected.tokens.tolist()


def test_hooks_and_edits_act_on_their_blocks_device():
    plain, placed = both("grouped")
    seen = {}

    def note(tensor, hook):
        seen[hook.name] = tensor.device

    listening = [("resid_pre", note), ("pattern", note), ("ln_final.hook_scale", note), ("unembed.hook_in", note)]
    changes = [edits.Scale("resid_post", 0.5, pos=[0, -1]), edits.Zero("z", head=1, rows=0, pos=slice(1, 3))]
    placed.run_with_hooks(IDS, fwd_hooks=listening, edits=changes, attention_mask=MASK)
    assert seen == {
        "blocks.0.hook_resid_pre": SECOND, "blocks.0.attn.hook_pattern": SECOND, "blocks.1.hook_resid_pre": FIRST,
        "blocks.1.attn.hook_pattern": FIRST, "ln_final.hook_scale": SECOND, "unembed.hook_in": THIRD,
    }  # fmt: skip
    close(
        placed.run_with_hooks(IDS, edits=changes, attention_mask=MASK),
        plain.run_with_hooks(IDS, edits=changes, attention_mask=MASK),
    )
    _, cache = placed.run_with_cache(IDS)
    replace = edits.Replace("blocks.1.hook_resid_pre", cache["resid_pre", 1])
    close(placed.run_with_hooks(IDS, edits=[replace]), plain(IDS))
    with pytest.raises(EditError, match=r"the value is torch.float64 on lazy:1, the activation .* on lazy:0; convert"):
        placed.run_with_hooks(IDS, edits=[edits.Replace("blocks.1.hook_resid_pre", cache["resid_pre", 0])])


def test_a_call_tells_of_its_tokens_where_its_tensors_are():
    """Whoever listens finds positions beside the activation, behind `logits_at` with padding, too."""
    model = spread(make_model("rotary"))
    seen = {}

    class Noting:
        def keep(self, tensor, point, call):
            seen[point.name] = tensor.device, call.tokens.token_index.device, call.tokens.n_tokens.device

    listeners = dict.fromkeys(model.hook_points().values(), Listening(watchers=[Noting()]))
    ids = IDS.to(model.device)
    model.run(ids, model.make_plan(ids, MASK), listeners=listeners, logits_at=[0, -1])
    assert len(seen) == len(model.hook_points())
    assert [name for name, devices in seen.items() if len(set(devices)) > 1] == []


def test_masks_and_tables_are_made_once_for_each_device(monkeypatch):
    """They are the same for all layers of a device, and a call of many layers must not move them for each."""
    from hooklens.model.attention.rotary import RotaryTables
    from hooklens.model.plan.positions import TokenPlan

    model = spread(make_model(CONFIGS["grouped"].replace(n_layers=6)), FIRST, SECOND, THIRD)
    moved, looked_up = [], []
    move, look_up = TokenPlan._move, RotaryTables._look_up
    monkeypatch.setattr(TokenPlan, "_move", lambda plan, device: moved.append(device) or move(plan, device))
    monkeypatch.setattr(
        RotaryTables, "_look_up", lambda *given: looked_up.append(given[1].device) or look_up(*given)
    )  # fmt: skip
    model(IDS, attention_mask=MASK)
    assert sorted(moved, key=str) == [SECOND, THIRD]
    assert sorted(looked_up, key=str) == [FIRST, SECOND, THIRD]


def test_gradient_checkpointing_crosses_devices():
    plain, placed = both("grouped")
    placed.gradient_checkpointing_enable()
    for model in (plain, placed):
        model(IDS, return_type="loss").backward()
    for (_, parameter), (_, reference) in zip(placed.named_parameters(), plain.named_parameters(), strict=True):
        close(parameter.grad, reference.grad)


def test_moving_a_network_again():
    """`to` brings all parts to one device; a change of dtype leaves them where they are."""
    _, placed = both("learned, tied")
    map_before = placed.device_map
    assert copy.deepcopy(placed).device_map == map_before
    assert placed.float().device_map == map_before
    assert placed.dtype == torch.float32
    placed.double().to(SECOND)
    assert placed.devices == (SECOND,)
    assert set(placed.device_map.values()) == {SECOND}
    assert placed.layer_devices == (SECOND, SECOND)
    spread(placed, THIRD, FIRST)
    assert placed.devices == (THIRD, FIRST)
    spread(placed, FIRST)
    assert placed.devices == (FIRST,)
    assert set(placed.cpu().device_map.values()) == {torch.device("cpu")}


def test_a_refused_placement_moves_nothing():
    model = make_model("rotary")
    with pytest.raises(InputError, match="no device for"):
        model.dispatch({"embed": FIRST})
    for wrong, message in (("everywhere", "'auto'"), (FIRST, "one device is device="), (None, "is None")):
        with pytest.raises(InputError, match=message):
            model.dispatch(wrong)
    with pytest.raises(InputError, match="max_memory goes with an automatic device_map"):
        model.dispatch({"": FIRST}, max_memory={0: 1})
    assert model.devices == (torch.device("cpu"),)
    with torch.device("meta"):
        empty = HookedCausalLM(model.cfg)
    with pytest.raises(InputError, match="has no weights to put anywhere"):
        empty.dispatch({"": FIRST})


def test_weights_of_several_devices():
    plain, placed = both("grouped")
    for name in ("W_Q", "W_out", "b_O", "W_U", "W_E"):
        close(getattr(placed, name), getattr(plain, name))
        assert getattr(placed, name).device == (placed.device_map["unembed"] if name == "W_U" else placed.device)
    options = {"fold_ln": True, "center_unembed": True, "fold_value_biases": True}
    processed = placed.process_weights(**options)
    assert processed.device_map == placed.device_map
    close(processed(IDS), plain.process_weights(**options)(IDS))
    again = HookedCausalLM.from_state_dict(placed.state_dict(), placed.cfg)
    assert again.device_map == placed.device_map
    assert again.blocks[1].attn.q_proj.weight.untyped_storage().data_ptr() == (
        placed.blocks[1].attn.q_proj.weight.untyped_storage().data_ptr()
    )


def test_weights_that_are_assigned_bring_their_devices():
    model, other = make_model("rotary"), spread(make_model("rotary", seed=1))
    model.load_state_dict(other.state_dict(), assign=True)
    assert model.device_map == other.device_map
    close(model(IDS), make_model("rotary", seed=1)(IDS))
    other.load_state_dict(make_model("rotary").state_dict())
    assert other.device_map == model.device_map
    close(other(IDS), make_model("rotary")(IDS))
