"""Peak memory of a forward and of a capture at 2,048 positions, and of loading."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.models import FAMILIES, build_pair
from tests.benchmarks.peak import PeakMemory, run_fresh

_N_POSITIONS = 2048


def _peak(call: Any) -> int:
    with torch.no_grad(), PeakMemory() as memory:
        call()
    return memory.peak


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_capture_at_2048_positions(family: str, record: Any) -> None:
    """12 heads: one query x key tensor per head would take 192 MiB; logits are asked for at one position."""
    reference, model = build_pair(family, n_layers=4, d_model=768, n_heads=12)
    tokens = torch.randint(0, 1000, (1, _N_POSITIONS))
    theirs = _peak(lambda: reference(tokens, use_cache=False, logits_to_keep=1))
    plain = _peak(lambda: model(tokens, logits_at=-1))
    one_site = _peak(lambda: model.run_with_cache(tokens, names_filter="blocks.2.hook_resid_post", logits_at=-1))
    stream = _N_POSITIONS * 768 * 4
    record(f"peak memory at 2,048 positions, {family}: plain / transformers", plain / theirs, at_most=1.0)
    record(
        f"peak memory at 2,048 positions, {family}: added by one site, in streams",
        (one_site - plain) / stream,
        at_most=1.01,
    )


LOAD = """
    import re
    from pathlib import Path
    import torch
    import transformers
    import hooklens

    def peak():
        # Not ru_maxrss: a process starts with that of the one it was forked from.
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    # A small model first: what the interpreter and its packages take is not the model's.
    hooklens.HookedCausalLM.from_pretrained({first!r})
    before = peak()
    model = hooklens.HookedCausalLM.from_pretrained({source!r}, adapter={adapter!r})
    # Mapped files count once their pages are read, as a forward does.
    total = sum(float(parameter.detach().sum()) for parameter in model.parameters())
    size = sum(parameter.nbytes for parameter in model.parameters())
    print((peak() - before) / size)
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_peak_resident_memory_of_loading(family: str, record: Any, tmp_path: Path) -> None:
    """Growth of a fresh process while a checkpoint of some 400 MB is loaded and every weight is read."""
    reference, _ = build_pair(family, n_layers=14, d_model=768, n_heads=12, d_vocab=8000)
    reference.save_pretrained(tmp_path / "big", max_shard_size="60MB")
    small, _ = build_pair(family, n_layers=1, d_model=32, n_heads=2)
    small.save_pretrained(tmp_path / "small")
    code = LOAD.format(source=str(tmp_path / "big"), first=str(tmp_path / "small"), adapter=None)
    ratio = float(run_fresh(code).splitlines()[-1])
    record(f"peak resident memory of loading, {family}: / bytes of the model", ratio, at_most=1.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_peak_resident_memory_of_merging_an_adapter_on_load(family: str, record: Any, tmp_path: Path) -> None:
    """The same with an adapter of rank 16 beside every linear map, in bfloat16, merged in float32."""
    peft = pytest.importorskip("peft")
    reference, _ = build_pair(family, n_layers=28, d_model=768, n_heads=12, d_vocab=8000)
    reference.bfloat16().save_pretrained(tmp_path / "big")
    adapted = peft.get_peft_model(reference, peft.LoraConfig(r=16, target_modules="all-linear"))
    adapted.save_pretrained(tmp_path / "adapter")
    small, _ = build_pair(family, n_layers=1, d_model=32, n_heads=2)
    small.save_pretrained(tmp_path / "small")
    places = {"source": str(tmp_path / "big"), "first": str(tmp_path / "small"), "adapter": str(tmp_path / "adapter")}
    ratio = float(run_fresh(LOAD.format(**places)).splitlines()[-1])
    record(f"peak resident memory of merging an adapter on load, {family}: / bytes of the model", ratio, at_most=1.3)
