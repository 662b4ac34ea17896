"""`verify` passes sound models of every configuration, refuses what it cannot verify, and leaves models alone."""

from pathlib import Path

import pytest
import torch

from hooklens import (
    HookedCausalLM,
    HookedConfig,
    NoPositions,
)
from hooklens.errors import CheckpointError, InputError
from hooklens.verification import verify
from hooklens.verification.comparing.recomputing import EXPLICIT, SHOWN
from tests.verification.networks import CONFIGS, build, verify_points, verify_whole

# With annotations checked, too.
CHECKED = ("mixture", "all-at-once")
# Between them they have every kind of part, of place of a norm and of way that a tensor goes through the network;
# in the others a function or a number is another one.
EVERY_KIND = (
    "qk-rms-norm",
    "norms-around-parallel",
    "norms-after-only",
    "learned-offset-tied",
    "attn-softcap",
    "not-causal",
    "scales",
    "projected-tied",
    "norms-in-branches-and-on-stream",
    "solu-ln",
    "gated-shared-norm",
    "mlps-alone-shared-norm",
    "parts-by-layer",
    "alibi-scaled",
    "rotary-dynamic",
    "shortformer",
    "qk-norm-per-head-after-rotary",
    "sinks",
    "mixture",
    "all-at-once",
)


# Their layers differ from one another, so that each is looked at; of the others one layer is, now the first, now the
# last: what it does is what the other does, and `slow` looks at both.
EVERY_LAYER = ("not-causal", "qk-norm-per-head-after-rotary", "parts-by-layer", "shortformer", "sinks", *CHECKED)
ONE_LAYER = [name for name in EVERY_KIND if name not in EVERY_LAYER]
# What the default run looks at point by point; of the others it sees that the whole computes what is defined.
BY_DEFAULT = ("mixture", "parts-by-layer", "qk-rms-norm", "learned-offset-tied", "norms-in-branches-and-on-stream")


def mark(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in BY_DEFAULT else (pytest.mark.long,)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=mark(name) if name in EVERY_LAYER else pytest.mark.slow) for name in CONFIGS],
)
def test_every_configuration_passes(name: str) -> None:
    run = verify if name in CHECKED else verify_points
    report = run(build(name), logits=False, gradients=True, progress=False)

    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("name", "layer"), [pytest.param(name, number % 2, marks=mark(name)) for number, name in enumerate(ONE_LAYER)]
)
def test_a_layer_of_every_kind_passes(name: str, layer: int) -> None:
    report = verify_points(build(name), layers=[layer], gradients=True)

    assert report.passed, str(report)
    assert {SHOWN, EXPLICIT} <= set(report.by_check())


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in BY_DEFAULT])
def test_every_configuration_computes_what_is_defined(name: str) -> None:
    report = verify_whole(build(name))

    assert report.passed, str(report)
    assert {SHOWN, EXPLICIT} <= set(report.by_check())


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("norms-around", [1]),
        *(
            pytest.param(name, layers, marks=pytest.mark.long)
            for name, layers in (("qk-rms-norm", [0]), ("learned", [1]), ("gated-shared-norm", [0]))
        ),
        *(
            pytest.param(name, None, marks=pytest.mark.slow)
            for name in ("qk-rms-norm", "norms-around", "learned", "gated-shared-norm")
        ),
    ],
)
def test_half_precision_passes(name: str, layers: list[int] | None) -> None:
    report = verify_points(build(name).to(torch.bfloat16), layers=layers)

    assert report.passed, str(report)


def test_a_network_without_blocks_passes() -> None:
    model = HookedCausalLM(
        HookedConfig(d_model=24, n_layers=0, n_heads=4, d_vocab=53, n_ctx=40, positions=NoPositions())
    )

    assert verify_points(model, gradients=True).passed


def test_verifying_leaves_the_model_as_it_was() -> None:
    model = build()
    model.embed.W_E.requires_grad_(requires_grad=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    assert verify_points(model.double(), gradients=True).passed

    assert not any(point.listening for point in model.hook_points().values())
    assert not model.embed.W_E.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name].double())


def test_layers_are_sampled_in_a_deep_model_and_the_report_says_so() -> None:
    model = HookedCausalLM(
        HookedConfig(
            d_model=8,
            n_layers=7,
            n_heads=1,
            d_vocab=11,
            n_ctx=16,
            attn_only=True,
            norm_before=False,
            positions=NoPositions(),
        )
    )

    report = verify_points(model, n_tokens=8)

    assert report.notes[0].startswith("hook points were checked in layers 0, 3, 6 of 7; layers=range(7) checks every")
    subjects = {result.subject for result in report.results}
    assert "blocks.3.hook_resid_pre" in subjects
    assert "blocks.1.hook_resid_pre" not in subjects


def test_chosen_layers_are_checked_alone() -> None:
    report = verify_points(build(), layers=[1], n_tokens=8)

    assert report.passed
    fired = {result.subject for result in report.by_check()["fires once"]}
    assert {subject.split(".")[1] for subject in fired if subject.startswith("blocks.")} == {"1"}


def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(InputError, match=r"layers \[2, -3\] do not exist; the model has layers 0 to 1"):
        verify(model, layers=[2, -3])
    with pytest.raises(InputError, match="n_tokens is 3; expected at least 4"):
        verify(model, n_tokens=3)
    with pytest.raises(InputError, match="expected floating dtypes such as"):
        verify(model, dtypes=(torch.int64,))
    with pytest.raises(CheckpointError, match="no such folder"):
        verify(tmp_path / "absent")
    model.add_hook("hook_embed", lambda tensor, hook: None)
    with pytest.raises(InputError, match=r"hooks are attached to 1 hook points.*reset_hooks"):
        verify(model)


def test_the_same_seed_gives_the_same_report() -> None:
    one, other = (verify_points(build("attention-only"), seed=3, layers=[1], n_tokens=8) for _ in range(2))

    assert one.results == other.results
