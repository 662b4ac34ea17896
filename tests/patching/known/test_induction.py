from itertools import chain, combinations

import pytest
import torch

from hooklens import edits, patching
from hooklens.errors import InputError
from hooklens.patching import Circuit
from hooklens.patching.graph.nodes import list_edges
from tests.annotations import unchecked
from tests.patching.masked_reference import MaskedReference
from tests.slow_cases import slow_but

KINDS = [(0, None), (1, None), (2, "rms"), (3, "layer")]
IDS = [f"{seed}, {norm}" for seed, norm in KINDS]
SEEDS = pytest.mark.parametrize(("seed", "norm"), KINDS, ids=IDS)
THREE = ("token", "previous", "query")
SETS = [*chain.from_iterable(combinations(THREE, size) for size in (1, 2, 3)), ("answer",)]


def make(seed=0, norm=None, **options):
    return patching.known.induction(seed=seed, norm=norm, **options)


def heads_of(known):
    """The previous-token head's and the induction head's number."""
    (first,) = (edge[0] for edge in known.circuit if edge[0].startswith("a0"))
    (second,) = (edge[0] for edge in known.circuit if edge[0].startswith("a1"))
    return int(first[-1]), int(second[-1])


def look_up(row):
    """The algorithm, once more: what stands behind the last token's first place."""
    row = row.tolist()
    return row[row.index(row[-1]) + 1]


@SEEDS
@torch.no_grad()
def test_every_answer_is_right_by_far(seed, norm):
    known = make(seed, norm)
    for tokens in known.prompts(300, seed=4):
        expected = torch.tensor([look_up(row) for row in tokens])
        assert torch.equal(known.answer(tokens), expected)
        logits = known.model(tokens)[:, -1]
        right = logits.gather(1, expected[:, None])[:, 0]
        others = logits.scatter(1, expected[:, None], -torch.inf).max(1).values
        # A weight of 0.97 on the match, read with a factor of 10; a norm's weight is right on average only.
        assert (right - others).min() > (9.0 if norm is None else 7.0)


@pytest.mark.parametrize(("seed", "norm"), slow_but(KINDS, [(0, None), (3, "layer")]), ids=IDS)
def test_the_true_edges_have_an_effect_and_no_others(seed, norm):
    """One full forward of a plain reference for each edge, in float64."""
    known = make(seed, norm, dtype=torch.float64)
    clean, corrupted = known.prompts(8)
    reference = MaskedReference(known.model, clean, corrupted)
    rows, answers, wrongs = torch.arange(8), known.answer(clean), known.answer(corrupted)

    def measure(circuit):
        logits = reference.logits(circuit)[:, -1]
        return (logits[rows, answers] - logits[rows, wrongs]).mean()

    full = Circuit.full(known.model.cfg)
    whole = measure(full)
    effects = {edge: abs(float(measure(full.without_edges([edge])) - whole)) for edge in list_edges(known.model.cfg)}
    true = [effects.pop(edge) for edge in known.circuit]
    assert min(true) > 8
    # What the noisy heads write is a twentieth of what the circuit's do, and in all directions.
    assert 0 < max(effects.values()) < 0.2
    assert float(measure(known.circuit)) > 0.95 * float(whole)


def test_without_noise_no_other_edge_has_an_effect():
    known = make(noise=0, dtype=torch.float64)
    pairs = known.pairs(8)
    exact = patching.edge_attribution(known.model, pairs, metric=known.metric, method="exact", progress=False)
    table = exact.to_dataframe()
    others = [edge not in known.circuit for edge in zip(table["writer"], table["reader"], strict=True)]
    # Sums in another order round differently.
    assert table[others]["score"].abs().max() < 1e-12
    assert Circuit(exact.top(5)) == known.circuit


def auroc(scores, circuit):
    """The share of (true, other) couples of edges that the scores put in the right order; ties count as a half."""
    true = torch.tensor([[(writer, reader) in circuit for reader in scores.readers] for writer in scores.writers])
    strength = scores.scores.abs()
    inside, outside = strength[true & scores.exists], strength[~true & scores.exists]
    couples = inside[:, None] - outside
    return float(((couples > 0).double() + (couples == 0).double() / 2).mean())


@SEEDS
def test_acdc_finds_the_circuit_and_attribution_ranks_it(seed, norm):
    known = make(seed, norm)
    pairs = known.pairs(16, seed=5)
    found = patching.discover_circuit(known.model, pairs, metric=known.metric, threshold=0.5, progress=False)
    assert found.circuit == known.circuit
    by_method = {
        method: auroc(
            patching.edge_attribution(known.model, pairs, metric=known.metric, method=method, progress=False),
            known.circuit,
        )
        for method in ("eap", "eap-ig-inputs", "eap-ig-activations")
    }
    assert max(by_method.values()) == 1.0
    assert min(by_method.values()) >= 0.95


