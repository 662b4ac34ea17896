"""Every architecture variant, loaded from disk, passes every check of `hooklens.verify`."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.axes import find_site
from hooklens.hooks.names import is_by_name_only
from hooklens.verification import VerificationReport, verify
from hooklens.verification.editing import CHANGES_LOGITS, EQUAL_COPY, IN_PLACE, REACHES, SPARES, STAYS
from hooklens.verification.gradients import GRADIENT
from hooklens.verification.probe import make_probe
from hooklens.verification.reference import FLOAT32_BOUND, FLOAT64_BOUND, LOGITS, check_logits, reference_loader
from hooklens.verification.round_trip import check_round_trip
from hooklens.verification.watching import AXES, EQUAL_IN_PLACE, FIRES, KEPT, SAME_TENSOR, WATCHING
from tests.annotations import unchecked
from tests.checkpoints import FALCON_VARIANTS, NEOX_VARIANTS, VARIANTS, save_variant
from tests.verification.networks import verify_whole

PER_POINT = [
    FIRES,
    AXES,
    WATCHING,
    KEPT,
    SAME_TENSOR,
    EQUAL_COPY,
    EQUAL_IN_PLACE,
    CHANGES_LOGITS,
    REACHES,
    SPARES,
    STAYS,
    IN_PLACE,
    GRADIENT,
]


# Checking annotations takes as long as the rest; these hold every kind of tensor.
CHECKED = ("neox-parallel", "llama-gqa", "falcon-rw")
# What a family has of wirings, of norms and of heads. The others differ from one of these in sizes, frequencies,
# activations, biases or a tied embedding, which is in their logits.
EVERY_KIND = (
    "neox-parallel",
    "neox-sequential",
    "llama-gqa",
    "llama-biases",
    "llama-dynamic",
    "falcon-7b",
    "falcon-rw",
    "falcon-40b",
    "falcon-sequential-mqa",
)


@pytest.mark.parametrize(
    ("variant", "layers"),
    [
        # Their layers are alike, so one is looked at.
        ("llama-gqa", [1]),
        *(
            pytest.param(name, [number % 2], marks=pytest.mark.long)
            for number, name in enumerate(EVERY_KIND)
            if name not in CHECKED
        ),
        *(pytest.param(name, None, marks=pytest.mark.long) for name in CHECKED),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in VARIANTS if name not in CHECKED),
    ],
)
def test_variant_passes_every_check(variant: str, layers: list[int] | None, tmp_path: Path) -> None:
    with nullcontext() if variant in CHECKED else unchecked():
        report = verify(save_variant(variant, tmp_path), layers=layers, progress=False)

    assert report.passed, str(report)
    # Where frequencies depend on the length of a row, no cache can be cut.
    by_length = ("key-value caches were not checked: frequencies by length",)
    notes = by_length if variant == "llama-dynamic" else ()
    assert [note for note in report.notes if not note.startswith("hook points were checked in layers")] == list(notes)
    _assert_every_point_checked(report, tmp_path, layers)
    _assert_bounds_as_promised(report, variant)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in CHECKED])
def test_variant_computes_what_transformers_does(variant: str, tmp_path: Path) -> None:
    model = HookedCausalLM.from_pretrained(save_variant(variant, tmp_path))
    whole = verify_whole(model)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    with unchecked(), torch.no_grad():
        logits = check_logits(make_probe(model), reference_loader(tmp_path, model.device), dtypes)
        tensors = check_round_trip(model, tmp_path)
    report = VerificationReport(variant, [*whole.results, *logits, *tensors], [])

    assert report.passed, str(report)
    _assert_bounds_as_promised(report, variant)


def _assert_every_point_checked(report: VerificationReport, folder: Path, layers: list[int] | None) -> None:
    """The checks name the points of `hook_table`, all but that of token ids, which has its own tests."""
    model = HookedCausalLM.from_pretrained(folder)
    left_out = set(range(model.cfg.n_layers)) - set(range(model.cfg.n_layers) if layers is None else layers)
    blocks = tuple(f"blocks.{layer}." for layer in left_out)
    names = {name for name in model.hook_table()["name"] if not is_by_name_only(name) and not name.startswith(blocks)}
    for check, results in report.by_check().items():
        if check in PER_POINT:
            assert {result.subject for result in results} & names == names, check
    assert set(PER_POINT) <= set(report.by_check())


def _assert_bounds_as_promised(report: VerificationReport, variant: str) -> None:
    """The bounds that verify adapts to large networks are the plain ones here, and every batch was compared.

    Half precision has its own bound, 1.2 times the reference's error.
    """
    logits = report.by_check()[LOGITS]
    assert len(logits) == 15
    for result in logits:
        dtype, _, batch = result.subject.partition(", ")
        assert dtype in ("float32", "float64", "bfloat16")
        alone = "8 rows of" if dtype == "bfloat16" else "single row of"
        assert batch.endswith("-padded") or batch.startswith(alone)
        if dtype == "float32":
            assert result.measured <= FLOAT32_BOUND
        # RMSNorm is computed in float32 in transformers, whatever the model's dtype.
        if dtype == "float64" and variant in NEOX_VARIANTS + FALCON_VARIANTS:
            assert result.bound == FLOAT64_BOUND


@pytest.mark.parametrize(
    ("variant", "dtype", "layers"),
    [
        ("llama-gqa", torch.bfloat16, [1]),
        pytest.param("neox-parallel", torch.float64, [0], marks=pytest.mark.long),
        pytest.param("falcon-rw", torch.bfloat16, [0], marks=pytest.mark.long),
        *(
            pytest.param(variant, dtype, None, marks=pytest.mark.slow)
            for variant in ("neox-parallel", "llama-gqa", "falcon-rw")
            for dtype in (torch.float64, torch.bfloat16)
        ),
    ],
)
def test_variant_in_other_dtypes(variant: str, dtype: torch.dtype, layers: list[int] | None, tmp_path: Path) -> None:
    """Hook points keep their promises in the dtype of the checkpoint, whatever that is."""
    with unchecked():
        report = verify(save_variant(variant, tmp_path, dtype=dtype), dtypes=(dtype,), layers=layers, progress=False)

    assert report.passed, str(report)
    assert str(dtype).removeprefix("torch.") in report.subject


def test_variants_have_every_kind_of_point_that_the_families_use(tmp_path: Path) -> None:
    """What no variant has (learned positions, latents, other norms, SoLU, mixtures) is in tests/verification."""
    seen = set()
    for number, variant in enumerate(("neox-sequential", "llama-gqa", "falcon-7b")):
        model = HookedCausalLM.from_pretrained(save_variant(variant, tmp_path / str(number)))
        seen |= {site.template for name in model.hook_points() if (site := find_site(name)) is not None}
    # In an interpreter of its own, where no test has declared parts.
    listing = "import hooklens, hooklens.axes; print(*hooklens.axes.HOOK_SITES, sep='\\n')"
    every = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True).stdout.split()
    unseen = {template for template in every if template not in seen}
    assert {name.removeprefix("blocks.{i}.").partition(".hook")[0] for name in unseen} == {
        "hook_pos_embed",
        "attn",
        "attn.q_latent_norm",
        "attn.kv_latent_norm",
        "attn.q_norm",
        "attn.k_norm",
        "ln1_post",
        "ln2_post",
        "ln1_stream",
        "ln2_stream",
        "embed.ln",
        "mlp",
        "mlp.ln",
        "mlp.router",
        "mlp.experts",
        "mlp.shared",
    }
