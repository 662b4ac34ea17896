"""Recording activations: throughput against the bare forward that stops at the site, and memory over many tokens."""

import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hooklens import HookedCausalLM
from hooklens.config import HookedConfig, LearnedPositions
from hooklens.datasets import ActivationDataset
from hooklens.datasets import record as record_activations
from hooklens.datasets.folder import LocalFolder
from hooklens.datasets.manifest import Manifest, Shard
from tests.benchmarks.peak import run_fresh

ROW, BATCH, N_ROWS = 256, 4096, 512
_COLUMNS = {"tokens": torch.int, "document": torch.long, "position": torch.int}

_MEMORY = """
    import resource, sys
    import torch
    from tests.benchmarks.test_recording import ROW, make_network
    from hooklens.datasets import record

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    class Corpus:
        def __iter__(self):
            draw = torch.Generator().manual_seed(0)
            for number in range(2_000_000 // ROW + 1):
                if number == 500_000 // ROW:
                    self.early = peak()
                yield torch.randint(1000, (ROW,), generator=draw)

    corpus = Corpus()
    found = record(
        make_network(), corpus, ["blocks.5.hook_resid_post"], sys.argv[1] if len(sys.argv) > 1 else FOLDER,
        row_length=ROW, batch_tokens=4096, shard_bytes=2**25, progress=False,
    )
    print(len(found), peak() - corpus.early, corpus.early)
"""


def make_network() -> HookedCausalLM:
    torch.manual_seed(0)
    cfg = HookedConfig(d_model=128, n_layers=12, n_heads=4, d_vocab=1000, n_ctx=ROW, positions=LearnedPositions())
    return HookedCausalLM(cfg)


def test_throughput(record: Any, tmp_path: Path) -> None:
    """Tokens a second of a recording, to those of forwards that stop at the site and keep nothing; turns of both."""
    model, site = make_network(), "blocks.11.hook_resid_post"
    rows = torch.randint(1000, (N_ROWS, ROW), generator=torch.Generator().manual_seed(1))

    def forward() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            for first in range(0, len(rows), BATCH // ROW):
                model(rows[first : first + BATCH // ROW], return_type=None, stop_at_layer=12)
        return time.perf_counter() - begin

    def run() -> float:
        folder = tmp_path / "acts"
        begin = time.perf_counter()
        record_activations(
            model, rows, [site], folder, row_length=ROW, batch_tokens=BATCH, shard_bytes=2**25, progress=False
        )
        seconds = time.perf_counter() - begin
        shutil.rmtree(folder)
        return seconds

    forward(), run()
    ratios = [forward() / run() for _ in range(7)]
    record("recording: throughput / bare forward's", median(ratios), at_least=0.9)


def test_memory_over_two_million_tokens(record: Any, tmp_path: Path) -> None:
    """What the peak of a process grows by after the first quarter of two million tokens."""
    printed = run_fresh(_MEMORY.replace("FOLDER", repr(str(tmp_path / "acts"))))
    n_tokens, growth, early = map(int, printed.split())
    assert n_tokens >= 2_000_000
    record("recording 2 M tokens: peak memory / that of the first quarter", (early + growth) / early, at_most=1.05)


def test_rates(record: Any, tmp_path: Path) -> None:
    """What docs/scale.md computes with: megabytes a second that one process writes, and reads in random order."""
    width, n_tokens = 4096, 2**15
    values = torch.randn(n_tokens, width).half()
    columns = {name: torch.zeros(n_tokens, dtype=dtype) for name, dtype in _COLUMNS.items()}
    folder = LocalFolder(tmp_path / "acts")
    folder.make()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        checksum = folder.write_tensors("shard-00000.safetensors", {"blocks.0.hook_resid_post": values, **columns})
        seconds.append(time.perf_counter() - begin)
    record("writing a shard, with its checksum and forced to the disk, MB a second", values.nbytes / min(seconds) / 1e6)
    shard = Shard(
        name="shard-00000.safetensors", tokens=n_tokens, documents=1, tokens_read=n_tokens, digest="", sha256=checksum
    )
    Manifest(run={}, sites={"blocks.0.hook_resid_post": (width,)}, dtype="float16", shards=(shard,)).write(folder)
    found = ActivationDataset(tmp_path / "acts")
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        n_read = sum(len(batch["blocks.0.hook_resid_post"]) for batch in found.loader(4096, buffer=2**14))
        seconds.append(time.perf_counter() - begin)
        assert n_read == n_tokens
    record("reading batches in random order, MB a second", values.nbytes / min(seconds) / 1e6)