@pytest.mark.parametrize("names", SETS, ids=" and ".join)
@torch.no_grad()
def test_interchanged_variables_give_the_algorithms_answer(names):
    """Every set of variables taken from other prompts, each in its own subspace and nowhere else."""
    known = make(1)
    tokens, others = known.prompts(64, seed=6)
    _, cache = known.model.run_with_cache(others)

    def interchange(variable):
        source = cache[variable.hook_name]

        def change(stream):
            taken = source[:, variable.pos] if variable.pos is not None else source
            taken = taken.reshape(stream.shape)
            return stream + (taken - stream) @ variable.basis.T @ variable.basis

        return edits.Custom(variable.hook_name, change, pos=variable.pos)

    chosen = [known.variables[name] for name in names]
    logits = known.model.run_with_hooks(tokens, edits=[interchange(one) for one in chosen])[:, -1]
    expected = known.answer(tokens, {one.name: one.value(others) for one in chosen})
    has_answer = expected >= 0
    assert has_answer.sum() > 16
    assert len(names) > 1 or has_answer.all()
    assert torch.equal(logits.argmax(-1)[has_answer], expected[has_answer])
    assert not torch.equal(expected, known.answer(tokens))


def test_sets_of_variables_without_an_answer():
    known = make()
    tokens, _ = known.prompts(2)
    absent = next(token for token in range(1, 32) if not (tokens == token).any())
    assert known.answer(tokens, {"query": torch.full((2,), absent)}).tolist() == [-1, -1]


@SEEDS
@torch.no_grad()
def test_weights_are_made_as_the_text_says(seed, norm):
    known = make(seed, norm, dtype=torch.float64)
    model, (previous, matching) = known.model, heads_of(known)
    idle_space = torch.eye(128, dtype=torch.float64)
    spaces = [model.W_E, model.W_pos, known.variables["previous"].basis, known.variables["answer"].basis]
    codes = torch.cat(spaces)
    assert torch.allclose(codes @ codes.T, torch.eye(len(codes), dtype=torch.float64), atol=1e-12)
    assert codes.sum(-1).abs().max() < 1e-12
    assert torch.equal(known.variables["query"].basis, model.W_E)
    assert torch.allclose(model.W_U, 10 * known.variables["answer"].basis.T)
    idle_space -= codes.T @ codes
    for layer, place in ((0, previous), (1, matching)):
        outside = [bool((model.W_O[layer, head] @ codes.T).abs().max() > 1e-9) for head in range(4) if head != place]
        assert sorted(outside) == [False, False, True]
        assert model.W_O[layer].sum(-1).abs().max() < 1e-12
        # Heads that stay idle have something to write.
        assert (model.W_O[layer] @ idle_space).norm(dim=(1, 2)).topk(2).values.min() > 1
    tokens, _ = known.prompts(16)
    _, cache = model.run_with_cache(tokens, names_filter="*hook_pattern")
    before = torch.tensor([0, *range(tokens.shape[1] - 1)])
    to_before = cache["blocks.0.attn.hook_pattern"][:, previous].gather(-1, before[None, :, None].expand(16, -1, 1))
    assert to_before.min() > 0.99
    match = torch.tensor([row.tolist().index(row[-1]) + 1 for row in tokens])
    to_match = cache["blocks.1.attn.hook_pattern"][torch.arange(16), matching, -1, match]
    assert 0.93 < to_match.min() < to_match.max() < 0.99


def test_seeds_places_and_the_global_random_state():
    state = torch.get_rng_state()
    one, same = make(4), make(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.circuit == same.circuit
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), same.model.parameters(), strict=True))
    places = {heads_of(make(seed)) for seed in range(12)}
    assert len(places) > 4
    assert not one.model.training


@torch.no_grad()
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_are_undone(norm):
    """What a norm gives is the stream, but for the scale of what idle heads have written."""
    known = make(norm=norm, dtype=torch.float64)
    tokens, _ = known.prompts(32)
    names = ["blocks.0.ln1.hook_normalized", "blocks.0.hook_resid_pre"]
    names += ["blocks.1.ln1.hook_normalized", "blocks.1.hook_resid_pre"]
    _, cache = known.model.run_with_cache(tokens, names_filter=names)
    # The stream's mean square at the entrance is 2 / 128, to which the norm's eps of 1e-6 is 6e-5 of.
    for layer, rounding in ((0, 4e-5), (1, 0.3)):
        weight = known.model.blocks[layer].ln1.w
        stream = cache[f"blocks.{layer}.hook_resid_pre"]
        ratio = (cache[f"blocks.{layer}.ln1.hook_normalized"] * weight).norm(dim=-1) / stream.norm(dim=-1)
        assert (ratio - 1).abs().max() < rounding


def test_dtypes():
    known = make(dtype=torch.float64)
    assert known.model.dtype == torch.float64
    assert known.variables["query"].basis.dtype == torch.float64
    half = make(dtype="bfloat16")
    tokens, _ = half.prompts(64)
    with torch.no_grad():
        assert torch.equal(half.model(tokens)[:, -1].argmax(-1), half.answer(tokens))


@unchecked()
def test_refusals():
    with pytest.raises(InputError, match="norm is 'batch', expected 'layer', 'rms' or None"):
        make(norm="batch")
    with pytest.raises(InputError, match="noise is -1, expected a number >= 0"):
        make(noise=-1)
    with pytest.raises(InputError, match=r"seed is 0\.5"):
        make(seed=0.5)
    with pytest.raises(InputError, match=r"dtype is torch.int64, expected a floating dtype"):
        make(dtype=torch.int64)
