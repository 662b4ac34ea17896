"""Tests of hooklens.model.moe.router: what edits of logits, choice and weights do."""

import pytest
import torch

from hooklens import MoEConfig
from hooklens.errors import HookOutputError
from hooklens.model.moe.router import choose_experts, weigh_experts
from tests.model.moe.layers import (
    MIXTURES,
    SIZES,
    choose_by_hand,
    compute_by_hand,
    make_layer,
    random_stream,
    weigh_by_hand,
)


def expert_alone(layer, expert, x):
    """What one expert makes of every token, by itself."""
    gate, linear = (x @ weight[expert] for weight in (layer.W_gate, layer.W_in))
    return (torch.nn.functional.silu(gate) * linear) @ layer.W_out[expert]


class TestForcingAndForbidding:
    @pytest.mark.parametrize("name", MIXTURES)
    def test_forced_identity_routing_is_bit_identical(self, name):
        """A copy of the choice, or of the weights, takes the way of an edit."""
        layer, x = make_layer(MIXTURES[name], dtype=torch.float32), random_stream(2, 9, dtype=torch.float32)
        plain = layer(x)
        for point in ("router.hook_choice", "router.hook_weights", "router.hook_logits"):
            copied = layer.run_with_hooks(x, fwd_hooks=[(point, lambda tensor, hook: tensor.clone())])
            assert torch.equal(copied, plain)

    @pytest.mark.parametrize("name", [name for name in MIXTURES if name != "all experts"])
    def test_masking_an_expert_equals_a_router_bias_of_minus_infinity(self, name):
        mixture = MoEConfig(**{**MIXTURES[name].options, "router_bias": True})
        layer, x = make_layer(mixture, dtype=torch.float32), random_stream(2, 9, dtype=torch.float32)
        with layer.capture(["router.hook_choice"]) as before:
            layer(x)
        expert = int(before["router.hook_choice"][0, 0, 0])

        def forbid(logits, hook):
            logits[..., expert] = -torch.inf

        with layer.capture(["router.hook_choice"]) as masked:
            out = layer.run_with_hooks(x, fwd_hooks=[("router.hook_logits", forbid)])
        assert not (masked["router.hook_choice"] == expert).any()
        with torch.no_grad():
            layer.b_router[expert] = -torch.inf
        assert torch.equal(layer(x), out)
        assert out.isfinite().all()

    @pytest.mark.parametrize("router", ["softmax", "sigmoid", "sparsemixer"])
    def test_fewer_experts_than_are_chosen(self, router):
        """Where all experts but one are forbidden the others' gates are 0, no NaN."""
        layer, x = make_layer(MoEConfig(**SIZES, router=router)), random_stream()

        def allow_one(logits, hook):
            return torch.where(torch.arange(6) == 4, logits, -torch.inf)

        with layer.capture(["router.hook_weights"]) as captured:
            out = layer.run_with_hooks(x, fwd_hooks=[("router.hook_logits", allow_one)])
        weights = captured["router.hook_weights"]
        assert not weights[..., [0, 1, 2, 3, 5]].any()
        torch.testing.assert_close(out, expert_alone(layer, 4, x) * weights[..., 4:5])

    @pytest.mark.parametrize("name", ["softmax", "renormalised", "sigmoid with correction", "sparsemixer"])
    def test_gates_of_forced_experts_follow_from_the_logits(self, name):
        mixture = MIXTURES[name]
        layer, x = make_layer(mixture), random_stream()
        forced = torch.tensor([5, 0, 3][: mixture.experts_per_token]).expand(2, 5, -1)
        with layer.capture(["router.*"]) as captured:
            layer.run_with_hooks(x, fwd_hooks=[("router.hook_choice", lambda tensor, hook: forced.clone())])
        assert torch.equal(captured["router.hook_choice"], forced)
        for logits, weights in zip(
            captured["router.hook_logits"].flatten(0, 1), captured["router.hook_weights"].flatten(0, 1), strict=True
        ):
            chosen = forced[0, 0].tolist()
            assert weights[chosen].tolist() == pytest.approx(weigh_by_hand(logits.tolist(), chosen, mixture), abs=1e-12)

    def test_an_improbable_expert_can_be_forced(self):
        """Its softmax over all is no number above 0 in float32, its softmax over the chosen is."""
        mixture = MoEConfig(**{**SIZES, "experts_per_token": 1}, gate_norm=1.0)
        logits = torch.tensor([[[200.0, 0, 0, 0, 0, 0]]])
        assert weigh_experts(logits, torch.tensor([[[3]]]), mixture).tolist() == [[[1.0]]]

    def test_an_expert_alone(self):
        layer, x = make_layer(MIXTURES["renormalised"]), random_stream()

        def only_third(weights, hook):
            weights.zero_()
            weights[..., 3] = 1.0

        found = layer.run_with_hooks(x, fwd_hooks=[("router.hook_weights", only_third)])
        torch.testing.assert_close(found, expert_alone(layer, 3, x), rtol=1e-12, atol=1e-12)

    def test_weights_of_any_experts_take_effect(self):
        """Whether or not they were chosen; a random table of gates, half of them 0."""
        layer, x = make_layer(MIXTURES["softmax"]), random_stream()
        table = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()
        found = layer.run_with_hooks(x, fwd_hooks=[("router.hook_weights", lambda tensor, hook: table)])
        expected = sum(table[..., e : e + 1] * expert_alone(layer, e, x) for e in range(6))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_gates_on_the_input(self):
        layer, x = make_layer(MIXTURES["sigmoid on the input"]), random_stream()
        table = torch.rand(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = layer.run_with_hooks(x, fwd_hooks=[("router.hook_weights", lambda tensor, hook: table)])
        with layer.capture(["shared.hook_out"]) as captured:
            layer(x)
        expected = (
            sum(expert_alone(layer, e, table[..., e : e + 1] * x) for e in range(6)) + captured["shared.hook_out"]
        )
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_experts_that_there_are_not(self):
        layer, x = make_layer(MIXTURES["softmax"]), random_stream()
        for value, message in ((torch.tensor([1, 6]), r"chose experts \[6\]; the layer has 6, 0 to 5"),
                               (torch.tensor([-1, 6]), r"chose experts \[-1, 6\]"),
                               (torch.tensor([2, 2]), "chose an expert twice for a token")):  # fmt: skip
            with pytest.raises(HookOutputError, match=message):
                layer.run_with_hooks(
                    x,
                    fwd_hooks=[("router.hook_choice", lambda tensor, hook, value=value: value.expand(2, 5, 2).clone())],
                )
        with pytest.raises(HookOutputError, match=r"returned shape \[2, 5, 3\]"):
            layer.run_with_hooks(x, fwd_hooks=[("router.hook_choice", lambda tensor, hook: tensor[..., [0, 1, 0]])])


class TestFormulas:
    @pytest.mark.parametrize("name", MIXTURES)
    def test_choice_and_gates_against_plain_numbers(self, name):
        mixture = MIXTURES[name]
        generator = torch.Generator().manual_seed(7)
        logits = 3 * torch.randn(40, mixture.n_experts, generator=generator, dtype=torch.float64)
        added = torch.randn(mixture.n_experts, generator=generator, dtype=torch.float64)
        added = added if mixture.choice_bias else None
        choice = choose_experts(logits[None], mixture, added)
        gates = weigh_experts(logits[None], choice, mixture)
        for row, (chosen, weighed) in enumerate(zip(choice[0].tolist(), gates[0].tolist(), strict=True)):
            plain = logits[row].tolist()
            assert chosen == choose_by_hand(plain, mixture, [0.0] * len(plain) if added is None else added.tolist())
            assert weighed == pytest.approx(weigh_by_hand(plain, chosen, mixture), abs=1e-12)

    def test_the_router_runs_in_float32_where_asked(self):
        for in_float32 in (False, True):
            mixture = MoEConfig(**SIZES, router_float32=in_float32, router_bias=True)
            layer, x = make_layer(mixture, dtype=torch.bfloat16), random_stream(dtype=torch.bfloat16)
            with layer.capture(["router.*"]) as captured:
                assert layer(x).dtype == torch.bfloat16
            wide = x.float() @ layer.W_router.float() + layer.b_router.float()
            logits = captured["router.hook_logits"]
            assert logits.dtype == (torch.float32 if in_float32 else torch.bfloat16)
            # bfloat16 rounds to 8 bits.
            rtol, atol = (0, 1e-5) if in_float32 else (2**-8, 1e-2)
            torch.testing.assert_close(logits.float(), wide, rtol=rtol, atol=atol)
            assert captured["router.hook_weights"].dtype == torch.bfloat16

    def test_gradient_of_a_weight_is_what_its_expert_would_change(self):
        """Also at experts that were not chosen, whose gates are 0 in the forward."""
        layer, x = make_layer(MIXTURES["softmax"]), random_stream()
        direction = random_stream(seed=9)
        with layer.capture(["router.hook_weights"], incl_bwd=True) as captured:
            (layer(x) * direction).sum().backward()
        expected = torch.stack([(expert_alone(layer, e, x) * direction).sum(-1) for e in range(6)], -1)
        torch.testing.assert_close(captured["router.hook_weights_grad"], expected, rtol=1e-10, atol=1e-10)

    def test_gradients_reach_the_router_through_the_gates(self):
        layer, x = make_layer(MIXTURES["sigmoid with correction"]), random_stream(1, 3)
        weight = layer.router_proj.weight
        (layer(x) * random_stream(1, 3, seed=9)).sum().backward()
        step = 1e-6 * torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step)
                out = compute_by_hand(layer, MIXTURES["sigmoid with correction"], x)
                values.append(float((out * random_stream(1, 3, seed=9)).sum()))
                weight.sub_(sign * step)
        # Central differences: their error is the square of the step, and rounding divided by it.
        assert float((weight.grad * step).sum()) == pytest.approx((values[0] - values[1]) / 2, rel=1e-5)
