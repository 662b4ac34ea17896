import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import edits, patching
from hooklens.patching import Circuit, FunctionMetric
from hooklens.patching.graph.nodes import list_edges
from hooklens.patching.known import KnownVariable
from hooklens.patching.known.exchange import Exchange
from tests.model.networks import make_config, make_model, random_tokens

CLEAN, OTHER = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)


def draw_circuits(cfg, n, seed):
    generator = torch.Generator().manual_seed(seed)
    edges = list_edges(cfg)
    drawn = torch.rand(n, len(edges), generator=generator) < 0.5
    return [Circuit(edge for edge, has in zip(edges, row, strict=True) if has) for row in drawn.tolist()]


NETWORKS = ("rotary", "grouped", "alibi, grouped", "learned, tied", "shared norm", "attention only", "scaled")


@settings(max_examples=10)
@given(network=st.sampled_from(NETWORKS), seed=st.integers(0, 99))
@torch.no_grad()
def test_edges_are_those_of_the_circuit_runner(network, seed):
    """The rest of patching runs circuits piece by piece; here each row has a circuit of its own."""
    model = make_model(make_config(residual_scale=0.5) if network == "scaled" else network)
    circuits = draw_circuits(model.cfg, 3, seed=seed)
    kept = []

    def keep_logits(logits):
        kept.append(logits[:, -1])
        return logits[:, -1, 0]

    exchange = Exchange(model, {})
    full = Circuit.full(model.cfg).to_mask(model.cfg)
    rows = torch.stack([full & ~circuit.to_mask(model.cfg) for circuit in circuits])
    found = exchange.run(CLEAN, exchange.take(OTHER), rows)
    for row, circuit in enumerate(circuits):
        kept.clear()
        patching.evaluate_circuits(
            model, CLEAN[[row]], OTHER[[row]], [circuit], FunctionMetric(keep_logits), progress=False
        )
        assert torch.allclose(kept[-1][0], found[row], atol=1e-10)


@torch.no_grad()
def test_nothing_exchanged_is_the_plain_run():
    model = make_model("grouped")
    exchange = Exchange(model, {})
    source = exchange.take(OTHER)
    plain = model(CLEAN, logits_at=[-1])[:, 0]
    assert torch.equal(exchange.run(CLEAN, source), plain)
    none = torch.zeros(3, *Circuit().to_mask(model.cfg).shape, dtype=torch.bool)
    assert torch.allclose(exchange.run(CLEAN, source, none), plain, atol=1e-12)
    assert torch.equal(source.logits, model(OTHER, logits_at=[-1])[:, 0])


VARIABLES = {
    "stream": ("blocks.1.hook_resid_pre", None, slice(1, 3)),
    "head": ("blocks.0.attn.hook_result", 2, -1),
    "mlp": ("blocks.1.hook_mlp_out", None, None),
}


@pytest.mark.parametrize("name", VARIABLES)
@torch.no_grad()
def test_variables_are_exchanged_as_an_edit_would(name):
    model = make_model("learned, tied")
    hook_name, head, pos = VARIABLES[name]
    basis = torch.linalg.qr(torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q.T
    variable = KnownVariable(
        name=name, hook_name=hook_name, basis=basis, pos=pos, head=head, read=lambda tokens: tokens
    )
    exchange = Exchange(model, {name: variable})
    rows = torch.tensor([True, False, True])
    found = exchange.run(CLEAN, exchange.take(OTHER), exchanged={name: rows})
    _, cache = model.run_with_cache(OTHER, names_filter=hook_name)
    at = slice(None) if pos is None else pos
    theirs = cache[hook_name][rows][:, at] if head is None else cache[hook_name][rows][:, at, head]

    def by_hand(own):
        moved = theirs.reshape(own.shape)
        return own - own @ basis.T @ basis + moved @ basis.T @ basis

    edit = edits.Custom(hook_name, by_hand, pos=pos, head=head, rows=[0, 2])
    expected = model.run_with_hooks(CLEAN, edits=[edit])[:, -1]
    assert torch.allclose(found, expected, atol=1e-12)
    assert not torch.allclose(found[0], model(CLEAN)[0, -1])


@torch.no_grad()
def test_an_exchanged_variable_is_what_edges_carry():
    """Edges that carry the source's output of a node give nothing new where the node itself is the source's."""
    model = make_model("learned, tied")
    basis = torch.eye(12, dtype=torch.float64)
    variable = KnownVariable(
        name="mlp", hook_name="blocks.0.hook_mlp_out", basis=basis, pos=None, read=lambda tokens: tokens
    )
    exchange = Exchange(model, {"mlp": variable})
    source, rows = exchange.take(OTHER), torch.ones(3, dtype=torch.bool)
    edges = Circuit(edge for edge in list_edges(model.cfg) if edge[0] == "m0").to_mask(model.cfg).expand(3, -1, -1)
    both = exchange.run(CLEAN, source, edges, {"mlp": rows})
    assert torch.allclose(both, exchange.run(CLEAN, source, exchanged={"mlp": rows}), atol=1e-12)
    assert torch.allclose(both, exchange.run(CLEAN, source, edges), atol=1e-12)


def test_gradients_go_through_both_runs():
    """Against the difference of two runs with a weight moved, in float64."""
    model = make_model("grouped").requires_grad_(True)
    edges = ~Circuit().to_mask(model.cfg) & Circuit.full(model.cfg).to_mask(model.cfg)
    edges[:, 2:] = False
    exchange = Exchange(model, {})

    def value():
        return exchange.run(CLEAN, exchange.take(OTHER), edges.expand(3, -1, -1))[:, 1].sum()

    weight = model.blocks[0].attn.v_proj.weight
    (gradient,) = torch.autograd.grad(value(), weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ends = []
        for step in (1e-5, -1e-5):
            weight += step * direction
            ends.append(value())
            weight -= step * direction
    # The error of a central difference is of order 1e-10.
    assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-6)
