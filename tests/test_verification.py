"""`verify` passes sound models of every configuration, and names what is wrong with broken ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hooklens import (
    AlibiPositions,
    HookedCausalLM,
    HookedConfig,
    HookPoint,
    LearnedPositions,
    NormConfig,
    RotaryPositions,
)
from hooklens.errors import CheckpointError, InputError
from hooklens.model.attention import Attention
from hooklens.model.positions import TokenPlan
from hooklens.verification import CheckResult, VerificationReport, verify
from hooklens.verification.dataflow import downstream_of
from hooklens.verification.probe import make_probe
from tests.checkpoints import build_variant, save_variant

RMS = NormConfig(kind="rms", eps=1e-6, bias=False)
RMS_OFFSET = NormConfig(kind="rms", eps=1e-6, bias=False, unit_offset=True)
ROTARY = RotaryPositions(dim=6)

# Networks outside the families that have adapters: what a new adapter may ask for.
CONFIGS: dict[str, dict[str, Any]] = {
    "no-positions": {},
    "qk-rms-norm": {"positions": ROTARY, "qk_norm": RMS, "n_kv_heads": 2},
    "qk-layer-norm": {"positions": ROTARY, "qk_norm": NormConfig(kind="layer", eps=1e-5)},
    "norms-around": {"positions": ROTARY, "norm_after": True, "norm": RMS_OFFSET},
    "norms-around-parallel": {"positions": ROTARY, "norm_after": True, "wiring": "parallel"},
    "norms-after-only": {"positions": ROTARY, "norm_after": True, "norm_before": False},
    "no-norms": {"positions": ROTARY, "norm_before": False},
    "no-norms-parallel": {"positions": ROTARY, "norm_before": False, "wiring": "parallel"},
    "learned": {"positions": LearnedPositions()},
    "learned-offset-tied": {"positions": LearnedPositions(offset=2), "tied_unembed": True},
    "interleaved": {"positions": RotaryPositions(dim=4, layout="interleaved")},
    "attn-softcap": {"positions": ROTARY, "attn_softcap": 5.0, "n_kv_heads": 1},
    "alibi-softcap": {"positions": AlibiPositions(), "attn_softcap": 3.0},
    "logits-softcap": {"positions": ROTARY, "logits_softcap": 5.0},
    "windows": {"positions": ROTARY, "windows": (4, None)},
    "embed-scale": {"positions": ROTARY, "embed_scale": 4.9},
    "unembed-bias": {"positions": ROTARY, "unembed_bias": True},
    "relu2": {"positions": ROTARY, "act_fn": "relu2"},
    "gated-sequential": {"positions": ROTARY, "gated_mlp": True, "act_fn": "silu"},
    "gated-parallel": {"positions": ROTARY, "gated_mlp": True, "act_fn": "gelu_quick", "wiring": "parallel"},
    "gated-shared-norm": {"positions": ROTARY, "gated_mlp": True, "wiring": "parallel", "shared_norm": True},
    "all-at-once": {
        "positions": ROTARY,
        "norm": RMS_OFFSET,
        "norm_after": True,
        "qk_norm": RMS_OFFSET,
        "attn_softcap": 4.0,
        "logits_softcap": 6.0,
        "windows": (3, None),
        "embed_scale": 4.9,
        "gated_mlp": True,
        "act_fn": "gelu_tanh",
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "n_kv_heads": 2,
        "tied_unembed": True,
        "attn_scale": 0.3,
    },
}


def build(name: str = "learned") -> HookedCausalLM:
    """A model of two layers whose every parameter is random."""
    sizes = {"d_model": 24, "n_layers": 2, "n_heads": 4, "d_vocab": 53, "n_ctx": 40, "d_mlp": 40}
    torch.manual_seed(0)
    model = HookedCausalLM(HookedConfig(**{**sizes, **CONFIGS[name]}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def verify_points(model: HookedCausalLM, **options: Any) -> VerificationReport:
    """The checks that need no transformers model."""
    return verify(model, **{"logits": False, "gradients": False, "progress": False, **options})


def failures_at(report: VerificationReport, subject: str) -> dict[str, CheckResult]:
    return {result.check: result for result in report.failures if result.subject == subject}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_passes(name: str) -> None:
    report = verify_points(build(name), gradients=True)

    assert report.passed, str(report)


@pytest.mark.parametrize("name", ["qk-rms-norm", "norms-around", "learned", "gated-shared-norm"])
def test_half_precision_passes(name: str) -> None:
    report = verify_points(build(name).to(torch.bfloat16))

    assert report.passed, str(report)


def test_a_network_without_blocks_passes() -> None:
    model = HookedCausalLM(HookedConfig(d_model=24, n_layers=0, n_heads=4, d_vocab=53, n_ctx=40))

    assert verify_points(model, gradients=True).passed


class NeverFires(HookPoint):
    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor


class FiresTwice(HookPoint):
    def __call__(self, tensor: Tensor) -> Tensor:
        return super().__call__(super().__call__(tensor))


class ShowsOtherAxes(HookPoint):
    def __call__(self, tensor: Tensor) -> Tensor:
        return super().__call__(tensor.transpose(1, 2)).transpose(1, 2)


class LosesEdits(HookPoint):
    def __call__(self, tensor: Tensor) -> Tensor:
        super().__call__(tensor.clone())
        return tensor


class ChangesWhatItWatches(HookPoint):
    def __call__(self, tensor: Tensor) -> Tensor:
        return super().__call__(tensor) * 1.001 if self.listening else tensor


class Detaches(HookPoint):
    """Hands the right values on, but gradients go past what listeners see."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return super().__call__(tensor.clone()).detach() + (tensor - tensor.detach())


