"""Tests of hooklens.pool.config.interpolation."""

from typing import Any

import pytest

from hooklens import HookLensError
from hooklens.pool import PoolError
from hooklens.pool.config.document import Document
from hooklens.pool.config.interpolation import find_references, resolve

CONTENT = {
    "base": "owner/base",
    "models": {"_pretrained_": "${..base}", "a": {"path": "${...base}", "rest": ["${base}", "x-${base}-y"]}},
    "tokenizer": "${.models._pretrained_}",
    "other": "${models[a].path}",
}


def test_references_are_replaced() -> None:
    document = Document(CONTENT, "config")
    resolved = resolve(document)
    assert resolved.content == {
        "base": "owner/base",
        "models": {"_pretrained_": "owner/base", "a": {"path": "owner/base", "rest": ["owner/base", "x-owner/base-y"]}},
        "tokenizer": "owner/base",
        "other": "owner/base",
    }
    assert document.content is CONTENT
    assert CONTENT["tokenizer"] == "${.models._pretrained_}"


def test_what_is_referred_to() -> None:
    found = {("base",), ("models", "_pretrained_"), ("models", "a", "path")}
    assert find_references(CONTENT) == found


def test_objects_pass_through() -> None:
    thing = object()
    resolved = resolve(Document({"a": thing, "b": "x", "c": "${b}"}, "config"))
    assert resolved.content == {"a": thing, "b": "x", "c": "x"}


def test_without_references_omegaconf_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hooklens.pool.config.interpolation.import_package", None)
    document = Document({"models": {"a": "$x {y}"}}, "config")
    assert resolve(document) is document


def test_a_missing_omegaconf_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", find_nothing)
    with pytest.raises(HookLensError, match=r"pip install 'hooklens\[pool\]'"):
        resolve(Document(CONTENT, "config"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("${oc.env:HOME}", "calls 'oc.env'; a file may only refer to its own values"),
        ("${ oc.env :HOME}", "calls 'oc.env'"),
        ("${base}${oc.env:HOME,x}", "calls 'oc.env'"),
        ("${oc.decode:${oc.env:HOME}}", "calls 'oc.env'"),
        ("${eval:__import__('os')}", "calls 'eval'"),
        ("${models.${base}}", "expected plain references"),
        ("\\${base}${", "expected plain references"),
        ("${nowhere}", "nowhere"),
        ("${..nowhere}", "models"),
    ],
)
def test_texts_that_are_refused(text: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "secret")
    content = {"base": "b", "models": {"a": {"path": text}}}
    document = Document(content, "pool.yaml", {("models", "a", "path"): 4})
    with pytest.raises(PoolError) as caught:
        resolve(document)
    assert found in str(caught.value)
    assert "pool.yaml:4: models.a.path" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", [{"a": "${b}", "b": "${a}"}, {"a": "${a}"}])
def test_circles_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(PoolError):
        resolve(Document(content, "config"))


def test_functions_that_are_allowed_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOKLENS_TEST_BASE", "from-outside")
    document = Document({"a": "${oc.env:HOOKLENS_TEST_BASE}"}, "config")
    assert resolve(document, resolvers=["oc.env"]).content == {"a": "from-outside"}
    with pytest.raises(PoolError, match="HOOKLENS_TEST_ABSENT"):
        resolve(Document({"a": "${oc.env:HOOKLENS_TEST_ABSENT}"}, "config"), resolvers=["oc.env"])
