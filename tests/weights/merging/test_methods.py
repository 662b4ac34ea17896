"""Merges against formulas written out over whole vectors, in float64; what cannot be merged is refused."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.weights import merging
from hooklens.weights.merging import operands
from tests.model.networks import make_model

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def make(seed: int, *, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state[name].double().flatten() for name in SHAPES])


BASE, MODELS = make(0), [make(1), make(2), make(3)]
TASKS = torch.stack([flat(model) - flat(BASE) for model in MODELS])


def test_averages():
    whole = torch.stack([flat(model) for model in MODELS])
    torch.testing.assert_close(flat(merging.simple_average(MODELS)), whole.mean(0), **CLOSE)
    weights = [1.0, 3.0, -2.0]
    expected = whole[0] + 3 * whole[1] - 2 * whole[2]
    torch.testing.assert_close(flat(merging.weighted_average(MODELS, weights)), expected / 2, **CLOSE)
    torch.testing.assert_close(flat(merging.weighted_average(MODELS, weights, normalize=False)), expected, **CLOSE)


def test_slerp_takes_each_weight_by_itself():
    found = merging.slerp(MODELS[0], MODELS[1], 0.25)
    for name, (first, second) in {name: (MODELS[0][name], MODELS[1][name]) for name in SHAPES}.items():
        angle = torch.arccos((first * second).sum() / first.norm() / second.norm())
        expected = (torch.sin(0.75 * angle) * first + torch.sin(0.25 * angle) * second) / torch.sin(angle)
        torch.testing.assert_close(found[name], expected, **CLOSE)


def test_task_arithmetic():
    found = merging.task_arithmetic(BASE, MODELS, scaling_factor=-0.4)
    torch.testing.assert_close(flat(found), flat(BASE) - 0.4 * TASKS.sum(0), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_task_vector_of_one_model_gives_that_model(dtype):
    base, model = make(0, dtype=dtype), make(1, dtype=dtype)
    for found in (
        merging.task_arithmetic(base, [model], scaling_factor=1.0),
        merging.ties_merging(base, [model], density=1.0),
        merging.dare(base, [model], sparsity=0.0, scaling_factor=1.0),
        merging.dare(base, [model], sparsity=0.0, then="simple_average"),
    ):
        assert all(torch.equal(found[name], model[name]) for name in SHAPES)


@given(st.floats(0, 1), st.sampled_from(["mean", "sum", "max"]))
def test_ties_merging_trims_over_all_weights_together(density, agreement):
    found = merging.ties_merging(BASE, MODELS, density=density, agreement=agreement, scaling_factor=0.7)
    trimmed = torch.zeros_like(TASKS)
    for row, task in enumerate(TASKS):
        kept = task.abs().argsort(descending=True)[: int(density * len(task))]
        trimmed[row, kept] = task[kept]
    elected = trimmed.sum(0).sign()
    agreeing = torch.where(trimmed.sign() == elected, trimmed, 0.0)
    expected = {
        "mean": agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1),
        "sum": agreeing.sum(0),
        "max": agreeing.abs().max(0).values * elected,
    }[agreement]
    torch.testing.assert_close(flat(found), flat(BASE) + 0.7 * expected, **CLOSE)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_one_tensor_is_merged_as_peft_merges_adapters(density):
    """Of one tensor the largest entries of all are the largest of each; drawn numbers have no equal sizes."""
    theirs = pytest.importorskip("peft.utils.merge_utils")
    tasks = list(torch.randn(3, 30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    base, models = {"w": torch.zeros(30, 20, dtype=torch.float64)}, [{"w": task} for task in tasks]
    ones = torch.ones(3, dtype=torch.float64)
    found = merging.ties_merging(base, models, density=density)["w"]
    torch.testing.assert_close(found, theirs.ties(tasks, ones, density), **CLOSE)
    found = merging.task_arithmetic(base, models, scaling_factor=0.7)["w"]
    torch.testing.assert_close(found, theirs.task_arithmetic(tasks, 0.7 * ones), **CLOSE)


def test_dare_draws_each_weight_of_each_model_by_itself():
    found = merging.dare(BASE, MODELS, sparsity=0.5, scaling_factor=1.0, seed=3)
    backwards = [{name: model[name] for name in reversed(SHAPES)} for model in MODELS]
    again = merging.dare({name: BASE[name] for name in reversed(SHAPES)}, backwards, scaling_factor=1.0, seed=3)
    assert all(torch.equal(found[name], again[name]) for name in SHAPES)
    other = merging.dare(BASE, MODELS, sparsity=0.5, scaling_factor=1.0, seed=4)
    assert not torch.equal(found["a"], other["a"])
    # Whatever was drawn, each entry is the base's and twice the task vectors of some of the models.
    change = (flat(found) - flat(BASE)) / 2
    subsets = torch.stack(
        [sum((TASKS[i] for i in range(3) if bits >> i & 1), torch.zeros(len(change))) for bits in range(8)]
    )
    assert bool(((change - subsets).abs().min(0).values < 1e-12).all())


def test_dare_ties_merges_what_is_left():
    found = merging.dare(BASE, MODELS[:1], then="ties_merging", density=1.0, seed=1)
    plain = merging.dare(BASE, MODELS[:1], scaling_factor=1.0, seed=1)
    torch.testing.assert_close(flat(found), flat(plain), **CLOSE)


def test_the_layout_does_not_matter():
    def turned(state):
        return {name: tensor.flatten().flip(0).view(tensor.shape[::-1]) for name, tensor in state.items()}

    for merge in (
        merging.task_arithmetic,
        lambda base, models: merging.ties_merging(base, models, density=0.4),
        lambda base, models: merging.slerp(models[0], models[1]),
    ):
        there = merge(turned(BASE), list(map(turned, MODELS)))
        back = turned(merge(BASE, MODELS))
        for name in SHAPES:
            torch.testing.assert_close(there[name], back[name], **CLOSE)


def test_a_weight_under_two_names_counts_once():
    """As a tied unembedding: counted twice, its entries would take the places of others in a task vector."""
    tied = [{**state, "z": state["a"]} for state in (BASE, *MODELS)]
    found = merging.ties_merging(tied[0], tied[1:], density=0.3)
    expected = merging.ties_merging(BASE, MODELS, density=0.3)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
    assert found["z"] is found["a"]


class Reader(Mapping):
    """Gives new tensors, whose memory is the last one's as soon as that is gone."""

    def __init__(self, state):
        self.state = state

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)

    def __getitem__(self, name):
        return self.state[name].clone()


