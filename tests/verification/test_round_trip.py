"""A save that loses something is named."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hooklens import (
    HookedCausalLM,
)
from hooklens.verification import verify
from tests.annotations import unchecked
from tests.checkpoints import save_variant


@pytest.fixture(autouse=True)
def without_checks_of_annotations() -> Iterator[None]:
    """They take five times the rest; other verifications run with them."""
    with unchecked():
        yield


def test_a_save_that_changes_a_weight_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_variant("neox-parallel", tmp_path)
    save = HookedCausalLM.save_pretrained

    def save_changed(model: HookedCausalLM, folder: Path) -> None:
        changed = HookedCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            changed.block_list()[0].mlp.W_out[0, 0] += 1
        save(changed, folder)

    monkeypatch.setattr(HookedCausalLM, "save_pretrained", save_changed)
    report = verify(tmp_path, logits=False, gradients=False, layers=[0], progress=False)

    assert {failure.subject for failure in report.failures} == {
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight",
        "blocks.0.mlp.W_out",
    }
    assert "is not bit-equal after saving" in str(report)
