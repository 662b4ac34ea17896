"""The search finds a variable in its cells and nowhere else, and controls find nothing."""

import pytest
import torch

from hooklens.alignment import AlignmentError, AlignmentInterruptedError, Basis, Counterfactuals, DasOptions, search
from hooklens.alignment.tables import cells
from hooklens.errors import HookNameError
from tests.alignment.pair_model import make_pair_model
from tests.annotations import unchecked

PAIRS = make_pair_model()
ONE = Counterfactuals.draw(PAIRS.causal_model, PAIRS.prompts, 200, variables=["first"])
BOTH = Counterfactuals.draw(PAIRS.causal_model, PAIRS.prompts, 200, changed=False)
# Where the first token's identity is: at its own position before layer 0 has copied it, at the last one afterwards.
TRUTH = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
SHORT = DasOptions(steps=45, lr=0.05)


def find(data=ONE, **options):
    return search(PAIRS.model, data, progress=False, **options)


def test_das_finds_the_variable_and_controls_do_not():
    table = find(n_dims=2, options=SHORT, controls=["random_model", "arbitrary_labels", "placebo", "full"])
    assert torch.equal(table.accuracy, TRUTH)
    assert table.best() in ((0, 0), (1, 1))
    assert table.unpatched_accuracy == 0.0
    # Nine answers: chance is 0.11, and of 50 rows 0.35 is five standard deviations above it.
    for name in ("random_model", "arbitrary_labels", "placebo"):
        assert float(table.controls[name].accuracy.max()) < 0.35, name
    # Two directions cannot learn by heart what 150 rows say without a rule.
    assert float(table.controls["arbitrary_labels"].training_accuracy.max()) < 0.5
    # The held-out rows are measured against each other's labels, too.
    assert not torch.equal(table.controls["arbitrary_labels"].unpatched_margins, table.unpatched_margins)
    full = table.controls["full"].accuracy
    assert float(full[0, 0]) == 1.0
    # At the last position of layer 1 the other token goes along.
    assert 0.2 < float(full[1, 1]) < 0.9
    assert dict(table.controls["full"].bases) == {}
    sizes = table.controls["placebo"].n_dims
    assert sizes == table.n_dims == {(layer, pos): {"first": 2} for layer in (0, 1) for pos in (0, 1)}


@pytest.mark.parametrize("method", ["mean_differences", "probe"])
def test_bases_of_values_find_it_without_training(method):
    table = find(method=method)
    assert torch.equal(table.accuracy, TRUTH)
    assert table.n_dims[1, 1] == {"first": 2}
    assert bool(table.training_accuracy.isnan().all())


def test_principal_components_of_the_only_content_find_it():
    table = find(method="principal_components", n_dims=2)
    assert float(table.accuracy[0, 0]) == 1.0
    # There two tokens share the stream, and components mix them.
    assert float(table.accuracy[1, 1]) < 1.0


def test_given_bases_are_used_as_they_are():
    names = [f"blocks.{layer}.hook_resid_pre" for layer in (0, 1)]
    table = find(method={name: Basis.of_span(name, PAIRS.first.float()) for name in names})
    assert float(table.accuracy[1, 1]) == 1.0
    # Before layer 0 the token stands in other directions.
    assert float(table.accuracy[0, 0]) == 0.0


def test_several_variables_at_once():
    table = find(BOTH, layers=[1], positions=[-1], n_dims=2, options=SHORT, controls="placebo")
    assert table.accuracy.tolist() == [[1.0]]
    assert list(table.bases[1, 1]) == ["first", "second"]
    products = table.controls["placebo"].bases[1, 1]
    crossed = products["first"].rows @ products["second"].rows.T
    # 1e-5: float32.
    assert float(crossed.abs().max()) < 1e-5


def test_boundless_and_its_placebo_have_as_many_dimensions():
    table = find(layers=[1], positions=[1], method="boundless", options=SHORT, controls=["placebo"])
    assert table.accuracy.tolist() == [[1.0]]
    assert table.controls["placebo"].n_dims == table.n_dims