def test_lazy_mappings_are_read_a_weight_at_a_time():
    alike = {"a": torch.ones(50, 50), "b": torch.ones(50, 50), "c": torch.ones(50, 50)}
    models = [{name: tensor * (i + 1) for i, (name, tensor) in enumerate(alike.items())}, alike]
    found = merging.simple_average([Reader(model) for model in models])
    assert [float(found[name].mean()) for name in alike] == [1.0, 1.5, 2.0]
    found = merging.ties_merging(Reader(BASE), [Reader(model) for model in MODELS])
    expected = merging.ties_merging(BASE, MODELS)
    assert list(found) == list(SHAPES)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_networks_merge_by_their_state_dicts():
    models = [make_model("learned, tied", seed=seed) for seed in range(3)]
    merged = merging.task_arithmetic(models[0].state_dict(), [model.state_dict() for model in models[1:]])
    network = type(models[0]).from_state_dict(merged, models[0].cfg)
    expected = models[0].W_E + 0.3 * (models[1].W_E + models[2].W_E - 2 * models[0].W_E)
    torch.testing.assert_close(network.W_E, expected)


@pytest.mark.parametrize("kind", [dict, lambda weights: weights], ids=["dict", "the mapping itself"])
def test_a_tied_unembedding_counts_once_in_the_unified_layout(kind):
    """`W_U` is the transpose of `W_E` in the same memory; it took the places of other entries in a task vector."""
    models = [make_model("learned, tied", seed=seed) for seed in range(3)]
    states = [dict(model.named_weights()) for model in models]
    given = [kind(model.named_weights()) for model in models]
    found = merging.ties_merging(given[0], given[1:], density=0.3)
    single = [{name: one for name, one in state.items() if name != "unembed.W_U"} for state in states]
    expected = merging.ties_merging(single[0], single[1:], density=0.3)
    assert all(torch.equal(found[name], one) for name, one in expected.items())
    assert torch.equal(found["unembed.W_U"], found["embed.W_E"].T)
    assert found["unembed.W_U"].data_ptr() == found["embed.W_E"].data_ptr()
    states[2]["unembed.W_U"] = states[2]["unembed.W_U"].clone()
    assert torch.equal(merging.ties_merging(states[0], states[1:], density=0.3)["embed.W_E"], found["embed.W_E"])
    states[2]["unembed.W_U"] = states[2]["unembed.W_U"] + 1
    with pytest.raises(InputError, match=r"'unembed.W_U' and 'embed.W_E' are one weight in base and two in models"):
        merging.ties_merging(states[0], states[1:], density=0.3)


def test_one_weight_here_and_two_there_is_refused():
    """The second of the two was left out without a word."""
    tied = [{**state, "z": state["a"]} for state in (BASE, *MODELS)]
    tied[2]["z"] = tied[2]["a"] + 1
    with pytest.raises(InputError, match=r"'z' and 'a' are one weight in base and two in models\[1\]"):
        merging.task_arithmetic(tied[0], tied[1:])
    tied[2]["z"] = tied[2]["a"].clone()
    assert torch.equal(merging.task_arithmetic(tied[0], tied[1:])["z"], merging.task_arithmetic(BASE, MODELS)["a"])


