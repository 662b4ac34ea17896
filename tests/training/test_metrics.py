"""The file of metrics: what a killed process left of it, and where it cannot be written."""

import json

import pytest

from hooklens.errors import InputError
from hooklens.training.metrics import MetricsLog, read_logger


def test_later_entries_and_parts_of_lines_are_dropped(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n[3]\nno json\n{"step": 4, "loss": 1.5}\n{"step": 2}\n{"step": 3')
    log = MetricsLog(path, None, step=3)
    assert log.records == [{"step": 1, "loss": 2.5}, {"step": 2}]
    log.add(4, {"loss": 0.1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*log.records]


def test_a_file_that_cannot_be_written_is_told(tmp_path) -> None:
    with pytest.raises(InputError, match=r"cannot use .* for metrics"):
        MetricsLog(tmp_path / "no" / "such" / "metrics.jsonl", None, step=0)


def test_loggers() -> None:
    assert read_logger(None) is None
    with pytest.raises(InputError, match="logger is the class dict"):
        read_logger(dict)