class LeaksUpstream(HookPoint):
    """Edits reach the tensor that the skip connection reads, too."""

    def watch(self, tensor: Tensor) -> tuple[Tensor, bool]:
        edited, changed = super().watch(tensor.clone())
        return tensor.copy_(edited), changed


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


def test_a_lost_edit_is_named() -> None:
    model = build()
    model.block_list()[0].hook_attn_out = LosesEdits()

    failed = failures_at(verify_points(model, layers=[0]), "blocks.0.hook_attn_out")

    assert "setting it to 0 moves no logit by more than rounding: the edit is lost" in (
        failed["an edit changes the logits"].message
    )
    assert "not reached: 'blocks.0.hook_resid_mid'" in failed["an edit reaches all that is downstream"].message


def test_a_point_that_changes_what_it_watches_is_named() -> None:
    model = build()
    model.block_list()[0].mlp.hook_post = ChangesWhatItWatches()

    report = verify_points(model, layers=[0])

    failed = failures_at(report, "blocks.0.mlp.hook_post")
    assert "must be bit-identical" in failed["watching leaves logits bit-identical"].message
    assert {"writing back the same tensor", "writing back an equal copy"} <= set(failed)
    assert "every point at once, left-padded" in {failure.subject for failure in report.failures}


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

    assert set(failed) == {"in-place and returned edits agree"}
    assert "'blocks.0.hook_resid_mid'" in failed["in-place and returned edits agree"].message


def test_an_in_place_operation_that_changes_captures_is_named() -> None:
    model = build()
    model.block_list()[1].mlp.act = F.relu_

    failed = failures_at(verify_points(model, layers=[1]), "blocks.1.mlp.hook_pre")

    assert "an in-place operation in the model changed it later" in failed["captures hold what passed"].message


