"""Tests of hooklens.model.parts.part: views of weights, and parts of one's own from one class and one config value."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hooklens import HookedCausalLM, edits
from hooklens.axes import declare_axis
from hooklens.config import NormConfig, PartConfig, RotaryPositions
from hooklens.errors import CheckpointError, ConfigError
from hooklens.model import MLP, Attention, Part, point, weight
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, activations_of, make_config, make_model, random_tokens

declare_axis("toy_expert", "experts of a toy MLP")

STORED = {
    "W_Q": ("q_proj", "weight"), "W_K": ("k_proj", "weight"), "W_V": ("v_proj", "weight"), "W_O": ("o_proj", "weight"),
    "b_Q": ("q_proj", "bias"), "b_K": ("k_proj", "bias"), "b_V": ("v_proj", "bias"), "b_O": ("o_proj", "bias"),
    "W_in": ("in_proj", "weight"), "W_gate": ("gate_proj", "weight"), "W_out": ("out_proj", "weight"),
    "b_in": ("in_proj", "bias"), "b_gate": ("gate_proj", "bias"), "b_out": ("out_proj", "bias"),
    "W_E": ("table", "weight"), "W_pos": ("table", "weight"), "W_U": ("proj", "weight"), "b_U": ("proj", "bias"),
}  # fmt: skip


def declared_weights(model):
    """Every weight that has a parameter of its own: the part, the weight's name, its declaration."""
    for name, declared in model.cfg.description.weights.items():
        if not (name == "unembed.W_U" and model.cfg.tied_unembed):
            path, _, word = name.rpartition(".")
            yield model.get_submodule(path), word, declared


def by_hand(stored, word, cfg):
    """A stored matrix in its logical shape: `[out, in]` with heads merged, as PyTorch and checkpoints lay maps out."""
    if word in ("W_Q", "W_K", "W_V"):
        return torch.stack([rows.T for rows in stored.split(cfg.d_head)])
    if word == "W_O":
        return torch.stack([columns.T for columns in stored.split(cfg.d_head, dim=1)])
    if word in ("b_Q", "b_K", "b_V"):
        return torch.stack(stored.split(cfg.d_head))
    return stored.T if word in ("W_in", "W_gate", "W_out", "W_U") else stored


@pytest.mark.parametrize("network", ALL_CONFIGS)
class TestViews:
    def test_they_are_views_of_the_stored_matrix(self, network):
        model = make_model(network)
        for part, word, declared in declared_weights(model):
            view = getattr(part, word)
            assert view.shape == declared.shape == model.cfg.description.weights[declared.name].shape, declared.name
            stored = model.get_parameter(declared.parameter)
            assert stored.shape == declared.stored_shape
            assert stored.is_contiguous()
            assert view.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
            assert torch.equal(view, by_hand(stored, word, model.cfg)), declared.name
            if word in STORED:
                module, held_as = STORED[word]
                assert getattr(getattr(part, module), held_as) is stored

    def test_an_edit_in_place_is_an_edit_of_the_map(self, network):
        model = make_model(network)
        with torch.no_grad():
            for part, word, declared in declared_weights(model):
                before = model.get_parameter(declared.parameter).clone()
                getattr(part, word).mul_(2)
                assert torch.equal(model.get_parameter(declared.parameter), before * 2), declared.name
                where = (0,) * len(declared.shape)
                getattr(part, word)[where] = 5.0
                assert model.get_parameter(declared.parameter).flatten()[0] == 5
                getattr(part, word).copy_(getattr(part, word) * 0.05)

    def test_assignment(self, network):
        model, twin, tokens = make_model(network), make_model(network, seed=3), random_tokens(2, 5)
        names = list(dict(model.named_parameters()))
        for (part, word, declared), (other, _, _) in zip(declared_weights(model), declared_weights(twin), strict=True):
            value = getattr(other, word).detach().clone(memory_format=torch.contiguous_format)
            setattr(part, word, nn.Parameter(value) if getattr(part, word).is_leaf else value)
            assert torch.equal(getattr(part, word), value), declared.name
            assert model.get_parameter(declared.parameter).requires_grad
            assert model.get_parameter(declared.parameter).is_contiguous()
        assert torch.equal(model(tokens), twin(tokens))
        assert list(dict(model.named_parameters())) == names

    def test_gradients_lie_at_the_parameters(self, network):
        model = make_model(network)
        model(random_tokens(2, 5), return_type="loss").backward()
        for part, word, declared in declared_weights(model):
            gradient = model.get_parameter(declared.parameter).grad
            assert gradient is not None, declared.name
            assert gradient.shape == declared.stored_shape
            seen = getattr(part, word).grad
            assert torch.equal(seen, by_hand(gradient, word, model.cfg)), declared.name
            assert seen.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()

    def test_names(self, network):
        model = make_model(network)
        expected = [declared.parameter for _, _, declared in declared_weights(model)]
        assert sorted(model.state_dict()) == sorted(expected) == sorted(dict(model.named_parameters()))
        assert list(dict(model.named_weights())) == list(model.cfg.description.weights)
        for name, tensor in model.named_weights().items():
            assert tuple(tensor.shape) == model.cfg.description.weights[name].shape

    def test_hook_points_are_those_declared(self, network):
        model = make_model(network)
        assert {name: point.site for name, point in model.hook_points().items()} == model.cfg.description.points
        assert not set(model.cfg.description.absent) & (set(model.hook_points()) | set(model.named_weights()))
        assert all(model.cfg.description.absent.values()), "each absence has its reason"


