"""Widths, and heat maps with and without colour."""

import io

import pytest
from rich.console import Console

from hooklens.cli.screen import make_console, print_heat_map, say


def print_small_map(console: Console) -> None:
    print_heat_map(
        console,
        [[-0.001, 0.5], [1.0, -0.25]],
        row_labels=["0 [Mary]", "1 John"],
        column_labels=["layer 0", "layer 1"],
        row_title="position",
    )


@pytest.mark.parametrize(("encoding", "full"), [("utf-8", "█"), ("cp1252", "#"), ("ascii", "#")])
def test_heat_map_without_colour_can_be_written_in_any_encoding(encoding: str, full: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_small_map(Console(file=stream, width=80))
    stream.flush()
    lines = raw.getvalue().decode(encoding).splitlines()
    first, second = next(line for line in lines if "[Mary]" in line), next(line for line in lines if "John" in line)
    assert first.count(full) == 2
    assert second.count(full) == 5
    assert [word for word in first.split() if "." in word] == ["0.00", "0.50"]
    assert [word for word in second.split() if "." in word] == ["1.00", "-0.25"]


def test_heat_map_with_colour_shades_cells() -> None:
    stream = io.StringIO()
    print_small_map(Console(file=stream, width=80, force_terminal=True, color_system="truecolor"))
    assert "48;2;255;255;255m   0.00" in stream.getvalue()
    assert "48;2;8;48;130m   1.00" in stream.getvalue()
    # Below 0 takes the shade of 0.
    assert "48;2;255;255;255m  -0.25" in stream.getvalue()


def test_text_in_brackets_is_no_markup() -> None:
    stream = io.StringIO()
    say(Console(file=stream, width=80), "shape [red]1[/red]")
    assert stream.getvalue() == "shape [red]1[/red]\n"


@pytest.mark.parametrize(("columns", "width"), [("20", 80), ("90", 90), ("300", 100)])
def test_width_follows_the_terminal_between_80_and_100(
    monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setenv("COLUMNS", columns)
    assert make_console().width == width
