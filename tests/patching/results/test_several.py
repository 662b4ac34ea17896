import pytest
import torch

from hooklens import patching
from hooklens.errors import HookLensError
from hooklens.patching import KL, LogitDiff
from hooklens.patching.results.several import Results
from tests.model.networks import make_model
from tests.patching.test_edited_models import WIDTH, make_pairs

METRICS = {"difference": LogitDiff(3, 5), "shift": KL()}


@pytest.fixture(scope="module")
def results():
    cleans, corrupteds = make_pairs((WIDTH, WIDTH))
    return patching.sweep(
        make_model("grouped"), torch.stack(cleans), torch.stack(corrupteds), "z", METRICS, progress=False
    )


def test_they_are_a_mapping_from_metric_to_result(results):
    assert isinstance(results, Results)
    assert list(results) == list(METRICS)
    assert len(results) == 2
    assert results["shift"].metric == "shift"
    with pytest.raises(KeyError, match=r"no metric is called 'shfit'.*shift"):
        results["shfit"]


def test_the_table_has_the_cells_once_and_each_metrics_columns(results):
    table = results.to_dataframe()
    alone = results["difference"].to_dataframe()
    assert list(table.columns) == [
        "site", "layer", "head", "difference value", "difference normalized", "shift value", "shift normalized",
    ]  # fmt: skip
    assert table["difference value"].tolist() == alone["value"].tolist()
    assert table["shift value"].tolist() == results["shift"].values.flatten().tolist()


def test_columns_that_would_be_one_are_refused(results):
    doubled = Results({"a": results["shift"], "a value": results["shift"]})
    assert len(doubled.to_dataframe().columns) == 3 + 4

    class Renamed:
        def to_dataframe(self):
            return results["shift"].to_dataframe().rename(columns={"value": "b value", "normalized": "b normalized"})

    class Plain:
        def to_dataframe(self):
            return results["difference"].to_dataframe()

    with pytest.raises(HookLensError, match="have the same names"):
        Results({"a": Renamed(), "a b": Plain()}).to_dataframe()


def test_the_printed_form_is_short(results):
    assert repr(results).splitlines() == [
        "Results of 2 metrics",
        "  metric      result",
        "  difference  SweepResult: difference, denoise",
        "  shift       SweepResult: shift, denoise",
    ]
    many = Results({str(i): results["shift"] for i in range(40)})
    assert len(repr(many).splitlines()) <= 20