class TestAssignmentIsChecked:
    @pytest.mark.parametrize(
        ("word", "value", "text"),
        [
            ("W_Q", torch.zeros(4, 6, 12), r"W_Q = \[4, 6, 12\]: .*\['head', 'd_model', 'd_head'\] \[4, 12, 6\]"),
            ("W_Q", torch.zeros(24, 12), r"W_Q = \[24, 12\]: .*another network \(cfg.replace\)"),
            ("b_O", torch.zeros(1), r"b_O = \[1\]: this network has \['d_model'\] \[12\]"),
            ("W_O", 3.0, r"W_O = float: this network has"),
            ("W_O", None, r"W_O = NoneType: this network has"),
        ],
    )
    def test_shapes(self, word, value, text):
        attn = make_model("rotary").blocks[0].attn
        before = {name: tensor.clone() for name, tensor in attn.state_dict().items()}
        with unchecked(), pytest.raises(ConfigError, match=text):
            setattr(attn, word, value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in attn.state_dict().items())

    def test_a_bias_that_the_network_lacks(self):
        attn = make_model("grouped").blocks[0].attn
        assert attn.b_Q is None
        with pytest.raises(ConfigError, match=r"b_Q = \[4, 6\]: this network has no such weight; .*cfg.replace"):
            attn.b_Q = torch.zeros(4, 6)
        with pytest.raises(AttributeError, match=r"MLP has no W_gate here: its MLPs are not gated"):
            _ = make_model("rotary").blocks[0].mlp.W_gate

    def test_a_frozen_weight_stays_frozen(self):
        attn = make_model("rotary").blocks[0].attn
        attn.q_proj.weight.requires_grad_(False)
        attn.W_Q = torch.zeros(4, 12, 6, dtype=torch.float64)
        assert not attn.q_proj.weight.requires_grad
        attn.W_Q = nn.Parameter(torch.zeros(4, 12, 6, dtype=torch.float64))
        assert attn.q_proj.weight.requires_grad

    def test_something_else_in_the_place_of_the_map(self):
        model = make_model("rotary")

        class Doubled(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner, self.weight = inner, inner.weight

            def forward(self, x):
                return 2 * self.inner(x)

        model.blocks[0].attn.q_proj = Doubled(model.blocks[0].attn.q_proj)
        with pytest.raises(ConfigError, match=r"W_Q: a Doubled stands in the place of q_proj, .*merge the adapter"):
            _ = model.blocks[0].attn.W_Q
        twin, tokens = make_model("rotary"), random_tokens(2, 4)
        with torch.no_grad():
            twin.blocks[0].attn.q_proj.weight.mul_(2)
            twin.blocks[0].attn.q_proj.bias.mul_(2)
        assert torch.equal(model(tokens), twin(tokens))

    def test_hooks_of_pytorch_around_a_map_act(self):
        """A map is applied by its weight alone where nothing is put around it, and only there."""
        model, tokens = make_model("rotary"), random_tokens(2, 4)
        plain = model(tokens)
        for word in ("attn.q_proj", "attn.o_proj", "mlp.in_proj", "mlp.out_proj"):
            seen = []
            handle = (
                model.blocks[0]
                .get_submodule(word)
                .register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape) or out * 2)
            )
            assert not torch.equal(model(tokens), plain), word
            assert len(seen) == 1
            handle.remove()
        assert torch.equal(model(tokens), plain)


