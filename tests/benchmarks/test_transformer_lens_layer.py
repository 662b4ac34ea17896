"""The import layer beside TransformerLens 3.9's own HookedTransformer, with the same weights.

Needs that version (`pip install "transformer-lens==3.9.*"`); its successor has no HookedTransformer. Values are equal
to 1e-5, names, shapes, labels and classes of errors exactly. Where 2.x and 3.9 differ, or 3.9 is wrong, a test says so.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformer_lens.HookedTransformer", reason="needs transformer-lens 3.9")
import transformer_lens as real

import hooklens.compat.transformer_lens as layer
from hooklens.errors import HookLensError

TOLERANCE = 1e-5
_BASE: dict[str, Any] = {
    "n_layers": 3, "d_model": 32, "n_ctx": 24, "d_head": 8, "n_heads": 4, "d_vocab": 50, "act_fn": "gelu_new",
    "device": "cpu", "seed": 0, "dtype": torch.float64,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2_folded": {"normalization_type": "LNPre"},
    "neox": {"positional_embedding_type": "rotary", "rotary_dim": 4, "parallel_attn_mlp": True, "act_fn": "gelu"},
    "gptj": {
        "positional_embedding_type": "rotary", "rotary_dim": 4, "rotary_adjacent_pairs": True,
        "parallel_attn_mlp": True,
    },
    "llama": {
        "normalization_type": "RMS", "positional_embedding_type": "rotary", "gated_mlp": True, "act_fn": "silu",
        "final_rms": True,
    },
    "grouped": {
        "normalization_type": "RMS", "positional_embedding_type": "rotary", "gated_mlp": True, "act_fn": "silu",
        "final_rms": True, "n_key_value_heads": 2,
    },
    "gemma2": {
        "normalization_type": "RMS", "positional_embedding_type": "rotary", "gated_mlp": True, "final_rms": True,
        "act_fn": "gelu_pytorch_tanh", "n_key_value_heads": 2, "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 5.0, "output_logits_soft_cap": 3.0, "use_local_attn": True, "window_size": 4,
        "attn_types": ["local", "global", "local"],
    },
    "attn_only": {"attn_only": True, "d_mlp": None},
    "shortformer": {"attn_only": True, "positional_embedding_type": "shortformer", "normalization_type": None},
    "solu": {"act_fn": "solu_ln"},
    "bracket": {"attention_dir": "bidirectional", "d_vocab_out": 2, "use_hook_tokens": True, "act_fn": "relu"},
    "no_norm": {"normalization_type": None, "act_fn": "relu"},
    "neo": {
        "use_attn_scale": False, "use_local_attn": True, "window_size": 4, "attn_types": ["global", "local", "global"],
    },
}  # fmt: skip
# Networks whose outputs are of the vocabulary, so that there is a loss of the next token.
_LANGUAGE = [name for name in NETWORKS if name != "bracket"]


@functools.cache
def models(name: str) -> tuple[Any, Any]:
    """The real model with all parameters random, and the layer's with its state dict."""
    config = {**_BASE, **NETWORKS[name]}
    peer = real.HookedTransformer(real.HookedTransformerConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for own, parameter in peer.named_parameters():
        around = 1.0 if own.endswith(".w") else 0.0
        parameter.data = around + 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # Of a gated MLP it adds this one behind the product, where no checkpoint has any.
        if peer.cfg.gated_mlp and own.endswith(".b_in"):
            parameter.data.zero_()
    model = layer.HookedTransformer(layer.HookedTransformerConfig(**config))
    model.load_state_dict(peer.state_dict())
    return peer, model


@functools.cache
def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(2))


def as_2x(name: str, own: str, value: Tensor) -> Tensor:
    """What 2.x has at a point: of a LayerNorm the output, where 3.9 has what weight and bias are put on."""
    norm, _, point = own.rpartition(".")
    kind = models(name)[1].cfg.normalization_type
    if point != "hook_normalized" or kind != "LN":
        return value
    state = models(name)[0].state_dict()
    return value * state[f"{norm}.w"] + state[f"{norm}.b"]


