import pytest

from hooklens.display.numbers import format_bytes


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (5_000_000_000_000, "5 TB")]
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
