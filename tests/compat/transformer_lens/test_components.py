"""Parts by themselves and inside models, against those of TransformerLens 2.18.

The numbers are what its classes give with the weights of `fill`.
"""

import copy
import dataclasses
import importlib
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from hooklens import HookedCausalLM, HookedConfig, HookedKeyValueCache
from hooklens.analysis import circuit_weights
from hooklens.compat.transformer_lens import components, factories, utilities
from hooklens.compat.transformer_lens.hook_points import HookPoint
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig

BASE: dict[str, Any] = {
    "d_model": 16, "n_layers": 3, "d_head": 8, "n_heads": 4, "n_ctx": 12, "d_vocab": 31, "d_mlp": 24,
    "act_fn": "gelu", "normalization_type": "LN", "device": "cpu", "seed": 0,
}  # fmt: skip
TOKENS = torch.tensor([[1, 5, 7, 2, 9, 0, 3], [4, 4, 6, 8, 1, 2, 0]])
MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")


def make_config(**changes: Any) -> HookedTransformerConfig:
    return HookedTransformerConfig(**{**BASE, **changes})


def wave(name: str, shape: tuple[int, ...], phase: int) -> Tensor:
    """Numbers that no generator of random numbers has a part in."""
    steps = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    made = torch.sin(steps * (0.7 + 0.01 * phase) + phase)
    return ((1 + 0.3 * made) if name.rpartition(".")[2] == "w" else 0.4 * made).reshape(shape).float()


