"""The tutorials' exercises: solutions are right, stubs are told to be unwritten, and typical mistakes by their name."""

import ast
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hooklens as hl
from hooklens import edits
from tests.test_tutorials import TUTORIALS, read
from tests.tutorial_exercises import FOLDER, Exercise, find_exercises, load_checks

exercises = load_checks()

FOUND = {
    function.name: (path.stem, exercise)
    for path in TUTORIALS
    for exercise in find_exercises(read(path))
    for function in ast.parse(exercise.stub).body
    if isinstance(function, ast.FunctionDef)
}


@pytest.fixture(scope="module")
def models() -> dict[str, hl.HookedCausalLM]:
    """What the notebooks hand to the checks."""
    model = hl.HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox")
    return {"model": model, "folded": model.process_weights(fold_ln=True, center_writing_weights=True)}


@pytest.fixture(autouse=True)
def _no_gradients():
    """The notebooks turn gradients off at their top."""
    with torch.no_grad():
        yield


def judge(exercise: Exercise, attempt: Callable[..., Any], models: dict[str, hl.HookedCausalLM]) -> Any:
    """The verdict of an exercise's check, called as the notebook calls it."""
    (call,) = ast.parse(exercise.check).body
    assert isinstance(call, ast.Expr)
    assert isinstance(call.value, ast.Call)
    assert isinstance(call.value.func, ast.Attribute)
    function, model = (argument.id for argument in call.value.args)  # type: ignore[attr-defined]
    assert function == attempt.__name__
    return getattr(exercises, call.value.func.attr)(attempt, models[model])


def write(code: str) -> Callable[..., Any]:
    """The function that a cell defines, with what the notebooks import."""
    names: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor, "hl": hl, "edits": edits}
    names["HookPoint"] = hl.hooks.HookPoint
    exec(code, names)
    (name,) = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    function: Callable[..., Any] = names[name]
    return function


def test_the_first_three_tutorials_have_exercises() -> None:
    assert [path for path, _ in FOUND.values()] == [
        "01_first_look",
        *["02_hooks_and_edits"] * 3,
        *["03_activation_patching"] * 3,
    ]
    checks = {name for name in vars(exercises) if name.startswith("check_")}
    assert checks == {f"check_{name}" for name in FOUND}