class TwoExperts(Part, place="blocks.{i}.mlp", kind="two_experts"):
    """Two MLPs, and a router that says how much of each to take."""

    W_router = weight("d_model toy_expert", "toy_expert d_model", module="router", reads=True, bias="b_router")
    W_in_1 = weight("d_model d_mlp", "d_mlp d_model", module="in_1", reads=True, bias="b_in_1")
    W_in_2 = weight("d_model d_mlp", "d_mlp d_model", module="in_2", reads=True, bias="b_in_2")
    W_out_1 = weight("d_mlp d_model", "d_model d_mlp", module="out_1", writes=True)
    W_out_2 = weight("d_mlp d_model", "d_model d_mlp", module="out_2", writes=True)
    b_router = weight("toy_expert", module="router")
    b_in_1 = weight("d_mlp", module="in_1")
    b_in_2 = weight("d_mlp", module="in_2")
    hook_router = point("batch pos toy_expert", "how much of each expert")
    hook_first = point("batch pos d_mlp", "neurons of the first expert")
    hook_second = point("batch pos d_mlp", "neurons of the second expert")

    def forward(self, x, call):
        share = self.hook_router(self.router(x).softmax(-1), call)
        first = self.hook_first(F.relu(self.in_1(x)), call)
        second = self.hook_second(F.gelu(self.in_2(x)), call)
        return share[..., :1] * self.out_1(first) + share[..., 1:] * self.out_2(second)


class GatedAttention(Attention, kind="gated_attention"):
    """Attention whose output a learned gate scales, token by token."""

    W_gate = weight("d_model one", "one d_model", module="gate", reads=True, bias="b_gate")
    b_gate = weight("one", module="gate")
    hook_gate = point("batch pos one", "how much of what attention writes")

    def forward(self, q_input, k_input, v_input, plan, call, entry=None):
        # With edited copies of the stream per head the gate reads their mean.
        gate = self.gate(q_input if q_input.ndim == 3 else q_input.mean(2)).sigmoid()
        return self.hook_gate(gate, call) * super().forward(q_input, k_input, v_input, plan, call, entry)


EXPERTS = PartConfig(kind="two_experts", options={"toy_expert": 2, "d_mlp": 7})
GATED = PartConfig(kind="gated_attention")
OWN = {
    "experts": {"mlp": EXPERTS},
    "experts, rms": {"mlp": EXPERTS, "norm": NormConfig(kind="rms", eps=1e-6, bias=False)},
    "experts in one layer": {"mlp": (PartConfig(kind="mlp"), EXPERTS)},
    "gated": {"attn": GATED, "positions": RotaryPositions(dim=4)},
    "both, grouped": {"mlp": EXPERTS, "attn": GATED, "n_kv_heads": 2, "norm_after": True},
    "parallel, tied": {"mlp": EXPERTS, "attn": GATED, "wiring": "parallel", "shared_norm": True, "tied_unembed": True},
}  # fmt: skip


@pytest.fixture(params=OWN)
def model(request):
    return make_model(make_config(**OWN[request.param]))


def own_points(model):
    """The points of the parts above, with their axes."""
    found = {}
    for layer in range(model.cfg.n_layers):
        if model.cfg.block(layer).mlp.kind == "two_experts":
            found[f"blocks.{layer}.mlp.hook_router"] = (2, 5, 2)
            found[f"blocks.{layer}.mlp.hook_first"] = found[f"blocks.{layer}.mlp.hook_second"] = (2, 5, 7)
        if model.cfg.block(layer).attn.kind == "gated_attention":
            found[f"blocks.{layer}.attn.hook_gate"] = (2, 5, 1)
    return found


