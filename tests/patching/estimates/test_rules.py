from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import HookedCausalLM, patching
from hooklens.config import MoEConfig, NormConfig, PartConfig, RotaryPositions
from hooklens.errors import InputError
from hooklens.hooks.call import thread_listeners
from hooklens.model.parts.declared import point
from hooklens.model.parts.part import Part
from hooklens.patching import (
    RULE_SETS,
    ExactSoftmax,
    GradDrop,
    HalveProducts,
    HoldNormScale,
    HoldPattern,
    LinearizeActivations,
    LogitDiff,
    SoftenSoftmax,
)
from tests.annotations import unchecked
from tests.model.networks import CONFIGS, RMS_NORM, make_config, make_model, random_tokens
from tests.patching.estimates.surrogates import Surrogate
from tests.slow_cases import slow_but

METRIC = LogitDiff(3, 5)
SITES = [
    patching.grid(site, positions="all")
    for site in ("resid_pre", "mlp_out", "q", "k", "v", "z", "q_input", "k_input", "mlp_in", "k_per_head")
]
EXTRA = {
    "solu": make_config(act_fn="solu_ln", act_norm=NormConfig(kind="layer", eps=1e-5)),
    "experts": make_config(
        mlp=MoEConfig(n_experts=3, experts_per_token=2, d_expert=7, d_shared=5),
        gated_mlp=True,
        act_fn="silu",
        norm=RMS_NORM,
    ),
    "sinks": make_config(attn_sinks=True, positions=RotaryPositions(dim=6), norm=RMS_NORM, gated_mlp=True),
}
NETWORKS = ["grouped", "alibi", "shared norm", "capped", *EXTRA]
CHANGING = [
    HoldNormScale(),
    LinearizeActivations(),
    HalveProducts(),
    HalveProducts(mlp=False, attention=True),
    HoldPattern(),
    SoftenSoftmax(3.0),
]


def network(name):
    if name not in EXTRA:
        return make_model(name)
    return make_model(EXTRA[name])


def assert_is_derivative(model, rules, *, sites=SITES, every=9):
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    present = [one for one in sites if any(name.endswith(f"hook_{one.site}") for name in model.hook_points())]
    found = patching.attribution(model, clean, corrupted, present, METRIC, rules=rules, progress=False)
    effects = found.per_pair - found.corrupted_per_pair
    surrogate = Surrogate(model, clean, corrupted, rules)
    for index in range(0, len(found.cells), every):
        expected = surrogate.derivative(found.cells[index], METRIC)
        # Central differences of step 1e-4 are off by the third derivative times 1e-8.
        torch.testing.assert_close(effects[index], expected, rtol=2e-4, atol=2e-4)


# Where each rule has something to change, and ways to do it that networks do not share.
TRIED = {
    0: ("grouped", "shared norm", "capped"),
    1: ("grouped", "alibi", "solu", "experts"),
    2: ("grouped", "alibi", "experts"),
    3: ("grouped", "capped", "sinks"),
    4: ("grouped", "alibi", "capped", "sinks"),
    5: ("grouped", "alibi", "capped", "sinks"),
}


@pytest.mark.parametrize(
    ("name", "rule"),
    slow_but(product(NETWORKS, CHANGING), [(name, CHANGING[at]) for at, names in TRIED.items() for name in names]),
    ids=str,
)
def test_a_rule_is_the_gradient_of_its_surrogate(name, rule):
    assert_is_derivative(network(name), [rule])


@given(
    st.sampled_from(NETWORKS),
    st.lists(st.sampled_from(CHANGING), unique_by=type, min_size=2, max_size=5),
)
@settings(max_examples=6)
def test_rules_go_together_in_any_order(name, rules):
    """A product was halved in front of the softmax's own scores, which then passed on the whole gradient."""
    kinds = {type(rule) for rule in rules}
    if {HoldPattern, SoftenSoftmax} <= kinds:
        rules = [rule for rule in rules if type(rule) is not HoldPattern]
    assert_is_derivative(network(name), rules, every=11)


@pytest.mark.parametrize("name", ["linear", "relp", "gim"])
def test_named_sets_are_their_rules(name):
    model = network("grouped")
    prompts = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    by_name = patching.attribution(model, *prompts, "z", METRIC, rules=name, progress=False)
    listed = patching.attribution(model, *prompts, "z", METRIC, rules=RULE_SETS[name][::-1], progress=False)
    assert torch.equal(by_name.per_pair, listed.per_pair)
    assert by_name.rules == name
    assert_is_derivative(model, RULE_SETS[name])


def test_rules_of_what_a_network_lacks_do_nothing():
    """`"relp"` was an error for edges of networks whose MLPs are not gated: it has no hook point there."""
    model = network("alibi")
    prompts = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    relp = patching.edge_attribution(model, *prompts, METRIC, rules="relp", progress=False)
    linear = patching.edge_attribution(model, *prompts, METRIC, rules="linear", progress=False)
    assert torch.equal(relp.per_pair, linear.per_pair)


