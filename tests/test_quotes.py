"""Quoted numbers hold within rounding to the decimals that are shown."""

import pytest

from tests.quotes import agrees, format_like


@pytest.mark.parametrize(
    ("quoted", "value", "expected"),
    [
        ("0.93", 0.9349, True),
        ("0.93", 0.936, False),
        ("-1.5", -1.46, True),
        ("-1.5", 1.5, False),
        ("81", 81, True),
        ("81", 82, False),
        ("Mary", "Mary", True),
        ("Mary", "John", False),
    ],
)
def test_quotes_agree_within_rounding(quoted: str, value: object, expected: bool) -> None:
    assert agrees(quoted, value) is expected


@pytest.mark.parametrize(
    ("quoted", "value", "expected"),
    [("0.93", 1, "1.00"), ("7", 12, "12"), ("-1.5", 2.26, "2.3"), ("Mary", "Tom", "Tom")],
)
def test_refreshed_quotes_keep_their_decimals(quoted: str, value: object, expected: str) -> None:
    assert format_like(quoted, value) == expected
    assert agrees(expected, value)