def test_the_model_and_the_random_state_stay_and_the_seed_says_all():
    weights = {name: one.clone() for name, one in PAIRS.model.state_dict().items()}
    state = torch.get_rng_state()
    options = {"n_dims": 1, "options": DasOptions(steps=4), "layers": 1, "controls": ["random_model", "placebo"]}
    one, same, other = (find(seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.margins, same.margins)
    for name in options["controls"]:
        assert torch.equal(one.controls[name].margins, same.controls[name].margins)
        assert not torch.equal(one.controls[name].margins, other.controls[name].margins)
    assert all(torch.equal(weights[name], found) for name, found in PAIRS.model.state_dict().items())
    assert all(found.grad is None for found in PAIRS.model.parameters())


def test_an_interrupt_gives_the_layers_that_were_measured(monkeypatch):
    measure = cells.measure_cells

    def interrupted(model, data, name, *given, **options):
        if name.startswith("blocks.1"):
            raise KeyboardInterrupt
        return measure(model, data, name, *given, **options)

    monkeypatch.setattr(cells, "measure_cells", interrupted)
    with pytest.raises(
        AlignmentInterruptedError, match=r"search stopped after 2 of 4 cells \(KeyboardInterrupt"
    ) as got:
        find(method="mean_differences")
    table = got.value.result
    assert table.accuracy[0].tolist() == [1.0, 0.0]
    assert bool(table.accuracy[1].isnan().all())
    assert table.best() == (0, 0)


def test_an_interrupt_within_a_layer_gives_its_cells_that_were_fitted(monkeypatch):
    fit = cells.TableInMaking._fit

    def interrupted(self, layer, position):
        if (layer, position) == (0, 1):
            raise KeyboardInterrupt
        return fit(self, layer, position)

    monkeypatch.setattr(cells.TableInMaking, "_fit", interrupted)
    with pytest.raises(AlignmentInterruptedError, match="search stopped after 1 of 4 cells") as got:
        find(method="mean_differences")
    accuracy = got.value.result.accuracy
    assert float(accuracy[0, 0]) == 1.0
    assert int(accuracy.isnan().sum()) == 3
    # Before there is anything to keep an interrupt is one.
    with pytest.raises(KeyboardInterrupt):
        find(method="mean_differences", positions=[1, 0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"n_dims": 1, "site": "resid_per"}, HookNameError, "no hook point is called 'resid_per'"),
        ({"n_dims": 1, "site": "z"}, AlignmentError, r"\[batch pos d\]; train_das takes single heads"),
        ({"n_dims": 1, "site": "mlp_out"}, AlignmentError, r"site 'mlp_out' is at \['blocks.0.hook_mlp_out'"),
        ({"n_dims": 1, "layers": 2}, AlignmentError, "layers: 2 out of range; there are 2 layers"),
        ({"n_dims": 1, "positions": [0, 5]}, AlignmentError, r"positions: \[5\] out of range"),
        ({"n_dims": 1, "positions": slice(0)}, AlignmentError, "choose no cell"),
        ({"method": "pca"}, AlignmentError, "method is 'pca', expected 'das', 'boundless', 'mean_differences'"),
        ({"method": {}}, AlignmentError, r"no alignment.Basis for \['blocks.0.hook_resid_pre', 'blocks.1"),
        ({}, AlignmentError, "n_dims is missing"),
        ({"method": "random"}, AlignmentError, "n_dims is missing"),
        ({"method": "full", "n_dims": 1}, AlignmentError, "n_dims=1 goes with no method='full'"),
        ({"method": "boundless", "n_dims": 1}, AlignmentError, "n_dims=1 goes with no method='boundless'"),
        ({"method": "full", "options": SHORT}, AlignmentError, "method='full' trains nothing"),
        ({"method": "full", "controls": ["placebo"]}, AlignmentError, "method='full' has none"),
        ({"n_dims": 1, "controls": ["chance"]}, AlignmentError, "controls is 'chance', expected 'random_model'"),
        ({"n_dims": 1, "controls": ["full", "full"]}, AlignmentError, "name one twice"),
        (
            {"n_dims": 1, "controls": ["full"], "data": BOTH},
            AlignmentError,
            "from one source, and the data have several",
        ),
        (
            {"method": "probe", "data": BOTH},
            AlignmentError,
            r"method='probe' is of one variable, and the data interchange",
        ),
        (
            {"method": "probe", "data": Counterfactuals(base=ONE.base, sources=ONE.sources, labels=ONE.labels)},
            AlignmentError,
            "needs the values of the variable",
        ),
        ({"n_dims": 1, "progress": 1}, AlignmentError, "progress is 1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, error, text):
    with unchecked(), pytest.raises(error, match=text):
        search(PAIRS.model, options.pop("data", ONE), **{"progress": False, **options})
