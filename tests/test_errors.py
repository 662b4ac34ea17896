"""Tests of hooklens.errors: the hierarchy, and the wording tools."""

import inspect

import pytest

from hooklens import errors
from hooklens.errors import HookLensError, join_names, suggest_names

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_one_base_catches_everything(kind):
    assert issubclass(kind, UserWarning if kind.__name__.endswith("Warning") else HookLensError)
    assert inspect.getdoc(kind)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.InputError, ValueError),
        (errors.HookNameError, LookupError),
        (errors.HookOutputError, ValueError),
        (errors.EditError, ValueError),
        (errors.CheckpointError, ValueError),
        (errors.UnsupportedModelError, errors.CheckpointError),
        (errors.CacheError, ValueError),
        (errors.TransformError, ValueError),
        (errors.MissingDependencyError, ImportError),
    ],
)
def test_code_that_catches_the_builtin_keeps_working(kind, builtin):
    assert issubclass(kind, builtin)


def test_hook_name_error_shows_its_text():
    """A KeyError would show the repr of its text, with quotes and escaped newlines."""
    assert str(errors.HookNameError("no 'x'")) == "no 'x'"


def test_suggest_names_orders_by_nearness_and_stays_silent_on_strangers():
    assert suggest_names("hook_patern", ["hook_z", "hook_pattern"]) == " Did you mean 'hook_pattern'?"
    assert suggest_names("resid", ["resid_a", "resid_b"]) in (
        " Did you mean 'resid_a' or 'resid_b'?",
        " Did you mean 'resid_b' or 'resid_a'?",
    )
    assert suggest_names("zzzz", ["hook_pattern"]) == ""
    assert suggest_names("ab", ["abc", "abd", "abe", "abf"], limit=2).count(" or ") == 1


def test_join_names_says_how_many_it_leaves_out():
    assert join_names(["a", "b"]) == "'a', 'b'"
    assert join_names([str(i) for i in range(5)], limit=3) == "'0', '1', '2' and 2 more"
    assert join_names([]) == ""
