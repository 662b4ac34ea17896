"""Edits that are lost, or that reach too far, are named."""

from tests.verification.networks import LeaksUpstream, LosesEdits, build, failures_at, verify_points


def test_a_lost_edit_is_named() -> None:
    model = build()
    model.block_list()[0].hook_attn_out = LosesEdits()

    failed = failures_at(verify_points(model, layers=[0]), "blocks.0.hook_attn_out")

    assert "setting it to 0 moves no logit by more than rounding: the edit is lost" in (
        failed["an edit changes the logits"].message
    )
    assert "not reached: 'blocks.0.hook_resid_mid'" in failed["an edit reaches all that is downstream"].message


def test_an_edit_that_leaks_upstream_is_named() -> None:
    """An edit of `hook_mlp_in` reaches the MLP only; here it reaches the skip connection, too."""
    model = build()
    model.block_list()[0].hook_mlp_in = LeaksUpstream(shared=True)

    failed = failures_at(verify_points(model, layers=[0]), "blocks.0.hook_mlp_in")

    assert "changed, though not downstream: 'blocks.0.hook_resid_mid'" in failed["an edit reaches nothing else"].message


def test_an_in_place_edit_that_reaches_the_skip_connection_is_named() -> None:
    model = build()
    model.block_list()[0].hook_mlp_in.shared = False

    failed = failures_at(verify_points(model, layers=[0]), "blocks.0.hook_mlp_in")

    assert set(failed) == {"in-place and returned edits agree", "single edits give what an explicit computation gives"}
    assert "'blocks.0.hook_resid_mid'" in failed["in-place and returned edits agree"].message
