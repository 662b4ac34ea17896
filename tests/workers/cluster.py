"""A Ray of two cores on this machine, for the tests of a module; workers that die where a test says."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hooklens.optional import import_package
from hooklens.workers.holder import Holder

FLAGS = "HOOKLENS_TEST_DEATHS"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two cores, and the folder of files that each let a worker die once."""
    ray: Any = import_package("ray")
    flags = tmp_path_factory.mktemp("deaths")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # What Ray starts has this process' environment.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FLAGS, str(flags))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield flags
    ray.shutdown()
    torch.set_num_threads(threads)


class Mortal(Holder):
    """A worker that dies by SIGKILL before or behind its task 0, 1, ... where there is a file `before-1` or `after-1`.

    Each file is taken away first, so that one worker dies.
    """

    n_run = -1

    def run(self, task: Any, begun: int, shared: list[Any]) -> Any:
        """The result of a task, if it comes to that."""
        self.n_run += 1
        self._die(f"before-{self.n_run}")
        result = super().run(task, begun, shared)
        self._die(f"after-{self.n_run}")
        return result

    @staticmethod
    def _die(name: str) -> None:
        try:
            (Path(os.environ[FLAGS]) / name).unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
