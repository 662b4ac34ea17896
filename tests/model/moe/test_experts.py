"""Tests of hooklens.model.moe.experts and groups: work only for routed tokens, and what its hook points show."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hooklens import MoEConfig
from hooklens.model.moe import groups
from hooklens.model.moe.groups import ExpertGroups
from tests.model.moe.layers import MIXTURES, make_layer, random_stream
from tests.torch_version import multiplies_groups


def flops_of(n_experts, k, n_tokens=64):
    layer = make_layer(MoEConfig(n_experts=n_experts, experts_per_token=k, d_expert=8), dtype=torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(random_stream(1, n_tokens, dtype=torch.float32))
    router = 2 * n_tokens * 12 * n_experts
    return counter.get_total_flops() - router


def test_work_grows_with_routed_tokens_not_with_experts():
    per_pair = 2 * 3 * 12 * 8
    for n_experts in (4, 16, 64):
        for k in (1, 2, 4):
            assert flops_of(n_experts, k) == 64 * k * per_pair


class TestShownNeurons:
    @pytest.mark.parametrize("name", MIXTURES)
    def test_neurons_are_those_of_the_chosen_experts(self, name):
        mixture = MIXTURES[name]
        layer, x = make_layer(mixture), random_stream()
        with layer.capture(["router.*", "experts.*"]) as shown:
            layer(x)
        choice, weights = shown["router.hook_choice"], shown["router.hook_weights"]
        for row in range(2):
            for pos in range(5):
                for place, expert in enumerate(choice[row, pos].tolist()):
                    read = x[row, pos] * (weights[row, pos, expert] if mixture.router == "sigmoid_input" else 1)
                    for point, half in (("hook_pre", "gate"), ("hook_pre_linear", "in")):
                        bias = getattr(layer, f"b_{half}")
                        expected = read @ getattr(layer, f"W_{half}")[expert] + (0 if bias is None else bias[expert])
                        torch.testing.assert_close(shown[f"experts.{point}"][row, pos, place], expected)
                    made = shown["experts.hook_post"][row, pos, place] @ layer.W_out[expert]
                    made = made if layer.b_out is None else made + layer.b_out[expert]
                    made = made if mixture.router == "sigmoid_input" else made * weights[row, pos, expert]
                    torch.testing.assert_close(shown["experts.hook_result"][row, pos, place], made)

    def test_one_expert_s_neurons_are_read_and_edited_by_the_choice(self):
        """The example of the class: of an expert, for the tokens that it sees."""
        layer, x = make_layer(MIXTURES["renormalised"]), random_stream()
        with layer.capture(["router.hook_choice", "router.hook_weights", "experts.hook_post"]) as shown:
            plain = layer(x)
        choice = shown["router.hook_choice"]
        expert = int(choice[0, 0, 0])
        neurons = shown["experts.hook_post"][choice == expert]
        assert neurons.shape == (int((choice == expert).sum()), 5)

        def silence(post, hook):
            post[choice == expert] = 0

        found = layer.run_with_hooks(x, fwd_hooks=[("experts.hook_post", silence)])
        written = torch.zeros_like(x)
        written[(choice == expert).any(-1)] = neurons @ layer.W_out[expert]
        expected = plain - shown["router.hook_weights"][..., expert, None] * written
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_an_expert_that_no_token_sees(self):
        """All tokens at one expert: the others have no tokens, and every point fires once all the same."""
        layer, x = make_layer(MIXTURES["one expert"]), random_stream()
        fired = []
        hooks = [
            ("router.hook_choice", lambda tensor, hook: torch.full_like(tensor, 2)),
            (lambda name: True, lambda tensor, hook: fired.append((hook.name, tuple(tensor.shape)))),
        ]
        out = layer.run_with_hooks(x, fwd_hooks=hooks)
        assert out.isfinite().all()
        assert len(fired) == len({name for name, _ in fired}) == len(layer.hook_points())
        assert ("experts.hook_post", (2, 5, 1, 5)) in fired

    def test_no_tokens_at_all(self):
        layer = make_layer(MIXTURES["gated shared expert"])
        with layer.capture(lambda name: True) as shown:
            assert layer(random_stream(0, 5)).shape == (0, 5, 12)
        assert shown["experts.hook_pre"].shape == (0, 5, 2, 5)


class TestGroups:
    def test_sorting_is_undone_and_keeps_the_order_of_tokens(self):
        choice = torch.tensor([[3, 1], [1, 0], [3, 2], [0, 3]])
        made = ExpertGroups.of_choice(choice, 5)
        assert made.experts.tolist() == [0, 0, 1, 1, 2, 3, 3, 3]
        assert made.tokens.tolist() == [1, 3, 0, 1, 2, 0, 2, 3]
        pairs = torch.randn(8, 3)
        assert torch.equal(made.restore(made.sort(pairs)), pairs)

    def test_backward_fills_one_gradient_for_all_experts(self):
        """Indexed one by one, each expert's gradient would be as large as those of all of them together."""
        choice = torch.randint(0, 8, (40, 1), generator=torch.Generator().manual_seed(0))
        made = ExpertGroups.of_choice(choice, 8)
        weight = torch.randn(8, 4, 3, dtype=torch.float64, requires_grad=True)
        x = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, weight: made.apply(x, weight, None), (x, weight))

    @multiplies_groups
    def test_the_fused_kernel_gives_the_same(self, monkeypatch):
        """On CUDA with bfloat16; here the CPU's kernel of that name stands in, forwards and backwards."""
        mixture = MoEConfig(n_experts=5, experts_per_token=2, d_expert=16, expert_bias=True)
        layer = make_layer(mixture, dtype=torch.bfloat16, d_model=24)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2, 9, 24, generator=generator).to(torch.bfloat16).requires_grad_()
        outs, grads = [], []
        for fused in (False, True):
            monkeypatch.setattr(groups, "_is_fused", lambda x, weight, fused=fused: fused)
            layer.zero_grad()
            outs.append(layer(x))
            [grad] = torch.autograd.grad((outs[-1].float() ** 2).sum(), x)
            grads.append(grad)
        # Both round sums of at most 24 products to bfloat16 once.
        torch.testing.assert_close(outs[0], outs[1], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grads[0].float(), grads[1].float(), rtol=5e-2, atol=0.2)