X, WIDE = wave("x", (2, 7, 16), 50), wave("y", (2, 7, 24), 3)
PER_HEAD = X[:, :, None].repeat(1, 1, 4, 1)
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 4}
SHORT = {"positional_embedding_type": "shortformer"}
GEMMA = {
    **ROTARY, "use_normalization_before_and_after": True, "normalization_type": "RMS", "gated_mlp": True,
    "act_fn": "silu", "n_key_value_heads": 2,
}  # fmt: skip
# The class, fields of its config, its other arguments, and what it is called with.
CASES: dict[str, tuple[str, dict[str, Any], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]] = {
    "LayerNorm": ("LayerNorm", {}, (), (X,), {}),
    "LayerNorm24": ("LayerNorm", {}, (24,), (WIDE,), {}),
    "LNPre": ("LayerNormPre", {}, (), (X,), {}),
    "RMS": ("RMSNorm", {}, (), (X,), {}),
    "RMSPre": ("RMSNormPre", {}, (), (X,), {}),
    "attn": ("Attention", {}, ("global", 0), (X, X * 0.5, X + 1), {}),
    "attn rot": ("Attention", ROTARY, ("global", 0), (X, X, X), {}),
    "attn mask": ("Attention", ROTARY, ("global", 0), (X, X, X), {"attention_mask": MASK}),
    "attn local": ("Attention", {"window_size": 3}, ("local", 1), (X, X, X), {}),
    "attn split": ("Attention", {"use_split_qkv_input": True}, ("global", 1), (PER_HEAD, PER_HEAD, PER_HEAD), {}),
    "gqa": ("GroupedQueryAttention", {"n_key_value_heads": 2, **ROTARY}, ("global", 1), (X, X, X), {}),
    "attn inv": ("Attention", {"scale_attn_by_inverse_layer_idx": True}, ("global", 2), (X, X, X), {}),
    "mlp": ("MLP", {}, (), (X,), {}),
    "gated": ("GatedMLP", {"gated_mlp": True, "act_fn": "silu"}, (), (X,), {}),
    "moe": ("MoE", {"num_experts": 3, "experts_per_token": 2, "act_fn": "silu"}, (), (X,), {}),
    "solu": ("MLP", {"act_fn": "solu_ln"}, (), (X,), {}),
    "embed": ("Embed", {}, (), (TOKENS,), {}),
    "pos": ("PosEmbed", {}, (), (TOKENS,), {}),
    "pos mask": ("PosEmbed", {}, (), (TOKENS, 0, MASK), {}),
    "pos off": ("PosEmbed", {}, (), (TOKENS, 3), {}),
    "unembed": ("Unembed", {}, (), (X,), {}),
    "block": ("TransformerBlock", {}, (0,), (X,), {}),
    "block par": ("TransformerBlock", {"parallel_attn_mlp": True, **ROTARY}, (1,), (X,), {}),
    "block short": ("TransformerBlock", SHORT, (0,), (X,), {"shortformer_pos_embed": X * 0.3}),
    "block mask": ("TransformerBlock", {}, (0,), (X, None, None, MASK), {}),
    "block short none": ("TransformerBlock", SHORT, (0,), (X,), {}),
    "block gemma": ("TransformerBlock", GEMMA, (0,), (X,), {}),
}
# Three entries of the last token, and the mean of the absolute value of all.
NUMBERS = {
    "LayerNorm": [-1.00521, 1.08991, 1.77707, 0.88856],
    "LayerNorm24": [-1.43247, -0.16097, 0.91182, 0.91244],
    "LNPre": [-0.97363, 0.58066, 1.42682, 0.90085],
    "RMS": [-1.19171, 0.71919, 1.76378, 0.91217],
    "RMSPre": [-0.99870, 0.55509, 1.40098, 0.90091],
    "attn": [0.39166, 0.46738, 0.31263, 0.37123],
    "attn rot": [0.03776, 0.35905, 0.50223, 0.32522],
    "attn mask": [0.02992, 0.33982, 0.48091, 0.30183],
    "attn local": [0.01696, 0.30766, 0.44509, 0.32796],
    "attn split": [0.03723, 0.35762, 0.50059, 0.32420],
    "gqa": [0.18868, 0.41424, 0.41473, 0.28148],
    "attn inv": [0.04024, 0.35918, 0.49995, 0.32531],
    "mlp": [-0.13530, -0.22518, -0.19601, 0.17382],
    "gated": [-0.74464, -0.59908, -0.14847, 0.47042],
    "moe": [-0.00089, -0.00055, 0.00156, 0.00103],
    "solu": [0.25394, 0.27079, 0.16699, 0.18543],
    "embed": [0.25769, 0.39418, 0.34528, 0.25761],
    "pos": [-0.37495, -0.19703, 0.07356, 0.25530],
    "pos mask": [0.39944, 0.31918, 0.08881, 0.21942],
    "pos off": [0.32974, 0.39807, 0.27919, 0.25541],
    "unembed": [0.38148, 0.16945, -0.12570, 0.26303],
    "block": [-8.43886, -4.80638, 1.93651, 6.06841],
    "block par": [-2.48896, -2.16392, -0.46705, 2.14263],
    "block short": [-8.46960, -4.74183, 2.06082, 6.07028],
    "block mask": [-8.04443, -5.18473, 0.99327, 5.91574],
    "block short none": [-8.43886, -4.80638, 1.93651, 6.06841],
    "block gemma": [0.41252, 2.44987, 3.03458, 1.71343],
}


def make_part(name: str) -> Any:
    part, fields, arguments, _, _ = CASES[name]
    return getattr(components, part)(make_config(**fields), *arguments)


def fill(part: torch.nn.Module) -> None:
    """Weights under TransformerLens's names, in their order."""
    shapes = {name: tuple(one.shape) for name, one in part.state_dict().items()}
    names = sorted(name for name in shapes if not name.endswith(BUFFERS))
    part.load_state_dict({name: wave(name, shapes[name], i) for i, name in enumerate(names)})


@pytest.mark.parametrize("name", CASES)
def test_parts_give_what_they_give_there(name: str) -> None:
    part = make_part(name)
    fill(part)
    _, _, _, arguments, words = CASES[name]
    with torch.no_grad():
        out = part(*arguments, **words).double()
    found = torch.cat([out[1, -1].flatten()[:3], out.abs().mean()[None]])
    # The numbers are rounded to five places; a block's are as large as 30.
    torch.testing.assert_close(found, torch.tensor(NUMBERS[name]).double(), rtol=2e-6, atol=1e-5)


