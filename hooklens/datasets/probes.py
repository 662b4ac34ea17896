"""Linear probes on recorded activations, fitted by scikit-learn and measured on documents that the fit has not seen.

Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_number, read_seed, reads, show
from hooklens.datasets.dataset import SiteValues
from hooklens.display import Displayed, Summary
from hooklens.errors import InputError
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Probe(Displayed):
    """A linear classifier of activations: the class with the largest `x @ weights[class] + bias[class]`.

    Attributes:
        site: the hook point.
        classes: the labels, in the order of the weights' rows.
        weights: in the activations' own units; of two classes one row, which speaks for the second.
        bias: of each row.
        accuracy: on tokens of documents that the fit has not seen.
        train_accuracy: on those that it has.
        majority: the share of the most frequent class among the former: what a constant answer reaches.
        n_train, n_test: tokens.
    """

    site: str
    classes: tuple[Any, ...]
    weights: Float[Tensor, "row width"]
    bias: Float[Tensor, " row"]
    accuracy: float
    train_accuracy: float
    majority: float
    n_train: int
    n_test: int

    @property
    def direction(self) -> Float[Tensor, " width"]:
        """Of two classes, the unit vector that points from the first to the second.

        Raises:
            InputError: there are more classes.
        """
        if len(self.classes) != 2:
            raise InputError(
                f"the probe tells {len(self.classes)} classes apart, and has no one direction; see weights"
            )
        unit: Tensor = self.weights[0] / self.weights[0].norm()
        return unit

    def scores(self, activations: Float[Tensor, "token ..."]) -> Float[Tensor, "token class"]:
        """What the classes score, before any softmax; of two the first scores 0."""
        found = activations.flatten(1).to(self.weights.dtype) @ self.weights.T + self.bias
        return torch.cat([torch.zeros_like(found), found], dim=1) if len(self.classes) == 2 else found

    def predict(self, activations: Float[Tensor, "token ..."]) -> list[Any]:
        """The class of each token."""
        return [self.classes[index] for index in self.scores(activations).argmax(1).tolist()]

    def _summary(self) -> Summary:
        return Summary(
            title=f"Probe({self.site!r}, {len(self.classes)} classes)",
            facts={
                "accuracy": f"{self.accuracy:.3f} on {self.n_test:,} unseen tokens (majority {self.majority:.3f})",
                "seen": f"{self.train_accuracy:.3f} on {self.n_train:,}",
                "classes": ", ".join(map(str, self.classes[:20])) + (", ..." if len(self.classes) > 20 else ""),
            },
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row: site, classes, accuracy, train_accuracy, majority, n_train, n_test."""
        names = ("site", "accuracy", "train_accuracy", "majority", "n_train", "n_test")
        row = {**{name: getattr(self, name) for name in names}, "classes": len(self.classes)}
        table: pandas.DataFrame = import_package("pandas").DataFrame([row])
        return table


@reads()
def fit_probe(
    activations: SiteValues | Float[Tensor, "token ..."],
    labels: Sequence[Any] | Int[Tensor, " token"],
    *,
    groups: Sequence[int] | Int[Tensor, " token"] | None = None,
    holdout: float = 0.25,
    strength: float = 1.0,
    max_iter: int = 1000,
    seed: int = 0,
) -> Probe:
    """Fit a logistic regression (L2) on some documents and measure it on the others.

    Entries are scaled to unit variance for the fit, so that one strength of the penalty does for all sites; the
    probe's weights are for activations as they are.

    Args:
        activations: of one site, `dataset.site(name)`, or a tensor; several heads are one flattened vector.
        labels: a class for each token: numbers, texts or booleans.
        groups: tokens of one group stand on one side of the split. None: the documents of a recorded site; of a tensor,
            each token by itself.
        holdout: the share of groups that is measured on.
        strength: the inverse of the penalty's strength, scikit-learn's `C`.
        max_iter: the most iterations of the fit.
        seed: of the split.

    Raises:
        InputError: labels or groups for another number of tokens, fewer than two classes on the side that is fitted,
            or fewer than two groups.
        MissingDependencyError: scikit-learn is not installed (the extra `probes`).

    Example:
        >>> recorded = hl.datasets.record(model, texts, "resid_post", "activations")
        >>> fit_probe(recorded.site("blocks.1.hook_resid_post"), recorded.positions() % 2)
    """
    share = read_number(
        holdout, what="fit_probe: holdout", expected="a share above 0 and below 1", allows=lambda x: 0 < x < 1
    )
    penalty = read_number(strength, what="fit_probe: strength", expected="a number above 0", allows=lambda x: x > 0)
    drawn_by = read_seed(seed, what="fit_probe: seed")
    name = activations.name if isinstance(activations, SiteValues) else "activations"
    if groups is None and isinstance(activations, SiteValues):
        groups = activations.documents
    values = (activations[:] if isinstance(activations, SiteValues) else activations).flatten(1).double().numpy()
    answers = np.asarray(labels.tolist() if isinstance(labels, Tensor) else list(labels))
    of_group = np.arange(len(values)) if groups is None else np.asarray(groups)
    for what, given in (("labels", answers), ("groups", of_group)):
        if given.shape != (len(values),):
            raise InputError(
                f"fit_probe: {what} have the shape {list(given.shape)}, and there are {len(values)} tokens"
            )
    tested = _draw_tested(of_group, share, drawn_by)
    classes = np.unique(answers)
    if len(np.unique(answers[~tested])) < max(2, len(classes)):
        raise InputError(
            f"fit_probe: the tokens to fit have {len(np.unique(answers[~tested]))} of the classes "
            f"{show(classes.tolist())}; expected all of them and at least two: give more documents, or another seed"
        )
    spread = values[~tested].std(0)
    spread[spread == 0] = 1.0
    centre = values[~tested].mean(0)
    fitted = import_package("sklearn.linear_model").LogisticRegression(C=penalty, max_iter=max_iter)
    fitted.fit((values[~tested] - centre) / spread, answers[~tested])
    weights = fitted.coef_ / spread
    right = fitted.predict((values - centre) / spread) == answers
    counts = np.unique(answers[tested], return_counts=True)[1]
    return Probe(
        site=name,
        classes=tuple(fitted.classes_.tolist()),
        weights=torch.from_numpy(weights),
        bias=torch.from_numpy(fitted.intercept_ - weights @ centre),
        accuracy=float(right[tested].mean()),
        train_accuracy=float(right[~tested].mean()),
        majority=float(counts.max() / counts.sum()),
        n_train=int((~tested).sum()),
        n_test=int(tested.sum()),
    )


def _draw_tested(groups: np.ndarray[Any, np.dtype[Any]], share: float, seed: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Which tokens are measured on.

    Raises:
        InputError: fewer than two groups.
    """
    found = np.unique(groups)
    if len(found) < 2:
        raise InputError(f"fit_probe: there is {len(found)} group, which cannot be parted; give tokens of at least two")
    n_tested = min(max(1, round(share * len(found))), len(found) - 1)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).numpy()
    return np.isin(groups, found[order[:n_tested]])
