from itertools import product

import pytest
import torch

from hooklens import patching
from hooklens.config import NoPositions, NormConfig, RotaryPositions
from hooklens.model.norm import Norm
from hooklens.patching import ExactSoftmax, HoldNormScale, LogitDiff
from tests.model.networks import CONFIGS, make_config, make_model, pad_rows, random_tokens
from tests.patching.estimates import published
from tests.patching.estimates.surrogates import index_of
from tests.slow_cases import slow_but

METRIC = LogitDiff(3, 5)
SITES = [
    patching.grid("q", positions="each"),
    patching.grid("q"),
    patching.grid("k", positions="each"),
    patching.grid("k", heads="all"),
    patching.grid("k"),
]
NETWORKS = {
    "grouped": CONFIGS["grouped"],
    "alibi, grouped": CONFIGS["alibi, grouped"],
    "capped": CONFIGS["capped"],
    "rotary": CONFIGS["rotary"],
    "sinks": make_config(attn_sinks=True, n_kv_heads=2, positions=RotaryPositions(dim=6)),
}


def slope_of_pattern(model, tokens, name):
    """The metric's gradient at a pattern, by autograd alone."""
    found = {}
    leaf = ("hook_embed", lambda tensor, hook: tensor.detach().requires_grad_())

    def keep(gradient, hook):
        found[hook.name] = gradient.detach()

    with model.hooks([leaf], [(name, keep)]):
        METRIC(model(tokens)).sum().backward()
    return found.get(name)


def expected_effect(model, clean, corrupted, cell):
    """`(pattern of the patched run - pattern) . gradient at the pattern`, the cell patched in a run of its own."""
    name, index = cell["site"], index_of(cell)
    pattern = f"{name.rpartition('.')[0]}.hook_pattern"
    with torch.no_grad():
        source = model.run_with_cache(clean, names_filter=name)[1][name]

        def put(tensor, hook):
            moved = tensor.clone()
            moved[index] = source[index]
            return moved

        old = model.run_with_cache(corrupted, names_filter=pattern)[1][pattern]
        new = model.run_with_cache(corrupted, names_filter=pattern, fwd_hooks=[(name, put)])[1][pattern]
    return ((new - old) * slope_of_pattern(model, corrupted, pattern)).sum((1, 2, 3))


@pytest.mark.parametrize(
    ("network", "sharpness"),
    slow_but(product(NETWORKS, [1.0, 40.0]), [*((network, 40.0) for network in NETWORKS), ("grouped", 1.0)]),
)
def test_patterns_are_those_of_patched_runs(network, sharpness):
    """One key has all of a row where scores are sharp: what it leaves to the others was lost to rounding."""
    model = make_model(NETWORKS[network])
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q_proj.weight *= sharpness
    clean, corrupted = random_tokens(2, 6, seed=1), random_tokens(2, 6, seed=2)
    found = patching.attribution(model, clean, corrupted, SITES, METRIC, rules=[ExactSoftmax()], progress=False)
    effects = found.per_pair - found.corrupted_per_pair
    for index in range(0, len(found.cells), 7):
        expected = expected_effect(model, clean, corrupted, found.cells[index])
        # Sums of some hundred products of up to 1e2, in float64.
        torch.testing.assert_close(effects[index], expected, rtol=1e-8, atol=1e-9)


def test_it_is_exact_where_all_behind_the_pattern_is_linear():
    """In one layer of attention without norms a patch of queries or keys acts through its pattern alone."""
    cfg = make_config(n_layers=1, attn_only=True, norm=None, final_norm=None, positions=RotaryPositions(dim=6))
    model = make_model(cfg)
    clean, corrupted = random_tokens(3, 6, seed=1), random_tokens(3, 6, seed=2)
    exact = patching.sweep(model, clean, corrupted, SITES, METRIC, progress=False)
    found = patching.attribution(model, clean, corrupted, SITES, METRIC, rules=[ExactSoftmax()], progress=False)
    torch.testing.assert_close(found.per_pair, exact.per_pair, rtol=0, atol=1e-10)
    plain = patching.attribution(model, clean, corrupted, SITES, METRIC, rules=[], progress=False)
    assert (plain.per_pair - exact.per_pair).abs().max() > 0.01


def test_ragged_pairs_and_groups_change_nothing():
    model = make_model("grouped")
    lengths = (7, 5, 6)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(3, 7, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], "left"), pad_rows(rows[1], "left")
    sites = [patching.grid("q", positions=-2), patching.grid("k", positions=[1, -1]), patching.grid("k")]
    options = {"rules": "atp*", "progress": False}
    for size in (1, 2, 3):
        together = patching.attribution(
            model, clean, corrupted, sites, METRIC, attention_mask=mask, batch_size=size, **options
        )
        for i in range(3):
            alone = patching.attribution(model, rows[0][i][None], rows[1][i][None], sites, METRIC, **options)
            torch.testing.assert_close(together.per_pair[..., i], alone.per_pair[..., 0], rtol=0, atol=1e-10)


