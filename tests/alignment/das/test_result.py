"""What training gives, as a value."""

import pytest
import torch

from hooklens.alignment import AlignmentError, Basis, DasResult, Site
from hooklens.alignment.das.result import Step
from hooklens.errors import CheckpointError
from tests.alignment.pair_model import make_pair_model

NAME = "blocks.1.hook_resid_pre"


def make_result(**changes) -> DasResult:
    rows = torch.eye(12)
    fields = {
        "site": Site(NAME, (1,)),
        "bases": {"a": Basis(NAME, rows[:2], "das", {"seed": 1}), "b": Basis(NAME, rows[2:5], "das")},
        "margins": torch.tensor([1.0, -1.0, 0.0, 2.0]),
        "unpatched_margins": torch.tensor([-1.0, 1.0, -1.0, -1.0]),
        "training_accuracy": 0.75,
        "history": tuple(Step(step=n, loss=1 / n, validation_loss=2 / n, validation_accuracy=n / 40) for n in (20, 40)),
        "stopped": "all steps done",
    }
    return DasResult(**{**fields, **changes})


def test_accuracy_is_the_share_of_margins_above_0():
    result = make_result()
    assert (result.accuracy, result.unpatched_accuracy) == (0.5, 0.25)
    # The standard deviation of 1, 0, 0, 1 with n - 1, by the root of 4.
    assert float(result.standard_errors) == pytest.approx((1 / 3) ** 0.5 / 2)


def test_edits_of_a_result_do_what_was_measured():
    pairs = make_pair_model()
    result = make_result(bases={"first": Basis.of_span(NAME, pairs.first.float())})
    base, source = pairs.prompts[:1], pairs.prompts[5:6]
    _, cache = pairs.model.run_with_cache(source, names_filter=NAME)
    logits = pairs.model.run_with_hooks(base, edits=result.interchange({"first": cache[NAME][:, [1]]}))
    expected = pairs.causal_model.interchange(base, {"first": source})
    assert torch.equal(logits[:, -1].argmax(-1), expected)
    with pytest.raises(AlignmentError, match=r"no variables \['b'\]; there are \['first'\]"):
        result.interchange({"b": cache[NAME]})


def test_the_only_basis():
    result = make_result()
    with pytest.raises(AlignmentError, match=r"there are bases of \['a', 'b'\]"):
        _ = result.basis
    assert make_result(bases={"a": result.bases["a"]}).basis == result.bases["a"]


def test_tables_figures_and_text():
    result = make_result()
    table = result.to_dataframe()
    assert list(table.columns) == ["step", "loss", "validation_loss", "validation_accuracy"]
    assert table["loss"].tolist() == [1 / 20, 1 / 40]
    assert len(result.plot().data) == 3
    assert len(result.plot(backend="matplotlib").axes) == 2
    text = repr(result)
    assert "interchange accuracy  0.500 on 4 held-out rows (0.750 on those trained on, 0.250 without any)" in text
    assert "dimensions            'a': 2 of 12, 'b': 3 of 12" in text


def test_a_file_holds_all(tmp_path):
    result = make_result(site=Site(NAME, (0, 1), 2))
    result.save(tmp_path / "das.safetensors")
    read = DasResult.load(tmp_path / "das.safetensors")
    assert read.site == result.site
    assert dict(read.bases) == dict(result.bases)
    assert torch.equal(read.margins, result.margins)
    assert torch.equal(read.unpatched_margins, result.unpatched_margins)
    assert (read.training_accuracy, read.history, read.stopped) == (0.75, result.history, "all steps done")
    result.bases["a"].save(tmp_path / "basis.safetensors")
    with pytest.raises(CheckpointError, match=r"does not hold trained directions; expected a file that DasResult.save"):
        DasResult.load(tmp_path / "basis.safetensors")