def test_defaults_hold_norms_where_one_gradient_is_taken():
    model = network("grouped")
    prompts = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    assert patching.attribution(model, *prompts, "z", METRIC, progress=False).rules == "norms"
    assert patching.attribution(model, *prompts, "z", METRIC, method="ig", progress=False).rules == "gradient"
    methods = {"eap": "norms", "clean-corrupted": "norms", "eap-ig": "gradient", "exact": "gradient"}
    for method, rules in methods.items():
        assert patching.edge_attribution(model, *prompts, METRIC, method=method, progress=False).rules == rules


@torch.no_grad()
def test_values_and_the_model_stay_what_they_are():
    """Rules change gradients; a linear activation's value, and a halved product's, are the network's to the bit."""
    model = network("grouped")
    tokens = random_tokens(2, 5, seed=1)
    expected = model(tokens)
    for rule in CHANGING:
        with model.hooks(rule.hooks(model)):
            # Held norms and patterns are computed the explicit way.
            torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-12)
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
    patching.attribution(model, tokens, tokens.flip(0), "q", METRIC, rules="atp*", progress=False)
    assert not thread_listeners()
    assert all(point.own is None for point in model.hook_points().values())


def plain_effects(model, clean, corrupted, cells, hooks):
    """`(clean - corrupted activation) . gradient`, for cells at the stream and at heads' z, by autograd alone."""
    names = sorted({cell["site"] for cell in cells})
    cache = model.run_with_cache(clean, names_filter=names)[1]
    now, found = {}, {}

    def keep(tensor, hook):
        now[hook.name] = tensor.detach()

    def grade(gradient, hook):
        found[hook.name] = gradient.detach()

    leaf = ("hook_embed", lambda tensor, hook: tensor.detach().requires_grad_())
    with model.hooks([leaf, *hooks, (names, keep)], [(names, grade)]):
        METRIC(model(corrupted)).sum().backward()
    effects = []
    for cell in cells:
        name = cell["site"]
        slope = found.get(name, torch.zeros_like(now[name]))
        whole = ((cache[name] - now[name]).detach() * slope).sum(-1)
        effects.append((whole if cell["head"] is None else whole[..., cell["head"]]).sum(1))
    return torch.stack(effects)


def test_grad_drop_averages_magnitudes():
    """Kramar et al. 2024: one backward pass for each layer, in which it passes nothing on."""
    model = make_model(CONFIGS["grouped"].replace(n_layers=3))
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    sites = [patching.grid("resid_pre", positions="all"), patching.grid("z")]
    found = patching.attribution(model, clean, corrupted, sites, METRIC, rules=[GradDrop()], progress=False)
    plain = plain_effects(model, clean, corrupted, found.cells, [])
    dropped = []
    for layer in range(3):
        names = [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
        hooks = [(names, lambda tensor, hook: tensor.detach())]
        dropped.append(plain_effects(model, clean, corrupted, found.cells, hooks))
    expected = plain.sign() * torch.stack(dropped).abs().sum(0) / 2
    torch.testing.assert_close(found.per_pair - found.corrupted_per_pair, expected, rtol=0, atol=1e-10)
    # Both prompts as one batch, the plain run, and one for each layer.
    assert found.stats.forwards == 1 + 1 + 3


class Doubling(Part, place="blocks.{i}.mlp", kind="doubling of the stream"):
    """A part without neurons."""

    hook_twice = point("batch pos d_model", "twice the stream")

    def forward(self, x, call=None):
        return self.hook_twice(2 * x, call)


def test_refusals():
    model = network("grouped")
    prompts = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)

    def run(rules, model=model):
        patching.attribution(model, *prompts, "z", METRIC, rules=rules, progress=False)

    with unchecked():
        with pytest.raises(InputError, match="rules is 'norm'; expected one of 'gradient', 'norms', 'linear', 'relp'"):
            run("norm")
        with pytest.raises(InputError, match="expected a list of rules such as"):
            run([HoldNormScale])
        with pytest.raises(InputError, match="temperature is 0; expected a number above 0"):
            SoftenSoftmax(0)
        with pytest.raises(InputError, match="HalveProducts: mlp is 1"):
            HalveProducts(mlp=1)
    with pytest.raises(InputError, match="HalveProducts more than once"):
        run([HalveProducts(), HalveProducts(attention=True)])
    with pytest.raises(InputError, match="HoldPattern lets no gradient through a softmax"):
        run([SoftenSoftmax(), HoldPattern()])
    with pytest.raises(InputError, match="GradDrop leaves out one layer of several, and this network has one"):
        run("atp*", make_model(CONFIGS["grouped"].replace(n_layers=1)))
    with pytest.raises(InputError, match="method='exact' takes no gradients, so rules=relp says nothing"):
        patching.edge_attribution(model, *prompts, METRIC, method="exact", rules="relp")
    other = HookedCausalLM(make_config(mlp=PartConfig(kind="doubling of the stream"))).double().eval()
    with pytest.raises(InputError, match=r"layers \[0, 1\] have a Doubling, whose neurons this rule does not know"):
        run("relp", other)
    run("norms", other)
    run([ExactSoftmax()], other)
