"""Plans of sweeps against what torch's allocator reports of the same sweeps."""

import pytest
import torch

from hooklens import HookedCausalLM, edits, patching
from hooklens.errors import InputError
from hooklens.patching import LogitDiff, SiteError, plan_sweep, sweep
from tests.memory_table import measure

CLEAN = "When Mary and John went to the store , John gave a drink to"
CORRUPTED = "When Mary and John went to the store , Mary gave a drink to"
METRIC = LogitDiff("Mary", "John")
NEOX, LLAMA = "bundled:tiny-gpt-neox", "bundled:tiny-llama"


@pytest.mark.parametrize(
    ("name", "n_pairs", "sites", "options"),
    [
        pytest.param(NEOX, 1, "mlp_out", {}, marks=pytest.mark.slow),
        (NEOX, 4, "pattern", {}),
        pytest.param(LLAMA, 4, patching.grid("z", heads="each"), {"batch_size": 16}, marks=pytest.mark.slow),
        (LLAMA, 2, "q", {"direction": "noise", "edits": [edits.Zero("blocks.1.attn.hook_z", head=2)]}),
        (NEOX, 4, "resid_post", {"source": "zero"}),
    ],
)  # fmt: skip
def test_a_peak_is_the_measured_one(name: str, n_pairs: int, sites: object, options: dict[str, object]) -> None:
    model = HookedCausalLM.from_pretrained(name)
    given = (model, [CLEAN] * n_pairs, [CORRUPTED] * n_pairs, sites, METRIC)
    plan = plan_sweep(*given, **options)
    results = []

    def run() -> None:
        results[:] = [sweep(*given, progress=False, **options)]

    assert plan.peak == pytest.approx(measure(run), rel=0.1)
    (result,) = results
    assert plan.notes == (f"{result.stats.forwards} passes",)
    assert plan.output == result.per_pair.nbytes


def test_refusals_are_the_sweeps() -> None:
    model = HookedCausalLM.from_pretrained(LLAMA)
    with pytest.raises(SiteError):
        plan_sweep(model, CLEAN, CORRUPTED, patching.grid("z", layers=[9]), METRIC)
    with pytest.raises(InputError, match="metric missing"):
        plan_sweep(model, CLEAN, CORRUPTED, "z")
    with pytest.raises(TypeError, match="batchsize"):
        plan_sweep(model, CLEAN, CORRUPTED, "z", METRIC, batchsize=3)
    # A plan has no bar, and said nothing of a keyword that it did not use; it told of one by another function's name.
    with pytest.raises(TypeError, match=r"^plan_sweep\(\) got an unexpected keyword argument 'progress'"):
        plan_sweep(model, CLEAN, CORRUPTED, "z", METRIC, progress=True)
    with pytest.raises(TypeError, match=r"^plan_sweep\(\) got .* 'patching_metric'\. Here it is metric="):
        plan_sweep(model, CLEAN, CORRUPTED, "z", patching_metric=METRIC)

    def of_values(logits: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(logits[:, -1, 0].numpy())

    with pytest.raises(InputError, match="not known before it runs"):
        plan_sweep(model, CLEAN, CORRUPTED, "z", of_values)
