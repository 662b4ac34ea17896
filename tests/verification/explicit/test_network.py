"""The second network is right by itself: held against transformers, whose code it shares nothing with either."""

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.config import PartConfig
from hooklens.verification.explicit import Batch, ExplicitNetwork, ExplicitRun, Unknown
from tests.checkpoints import build_variant
from tests.model.networks import make_config, make_model
from tests.model.parts.test_part import TwoExperts
from tests.verification.networks import verify_points


@pytest.mark.parametrize("variant", ["llama-gqa", "neox-parallel", "falcon-rw", "falcon-40b"])
def test_logits_are_those_of_transformers(variant: str) -> None:
    theirs = build_variant(variant).double()
    ours = HookedCausalLM.from_hf(theirs)
    tokens = torch.randint(0, ours.cfg.d_vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
        run = ExplicitRun(ours, Batch(tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool)))

    # Angles, and in some families norms, are made in float32 there.
    torch.testing.assert_close(run.logits, expected, atol=1e-5, rtol=0)


def test_a_part_of_ones_own_is_said_not_to_be_recomputed() -> None:
    model = make_model(make_config(mlp=PartConfig(kind="two_experts", options={"toy_expert": 2})))
    tokens = torch.zeros(1, 3, dtype=torch.long)
    network = ExplicitNetwork(model, Batch(tokens=tokens, mask=tokens == 0))

    assert network.why_unknown() == {
        f"blocks.{layer}.mlp": f"a part of one's own stands there ({TwoExperts.__name__})" for layer in range(2)
    }
    with pytest.raises(Unknown, match=r"blocks\.0\.mlp: a part of one's own"):
        network.compute("blocks.0.hook_mlp_out", lambda name: torch.zeros(1, 3, 12))


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": PartConfig(kind="two_experts", options={"toy_expert": 2})},
        {"mlp": PartConfig(kind="two_experts", options={"toy_expert": 2}), "wiring": "parallel", "shared_norm": True},
        {"attn": PartConfig(kind="gated_attention"), "norm_after": True},
    ],
)
def test_networks_with_parts_of_ones_own_pass_and_the_report_says_what_was_left_out(changes: dict) -> None:
    """Sizes of such a part's axes were asked of the config, which raised; its wiring was taken for the usual one."""
    report = verify_points(make_model(make_config(**changes)), gradients=True)

    assert report.passed, str(report)
    part = "attn" if "attn" in changes else "mlp"
    assert sum(note.startswith(f"not recomputed: blocks.0.{part} (") for note in report.notes) == 1
    recomputed = {
        result.subject.partition(",")[0] for result in report.by_check()["shown tensors are what their sources make"]
    }
    assert "blocks.1.ln1.hook_normalized" in recomputed
    assert not any(name.startswith(f"blocks.0.{part}.") for name in recomputed)


def test_a_map_with_something_around_it_is_not_recomputed() -> None:
    model = make_model("rotary")
    model.blocks[0].attn.q_proj = torch.nn.Sequential(model.blocks[0].attn.q_proj)

    report = verify_points(model, layers=[0])

    assert report.passed, str(report)
    assert any(
        "not recomputed: blocks.0.attn (something stands in the place of q_proj)" in note for note in report.notes
    )
