import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hooklens.datasets import fit_probe
from hooklens.errors import InputError
from tests.datasets.test_recording import record_small


def make_classes(n=400, width=6, n_classes=2, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    centres = torch.randn(n_classes, width, generator=generator, dtype=torch.float64)
    return centres[labels] + noise * torch.randn(n, width, generator=generator, dtype=torch.float64), labels, centres


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_probe_tells_apart_what_a_line_tells_apart(n_classes):
    values, labels, centres = make_classes(n_classes=n_classes)
    probe = fit_probe(values, labels)
    assert probe.accuracy > 0.9
    assert probe.predict(values) == probe.scores(values).argmax(1).tolist()
    assert np.mean(np.array(probe.predict(values)) == labels.numpy()) == pytest.approx(
        (probe.accuracy * probe.n_test + probe.train_accuracy * probe.n_train) / 400
    )
    if n_classes == 2:
        assert float(probe.direction @ (centres[1] - centres[0])) > 0
        assert float(probe.direction.norm()) == pytest.approx(1.0)
    else:
        with pytest.raises(InputError, match="4 classes"):
            _ = probe.direction


def test_the_fit_is_that_of_scikit_learn():
    values, labels, _ = make_classes(noise=1.5)
    probe = fit_probe(values, labels, strength=0.1, seed=5)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    seen = np.setdiff1d(np.arange(400), order[:100].numpy())
    x, y = values.numpy()[seen], labels.numpy()[seen]
    scaled = (x - x.mean(0)) / x.std(0)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, y)
    found = (probe.scores(torch.from_numpy(x))[:, 1] - probe.scores(torch.from_numpy(x))[:, 0]).numpy()
    # The same solver on the same numbers; the probe folds the scaling into its weights.
    np.testing.assert_allclose(found, expected.decision_function(scaled), rtol=1e-8, atol=1e-8)


def test_labels_that_tell_nothing_are_not_told():
    """On labels drawn at random a probe that was measured on what it has seen looked better than chance."""
    values, _, _ = make_classes(n=300, width=100)
    labels = torch.randint(2, (300,), generator=torch.Generator().manual_seed(9))
    probe = fit_probe(values, labels)
    assert probe.train_accuracy > 0.7
    # 75 fair coins: five standard deviations are 0.29.
    assert abs(probe.accuracy - 0.5) < 0.29


def test_tokens_of_one_document_stand_on_one_side(tmp_path):
    recorded = record_small(tmp_path / "set")
    site = recorded.site("blocks.0.hook_resid_post")
    probe = fit_probe(site, recorded.positions() % 2, seed=2)
    documents = recorded.documents()
    found = torch.unique(documents)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(2))
    tested = torch.isin(documents, found[order[: round(0.25 * len(found))]])
    assert (probe.n_test, probe.n_train) == (int(tested.sum()), int((~tested).sum()))
    assert probe.site == "blocks.0.hook_resid_post"


@pytest.mark.parametrize(
    ("labels", "options", "text"),
    [
        ([0, 1], {}, "labels have the shape"),
        ([0] * 10, {}, "have 1 of the classes"),
        ([0, 1] * 5, {"groups": [1] * 10}, "there is 1 group"),
        ([0, 1] * 5, {"holdout": 1.0}, "holdout is 1.0"),
        ([0, 1] * 5, {"strength": 0.0}, "strength is 0.0"),
    ],
)
def test_what_cannot_be_fitted(labels, options, text):
    with pytest.raises(InputError, match=text):
        fit_probe(torch.randn(10, 3), labels, **options)