@pytest.mark.parametrize("n_piece", [1, 7, 13])
def test_results_do_not_depend_on_the_size_of_the_pieces(monkeypatch, n_piece):
    """Entries of equal size, of which the first stay, and draws, too, are those of whole weights."""
    base, *models = ({name: (one * 4).round() for name, one in state.items()} for state in (BASE, *MODELS))
    merges = (
        lambda: merging.weighted_average(models, [1.0, 2.0, 3.0]),
        lambda: merging.ties_merging(base, models, density=0.3),
        lambda: merging.dare(base, models, then="ties_merging", density=0.3),
        lambda: merging.slerp(MODELS[0], MODELS[1], 0.3),
    )
    whole = [merge() for merge in merges]
    monkeypatch.setattr(operands, "N_PIECE", n_piece)
    for expected, merge in zip(whole, merges, strict=True):
        # Only the angle of slerp is a sum over pieces.
        tolerance = 1e-15 if merge is merges[-1] else 0.0
        for name, tensor in merge().items():
            torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance)


def test_the_dtype_of_the_outcome():
    half = [make(seed, dtype=torch.bfloat16) for seed in range(3)]
    assert merging.simple_average(half)["a"].dtype == torch.bfloat16
    found = merging.simple_average(half, dtype=torch.float32)
    assert torch.equal(found["b"], ((half[0]["b"].double() + half[1]["b"] + half[2]["b"]) / 3).float())


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3, 3)])
def test_tensors_of_any_shape(shape):
    models = [{"x": torch.full(shape, float(number)), "y": torch.ones(2)} for number in (1, 2)]
    for found in (
        merging.simple_average(models),
        merging.slerp(*models, 0.5),
        merging.ties_merging(*models[:1], models[1:]),
    ):
        assert found["x"].shape == shape
    assert torch.equal(merging.simple_average(models)["x"], torch.full(shape, 1.5))


def test_tensors_that_lie_otherwise_in_memory():
    turned = [{name: one.flatten().view(one.shape[::-1]).permute(*range(one.ndim)[::-1]) for name, one in model.items()}
              for model in MODELS]  # fmt: skip
    plain = [{name: one.contiguous() for name, one in model.items()} for model in turned]
    found, expected = merging.simple_average(turned), merging.simple_average(plain)
    assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_whole_numbers_are_kept_and_must_agree():
    numbered = [{**state, "steps": torch.tensor(3)} for state in MODELS]
    assert merging.simple_average(numbered)["steps"] == 3
    numbered[1]["steps"] = torch.tensor(4)
    with pytest.raises(InputError, match=r"'steps' holds torch.int64 and differs between models\[0\] and models\[1\]"):
        merging.simple_average(numbered)


@pytest.mark.parametrize(
    ("merge", "text"),
    [
        (lambda: merging.simple_average([]), r"models is empty"),
        (lambda: merging.simple_average(BASE), r"models is .*expected a list of models"),
        (lambda: merging.simple_average([BASE, 3]), r"models\[1\] is 3, expected tensors by name, a checkpoint f"),
        (lambda: merging.simple_average([BASE, {**BASE, "b": "text"}]), r"models\[1\] holds .*no plain tensor .*'b'"),
        (lambda: merging.simple_average([{"b": BASE["b"].to("meta")}]), r"models\[0\] holds .*no plain tensor .*'b'"),
        (lambda: merging.simple_average([BASE], out="folder"), r"out='folder' goes with folders"),
        (
            lambda: merging.simple_average([BASE, {"a": BASE["a"], "d": BASE["b"]}]),
            r"models\[1\] and models\[0\] do not .*: models\[1\] lacks 'b', 'c'; models\[1\] alone has 'd'",
        ),
        (
            lambda: merging.task_arithmetic(BASE, [{**BASE, "b": torch.ones(4), "c": torch.ones(1)}]),
            r"(?s)'b' is \[5\] in base and \[4\] in models\[0\].*'c' is \[2, 2, 2\] in base and \[1\]",
        ),
        (lambda: merging.weighted_average(MODELS, [1.0]), r"weights has 1 numbers for 3 models"),
        (lambda: merging.weighted_average(MODELS[:2], [1.0, -1.0]), r"weights add up to 0"),
        (lambda: merging.weighted_average(MODELS[:2], [1.0, float("nan")]), r"weights\[1\] is nan"),
        (lambda: merging.ties_merging(BASE, MODELS, density=20), r"density is 20, expected a number from 0 to 1"),
        (lambda: merging.ties_merging(BASE, MODELS, agreement="median"), r"agreement is 'median'"),
        (lambda: merging.dare(BASE, MODELS, sparsity=1.0), r"sparsity is 1.0, expected a number from 0 to below 1"),
        (lambda: merging.dare(BASE, MODELS, density=0.2), r"density is no option of then='task_arithmetic'"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(merge, text):
    with pytest.raises(InputError, match=text):
        merge()