def test_other_sites_and_norms_keep_their_gradient():
    model = make_model("grouped")
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    sites = ["resid_pre", patching.grid("v"), patching.grid("z")]
    plain = patching.attribution(model, clean, corrupted, sites, METRIC, rules="norms", progress=False)
    rules = [ExactSoftmax(), HoldNormScale()]
    found = patching.attribution(model, clean, corrupted, sites, METRIC, rules=rules, progress=False)
    assert torch.equal(found.per_pair, plain.per_pair)


def networks_and_rules():
    """Both rules in every network, each alone in one."""
    for rules in ([HoldNormScale(), ExactSoftmax()], [HoldNormScale()], [ExactSoftmax()]):
        for network in ("grouped", "rotary", "shared norm", "attention only", "latent attention"):
            is_tried = len(rules) == 2 or network == "grouped"
            yield pytest.param(network, rules, id=f"{rules}-{network}", marks=() if is_tried else pytest.mark.slow)


@pytest.mark.parametrize(("network", "rules"), list(networks_and_rules()))
def test_edges_feel_the_rules(network, rules, monkeypatch):
    """Edges into queries and keys: the reader's own copy moved in a run of its own, times the gradient at the pattern.

    The reference's norms are written out, with a denominator through which no gradient goes.
    """
    model = make_model(network)
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    found = patching.edge_attribution(model, clean, corrupted, METRIC, rules=rules, progress=False)
    if HoldNormScale() in rules:
        monkeypatch.setattr(Norm, "apply_weights", norm_with_held_scale)
    leaf = ("hook_embed", lambda tensor, hook: tensor.detach().clone().requires_grad_())
    expected = published.scores(model, clean, corrupted, METRIC, [(clean, [leaf])])
    if ExactSoftmax() in rules:
        expected |= exact_edges(model, clean, corrupted)
    for (writer, reader), score in expected.items():
        at = found.writers.index(writer), found.readers.index(reader)
        torch.testing.assert_close(found.per_pair[at], score, rtol=1e-8, atol=1e-9)


def norm_with_held_scale(norm, x):
    centred = x - x.mean(-1, keepdim=True) if norm.norm.kind == "layer" else x
    scale = (centred.square().mean(-1, keepdim=True) + norm.norm.eps).sqrt().detach()
    out = centred / scale
    out = out if norm.w is None else out * norm.w
    return out if norm.b is None else out + norm.b


def exact_edges(model, clean, corrupted):
    changes = published.outputs(model, corrupted)
    for name, value in published.outputs(model, clean).items():
        changes[name] = changes[name] - value
    slopes = {}
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.attn.hook_pattern"
        if name in model.hook_points():
            slopes[name] = slope_of_pattern(model, clean, name)
    found = {}
    for writer in published.list_writers(model.cfg):
        for reader in published.list_readers(model.cfg):
            if reader.kind not in ("q", "k") or not published.reaches(writer, reader, model.cfg):
                continue
            name = f"blocks.{reader.layer}.attn.hook_pattern"

            def move(tensor, hook, reader=reader, writer=writer):
                moved = tensor.clone()
                moved[:, :, reader.head] += changes[str(writer)]
                return moved

            with torch.no_grad():
                old = model.run_with_cache(clean, names_filter=name)[1][name]
                new = model.run_with_cache(clean, names_filter=name, fwd_hooks=[(reader.hook_name, move)])[1][name]
            slope = torch.zeros_like(old) if slopes[name] is None else slopes[name]
            found[str(writer), str(reader)] = ((new - old) * slope).sum((1, 2, 3))
    return found


def test_no_positions_and_half_precision():
    """Sums are taken in float32 where the network computes in bfloat16."""
    model = make_model(make_config(positions=NoPositions(), norm=NormConfig(kind="rms", eps=1e-5, bias=False)))
    clean, corrupted = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
    wide = patching.attribution(model, clean, corrupted, "k", METRIC, rules="atp*", progress=False)
    half = patching.attribution(model.to(torch.bfloat16), clean, corrupted, "k", METRIC, rules="atp*", progress=False)
    assert half.per_pair.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % of logits of some tens.
    torch.testing.assert_close(half.per_pair.double(), wide.per_pair, rtol=0.1, atol=1.5)
