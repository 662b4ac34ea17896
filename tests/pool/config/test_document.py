"""Tests of hooklens.pool.config.document."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.pool import PoolError
from hooklens.pool.config.document import Document, as_plain, read_yaml, write_yaml

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "pool.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@settings(max_examples=30)
@given(content=st.dictionaries(TEXTS, VALUES, min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("yaml") / "pool.yaml"
    write_yaml(path, content)
    document = read_yaml(path)
    assert document.content == content
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all(0 < line <= len(lines) for line in document.lines.values())
    assert all((key,) in document.lines for key in content)


def test_values_know_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "# note\nmodels:\n  a: x\n  b:\n    - y\n    - {c: z}\n")
    document = read_yaml(path)
    assert document.at(("models", "a")) == f"{path}:3: models.a"
    assert document.at(("models", "b", "1", "c")) == f"{path}:6: models.b.1.c"
    assert document.at(("absent",)) == f"{path}: absent"
    inside = document.inside("models")
    assert (inside.content, inside.at(("a",))) == ({"a": "x", "b": ["y", {"c": "z"}]}, f"{path}:3: a")
    assert Document({}, "config").at(("models",)) == "config: models"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("models:\n  a: x\n  b: y\n  a: z\n", "'models.a' stands twice, on lines 2 and 4"),
        ("models: {a: x, a: y}\n", "'models.a' stands twice, on lines 1 and 1"),
        ("tokenizer: x\nmodels: {}\ntokenizer: y\n", "'tokenizer' stands twice, on lines 1 and 3"),
        ("", "is empty"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: [1\n", "cannot be read as YAML"),
        ("? [a]\n: b\n", "a key is a sequence"),
        ("a: &a [*a]\n", ":1: an alias of a value stands inside that value"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a: !!python/name:os.system\n", "could not determine a constructor"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, found: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PoolError) as caught:
        read_yaml(path)
    assert found in str(caught.value)
    assert str(path) in str(caught.value)


def test_aliases_that_grow_are_refused(tmp_path: Path) -> None:
    """Ten lines that stand for ten thousand million values."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(PoolError, match="stand for more than 100000 values"):
        read_yaml(write(tmp_path, "\n".join(rows)))


def test_aliases_and_merge_keys_are_read(tmp_path: Path) -> None:
    text = "shared: &shared {dtype: float32, n: 1}\nmodels:\n  a:\n    <<: *shared\n    n: 2\n  b: {<<: [*shared]}\n"
    document = read_yaml(write(tmp_path, text))
    assert document.content["models"] == {"a": {"dtype": "float32", "n": 2}, "b": {"dtype": "float32", "n": 1}}
    assert document.lines["models", "a", "n"] == 5
    assert document.lines["models", "a", "dtype"] == 1


def test_a_file_that_is_not_there_and_one_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PoolError, match="cannot be read"):
        read_yaml(tmp_path / "binary.yaml")
    with pytest.raises(PoolError, match="cannot be written"):
        write_yaml(tmp_path / "absent" / "pool.yaml", {"a": 1})


def test_plain_values_are_copies() -> None:
    given = {"models": {"a": Path("folder"), "b": ("x", {"c": 1})}}
    plain = as_plain(given)
    assert plain == {"models": {"a": "folder", "b": ["x", {"c": 1}]}}
    plain["models"]["b"][1]["c"] = 2
    assert given["models"]["b"] == ("x", {"c": 1})
