import pytest
import torch

from hooklens.patching import FunctionMetric, LogitDiff, MetricError
from hooklens.patching.metrics.function import as_metric
from tests.annotations import unchecked


def last_logit(logits):
    return logits[:, -1, 0]


def test_functions_are_called_on_batches_of_patched_runs():
    logits = torch.randn(5, 1, 3, 7)
    metric = as_metric(last_logit)
    assert metric.name == "last_logit"
    assert metric.positions is None
    torch.testing.assert_close(metric.measure(logits), logits[:, :, -1, 0])


def test_several_pairs_are_a_batch_for_each_patch():
    logits = torch.randn(5, 2, 3, 7)
    seen = []

    def record(batch):
        seen.append(batch.shape)
        return last_logit(batch)

    torch.testing.assert_close(FunctionMetric(record).measure(logits), logits[:, :, -1, 0])
    assert seen == [(2, 3, 7)] * 5


def test_what_is_no_metric_is_refused():
    metric = LogitDiff(1, 2)
    assert as_metric(metric) is metric
    with unchecked(), pytest.raises(MetricError, match="a function from logits to one value per row; got int"):
        as_metric(3)
    with pytest.raises(
        MetricError, match=r"returned shape \[4, 7\] for logits \[4, 3, 7\].*expected one value per row, \[4\]"
    ):
        FunctionMetric(lambda logits: logits[:, -1]).measure(torch.randn(4, 1, 3, 7))
    with pytest.raises(MetricError, match="returned a float"):
        FunctionMetric(lambda logits: float(logits.mean())).measure(torch.randn(4, 1, 3, 7))
