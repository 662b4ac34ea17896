"""Tests of hooklens.config: defaults, refusals, round trips."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooklens.config import (
    AlibiPositions,
    HookedConfig,
    LearnedPositions,
    NoPositions,
    NormConfig,
    Origin,
    PartConfig,
    RotaryPositions,
    RotaryScaling,
)
from hooklens.errors import ConfigError
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, RMS_NORM

MLP = PartConfig(kind="mlp")
SIZES = {"d_model": 12, "n_layers": 2, "n_heads": 4, "d_vocab": 7, "n_ctx": 9, "positions": NoPositions()}


def test_sizes_left_out_are_derived():
    cfg = HookedConfig(**SIZES)
    assert (cfg.n_kv_heads, cfg.d_head, cfg.d_mlp) == (4, 3, 48)
    assert cfg.score_scale == 3**-0.5
    assert HookedConfig(**SIZES, attn_scale=0.25).score_scale == 0.25


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"d_model": 0, "n_ctx": -1}, r"config: d_model=0, n_ctx=-1; expected whole numbers from 1 on"),
        ({"n_layers": -1}, r"n_layers=-1; expected whole numbers from 0 on"),
        ({"d_model": 13}, r"d_model=13 is not a multiple of n_heads=4; give d_head"),
        ({"n_kv_heads": 3}, r"n_heads=4 is not a multiple of n_kv_heads=3; each key-value head serves"),
        ({"act_fn": "swish"}, r"act_fn is 'swish'; expected one of 'relu', 'relu2', 'gelu'"),
        ({"wiring": "both"}, r"wiring is 'both'; expected one of 'sequential', 'parallel'"),
        ({"shared_norm": True}, r"shared_norm needs wiring='parallel', and norm_before=True with a norm in every"),
        ({"wiring": "parallel", "shared_norm": True, "norm_before": False}, r"shared_norm needs"),
        ({"positions": RotaryPositions(dim=4)}, r"rotary dim 4 is larger than d_head=3"),
        ({"windows": (3,)}, r"windows has 1 entries for 2 layers"),
        ({"d_model": True, "d_vocab": 2.5}, r"d_model=True, d_vocab=2.5; expected whole numbers from 1 on"),
        ({"embed_scale": float("inf")}, r"embed_scale=inf; expected finite numbers above 0"),
        ({"embed_scale": 10**400}, r"embed_scale=10+; expected finite numbers above 0"),
        ({"embed_scale_rounded": True}, r"embed_scale_rounded=True says how .*, and embed_scale is None"),
        ({"embed_scale": 2.0, "embed_scale_rounded": 1}, r"embed_scale_rounded=1; expected True or False"),
        ({"windows": (3, 0)}, r"windows: layer 1=0; expected whole numbers from 1 on"),
        ({"positions": None}, r"positions=None; expected RotaryPositions.* or NoPositions\(\) for none at all"),
        ({"positions": (NoPositions(),)}, r"positions has 1 entries for 2 layers"),
        ({"positions": (NoPositions(), RotaryPositions(dim=4))}, r"rotary dim 4 is larger than d_head=3"),
        ({"positions": (LearnedPositions(), NoPositions())}, r"learned positions .* cannot differ by layer"),
        ({"attn": (PartConfig(kind="attention"),) * 3}, r"attn has 3 entries for 2 layers"),
        ({"positions": AlibiPositions(), "causal": False}, r"linear biases with causal=False: .* give other positions"),
        ({"positions": (NoPositions(), AlibiPositions()), "causal": False}, r"linear biases with causal=False"),
        ({"causal": 1}, r"causal"),
        ({"attn_softcap": 0.0}, r"attn_softcap=0.0; expected finite numbers above 0"),
        ({"attn_only": True, "mlp": MLP}, r"attn_only=True and mlp=PartConfig.* contradict each other"),
        ({"attn_only": False, "mlp": None}, r"attn_only=False and mlp=None contradict each other"),
        ({"attn_only": True, "mlp": (MLP, None)}, r"attn_only=True and mlp=.* contradict each other"),
        ({"norm": (RMS_NORM, None)}, r"norm differs by layer: give final_norm"),
        ({"norm": (RMS_NORM,), "final_norm": None}, r"norm has 1 entries for 2 layers"),
        ({"norm": None, "norm_after": True}, r"norm_after asks for norms in every layer, where norm is None"),
        ({"norm_before": (True,)}, r"norm_before has 1 entries for 2 layers"),
        (
            {"wiring": "parallel", "shared_norm": True, "norm": (None, RMS_NORM), "final_norm": None},
            r"shared_norm needs .* a norm in every layer",
        ),
        (
            {
                "n_kv_heads": 3, "windows": (1,), "attn_only": True,
                "mlp": MLP, "positions": RotaryPositions(dim=4), "norm": (RMS_NORM, None),
            },
            r"attn_only=True and mlp=.*\n- norm differs by layer.*\n- n_heads=4 is not .*"
            r"\n- windows has 1 entries for 2 layers\n- rotary dim 4 is larger than d_head=3",
        ),
    ],
)  # fmt: skip
def test_what_describes_no_network_is_refused(changes, text):
    with unchecked(), pytest.raises(ConfigError, match=text):
        HookedConfig(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NormConfig(kind="batch", eps=1e-5), r"norm kind is 'batch'; expected one of 'layer', 'rms'"),
        (lambda: NormConfig(kind="rms", eps=1e-5), r"an RMSNorm has no bias: set bias=False"),
        (lambda: NormConfig(kind="layer", eps=-1.0), r"norm: eps=-1.0; expected finite numbers >= 0"),
        (lambda: NormConfig(kind="layer", eps=None), r"norm: eps must be given"),
        (lambda: NormConfig(kind="layer", eps=1e-5, weight=1), r"norm: weight=1; expected True or False"),
        (
            lambda: NormConfig(kind="rms", eps=1e-5, weight=False, unit_offset=True),
            r"norm:\n- an RMSNorm has no bias: set bias=False\n- unit_offset=True .* needs weight=True",
        ),
        (lambda: RotaryPositions(dim=3), r"rotary dim is 3; expected an even number"),
        (lambda: RotaryPositions(dim=2, base=0), r"base=0; expected finite numbers above 0"),
        (lambda: RotaryPositions(dim=2, layout="odd"), r"rotary layout is 'odd'"),
        (lambda: RotaryScaling(kind="ntk", factor=2.0), r"rotary scaling kind is 'ntk'"),
        (lambda: RotaryScaling(kind="yarn", factor=2.0), r"rotary scaling 'yarn' needs original_n_ctx"),
        (lambda: RotaryScaling(kind="linear", factor=0.0), r"rotary scaling: factor=0.0"),
        (
            lambda: RotaryScaling(kind="llama3", factor=2.0, original_n_ctx=8, low_freq_factor=1.0),
            r"needs low_freq_factor and high_freq_factor",
        ),
    ],
)
def test_parts_are_checked_when_made(make, text):
    with unchecked(), pytest.raises(ConfigError, match=text):
        make()


def test_positions_have_no_default():
    """Left out they were none at all, so a network could be built whose tokens do not know their order."""
    sizes = {name: value for name, value in SIZES.items() if name != "positions"}
    with unchecked(), pytest.raises(ConfigError, match=r"positions=None; expected .* or NoPositions\(\)"):
        HookedConfig(**sizes)


def test_configs_are_frozen_and_keyword_only():
    cfg = HookedConfig(**SIZES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.d_model = 3
    with pytest.raises(TypeError):
        HookedConfig(12, 2, 4, 7, 9)
    with pytest.raises(TypeError, match="d_modle"):
        HookedConfig(**SIZES, d_modle=3)


def test_replace_checks_anew():
    cfg = HookedConfig(**SIZES)
    assert cfg.replace(n_ctx=100).n_ctx == 100
    with pytest.raises(ConfigError, match="windows has 2 entries for 3 layers"):
        cfg.replace(windows=(1, 2)).replace(n_layers=3)
    with pytest.raises(TypeError):
        cfg.replace(hidden_size=3)


def test_size_of_axes():
    cfg = CONFIGS["grouped"]
    sizes = {axis: cfg.size(axis) for axis in ("head", "kv_head", "d_head", "d_model", "d_mlp", "d_vocab", "one")}
    assert sizes == {"head": 4, "kv_head": 2, "d_head": 6, "d_model": 12, "d_mlp": 20, "d_vocab": 23, "one": 1}
    with pytest.raises(ConfigError, match=r"axis 'pos' has no size of its own; the config fixes head, kv_head"):
        cfg.size("pos")


def test_window_per_layer():
    assert [CONFIGS["capped"].window(layer) for layer in range(2)] == [3, None]
    assert CONFIGS["rotary"].window(1) is None


def test_layers_may_differ():
    rotary, other = RotaryPositions(dim=2), PartConfig(kind="mlp", options={"d_mlp": 5})
    cfg = HookedConfig(**{**SIZES, "positions": (rotary, NoPositions()), "mlp": (PartConfig(kind="mlp"), other)})
    first, second = cfg.block(0), cfg.block(1)
    assert (first.positions, second.positions) == (rotary, NoPositions())
    assert (first.attn, second.attn) == (cfg.attn, cfg.attn)
    assert second.mlp is other
    assert [block.of(block.mlp).size("d_mlp") for block in (first, second)] == [48, 5]
    assert second.of(second.attn).size("head") == 4
    wrong = PartConfig(kind="mlp", options={"d_mlp": "many"})
    with pytest.raises(ConfigError, match=r"part in layer 1: d_mlp='many'; expected whole numbers from 1 on"):
        second.of(wrong).size("d_mlp")


def test_layers_may_lack_parts():
    cfg = HookedConfig(
        **SIZES, attn=(None, PartConfig(kind="attention")), mlp=(MLP, None), norm=(None, RMS_NORM), final_norm=None,
        norm_after=(False, True), qk_norm=(None, RMS_NORM),
    )  # fmt: skip
    first, second = cfg.blocks
    assert (first.attn, first.mlp, first.norm, first.qk_norm) == (None, MLP, None, None)
    assert (second.attn, second.mlp, second.norm, second.qk_norm) == (
        PartConfig(kind="attention"),
        None,
        *[RMS_NORM] * 2,
    )
    assert (first.norm_before, first.norm_after, first.attn_norm, first.mlp_norm) == (False, False, None, None)
    assert (second.norm_before, second.norm_after, second.attn_norm, second.mlp_norm) == (True, True, "ln1", None)
    assert (first.has_mid, second.has_mid, cfg.kv_heads) == (False, False, (0, 4))


def test_attention_only_is_no_mlp():
    cfg = HookedConfig(**SIZES, attn_only=True)
    assert cfg == HookedConfig(**SIZES, mlp=None)
    assert cfg.fingerprint == HookedConfig(**SIZES, mlp=None).fingerprint != HookedConfig(**SIZES).fingerprint
    assert (cfg.mlp, cfg.attn_only, HookedConfig(**SIZES).attn_only) == (None, True, False)
    assert HookedConfig(**SIZES, mlp=(None, None)).attn_only
    assert HookedConfig(**SIZES).replace(attn_only=True) == HookedConfig(**SIZES).replace(mlp=None) == cfg
    assert cfg.replace(attn_only=False) == cfg.replace(mlp=MLP) == HookedConfig(**SIZES)
    assert cfg.replace(n_ctx=4, attn_only=True).attn_only
    with pytest.raises(ConfigError, match="contradict"):
        cfg.replace(mlp=MLP, attn_only=True)


def test_the_final_norm_follows_the_others_unless_given():
    assert HookedConfig(**SIZES, norm=RMS_NORM).final_norm == RMS_NORM
    assert HookedConfig(**SIZES, norm=None).final_norm is None
    assert HookedConfig(**SIZES, final_norm=None).norm is not None
    cfg = HookedConfig(**SIZES)
    assert cfg.replace(norm=RMS_NORM).final_norm == RMS_NORM
    assert cfg.replace(norm=RMS_NORM, final_norm=None).final_norm is None
    assert cfg.replace(final_norm=None).replace(norm=RMS_NORM).final_norm is None


def test_a_config_from_before_final_norms_is_read():
    younger = ("final_norm", "attn_only", "mlp")
    values = {name: value for name, value in CONFIGS["capped"].to_dict().items() if name not in younger}
    assert HookedConfig.from_dict(values) == CONFIGS["capped"]


def test_some_layers_of_a_network():
    """Only windows were cut, so a config whose positions or parts differ by layer was refused."""
    rotary = RotaryPositions(dim=2)
    cfg = HookedConfig(
        **{**SIZES, "positions": (rotary, NoPositions())}, windows=(3, None), mlp=(MLP, None), norm_after=(True, False),
        norm=(RMS_NORM, None), final_norm=RMS_NORM, attn=(None, PartConfig(kind="attention")), qk_norm=(RMS_NORM, None),
    )  # fmt: skip
    taken = cfg.take_layers([1])
    assert (taken.n_layers, taken.final_norm, taken.attn_only) == (1, RMS_NORM, True)
    for name in ("positions", "windows", "mlp", "norm_after", "norm", "attn", "qk_norm"):
        assert getattr(taken, name) == (getattr(cfg, name)[1],)
    assert cfg.take_layers([1, 0]).take_layers([1, 0]) == cfg
    assert CONFIGS["rotary"].take_layers([0]) == CONFIGS["rotary"].replace(n_layers=1)


def test_the_origin_is_no_part_of_equality():
    cfg = CONFIGS["rotary"]
    from_disk = cfg.replace(origin=Origin(family="f", hub_config="{}"))
    assert from_disk == cfg
    assert hash(from_disk) == hash(cfg)
    assert HookedConfig.from_json(from_disk.to_json()).origin == from_disk.origin


def draw(made, /, **fields):
    """Values of a class; made without the check of annotations, which uses random numbers of its own."""

    def make(**drawn):
        with unchecked():
            return made(**drawn)

    return st.builds(make, **fields)


_scaling = st.one_of(
    st.none(),
    draw(RotaryScaling, kind=st.just("linear"), factor=st.floats(1.0, 8.0)),
    draw(RotaryScaling, kind=st.sampled_from(["dynamic", "yarn"]), factor=st.floats(1.0, 8.0),
              original_n_ctx=st.integers(1, 99), mscale=st.one_of(st.none(), st.floats(0.5, 1.0))),
    draw(RotaryScaling, kind=st.just("llama3"), factor=st.floats(1.0, 8.0), original_n_ctx=st.integers(1, 99),
              low_freq_factor=st.just(1.0), high_freq_factor=st.just(4.0)),
)  # fmt: skip
_positions = st.one_of(
    draw(NoPositions),
    draw(AlibiPositions, scaled=st.booleans(), bfloat16=st.booleans()),
    draw(LearnedPositions, offset=st.integers(0, 3)),
    draw(RotaryPositions, dim=st.just(2), layout=st.sampled_from(["half", "interleaved"]), scaling=_scaling),
)
_norms = st.one_of(
    draw(NormConfig, kind=st.just("layer"), eps=st.floats(0, 1), weight=st.booleans(), bias=st.booleans()),
    draw(NormConfig, kind=st.just("rms"), eps=st.floats(0, 1), bias=st.just(False), unit_offset=st.booleans()),
)
# Text, whole and broken numbers as JSON gives them back.
_options = st.dictionaries(
    st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | st.text()
)
_parts = draw(PartConfig, kind=st.text(max_size=3), options=_options)


def _layers(value):
    return value | st.tuples(value, value)


_by_layer = _positions.filter(lambda positions: not isinstance(positions, LearnedPositions))
_configs = draw(
    HookedConfig, d_model=st.just(12), n_layers=st.just(2), n_heads=st.just(4), d_vocab=st.integers(1, 9),
    n_ctx=st.integers(1, 9), n_kv_heads=st.sampled_from([1, 2, 4]), norm=_layers(st.none() | _norms),
    final_norm=st.none() | _norms, norm_before=_layers(st.booleans()), qk_norm=_layers(st.none() | _norms),
    positions=_positions | st.tuples(_by_layer, _by_layer), attn=_layers(st.none() | _parts),
    mlp=_layers(st.none() | _parts),
    windows=st.none() | st.tuples(st.none(), st.integers(1, 9)), attn_softcap=st.none() | st.floats(1, 9),
    tied_unembed=st.booleans(),
)  # fmt: skip


def test_causality_is_part_of_the_description():
    cfg = HookedConfig(**SIZES)
    other = cfg.replace(causal=False)
    assert other != cfg
    assert other.fingerprint != cfg.fingerprint
    assert not HookedConfig.from_json(other.to_json()).causal
    # As written before there was such a field.
    assert HookedConfig.from_dict({name: value for name, value in cfg.to_dict().items() if name != "causal"}).causal


def test_how_the_embedding_is_scaled_is_part_of_the_description():
    cfg = HookedConfig(**SIZES, embed_scale=2.5, embed_scale_rounded=True)
    other = cfg.replace(embed_scale_rounded=False)
    assert other != cfg
    assert other.fingerprint != cfg.fingerprint
    assert HookedConfig.from_json(cfg.to_json()) == cfg
    assert HookedConfig.from_dict(cfg.to_dict()).embed_scale_rounded


@given(cfg=_configs)
def test_json_round_trip(cfg):
    for again in (HookedConfig.from_json(cfg.to_json()), HookedConfig.from_dict(json.loads(json.dumps(cfg.to_dict())))):
        assert again == cfg
        assert hash(again) == hash(cfg)
        assert again.fingerprint == cfg.fingerprint


def test_unknown_fields_in_a_file_are_listed():
    values = {**HookedConfig(**SIZES).to_dict(), "hidden_size": 3, "rope_theta": 1}
    with pytest.raises(ConfigError, match=r"unknown fields \['hidden_size', 'rope_theta'\]; known ones are"):
        HookedConfig.from_dict(values)
    with pytest.raises(ConfigError, match=r"positions kind is 'relative'; expected one of 'rotary', 'alibi'"):
        HookedConfig.from_dict({**SIZES, "positions": {"kind": "relative"}})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"d_model": None}, "d_model must be given"),
        ({"n_layers": None, "n_ctx": None}, "n_ctx, n_layers must be given"),
        ({"init_std": None}, "init_std must be given"),
        ({"norm": 1e-5}, r"norm=1e-05; expected NormConfig\(...\) or None, or a tuple"),
        ({"final_norm": (RMS_NORM, None)}, r"final_norm=.*; expected NormConfig\(...\) or None$"),
        ({"qk_norm": "rms"}, r"qk_norm='rms'; expected NormConfig"),
        ({"attn": "attention"}, r"attn='attention'; expected PartConfig\(...\) or None, or a tuple"),
        ({"norm_before": (True, 1)}, r"norm_before: layer 1=1; expected True or False"),
        ({"attn_only": "yes"}, r"attn_only='yes'; expected True or False"),
        ({"mlp": ["mlp", "mlp"]}, r"mlp=\['mlp', 'mlp'\]; expected PartConfig"),
        ({"windows": [1, 2]}, r"windows=\[1, 2\]; expected a tuple"),
        ({"windows": 5}, "windows=5; expected a tuple"),
        ({"gated_mlp": "yes", "tied_unembed": 1}, "gated_mlp='yes', tied_unembed=1; expected True or False"),
    ],
)
def test_values_of_another_kind_are_refused_in_words(changes, text):
    """They were accepted, or gave an AttributeError or AssertionError later."""
    given = {"d_model": 8, "n_layers": 2, "n_heads": 2, "d_vocab": 9, "n_ctx": 16, "positions": NoPositions()}
    with unchecked(), pytest.raises(ConfigError, match=text):
        HookedConfig(**{**given, **changes})


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("norm", {"kind": "layer", "eps": 1e-5, "epps": 1}, "norm: .*epps"),
        ("positions", {"kind": "rotary", "dimm": 1}, "positions: .*dimm"),
        ("attn", {"kind": "attention", "choices": {}}, "attn: .*choices"),
        ("origin", {"family": "llama"}, "origin: .*hub_config"),
        ("qk_norm", "rms", "qk_norm is 'rms'; expected its fields by name"),
    ],
)
def test_unknown_fields_inside_a_part_are_named(field, value, text):
    """They were TypeErrors of a constructor that the reader of a file has never heard of."""
    values = CONFIGS["rotary"].to_dict()
    with unchecked(), pytest.raises(ConfigError, match=text):
        HookedConfig.from_dict({**values, field: value})


def test_options_of_a_part_do_not_change():
    """A config whose options were changed kept the fingerprint that caches are compared by."""
    part = PartConfig(kind="attention", options={"a": 1})
    for change in (
        lambda: part.options.__setitem__("a", 2),
        lambda: part.options.update(b=1),
        lambda: part.options.pop("a"),
        part.options.clear,
        lambda: part.options.__ior__({"b": 2}),
    ):
        with pytest.raises(TypeError, match="make a new PartConfig"):
            change()
    for same in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), dataclasses.replace(part)):
        assert same == part
        assert hash(same) == hash(part)


def test_biases_of_single_maps():
    """A flag of one map says what its group's does not; what says the same is equal."""
    some = HookedConfig(**SIZES, qkv_bias=False, q_bias=True, v_bias=True, mlp_out_bias=False)
    assert [some.block(0).has_bias(name) for name in ("q", "k", "v")] == [True, False, True]
    assert [some.block(1).has_bias(name) for name in ("mlp_in", "mlp_gate", "mlp_out")] == [True, True, False]
    weights = some.description.weights
    assert "blocks.0.attn.b_Q" in weights
    assert "blocks.0.attn.b_K" not in weights
    assert "blocks.0.mlp.b_in" in weights
    assert "blocks.0.mlp.b_out" not in weights
    assert some.description.why_absent("blocks.0.attn.b_K") == "its keys have no bias"
    plain = HookedConfig(**SIZES)
    assert HookedConfig(**SIZES, qkv_bias=False, q_bias=True, k_bias=True, v_bias=True) == plain
    assert HookedConfig(**SIZES, k_bias=True) == plain
    assert HookedConfig(**SIZES, k_bias=False) == HookedConfig(**SIZES, qkv_bias=False, q_bias=True, v_bias=True)
    assert HookedConfig.from_json(some.to_json()) == some
    assert some.replace(k_bias=True, mlp_bias=True, mlp_out_bias=None) == plain