@pytest.mark.parametrize("name", FOUND)
def test_an_unsolved_exercise_is_told_and_stops_nothing(name: str, models: dict[str, hl.HookedCausalLM]) -> None:
    path, exercise = FOUND[name]
    verdict = judge(exercise, write(exercise.stub), models)
    assert not verdict.right
    assert repr(verdict) == f"Not yet: {name} is not written. Put your own lines in place of the one that raises."
    # What is defined in a reader's cell is used in its check alone, so that an unsolved notebook runs to its end.
    others = [
        cell.source
        for cell in read(FOLDER / f"{path}.ipynb").cells
        if cell.cell_type == "code" and cell.source not in (exercise.stub, exercise.check)
    ]
    used = {node.id for source in others for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert name not in used


@pytest.mark.parametrize("name", FOUND)
def test_solutions_are_right_and_have_the_stubs_signature(name: str, models: dict[str, hl.HookedCausalLM]) -> None:
    _, exercise = FOUND[name]
    verdict = judge(exercise, write(exercise.solution), models)
    assert verdict.right, verdict
    stub, solution = (ast.parse(code).body[0] for code in (exercise.stub, exercise.solution))
    assert isinstance(stub, ast.FunctionDef)
    assert isinstance(solution, ast.FunctionDef)
    assert ast.unparse(stub.args) == ast.unparse(solution.args)
    assert ast.get_docstring(stub) == ast.get_docstring(solution)


# By exercise: what of its solution is written otherwise, and what the check says of it.
_PROMPT = '"When Mary and John went to the store , John gave a drink to"'
_DIFFERENCE = "logits[0, -1, answer] - logits[0, -1, wrong]"
_ON_SCALE = "(difference(model.run_with_hooks(into, edits=[edit])) - start) / (end - start)"
_TO_SCALE = """
    both = (model(corrupted), clean_cache["unembed.hook_out"])
    start, end = (logits[0, -1, answer] - logits[0, -1, wrong] for logits in both)
    return (found - start) / (end - start)"""
MISTAKES: dict[str, list[tuple[str, str, str]]] = {
    "read_attention": [
        ("head, query, key]", "head, key, query]", "query and key are exchanged"),
        ('"pattern", layer][0, head', '"pattern", head][0, layer', "layer and head are exchanged"),
        ('"pattern"', '"attn_scores"', "scores before the softmax"),
        ("[0, head, query, key]", "[0, :, query, key].mean()", "mean over heads"),
        ("key])", "key]) + 0.5", "3 of 3 numbers are off"),
        ("float(", "bool(", "gives True; one number is asked for"),
    ],
    "silence_head": [
        ("z[:, -1, 3] = 0.0", "z[:, :, 3] = 0.0", "heads [3] changed at positions [0, 1"),
        ("z[:, -1, 3] = 0.0", "z[:, 3] = 0.0", "heads [0, 1, 2, 3] changed at positions [3]"),
        ("z[:, -1, 3] = 0.0", "z[:, -1] = 0.0", "heads [0, 1, 2, 3] changed at the last position"),
        ("z[:, -1, 3] = 0.0", "z[0, -1, 3] = 0.0", "only prompt [0] of 2 changed"),
        ("z[:, -1, 3] = 0.0", "z[-1, :, 3] = 0.0", "only prompt [1] of 2 changed"),
        ("z[:, -1, 3] = 0.0\n    return z", "z.clone()[:, -1, 3] = 0.0", "z comes out as it went in"),
        ("z[:, -1, 3] = 0.0", "z[:, -1, 3] *= 0.5", "and not to zero"),
        ("return z", "return z[:, -1]", "silence_head stopped with"),
        ("z[:, -1, 3]", "z[:, -1, 7]", "silence_head stopped with IndexError"),
    ],
    "previous_token_score": [
        ("diagonal(-1", "diagonal(0", "attention to the token itself"),
        ("diagonal(-1", "diagonal(1", "attention to the token after"),
        ("dim=(0, -1)", "dim=-1", "gives a tensor of shape [3, 4]; [head] is [4]"),
        (".mean(dim=(0, -1))", ".mean(0).sum(-1)", "this is a sum over queries"),
        (".mean(dim=(0, -1))", "[0].mean(-1)", "the first row of the batch"),
        (".mean(dim=(0, -1))", ".mean(0).sum(-1) / len(pattern[0, 0])", "the first query"),
        (".mean(dim=(0, -1))", ".mean().item()", "a tensor [head] is asked for"),
    ],
    "attribute_heads": [
        ("model.W_U[:, answer] - model.W_U[:, wrong]", "model.W_U[:, wrong] - model.W_U[:, answer]", "sign"),
        (' / cache["ln_final.hook_scale"][0, -1]', "", "the final norm is left out"),
        ("direction / cache", "direction * cache", "the final norm divides by its scale"),
        ("written @ direction / cache", "(written @ direction).T / cache", "layers and heads are exchanged"),
        (" - model.W_U[:, wrong]", "", "the answer's logit alone"),
        ("[0, -1]", "[0, 0]", "read at the first position"),
        ("lhd,lhdm->lhm", "lhd,lhdm->lm", "gives a tensor of shape [4]; [layer head] is [4, 4]"),
    ],
    "patch_heads": [
        (_DIFFERENCE, "logits[0, -1, wrong] - logits[0, -1, answer]", "the sign is turned round"),
        ("edits=[edit]", "edits=[]", "the corrupted run without a patch"),
        ("run_with_hooks(corrupted", f"run_with_hooks({_PROMPT}", "those of the clean run"),
        ("[:, :, head], head=head)", ")", "all heads of a layer are patched together"),
        ("found[layer, head] =", "found[head, layer] =", "layers and heads are exchanged"),
        (_DIFFERENCE, _DIFFERENCE.replace("-1", "0"), "read at the first position"),
        ("[:, :, head], head=head)", "[:, -1, head], head=head, pos=-1)", "at the last position alone"),
        ("\n    return found", _TO_SCALE, "on the scale from 0 to 1"),
    ],
    "copying_score": [
        ("float(eigenvalues", "float(-eigenvalues", "the sign is turned round"),
        ("model.W_U @ model.W_E @ ", "", "W_E and W_U are missing"),
        (" / eigenvalues.abs().sum()", "", "the sum of the eigenvalues"),
        ("[layer, head]", "[head, layer]", "layer and head are exchanged"),
        ("float(eigenvalues.sum().real", "complex(eigenvalues.sum()", "gives a complex number"),
        ("float(eigenvalues.sum().real", "(eigenvalues.real", "gives a tensor of shape [32]"),
    ],
    "enough_and_needed": [
        (
            "share(corrupted, clean), share(clean, corrupted)",
            "*(share(clean, corrupted), share(corrupted, clean)),",
            "exchanged",
        ),
        (_ON_SCALE, "difference(model.run_with_hooks(into, edits=[edit]))", "these are logits"),
        (", share(clean, corrupted)", ", 1 - share(clean, corrupted)", "what is left of the difference"),
        (", share(clean, corrupted)", ", -share(clean, corrupted)", "the sign of the second"),
        (", share(clean, corrupted)", ", share(corrupted, clean)", "both are what denoising restores"),
        (", share(clean, corrupted)", "", "two numbers are asked for"),
    ],
}


def count_known_mistakes(name: str) -> int:
    """How many mistakes the check of an exercise compares with."""
    source = ast.parse((FOLDER / "exercises.py").read_text(encoding="utf-8"))
    (check,) = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == f"check_{name}")
    lists = [node.value for node in ast.walk(check) if isinstance(node, ast.AnnAssign)]
    return sum(len(known.elts) for known in lists if isinstance(known, ast.List))


@pytest.mark.parametrize("name", MISTAKES)
def test_typical_mistakes_are_named(name: str, models: dict[str, hl.HookedCausalLM]) -> None:
    """Each that a check knows is tried, since the values of one can coincide with another's and hide its text."""
    _, exercise = FOUND[name]
    texts = []
    for old, new, said in MISTAKES[name]:
        assert old in exercise.solution
        verdict = judge(exercise, write(exercise.solution.replace(old, new)), models)
        assert not verdict.right
        assert said in verdict.text
        texts.append(verdict.text)
    assert len(set(texts)) == len(texts) >= count_known_mistakes(name)


def test_a_broken_exercise_is_refused() -> None:
    """A check without its exercise, or a solution in no block, would be left out without a word."""
    notebook = read(FOLDER / "01_first_look.ipynb")
    (exercise,) = find_exercises(notebook)
    for step in range(3):
        broken = read(FOLDER / "01_first_look.ipynb")
        del broken.cells[exercise.at + step]
        with pytest.raises(AssertionError, match="is no part of an exercise"):
            find_exercises(broken)
    notebook.cells[exercise.at + 2].source = "no code"
    with pytest.raises(ValueError, match="not enough values"):
        find_exercises(notebook)
