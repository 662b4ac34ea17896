import pytest

from hooklens.display import visible
from hooklens.errors import InputError
from hooklens.viz.labels import for_matplotlib, for_plotly, read_labels, readable


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" John", "·John"),
        ("\n\t\r", "↵→␍"),
        ("\0\x7f\x9b", "␀␡�"),
        ("\ud83d", "�"),
        ("a\u202eb\u200b", "a[U+202E]b[U+200B]"),
        ("\U0001f46a\u200d\U0001f600", "\U0001f46a\u200d\U0001f600"),
    ],
)
def test_nothing_in_a_token_is_hidden(token, shown):
    """Characters without a picture, and those that turn the text around them, were written as they are."""
    assert visible(token) == shown
    assert visible("x" * 10, 4) == "xxx…"


def test_names_keep_the_spaces_between_words():
    assert [readable(name) for name in (" Mary", "the other 3", "a ", "  ", "x\ny")] == [
        "·Mary",
        "the other 3",
        "a·",
        "··",
        "x↵y",
    ]
    assert readable("a long name", 6) == "a lon…"


def test_drawing_packages_are_handed_plain_text():
    assert for_matplotlib("$x$") == r"\$x\$"
    assert for_plotly("<b>&") == "&lt;b>&amp;"


def test_labels_go_with_the_values():
    assert read_labels([1, "b"], 2, subject="grid", what="rows") == ("1", "b")
    with pytest.raises(InputError, match="grid: the labels of rows are the text 'ab'; expected a list of 2 labels"):
        read_labels("ab", 2, subject="grid", what="rows")
    with pytest.raises(InputError, match="grid: 1 labels are given for rows, and the values have 2"):
        read_labels(["a"], 2, subject="grid", what="rows")
