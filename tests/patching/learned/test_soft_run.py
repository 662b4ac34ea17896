import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.patching.circuits.ground import prepare_ground
from hooklens.patching.circuits.masked_run import MaskedRun
from hooklens.patching.circuits.reach import Wiring
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.learned import soft_run
from hooklens.patching.learned.soft_run import SoftRun, pairs_per_step
from hooklens.patching.metrics.of_answers import LogProb
from hooklens.patching.pairs.prompts import read_pairs
from tests.model.networks import make_model, random_tokens
from tests.patching.masked_reference import MaskedReference

NETWORKS = ["grouped", "rotary", "shared norm", "alibi, grouped", "learned, tied", "attention only"]
MODELS = {network: make_model(network) for network in NETWORKS}
SOME = LogProb(4, pos=[2, -1])


class SoftReference(MaskedReference):
    """The reference with a factor on each edge: a circuit holds an edge as often as its gate says."""

    def __init__(self, model, clean, corrupted, ablation, gates):
        super().__init__(model, clean, corrupted, ablation)
        self.gates = {
            (str(writer), str(reader)): gates[row, column]
            for row, reader in enumerate(self.readers)
            for column, writer in enumerate(self.writers)
        }

    def give(self, names, circuit, written):
        blended = {
            reader: {
                writer: self.ablated[writer] + self.gates[writer, reader] * (output - self.ablated[writer])
                for writer, output in written.items()
            }
            for reader in names
        }
        # One reader at a time, each with writers that have written only as much as its gates let through.
        return [
            hook for reader in names for hook in super(SoftReference, self).give([reader], circuit, blended[reader])
        ]


class All:
    def __contains__(self, edge):
        return True


def prepare(model, ablation="resample", shared=2):
    clean, corrupted = random_tokens(2, 6, seed=1), random_tokens(2, 6, seed=2)
    corrupted[:, :shared] = clean[:, :shared]
    prompts = read_pairs(model, clean, corrupted, None)
    with torch.no_grad():
        ground = prepare_ground(model, prompts, [0, 1], SOME, ablation)
    return clean, corrupted, ground, Wiring.of(model.cfg)


def draw_gates(wiring, *, n=1, seed=0, share=0.0):
    """Gates, a share of them at each end."""
    generator = torch.Generator().manual_seed(seed)
    exists = wiring.graph.exists()
    gates = torch.rand(n, *exists.shape, generator=generator, dtype=torch.float64)
    ends = torch.rand(n, *exists.shape, generator=generator)
    gates = gates.masked_fill(ends < share, 0.0).masked_fill(ends > 1 - share, 1.0)
    return gates * exists


@pytest.mark.parametrize("network", NETWORKS)
def test_gates_of_0_and_1_give_what_the_circuit_gives_bit_for_bit(network):
    model = MODELS[network]
    _, _, ground, wiring = prepare(model)
    masks = draw_gates(wiring, n=2, share=0.5).bool()
    with torch.no_grad():
        expected = MaskedRun(model, wiring, ground, masks).logits()
        found = SoftRun(model, wiring, ground, masks.double()).logits()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=2)
@given(seed=st.integers(0, 999), share=st.sampled_from([0.0, 0.3]), ablation=st.sampled_from(["resample", "zero"]))
def test_gates_blend_each_edge_with_its_ablation(network, seed, share, ablation):
    model = MODELS[network]
    clean, corrupted, ground, wiring = prepare(model, ablation)
    gates = draw_gates(wiring, seed=seed, share=share)
    (found,) = SoftRun(model, wiring, ground, gates).logits()
    expected = SoftReference(model, clean, corrupted, ablation, gates[0]).logits(All())
    # Sums of some twenty terms in another order, in float64.
    torch.testing.assert_close(found, expected[:, [2, -1]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("width", [None, 1, 6])
def test_gradients_are_those_of_differences(network, width):
    model = MODELS[network]
    _, _, ground, wiring = prepare(model, "resample" if width is None else "zero", shared=0)
    exists = wiring.graph.exists()
    gates = draw_gates(wiring, seed=5, share=0.1).requires_grad_()
    generator = torch.Generator().manual_seed(7)
    constants = None
    if width is not None:
        shape = (len(wiring.graph.writers), width, model.cfg.d_model)
        constants = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    given_ = [tensor for tensor in (gates, constants) if tensor is not None]

    def value(gates, constants=None):
        run = SoftRun(model, wiring, ground, gates * exists, constants=constants)
        return run.logits().sin().sum()

    grads = torch.autograd.grad(value(*given_), given_)
    step = 1e-6
    for place, (tensor, grad) in enumerate(zip(given_, grads, strict=True)):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if tensor is gates:
            # At an end of [0, 1] a gate moves to one side only.
            direction = direction * exists * (gates > 0) * (gates < 1)
        with torch.no_grad():
            up, down = (
                [t + sign * step * direction if i == place else t for i, t in enumerate(given_)] for sign in (1, -1)
            )
            expected = float(value(*up) - value(*down)) / (2 * step)
        # Central differences: rounding of 1e-15 over 1e-6, times values of about 10.
        assert float((grad * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert abs(expected) > 1e-4


@pytest.mark.parametrize("width", [1, 6])
def test_constants_are_what_edges_are_ablated_to(width):
    model = MODELS["grouped"]
    clean, corrupted, ground, wiring = prepare(model, "zero")
    gates = draw_gates(wiring, seed=3, share=0.2)
    constants = torch.randn(len(wiring.graph.writers), width, model.cfg.d_model, dtype=torch.float64)
    (found,) = SoftRun(model, wiring, ground, gates, constants=constants).logits()
    reference = SoftReference(model, clean, corrupted, "zero", gates[0])
    for place, writer in enumerate(wiring.graph.writers):
        reference.ablated[str(writer)] = constants[place].expand(2, 6, -1)
    torch.testing.assert_close(found, reference.logits(All())[:, [2, -1]], rtol=0, atol=1e-9)


def test_a_run_leaves_the_model_as_it_was():
    model = MODELS["rotary"]
    _, _, ground, wiring = prepare(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    gates = draw_gates(wiring).requires_grad_()
    torch.autograd.grad(SoftRun(model, wiring, ground, gates).logits().sum(), gates)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_the_graph_keeps_the_changes_of_writers_once(monkeypatch):
    """Reads above each other go to one table, not to a stack of copies of what was written below."""
    model = MODELS["grouped"]
    _, _, ground, wiring = prepare(model)
    run = SoftRun(model, wiring, ground, draw_gates(wiring).requires_grad_())
    table = run.own.numel()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.numel(), t.data_ptr())) or t, lambda t: t):
        run.logits()
    assert all(size < table for size, _ in saved)


def test_pairs_of_an_update(monkeypatch):
    model = MODELS["grouped"]
    prompts = read_pairs(model, random_tokens(2, 6), random_tokens(2, 6, seed=2), None)
    runner = CircuitRunner(model, prompts, SOME, ablation="zero", batch_size=3)
    assert pairs_per_step(runner) == 3
    runner = CircuitRunner(model, prompts, SOME, ablation="zero", batch_size="auto")
    assert pairs_per_step(runner) == 32
    monkeypatch.setattr(soft_run, "assume_free_bytes", lambda device: 2**21)
    few = pairs_per_step(runner)
    assert 1 <= few < 32
    monkeypatch.setattr(soft_run, "assume_free_bytes", lambda device: 1)
    assert pairs_per_step(runner) == 1
