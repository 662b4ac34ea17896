import torch

from hooklens.verification.probe import make_probe
from hooklens.verification.report import CheckResult
from hooklens.verification.stages import RUNS, hook_point_stages, report_errors, stage_groups
from tests.verification.networks import build


def test_stages_are_those_of_the_groups_in_order():
    probe = make_probe(build(), n_tokens=8)
    groups = stage_groups(probe)
    names = [name for stages in groups.values() for name, _ in stages]
    assert names == [name for name, _ in hook_point_stages(probe)]
    assert names[:2] == ["shown tensors", "explicit logits"]
    assert names[-1] == "gradients"
    assert len(set(names)) == len(names)


@torch.no_grad()
def test_each_stage_checks_its_own_point():
    probe = make_probe(build(), n_tokens=8)
    groups = stage_groups(probe)
    for group in ("hook points", "single edits"):
        for name, run in groups[group][3:5]:
            subjects = {result.subject for result in run()}
            assert subjects
            assert all(name.removeprefix("single edits, ") in subject for subject in subjects)


def test_an_error_is_the_last_result():
    good = CheckResult(check="a", subject="b", measured=0.0, bound=0.0)

    def run():
        yield good
        raise ZeroDivisionError("no way")

    name, whole = report_errors(("mine", run))
    first, last = whole()
    assert (name, first) == ("mine", good)
    assert (last.check, last.subject, last.passed) == (RUNS, "mine", False)
    assert last.message == "ZeroDivisionError: no way"