def test_weights_have_the_shapes_that_they_have_there() -> None:
    shapes = {name: list(one.shape) for name, one in make_part("gqa").state_dict().items()}
    assert shapes == {
        "W_Q": [4, 16, 8], "b_Q": [4, 8], "_W_K": [2, 16, 8], "_b_K": [2, 8], "_W_V": [2, 16, 8], "_b_V": [2, 8],
        "W_O": [4, 8, 16], "b_O": [16], "mask": [12, 12], "IGNORE": [], "rotary_sin": [12, 4], "rotary_cos": [12, 4],
    }  # fmt: skip
    gated = make_part("gated")
    assert {name: list(one.shape) for name, one in gated.state_dict().items()} == {
        "W_in": [16, 24], "W_gate": [16, 24], "W_out": [24, 16], "b_in": [24], "b_out": [16],
    }  # fmt: skip
    attn = make_part("attn local")
    assert torch.equal(attn.mask[5], torch.tensor([False] * 3 + [True] * 3 + [False] * 6))
    assert -torch.inf == attn.IGNORE
    assert (attn.attn_scale, attn.b_Q.abs().sum().item()) == (pytest.approx(8**0.5), 0.0)
    torch.testing.assert_close(attn.OV[2].AB, attn.W_V[2] @ attn.W_O[2])
    grouped = make_part("gqa")
    assert (grouped.W_K.shape, grouped.b_V.shape, grouped._W_K.shape) == ((4, 16, 8), (4, 8), (2, 16, 8))
    assert torch.equal(grouped.W_K, grouped._W_K.repeat_interleave(2, dim=0))
    torch.testing.assert_close(grouped.QK[3].AB, grouped.W_Q[3] @ grouped._W_K[1].mT)
    grouped._W_K = torch.ones(2, 16, 8)
    assert float(grouped.W_K.detach().sum()) == 4 * 16 * 8
    assert "_W_K" not in dict(grouped.named_parameters())
    # Position 5, of pairs (0, 2) and (1, 3) with the base 10000.
    angles = torch.tensor([5.0, 0.05, 5.0, 0.05])
    torch.testing.assert_close(grouped.rotary_sin[5], angles.sin())
    torch.testing.assert_close(grouped.rotary_cos[5], angles.cos())
    assert (make_part("LayerNorm24").length, make_part("RMS").eps) == (24, 1e-5)


def test_state_dicts_of_models() -> None:
    model = HookedCausalLM.from_pretrained("bundled:tiny-falcon")
    weights = model.named_weights()
    components.adopt(model, make_config())
    state = components.state_of(model)
    for name in weights:
        assert torch.equal(state.get(name, state.get(name.replace("attn.", "attn._"))), weights[name])
    beside = {name.rpartition(".")[2] for name in state.keys() - weights.keys()}
    shared, zeros = {"_W_K", "_W_V", "_b_K", "_b_V"}, {"b_Q", "b_O", "b_in", "b_out", "b_U"}
    assert beside == shared | zeros | set(BUFFERS)
    again = HookedCausalLM(model.cfg)
    again.load_state_dict(state)
    assert all(torch.equal(one, weights[name]) for name, one in again.named_weights().items())


def test_state_dicts_that_do_not_fit() -> None:
    attn = make_part("attn")
    state = attn.state_dict()
    with pytest.raises(RuntimeError, match=r"missing are \['W_Q'\], unexpected \['W_X'\]"):
        attn.load_state_dict({"W_X": X, **{name: one for name, one in state.items() if name != "W_Q"}})
    found = attn.load_state_dict({"b_O": torch.ones(16)}, strict=False)
    assert "W_Q" in found.missing_keys
    assert float(attn.b_O.detach().sum()) == 16


def test_keys_and_values_of_before() -> None:
    cfg = make_config(**ROTARY)
    attn = components.Attention(cfg, "global", 0)
    entry = HookedKeyValueCache.init_cache(cfg.to_hooked_config(), "cpu", batch_size=2).entries[0]
    with torch.no_grad():
        whole = attn(X, X, X, attention_mask=MASK)
        first = X[:, :4]
        parts = [attn(first, first, first, past_kv_cache_entry=entry, attention_mask=MASK[:, :4])]
        parts.append(attn(X[:, 4:], X[:, 4:], X[:, 4:], past_kv_cache_entry=entry, attention_mask=MASK))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    assert entry.past_keys.shape == (2, 7, 4, 8)