class TestPartsOfOnesOwn:
    def test_points_fire_and_are_in_the_table(self, model):
        tokens, seen = random_tokens(2, 5), {}
        model.run_with_hooks(tokens, fwd_hooks=[("*", lambda t, hook: seen.update({hook.name: tuple(t.shape)}))])
        for name, shape in own_points(model).items():
            assert seen[name] == shape, name
        assert set(seen) == set(activations_of(model))
        table = model.hook_table().set_index("name")
        for name, shape in own_points(model).items():
            assert table.loc[name, "shape"] == ("batch", "pos", shape[2])
            assert table.loc[name, "description"]

    def test_the_arithmetic_is_the_classes(self, model):
        tokens = random_tokens(2, 5)
        _, cache = model.run_with_cache(tokens, names_filter="*")
        for layer, block in enumerate(model.block_list()):
            if isinstance(block.mlp, TwoExperts) and model.cfg.norm_before and not model.cfg.norm_after:
                x = cache["resid_pre" if block.ln2 is None else "resid_mid", layer]
                x = (block.ln1 if block.ln2 is None else block.ln2)(x)
                mlp = block.mlp
                share = (x @ mlp.W_router + mlp.b_router).softmax(-1)
                out = share[..., :1] * (F.relu(x @ mlp.W_in_1 + mlp.b_in_1) @ mlp.W_out_1)
                out = out + share[..., 1:] * (F.gelu(x @ mlp.W_in_2 + mlp.b_in_2) @ mlp.W_out_2)
                torch.testing.assert_close(cache["mlp_out", layer], out.detach(), rtol=1e-12, atol=1e-12)
            if isinstance(block.attn, GatedAttention) and not model.cfg.norm_after:
                out = torch.einsum("bpnh,nhm->bpm", cache["z", layer], block.attn.W_O) + block.attn.b_O
                x = block.ln1(cache["resid_pre", layer])
                out = out * torch.sigmoid(x @ block.attn.W_gate + block.attn.b_gate)
                torch.testing.assert_close(cache["attn_out", layer], out.detach(), rtol=1e-12, atol=1e-12)

    def test_caches_hold_their_points(self, model):
        tokens = random_tokens(2, 5)
        _, cache = model.run_with_cache(tokens)
        for name in own_points(model):
            assert name in cache
        _, part = model.run_with_cache(tokens, names_filter="*", pos_slice=[3, 0])
        for name in own_points(model):
            assert torch.equal(part[name], cache[name][:, [3, 0]]), name

    def test_edits_act_at_their_points(self, model):
        tokens = random_tokens(2, 5)
        plain, cache = model.run_with_cache(tokens)
        for name in own_points(model):
            edited = model.run_with_hooks(tokens, edits=[edits.Scale(name, 2.0, pos=3, rows=1)])
            assert torch.equal(edited[0], plain[0]), name
            assert torch.equal(edited[1, :3], plain[1, :3]), name
            assert (edited[1, 3:] - plain[1, 3:]).abs().max() > 1e-8, name
            again = model.run_with_hooks(tokens, edits=[edits.Replace(name, cache[name])])
            assert torch.equal(again, plain), name

    def test_with_a_cache_and_in_generation(self, model):
        tokens = random_tokens(1, 5)
        kv = model.prefill(tokens[:, :3])
        # 1e-10: attention in two parts, another order of float64 sums.
        torch.testing.assert_close(model(tokens[:, 3:], past_kv_cache=kv), model(tokens)[:, 3:], rtol=1e-10, atol=1e-10)
        ids = model.generate(tokens, max_new_tokens=3, do_sample=False, verbose=False)
        row = tokens
        for _ in range(3):
            row = torch.cat([row, model(row)[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids, row)

    def test_weights_load_under_both_kinds_of_names(self, model):
        tokens, expected = random_tokens(2, 5), model(random_tokens(2, 5))
        twin = HookedCausalLM.from_state_dict(dict(model.named_weights()), model.cfg)
        assert torch.equal(twin(tokens), expected)
        for state in (model.state_dict(), dict(model.named_weights())):
            fresh = make_model(model.cfg, seed=5)
            assert not torch.equal(fresh(tokens), expected)
            fresh.load_state_dict(state)
            assert torch.equal(fresh(tokens), expected)
            short = {name: tensor for name, tensor in state.items() if "router" not in name and "gate" not in name}
            if len(short) < len(state):
                with pytest.raises((RuntimeError, CheckpointError), match=r"router|gate"):
                    fresh.load_state_dict(short)

    def test_the_config_survives_json(self, model):
        assert type(model.cfg).from_json(model.cfg.to_json()) == model.cfg
        assert type(model.cfg).from_json(model.cfg.to_json()).fingerprint == model.cfg.fingerprint

    def test_norms_fold_into_their_maps(self, model):
        tokens = random_tokens(2, 5)
        folded = model.process_weights(fold_ln=True)
        # Float64: products in another order.
        torch.testing.assert_close(folded(tokens), model(tokens), rtol=1e-10, atol=1e-10)
        for block in folded.block_list():
            if block.ln1 is not None:
                assert torch.equal(block.ln1.w, torch.ones(12, dtype=torch.float64))
        saved = HookedCausalLM.from_state_dict(folded.state_dict(), folded.cfg)
        assert torch.equal(saved(tokens), folded(tokens))

    def test_gradients_reach_their_weights(self, model):
        model(random_tokens(2, 5), return_type="loss").backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_initialize(self, model):
        fresh = HookedCausalLM(model.cfg)
        assert all(parameter.isfinite().all() for parameter in fresh.parameters())
        assert fresh(random_tokens(2, 5)).isfinite().all()


def test_unknown_kinds_are_refused():
    with pytest.raises(
        ConfigError, match=r"no part of the kind 'three_experts' stands at 'blocks.\{i\}.mlp'; known are"
    ):
        make_model(make_config(mlp=PartConfig(kind="three_experts")))
    with pytest.raises(ConfigError, match=r"no part of the kind 'gated_attention' stands at 'blocks.\{i\}.mlp'"):
        make_model(make_config(mlp=GATED))


def test_a_part_alone():
    cfg = make_config()
    mlp = MLP(cfg.block(1)).double()
    assert list(mlp.hook_points()) == ["hook_pre", "hook_post"]
    assert [point.name for point in mlp.hook_points().values()] == [None, None]
    assert mlp.hook_pre.site == cfg.description.points["blocks.1.mlp.hook_pre"]


def _hook(part, seen):
    part.register_forward_hook(lambda *_: seen.append(part))


def _pre_hook(part, seen):
    part.register_forward_pre_hook(lambda *_: seen.append(part))


def _keyword_hook(part, seen):
    part.register_forward_hook(lambda *_: seen.append(part), with_kwargs=True)


def _backward_hook(part, seen):
    part.register_full_backward_hook(lambda *_: seen.append(part))


def _backward_pre_hook(part, seen):
    part.register_full_backward_pre_hook(lambda *_: seen.append(part))


def _own_forward(part, seen):
    forward = part.forward
    part.forward = lambda *arguments, **keywords: (seen.append(part), forward(*arguments, **keywords))[1]


def _compiled(part, seen):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda run, **_: lambda *given, **named: (seen.append(part), run(*given, **named))[1]
        )
        part.compile()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("place", ["", "embed", "blocks.1", "blocks.1.ln1", "blocks.1.attn", "blocks.1.mlp", "unembed"])
@pytest.mark.parametrize(
    "put", [_hook, _pre_hook, _keyword_hook, _backward_hook, _backward_pre_hook, _own_forward, _compiled]
)
def test_what_stands_around_a_part_is_run(place, put):
    """A part is called straight past nn.Module's machinery, but not where that has something to do."""
    model, tokens, seen = make_model("grouped"), random_tokens(2, 5), []
    expected = model(tokens)
    part = model.get_submodule(place)
    put(part, seen)
    logits = model(tokens)
    logits.sum().backward()
    assert seen == [part]
    assert torch.equal(logits, expected)


def test_hooks_on_all_modules_are_run():
    model, tokens, seen = make_model("grouped"), random_tokens(2, 5), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(tokens)
    finally:
        handle.remove()
    parts = [module for module in model.modules() if isinstance(module, Part)]
    assert {id(part) for part in parts} == {id(module) for module in seen if isinstance(module, Part)}