def test_a_wrong_gradient_is_named() -> None:
    model = build()
    model.block_list()[0].hook_attn_out = Detaches()

    report = verify_points(model, gradients=True)

    assert "gradient is the derivative of an edit" in {failure.check for failure in report.failures}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_positions_of_padded_rows_are_named(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def count_columns(plan: TokenPlan) -> Tensor:
        return torch.arange(plan.n_new)[None]

    monkeypatch.setattr(TokenPlan, "positions", property(count_columns))

    report = verify_points(build("learned").to(dtype))

    assert {failure.subject for failure in report.failures} == {"left-padded"}
    assert "logits of real tokens depend on left padding" in str(report)


def test_a_pattern_that_z_was_not_computed_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_pattern = Attention._watch_pattern

    def watch_scaled(attention: Attention, q: Tensor, k: Tensor, plan: TokenPlan) -> tuple[Tensor, bool]:
        return watch_pattern(attention, 2 * q, k, plan)

    monkeypatch.setattr(Attention, "_watch_pattern", watch_scaled)

    checks = {failure.check for failure in verify_points(build()).failures}

    assert {"z is pattern times values", "writing back an equal copy"} <= checks


def test_weights_that_differ_from_the_reference_fail_in_every_dtype(tmp_path: Path) -> None:
    model = HookedCausalLM.from_pretrained(save_variant("llama-gqa", tmp_path))
    with torch.no_grad():
        model.block_list()[1].attn.W_K[0, 0, 0] += 0.05

    report = verify(model, reference=tmp_path, gradients=False, layers=[1], progress=False)

    failed = [failure for failure in report.failures if failure.check == "logits against transformers"]
    assert {failure.check for failure in report.failures} == {"logits against transformers"}
    assert {failure.subject.partition(",")[0] for failure in failed} >= {"float32", "float64"}
    assert "the logits are not those of the reference" in str(report)


def test_a_model_in_memory_is_held_against_its_own_export() -> None:
    report = verify(HookedCausalLM.from_hf(build_variant("neox-tied")), progress=False)

    assert report.passed, str(report)
    assert "round trip: tensors on disk" not in report.by_check()
    assert any("model.to_hf()" in note for note in report.notes)


def test_a_network_that_transformers_lacks_is_verified_without_it() -> None:
    report = verify(build("qk-rms-norm"), gradients=False, progress=False)

    assert report.passed
    assert [note.partition(":")[0] for note in report.notes] == ["logits against transformers", "round trip"]
    assert all("qk_norm" in note for note in report.notes)


def test_a_save_that_changes_a_weight_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_variant("neox-parallel", tmp_path)
    save = HookedCausalLM.save_pretrained

    def save_changed(model: HookedCausalLM, folder: Path) -> None:
        changed = HookedCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            changed.block_list()[0].mlp.W_out[0, 0] += 1
        save(changed, folder)

    monkeypatch.setattr(HookedCausalLM, "save_pretrained", save_changed)
    report = verify(tmp_path, logits=False, gradients=False, progress=False)

    assert {failure.subject for failure in report.failures} == {
        "gpt_neox.layers.0.mlp.dense_4h_to_h.weight",
        "blocks.0.mlp.W_out",
    }
    assert "is not bit-equal after saving" in str(report)


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


def test_gradients_in_single_precision_are_held_against_a_leaf() -> None:
    """Differences drown in rounding there; what large models get, which are not copied to float64."""
    from hooklens.verification.gradients import check_gradients

    model = build("gated-shared-norm")
    with torch.no_grad():
        assert all(result.passed for result in check_gradients(make_probe(model)))
        model.block_list()[0].hook_attn_out = Detaches()
        results = check_gradients(make_probe(model))

    assert not all(result.passed for result in results)


def test_layers_are_sampled_in_a_deep_model_and_the_report_says_so() -> None:
    model = HookedCausalLM(HookedConfig(d_model=8, n_layers=7, n_heads=2, d_vocab=11, n_ctx=16))

    report = verify_points(model)

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


def test_a_report_reads_as_a_table() -> None:
    model = build()
    model.block_list()[0].attn.hook_z = NeverFires()
    report = verify_points(model)
    text, table = str(report), report.to_dataframe()

    assert "FAILED" in text.splitlines()[0]
    assert "fires once" in text
    assert "FAILED  fires once, blocks.0.attn.hook_z: 0, expected == 1" in text
    assert len(table) == len(report.results)
    assert list(table[~table["passed"]]["subject"]) == [failure.subject for failure in report.failures]
    assert "<table>" in report._repr_html_()
    assert "VerificationReport" in repr(report)


@pytest.mark.parametrize(
    ("relation", "measured", "passed"),
    [("<=", 1.0, True), ("<=", 1.1, False), (">", 1.0, False), (">", 1.1, True), ("==", 1.0, True), ("==", 2.0, False)],
)
def test_a_result_is_held_against_its_bound(relation: Any, measured: float, passed: bool) -> None:
    result = CheckResult(check="c", subject="s", measured=measured, bound=1.0, relation=relation)

    assert result.passed is passed
    assert not CheckResult(check="c", subject="s", measured=float("nan"), bound=1.0, relation=relation).passed


def test_a_report_of_nothing_has_not_passed() -> None:
    report = VerificationReport("a model", [])

    assert not report.passed
    assert "nothing was checked" in str(report)


@pytest.mark.parametrize(
    ("name", "reached", "spared"),
    [
        ("blocks.0.hook_mlp_in", "blocks.0.mlp.hook_pre", "blocks.0.hook_resid_mid"),
        ("blocks.0.hook_q_input", "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_k"),
        ("blocks.1.attn.hook_v", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"),
        ("hook_pos_embed", "blocks.0.hook_resid_pre", "hook_embed"),
        ("blocks.0.hook_resid_post", "unembed.hook_out", "blocks.0.hook_mlp_out"),
    ],
)
def test_downstream_follows_the_wiring(name: str, reached: str, spared: str) -> None:
    model = build("learned")
    found = downstream_of(name, model.hook_points(), model.cfg)

    assert reached in found
    assert spared not in found
    assert name not in found


def test_no_sublayer_of_a_parallel_block_is_downstream_of_the_other() -> None:
    model = build("gated-shared-norm")
    names = model.hook_points()

    assert "blocks.0.hook_mlp_out" not in downstream_of("blocks.0.hook_attn_out", names, model.cfg)
    assert "blocks.0.mlp.hook_pre_linear" in downstream_of("blocks.0.ln1.hook_scale", names, model.cfg)


def test_the_same_seed_gives_the_same_report() -> None:
    one, other = (verify_points(build(), seed=3) for _ in range(2))

    assert one.results == other.results