@pytest.mark.parametrize("name", ["tiny-gpt-neox", "tiny-llama", "tiny-falcon"])
def test_parts_of_models(name: str) -> None:
    """Parts of other classes compute what they computed, and can be called as in 2.x."""
    plain, model = (HookedCausalLM.from_pretrained(f"bundled:{name}") for _ in range(2))
    components.adopt(model, make_config())
    ids = torch.arange(3, 20)[None]
    (logits, cache), (wanted, kept) = (one.run_with_cache(ids) for one in (model, plain))
    assert torch.equal(logits, wanted)
    normed = {key for key in kept if key.endswith("hook_normalized")}
    assert all(torch.equal(cache[key], kept[key]) for key in kept.keys() - normed)
    assert list(model.state_dict()) == list(plain.state_dict())
    block = model.blocks[1]
    with torch.no_grad():
        torch.testing.assert_close(block(kept["resid_pre", 1]), kept["resid_post", 1])
        out = block.attn(*[plain.blocks[1].ln1(kept["resid_pre", 1])] * 3)
    torch.testing.assert_close(out, kept["attn_out", 1])
    is_grouped = model.cfg.n_kv_heads != model.cfg.n_heads
    classes = components.GroupedQueryAttention if is_grouped else components.Attention, components.TransformerBlock
    assert (isinstance(block.attn, classes[0]), isinstance(block, classes[1])) == (True, True)
    assert isinstance(block.mlp, components.GatedMLP if model.cfg.gated_mlp else components.MLP)
    assert isinstance(block.mlp, components.CanBeUsedAsMLP)
    assert isinstance(model.ln_final, components.RMSNorm if name == "tiny-llama" else components.LayerNorm)
    assert not isinstance(model.ln_final, components.LayerNormPre)
    assert isinstance(model.unembed, components.Unembed)
    assert type(block.hook_resid_pre) is HookPoint
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(ids), wanted)
    # Biases that there are not are zeros.
    assert model.blocks[0].attn.b_Q.shape == (model.cfg.n_heads, model.cfg.d_head)
    # HookLens reads its own weights, where query heads share keys and values.
    assert block.attn.W_K.shape[0] == model.cfg.n_heads
    assert model.W_K.shape[1] == model.cfg.n_kv_heads
    assert all(torch.equal(one, plain.named_weights()[key]) for key, one in model.named_weights().items())
    for circuit in (circuit_weights.ov_circuit, circuit_weights.qk_circuit):
        assert torch.equal(circuit(model, 1, 3).AB, circuit(plain, 1, 3).AB)
    assert torch.equal(model.process_weights(fold_ln=True)(ids), plain.process_weights(fold_ln=True)(ids))


def test_configs_of_parts() -> None:
    """Code reads and sets fields of 2.x on a part's config: of a model it is that of all parts."""
    attn = components.GroupedQueryAttention(make_config(n_key_value_heads=2))
    assert (attn.cfg.d_head, attn.cfg.n_key_value_heads, attn.cfg.use_split_qkv_input) == (8, 2, False)
    attn.cfg.use_split_qkv_input = True
    assert attn.cfg.use_split_qkv_input
    out = attn(X, X, X)
    copies = (X[:, :, None].expand(-1, -1, n, -1) for n in (4, 2, 2))
    torch.testing.assert_close(attn(*copies), out)
    with pytest.raises(dataclasses.FrozenInstanceError):
        attn.cfg.n_heads = 3
    with pytest.raises(AttributeError, match="n_haeds"):
        _ = attn.cfg.n_haeds
    model = HookedCausalLM(make_config().to_hooked_config())
    words = make_config()
    components.adopt(model, words)
    words.use_attn_result = True
    assert model.blocks[2].mlp.cfg.use_attn_result
    assert type(model.cfg) is HookedConfig


