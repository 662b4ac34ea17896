"""SIGKILL at moments of chance, ten times in one recording: what is finished in the end is byte for byte the same."""

import multiprocessing
import random
import shutil
import time

import pytest
import torch

import hooklens as hl
from hooklens.config import HookedConfig, RotaryPositions
from hooklens.datasets import ActivationDataset, record
from tests.datasets.test_recording import contents_of

N_DOCUMENTS, LENGTH = 3000, 64


def make_corpus():
    return torch.randint(50, (N_DOCUMENTS, LENGTH), generator=torch.Generator().manual_seed(0))


def record_all(folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = HookedConfig(d_model=64, n_layers=3, n_heads=4, d_vocab=50, n_ctx=256, positions=RotaryPositions(dim=16))
    model = hl.HookedCausalLM(cfg)
    record(
        model, make_corpus(), ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"], folder, row_length=256,
        batch_tokens=1024, shard_bytes=2**20, progress=False,
    )  # fmt: skip


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path):
    context = multiprocessing.get_context("spawn")
    whole = tmp_path / "whole"
    record_all(whole)
    expected = contents_of(whole)
    n_shards = len(ActivationDataset(whole).manifest.shards)
    assert n_shards > 60
    draw = random.Random(0)
    killed, shards = 0, []
    folder = tmp_path / "set"
    while killed < 10:
        process = context.Process(target=record_all, args=(folder,))
        process.start()
        before = len(list(folder.glob("shard-*"))) if folder.exists() else 0
        # The moment is counted from the first file that this process writes, whatever importing takes.
        while process.is_alive() and not (folder.exists() and len(list(folder.glob("shard-*"))) > before):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.join()
        if process.exitcode == 0:
            shutil.rmtree(folder)
            continue
        killed += 1
        shards.append(len(ActivationDataset(folder).manifest.shards))
        # What is there is readable at any time.
        ActivationDataset(folder).verify()
    assert len(set(shards)) > 5
    record_all(folder)
    assert contents_of(folder) == expected