def both(name: str, fn: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """What a function of a model and its package gives, there and here."""
    peer, model = models(name)
    return fn(peer, real), fn(model, layer)


def assert_same(found: Any, expected: Any, what: str = "") -> None:
    """Equal in structure and shape, and close in value."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), what
        assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} != {tuple(expected.shape)}"
        if expected.is_floating_point():
            expected = expected.to(found.dtype)
            torch.testing.assert_close(
                found, expected, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True, msg=lambda m: f"{what}: {m}"
            )
        else:
            assert torch.equal(found.to(expected.dtype), expected), what
    elif hasattr(expected, "items"):
        assert list(found.keys()) == list(expected.keys()), what
        for key, value in expected.items():
            assert_same(found[key], value, f"{what}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), what
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{what}[{place}]")
    else:
        assert found == expected, what


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_its_outputs(name: str) -> None:
    for kind in ["logits", "loss", "both", None] if name in _LANGUAGE else ["logits", None]:
        expected, found = both(name, lambda model, _, kind=kind: model(tokens(), return_type=kind))
        assert_same(found, expected, str(kind))
    for stop in (0, 1, -1, 3):
        assert_same(
            *reversed(both(name, lambda model, _, stop=stop: model(tokens(), stop_at_layer=stop))), f"stop {stop}"
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_state(name: str) -> None:
    peer, model = models(name)
    # Points that never fire there: of an MLP that is not there, and one of shortformer attention.
    silent = {one for one in peer.hook_dict if one.endswith("attn.hook_attn_input")}
    silent |= {one for one in peer.hook_dict if peer.cfg.attn_only and "hook_mlp" in one}
    assert set(model.hook_dict) == set(peer.hook_dict) - silent
    expected, found = peer.state_dict(), model.state_dict()
    assert set(found) == set(expected)
    for own in expected:
        # 3.9 makes its masks when they are needed; 2.x holds them.
        if not own.endswith("attn.mask"):
            assert_same(found[own].double(), expected[own].double(), own)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_cache_of_everything(name: str) -> None:
    (_, expected), (_, found) = both(name, lambda model, _: model.run_with_cache(tokens()))
    assert list(found.keys()) == list(expected.keys())
    for own in expected:
        assert_same(found[own], as_2x(name, own, expected[own]), own)


@pytest.mark.parametrize("name", _LANGUAGE)
def test_gradients_in_a_cache(name: str) -> None:
    (_, expected), (_, found) = both(
        name, lambda model, _: model.run_with_cache(tokens(), return_type="loss", incl_bwd=True)
    )
    assert set(found.keys()) == set(expected.keys())
    for own in expected:
        # There, `ln1` runs for queries, keys and values each, and one of the three gradients is kept.
        is_output = own.endswith("hook_normalized_grad") and models(name)[1].cfg.normalization_type == "LN"
        if ".ln1." not in own and not is_output:
            assert_same(found[own], as_2x(name, own, expected[own]), own)


@pytest.mark.parametrize("name", NETWORKS)
def test_edits_at_every_point(name: str) -> None:
    """Doubling an activation changes the logits alike, at every point that fires in a plain run."""
    peer, _ = models(name)
    _, cache = peer.run_with_cache(tokens())
    names = [own for own in cache.keys() if own != "hook_tokens"]  # noqa: SIM118
    if models(name)[1].cfg.normalization_type == "LN":
        names = [own for own in names if not own.endswith("hook_normalized")]

    def double(activation: Tensor, hook: Any) -> Tensor:
        return activation * 2

    for own in names:
        expected, found = both(
            name, lambda model, _, own=own: model.run_with_hooks(tokens(), fwd_hooks=[(own, double)])
        )
        assert_same(found, expected, own)


def _settings(model: Any, *, on: bool) -> None:
    model.set_use_attn_result(on)
    model.set_use_split_qkv_input(on)
    if not model.cfg.attn_only:
        model.set_use_hook_mlp_in(on)


@pytest.mark.parametrize("name", NETWORKS)
def test_settings_show_more_points(name: str) -> None:
    """3.9 runs `ln1` for each of the split inputs, so its scale and what it norms have a head axis: left out here."""
    try:
        for model in models(name):
            _settings(model, on=True)
        (_, expected), (_, found) = both(name, lambda model, _: model.run_with_cache(tokens()))
    finally:
        for model in models(name):
            _settings(model, on=False)
    assert set(found.keys()) == set(expected.keys())
    for own in expected:
        if ".ln1." not in own:
            assert_same(found[own], as_2x(name, own, expected[own]), own)


_STACKS: dict[str, Callable[[Any, Any], Any]] = {
    "accumulated_resid": lambda cache, _: cache.accumulated_resid(layer=None, return_labels=True),
    "accumulated_resid 2": lambda cache, _: cache.accumulated_resid(
        layer=2, incl_mid=True, pos_slice=-1, return_labels=True
    ),
    "accumulated_resid mlp": lambda cache, _: cache.accumulated_resid(layer=1, mlp_input=True, return_labels=True),
    "decompose_resid": lambda cache, _: cache.decompose_resid(return_labels=True),
    "decompose_resid 2": lambda cache, _: cache.decompose_resid(
        layer=2, mode="attn", pos_slice=(1, 5), return_labels=True
    ),
    "decompose_resid ln": lambda cache, _: cache.decompose_resid(apply_ln=True, return_labels=True),
    "stack_head_results": lambda cache, _: cache.stack_head_results(return_labels=True),
    "stack_head_results 1": lambda cache, _: cache.stack_head_results(
        1, incl_remainder=True, pos_slice=-1, return_labels=True
    ),
    "stack_head_results ln": lambda cache, _: cache.stack_head_results(apply_ln=True, pos_slice=-1),
    "stack_activation": lambda cache, _: cache.stack_activation("z"),
    "full": lambda cache, _: cache.get_full_resid_decomposition(return_labels=True, expand_neurons=False),
    "full neurons": lambda cache, _: cache.get_full_resid_decomposition(return_labels=True, pos_slice=-1),
    "apply_ln": lambda cache, _: cache.apply_ln_to_stack(cache.decompose_resid(), layer=-1),
    "apply_ln 1": lambda cache, _: cache.apply_ln_to_stack(cache.decompose_resid(1, pos_slice=2), layer=1, pos_slice=2),
    "logit_attrs": lambda cache, _: cache.logit_attrs(cache.decompose_resid(), tokens=3, incorrect_tokens=5),
    "logit_attrs 1": lambda cache, _: cache.logit_attrs(
        cache.decompose_resid(pos_slice=-1), tokens=torch.tensor([1, 2]), pos_slice=-1
    ),
    "logit_attrs none": lambda cache, _: cache.logit_attrs(cache["resid_post", -1], tokens=4),
    "remove_batch_dim": lambda cache, _: None,
}
_NEEDS_MLP = ("full neurons",)


@pytest.mark.parametrize("name", [one for one in _LANGUAGE if one not in ("no_norm", "shortformer")])
@pytest.mark.parametrize("method", _STACKS)
def test_cache_methods(name: str, method: str) -> None:
    if method in _NEEDS_MLP and NETWORKS[name].get("attn_only"):
        pytest.skip("there are no neurons")
    fn = _STACKS[method]

    def run(model: Any, package: Any) -> Any:
        return fn(model.run_with_cache(tokens())[1], package)

    peer, model = models(name)
    try:
        expected: Any = run(peer, real)
    except Exception as error:
        # What is not there raises here, too, or is taken from where it stands: MLPs beside attention read `resid_pre`.
        with contextlib.suppress(type(error), HookLensError):
            run(model, layer)
        return
    assert_same(run(model, layer), expected, method)


def _diff(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 9]).mean()


_PATCHES = [
    "resid_pre", "resid_mid", "attn_out", "mlp_out", "attn_head_out_by_pos", "attn_head_q_by_pos", "attn_head_k_by_pos",
    "attn_head_v_by_pos", "attn_head_out_all_pos", "attn_head_q_all_pos", "attn_head_k_all_pos", "attn_head_v_all_pos",
    "attn_head_pattern_by_pos", "attn_head_pattern_dest_src_pos", "attn_head_all_pos_every",
    "attn_head_pattern_all_pos", "attn_head_by_pos_every", "block_every",
]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "attn_only", "solu"])
@pytest.mark.parametrize("function", _PATCHES)
def test_patching(name: str, function: str) -> None:
    corrupted = tokens(1, 5)
    clean = corrupted.roll(1, dims=1)

    def run(model: Any, package: Any) -> Any:
        _, cache = model.run_with_cache(clean)
        return getattr(package.patching, f"get_act_patch_{function}")(model, corrupted, cache, _diff)

    peer, model = models(name)
    with torch.no_grad():
        try:
            expected: Any = run(peer, real)
        except Exception as error:
            with pytest.raises((type(error), HookLensError)):
                run(model, layer)
            return
        assert_same(run(model, layer), expected, function)


@pytest.mark.parametrize("name", [one for one in _LANGUAGE if one != "shortformer"])
def test_processed_weights(name: str) -> None:
    def processed(package: Any) -> dict[str, Tensor]:
        config = {**_BASE, **NETWORKS[name]}
        model = package.HookedTransformer(package.HookedTransformerConfig(**config))
        model.load_state_dict(models(name)[0].state_dict())
        model.process_weights_()
        state: dict[str, Tensor] = model.state_dict()
        return state

    expected, found = processed(real), processed(layer)
    assert set(found) == set(expected)
    # Centring changes logits that a soft cap follows; there, `process_weights_` does so all the same.
    capped = {"unembed.W_U", "unembed.b_U"} if "output_logits_soft_cap" in NETWORKS[name] else set()
    for own in expected:
        if not own.endswith("attn.mask") and own not in capped:
            assert_same(found[own].double(), expected[own].double(), own)


@pytest.mark.parametrize("name", _LANGUAGE)
def test_stacked_weights(name: str) -> None:
    peer, model = models(name)
    names = ["W_E", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"]
    names += [] if peer.cfg.attn_only else ["W_in", "W_out", "b_in", "b_out"]
    names += ["W_pos", "W_E_pos"] if peer.cfg.positional_embedding_type in ("standard", "shortformer") else []
    for own in names:
        assert_same(getattr(model, own), getattr(peer, own), own)
    for mode in "QKV":
        assert_same(model.all_composition_scores(mode), peer.all_composition_scores(mode), mode)
    assert model.all_head_labels() == (
        peer.all_head_labels if isinstance(peer.all_head_labels, list) else peer.all_head_labels()
    )
    for part in ("QK", "OV"):
        assert_same(getattr(model, part).AB, getattr(peer, part).AB, part)
    for deep in range(0 if peer.cfg.attn_only else 3):
        assert_same(model.accumulated_bias(deep), peer.accumulated_bias(deep), str(deep))


@pytest.mark.parametrize("name", [one for one in _LANGUAGE if one != "shortformer"])
@pytest.mark.parametrize("frozen", [False, True])
def test_key_value_caches(name: str, *, frozen: bool) -> None:
    def run(model: Any, package: Any) -> Any:
        kv = package.HookedTransformerKeyValueCache
        cache = kv.init_cache(model.cfg, model.cfg.device, 2)
        mask = torch.ones(2, 6, dtype=torch.long)
        model(tokens()[:, :6], past_kv_cache=cache, attention_mask=mask)
        if frozen:
            cache.freeze()
        out = model(tokens()[:, 6:], past_kv_cache=cache, attention_mask=mask)
        # Of rotary keys it holds what has not been turned.
        is_turned = model.cfg.positional_embedding_type == "rotary"
        keys = [] if is_turned else [entry.past_keys for entry in cache.entries]
        return out, keys, [entry.past_values for entry in cache.entries], cache.previous_attention_mask.long()

    peer, model = models(name)
    if not hasattr(real, "HookedTransformerKeyValueCache"):
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        real.HookedTransformerKeyValueCache = TransformerLensKeyValueCache
    assert_same(run(model, layer), run(peer, real))


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_left_padding(name: str) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    peer, model = models(name)
    expected, found = peer(tokens(), attention_mask=mask), model(tokens(), attention_mask=mask)
    assert_same(found[mask.bool()], expected[mask.bool()])
    assert_same(*(m(tokens(), attention_mask=mask, return_type="loss") for m in (model, peer)))


def test_hooks_of_levels_stay_and_go_alike() -> None:
    def run(model: Any, _: Any) -> list[Any]:
        seen: list[Any] = []

        def count(activation: Tensor, hook: Any) -> None:
            seen.append(hook.name)

        model.add_hook("hook_embed", count)
        model.add_hook("blocks.0.hook_resid_post", count, "fwd", level=1)
        model.add_perma_hook("blocks.1.hook_resid_post", count)
        counts = []
        for _round in range(2):
            model.run_with_hooks(tokens(), fwd_hooks=[(lambda name: name.endswith("hook_z"), count)])
            counts.append(len(seen))
        model.run_with_cache(tokens())
        counts.append(len(seen))
        model.reset_hooks()
        model(tokens())
        counts.append(len(seen))
        model.reset_hooks(including_permanent=True)
        model(tokens())
        with pytest.raises(KeyError):
            model.add_hook("blocks.0.typo", count)
        with pytest.raises(AssertionError):
            model.add_hook("blocks.0.attn.hook_result", count)
        return [counts, len(seen), seen, [len(point.fwd_hooks) for point in model.hook_dict.values()]]

    expected, found = both("gpt2", run)
    assert found == expected


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_of_attention(name: str) -> None:
    """What each step makes of its input, called by itself; `hook_q` and the like act in them."""
    peer, model = models(name)
    for number, (theirs, ours) in enumerate(zip(peer.blocks, model.blocks, strict=True)):
        one, other = theirs.attn, ours.attn
        generator = torch.Generator().manual_seed(number)
        stream = torch.randn(2, 6, peer.cfg.d_model, dtype=torch.float64, generator=generator)
        heads = [attn.calculate_qkv_matrices(stream, stream + 1, stream - 1) for attn in (one, other)]
        assert_same(heads[1], heads[0])
        q, k, v = heads[0]
        scores = one.calculate_attention_scores(q, k)
        assert_same(other.calculate_attention_scores(q, k), scores)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, :2] = 0
        for given in (None, mask):
            assert_same(other.apply_causal_mask(scores, 0, given), one.apply_causal_mask(scores, 0, given))
        late = scores[:, :, 4:]
        assert_same(other.apply_causal_mask(late, 4), one.apply_causal_mask(late, 4))
        with pytest.raises(ValueError, match="past_kv_pos_offset 3"):
            other.apply_causal_mask(late, 3)
        pattern = one.apply_causal_mask(scores).softmax(-1)
        assert_same(other.calculate_z_scores(v, pattern), one.calculate_z_scores(v, pattern))
        if peer.cfg.positional_embedding_type == "rotary":
            assert_same(other.rotate_every_two(q), one.rotate_every_two(q))
            for start, given in ((0, None), (3, None), (0, mask)):
                assert_same(other.apply_rotary(q, start, given), one.apply_rotary(q, start, given))
            waves = [attn.calculate_sin_cos_rotary(4, 24, base=500, dtype=torch.float64) for attn in (one, other)]
            assert_same(waves[1], waves[0])
        if not peer.cfg.attn_only:
            assert_same(ours.apply_mlp(stream), theirs.apply_mlp(stream))


@pytest.mark.parametrize("name", _LANGUAGE)
def test_the_stream_of_embedded_tokens(name: str) -> None:
    peer, model = models(name)
    embedded = [one.embed(tokens()) for one in (peer, model)]
    for start in (0, 5):
        streams = [one.get_residual(stream, start) for one, stream in zip((peer, model), embedded, strict=True)]
        assert_same(streams[1], streams[0])
    cache = layer.HookedTransformerKeyValueCache.init_cache(model.cfg, "cpu", 2)
    assert model.get_pos_offset(None, 2) == 0
    assert model.get_pos_offset(cache, 2) == 0
    if name != "shortformer":
        model(tokens(), past_kv_cache=cache)
        assert model.get_pos_offset(cache, 2) == tokens().shape[1]
    with pytest.raises(AssertionError):
        model.get_pos_offset(cache, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_chosen_by_name(name: str) -> None:
    """Code that froze all of a name, such as biases, found none and froze nothing."""
    peer, model = models(name)
    theirs, ours = (dict(one.named_parameters()) for one in (peer, model))
    # A bias or map that is 0, or nothing, is no parameter here; experts lie in one.
    assert set(ours) <= set(theirs)
    assert {own for own in set(theirs) - set(ours) if bool(theirs[own].any())} <= set()
    for own, parameter in ours.items():
        assert parameter.numel() == theirs[own].numel(), own
        assert float(parameter.norm()) == pytest.approx(float(theirs[own].norm()), rel=1e-6), own
    assert [id(one) for one in model.parameters()] == [id(one) for one in ours.values()]
    named = dict(model.named_parameters(prefix="model"))
    assert list(named) == [f"model.{own}" for own in ours]