def test_learned_positions_of_models() -> None:
    cfg = make_config().to_hooked_config()
    model = HookedCausalLM(cfg)
    wanted = model(TOKENS)
    components.adopt(model, make_config())
    assert torch.equal(model(TOKENS), wanted)
    assert torch.equal(model.pos_embed(TOKENS), model.W_pos[:7].expand(2, -1, -1))


@pytest.mark.parametrize(
    ("part", "fields", "arguments", "error"),
    [
        ("Attention", {}, ("glocal", 0), ValueError),
        ("Attention", {}, ("local", 0), ValueError),
        ("Attention", {"scale_attn_by_inverse_layer_idx": True}, (), ValueError),
        ("GroupedQueryAttention", {}, (), AssertionError),
        ("MLP", {"attn_only": True, "d_mlp": None}, (), ValueError),
        ("MoE", {}, (), AssertionError),
        ("TransformerBlock", {"normalization_type": "BN"}, (0,), ValueError),
        ("BertBlock", {}, (), NotImplementedError),
        ("T5Attention", {}, (), NotImplementedError),
    ],
)
def test_errors_are_of_the_classes_that_they_are_there(
    part: str, fields: dict[str, Any], arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        getattr(components, part)(make_config(**fields), *arguments)


def test_modules_are_laid_out_as_there() -> None:
    layer = "hooklens.compat.transformer_lens"
    for path, names in {
        "components.mlps.can_be_used_as_mlp": "CanBeUsedAsMLP",
        "components.mlps.moe": "MoE",
        "components.abstract_attention": "AbstractAttention",
        "components.rms_norm_pre": "RMSNormPre",
        "components.transformer_block": "TransformerBlock",
        "factories.mlp_factory": "MLPFactory",
        "factories.activation_function_factory": "ActivationFunctionFactory",
        "utilities.activation_functions": "SUPPORTED_ACTIVATIONS gelu_new gelu_fast solu XIELU",
        "utilities.addmm": "batch_addmm vanilla_addmm",
        "utilities.attention": "simple_attn_linear complex_attn_linear",
        "utilities.devices": "get_best_available_device move_to_and_update_config",
    }.items():
        module = importlib.import_module(f"{layer}.{path}")
        assert [name for name in names.split() if not hasattr(module, name)] == []


def test_factories() -> None:
    create = factories.MLPFactory.create_mlp
    made = [create(make_config(**CASES[name][1])) for name in ("mlp", "gated", "moe")]
    assert [type(one) for one in made] == [components.MLP, components.GatedMLP, components.MoE]
    pick = factories.ActivationFunctionFactory.pick_activation_function
    cfg = make_config()
    for name in utilities.SUPPORTED_ACTIVATIONS:
        cfg.act_fn = name
        assert pick(cfg)(X).shape == X.shape
    for name, text in ((None, "act_fn not set"), ("mish", "Invalid activation function name: mish")):
        cfg.act_fn = name
        with pytest.raises(ValueError, match=text):
            pick(cfg)
    own = components.CanBeUsedAsMLP(make_config(act_fn="solu_ln"))
    own.select_activation_function()
    assert isinstance(own.ln, components.LayerNorm)
    assert own.ln.length == own.d_mlp == 24


def test_linear_biases() -> None:
    """Press et al. 2022, figure 3, and its slopes of eight heads."""
    attention = components.AbstractAttention
    assert attention.create_alibi_slope(3).tolist() == [[0, 0, 0], [-1, 0, 0], [-2, -1, 0]]
    assert attention.create_alibi_multipliers(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert attention.create_alibi_bias(2, 3)[1, 2].tolist() == [-2 * 2.0**-8, -(2.0**-8), 0]


def test_linear_maps() -> None:
    W, b = wave("W", (4, 16, 8), 1), wave("b", (4, 8), 2)
    simple = utilities.simple_attn_linear(X, W, b)
    torch.testing.assert_close(simple, utilities.complex_attn_linear(PER_HEAD, W, b))
    torch.testing.assert_close(simple[1, 2, 3], X[1, 2] @ W[3] + b[3])
    torch.testing.assert_close(utilities.batch_addmm(b[0], W[0], X), X @ W[0] + b[0])
    assert utilities.get_best_available_device(make_config()) == torch.device("cpu")
