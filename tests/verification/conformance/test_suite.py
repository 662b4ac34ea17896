from pathlib import Path

import pytest

from hooklens import HookedCausalLM, HookedConfig, NoPositions
from hooklens.errors import InputError
from hooklens.verification import conformance, verify
from hooklens.verification.conformance.checks import GROUPS_OF
from tests.annotations import unchecked
from tests.verification.conformance.parts import only

TINY = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11, "n_positions": 16}


def make_tiny() -> HookedCausalLM:
    cfg = HookedConfig(d_model=8, n_layers=1, n_heads=2, d_vocab=11, n_ctx=16, positions=NoPositions())
    return HookedCausalLM(cfg)


def test_a_family_passes_every_check_and_as_often_as_verify_makes_it():
    models = conformance.of_family({"plain": TINY})
    with unchecked():
        outcomes = conformance.run(models=models, n_tokens=8, progress=False).outcomes
        report = verify(models["plain"](), n_tokens=8, progress=False)
    # Where all logits can be computed, no weaker check takes the place of that.
    weaker = "after single edits shown tensors are what their sources make"
    assert {one.check: one.verdict for one in outcomes if one.verdict != "passed"} == {weaker: "not applicable"}
    assert [one.check for one in outcomes] == list(conformance.CHECKS)
    found = {one.check: one.n_results for one in outcomes}
    made = {check: len(results) for check, results in report.by_check().items()}
    own = {check for check, groups in GROUPS_OF.items() if groups == ("declarations",)}
    assert {check: n for check, n in found.items() if check not in own} == {**made, weaker: 0}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["in sequence", "in parallel", "in the last layer", "alone"])
def test_a_sound_part_passes_everything(layout):
    with unchecked():
        report = conformance.run(models=only("squares for tests", layout), progress=False)
    assert report.passed, repr(report)
    assert {one.check for one in report.outcomes if one.verdict == "not applicable"} == {
        "logits against transformers",
        "round trip: tensors on disk",
        "round trip: weights and config",
        "logits are those of an explicit computation",
    }


def test_a_report():
    models = {**only("squares for tests"), **only("mute")}
    checks = ["fires once", "round trip: weights and config"]
    with unchecked():
        report = conformance.run(models=models, checks=checks, n_tokens=8, progress=False)
    assert not report.passed
    assert [(one.model, one.check) for one in report.failures] == [("mute alone", "fires once")]
    text = repr(report)
    assert text.startswith("ConformanceReport: 1 passed, 0 excepted, 1 failed, 2 not applicable")
    assert "  mute alone  fires once         FAILED  fires once, blocks.1.mlp.hook_post: 0, expected == 1" in text
    table = report.to_dataframe()
    assert list(table.columns) == ["model", "check", "verdict", "results", "message"]
    assert table["verdict"].tolist() == ["passed", "not applicable", "failed", "not applicable"]
    assert "no transformers architecture holds this network" in table["message"][1]
    excepted = conformance.run(
        models=only("mute"), checks=checks, exceptions={"fires once": "it is mute"}, n_tokens=8, progress=False
    )
    assert excepted.passed
    nothing = conformance.run(models=only("mute"), checks=checks[1:], n_tokens=8, progress=False)
    assert not nothing.passed


def test_parameters_of_a_test():
    models = {"one": "no such folder", "other": Path("nor", "this")}
    mark = conformance.parametrize(models=models, checks=["fires once", "declared axes"]).mark
    assert mark.name == "parametrize"
    name, cases = mark.args
    assert name == "case"
    assert [case.id for case in cases] == [
        "one: fires once", "one: declared axes", "other: fires once", "other: declared axes"
    ]  # fmt: skip


def test_what_is_not_asked_for_is_not_made():
    cases = conformance.list_cases(models={"one": make_tiny}, logits=False, gradients=False)
    left_out = set(conformance.CHECKS) - {case.check for case in cases}
    assert left_out == {
        "logits against transformers", "gradient is the derivative of an edit", "gradient at one point alone"
    }  # fmt: skip


def test_exceptions_are_for_the_models_and_checks_they_name():
    cases = conformance.list_cases(
        models={"tied": make_tiny, "untied": make_tiny},
        checks=["fires once", "declared axes"],
        exceptions=[conformance.Exemption(check="fires once", models="tied", reason="why")],
    )
    assert [bool(case.exemptions) for case in cases] == [True, False, False, False]


def test_refusals():
    models = {"one": make_tiny}
    for wrong, text in (
        ({"models": {}}, "models is {}, expected at least one of models, checkpoints, or functions"),
        ({"models": "path"}, "models is 'path', expected models, checkpoints"),
        ({"models": {1: make_tiny}}, "models: a name is 1, expected a text that is not empty"),
        ({"models": {"one": 3}}, r"models\['one'\] is 3, expected a model, a checkpoint's name or path, or a function"),
        ({"checks": ["fires twice"]}, r"checks: there is no check 'fires twice'.*'fires once'"),
        ({"checks": []}, "checks is empty"),
        ({"exceptions": {"fires": "why"}}, "exceptions: there is no check 'fires'"),
        ({"exceptions": {"fires once": ""}}, "exceptions: the reason for 'fires once' is ''; say why"),
        ({"exceptions": 3}, "exceptions is 3, expected reasons by the name of the check"),
        ({"exceptions": ["fires once"]}, "exceptions: an entry is 'fires once', expected"),
        (
            {"exceptions": {"fires once": "why"}, "checks": ["declared axes"]},
            "exceptions: 'fires once' is not among the checks that are made",
        ),
        (
            {"exceptions": [conformance.Exemption(check="fires once", reason="why", models="two")]},
            r"exceptions: no model fits 'two'; there are \['one'\]",
        ),
        ({"logits": 1}, "logits is 1"),
        ({"n_tokens": 3}, "n_tokens is 3"),
        ({"dtypes": ["int8"]}, "dtypes is 'int8'"),
    ):
        with unchecked(), pytest.raises(InputError, match=text):
            conformance.list_cases(**{"models": models, **wrong})
