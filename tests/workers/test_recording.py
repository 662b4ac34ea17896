"""Recordings on two local workers of Ray hold the bytes that the local engine leaves, whatever dies on the way.

Needs the extra `ray`.
"""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from hooklens import HookedCausalLM, edits
from hooklens.datasets import ActivationDataset, record
from hooklens.errors import CheckpointError, InputError
from hooklens.workers import ray_workers
from tests.datasets.test_recording import contents_of, make_documents, record_small
from tests.workers.cluster import Mortal, cluster

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'hooklens[ray]'", allow_module_level=True)

__all__ = ["cluster"]
pytestmark = pytest.mark.usefixtures("cluster")

ON_RAY = {"engine": "ray", "workers": 2}


def test_the_same_bytes(tmp_path: Path) -> None:
    documents = make_documents()
    given = {"edits": (edits.Scale("blocks.0.hook_mlp_out", 0.5),), "keep": lambda tokens: tokens % 3 != 0}
    record_small(tmp_path / "here", documents, **given)
    found = record_small(tmp_path / "there", documents, **given, **ON_RAY)
    assert len(found.manifest.shards) > 2
    assert contents_of(tmp_path / "there") == contents_of(tmp_path / "here")
    found.verify()


@pytest.mark.parametrize("flags", [["before-1"], ["before-0", "after-2"]])
def test_workers_that_die_leave_the_same_bytes(
    tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """A worker dies before a shard is written, or when it lies there and nobody has been told."""
    monkeypatch.setattr(ray_workers, "Holder", Mortal)
    for name in flags:
        (cluster / name).touch()
    documents = make_documents(n=60)
    found = record_small(tmp_path / "there", documents, **ON_RAY)
    assert list(cluster.iterdir()) == [], "nobody died"
    record_small(tmp_path / "here", documents)
    assert contents_of(tmp_path / "there") == contents_of(tmp_path / "here")
    assert found.tokens().tolist() == [token for document in documents for token in document]


def test_an_interrupted_recording_goes_on_by_either_engine(tmp_path: Path) -> None:
    documents = make_documents()

    class Stops:
        def __iter__(self):
            for number, document in enumerate(documents):
                if sum(map(len, documents[:number])) >= 150:
                    raise KeyboardInterrupt
                yield document

    record_small(tmp_path / "whole", documents)
    for name, before, then in (("ray, local", ON_RAY, {}), ("local, ray", {}, ON_RAY)):
        folder = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            record_small(folder, Stops(), **before)
        assert not ActivationDataset(folder).is_complete
        record_small(folder, documents, **then)
        assert contents_of(folder) == contents_of(tmp_path / "whole")


def test_a_killed_call_goes_on(tmp_path: Path) -> None:
    """SIGKILL of the calling process, which takes the Ray that it has started with it, while workers write."""
    code = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        import torch
        from tests.datasets.test_recording import make_documents, record_small

        folder = Path(sys.argv[1])
        torch.set_num_threads(1)

        class Killed:
            def __iter__(self):
                for document in make_documents(n=400):
                    if (folder / "shard-00005.safetensors").exists():
                        os.kill(os.getpid(), 9)
                    yield document

        record_small(folder, Killed(), engine="ray", workers=1)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    documents = make_documents(n=400)
    partial = ActivationDataset(tmp_path / "there")
    partial.verify()
    assert not partial.is_complete
    record_small(tmp_path / "there", documents, **ON_RAY)
    record_small(tmp_path / "here", documents)
    assert contents_of(tmp_path / "there") == contents_of(tmp_path / "here")


def test_workers_upload(tmp_path: Path) -> None:
    record_small(tmp_path / "here")
    (tmp_path / "there").mkdir()
    record_small((tmp_path / "there").as_uri(), **ON_RAY)
    assert contents_of(tmp_path / "there") == contents_of(tmp_path / "here")


def test_a_folder_that_workers_do_not_see_is_refused() -> None:
    """What `memory://` holds is in one process alone."""
    with pytest.raises(CheckpointError, match=r"does not see the folder memory://unseen.*all machines share"):
        record_small("memory://unseen", **ON_RAY)


def test_a_worker_that_cannot_write_keeps_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    (tmp_path / "whole").mkdir()
    record_small(tmp_path / "whole")
    folder.mkdir()
    # A file cannot take the place of a folder.
    blocked = folder / "shard-00002.safetensors"

    class Blocks:
        def __iter__(self):
            blocked.mkdir(exist_ok=True)
            return iter(make_documents())

    with pytest.raises(CheckpointError, match=r"cannot write to .*2 shards .* are kept.*record again"):
        record_small(folder, Blocks(), **ON_RAY)
    blocked.rmdir()
    record_small(folder, **ON_RAY)
    assert contents_of(folder) == contents_of(tmp_path / "whole")


def test_more_workers_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"record: no room for 3 workers: each takes 1 CPU .* Ray's machines have 2$"):
        record_small(tmp_path / "set", engine="ray", workers=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises(InputError, match=r"each takes 4 CPUs .*; torch.set_num_threads\(1\) makes room for more"):
            record_small(tmp_path / "set", engine="ray")
    finally:
        torch.set_num_threads(threads)


def test_a_model_in_bfloat16_with_tied_weights_travels_bit_for_bit(tmp_path: Path) -> None:
    model = HookedCausalLM.from_pretrained("bundled:tiny-falcon", dtype=torch.bfloat16)
    texts = ["When Mary and John went to the store , John gave a drink to Mary ."] * 40
    for name, engine in (("here", {}), ("there", ON_RAY)):
        record(
            model, texts, "resid_post", tmp_path / name, batch_tokens=100, shard_bytes=90_000, progress=False, **engine
        )
    assert len(ActivationDataset(tmp_path / "there").manifest.shards) > 3
    assert contents_of(tmp_path / "there") == contents_of(tmp_path / "here")
