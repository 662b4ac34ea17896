"""Points that do not show what passes, or change it, are named."""

import torch.nn.functional as F

from tests.verification.networks import (
    ChangesWhatItWatches,
    FiresTwice,
    NeverFires,
    ShowsOtherAxes,
    build,
    failures_at,
    verify_points,
)


def test_a_point_that_never_fires_is_named() -> None:
    model = build()
    model.block_list()[0].attn.hook_z = NeverFires()

    failed = failures_at(verify_points(model, layers=[0]), "blocks.0.attn.hook_z")

    assert failed["fires once"].measured == 0
    assert "fires, exactly once per forward" in failed["fires once"].message


def test_a_point_that_fires_twice_is_named() -> None:
    model = build()
    model.block_list()[1].attn.hook_z = FiresTwice()

    failed = failures_at(verify_points(model, layers=[1]), "blocks.1.attn.hook_z")

    assert failed["fires once"].measured == 2


def test_a_point_with_other_axes_is_named() -> None:
    model = build()
    model.block_list()[1].attn.hook_q = ShowsOtherAxes()

    failed = failures_at(verify_points(model, layers=[1]), "blocks.1.attn.hook_q")

    assert "found [3, 4, 20, 6], declared [batch=3, pos=20, head=4, d_head=6]" in failed["declared axes"].message


def test_a_point_that_changes_what_it_watches_is_named() -> None:
    model = build()
    model.block_list()[0].mlp.hook_post = ChangesWhatItWatches()

    report = verify_points(model, layers=[0])

    failed = failures_at(report, "blocks.0.mlp.hook_post")
    assert "must be bit-identical" in failed["watching leaves logits bit-identical"].message
    assert {"writing back the same tensor", "writing back an equal copy"} <= set(failed)
    assert "every point at once, left-padded" in {failure.subject for failure in report.failures}


def test_an_in_place_operation_that_changes_captures_is_named() -> None:
    model = build()
    model.block_list()[1].mlp.act = F.relu_

    failed = failures_at(verify_points(model, layers=[1]), "blocks.1.mlp.hook_pre")

    assert "an in-place operation in the model changed it later" in failed["captures hold what passed"].message
