"""What runs in a worker's process."""

import os
import platform
import sys
from typing import Any

import numpy as np
import torch

from hooklens.errors import WorkerError
from hooklens.optional import import_package
from hooklens.workers.work import Settings, Work, unpack


def describe_versions() -> dict[str, str]:
    """The versions of this process that results depend on."""
    return {
        "hooklens": sys.modules["hooklens"].__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


class Holder:
    """Holds the work of a worker."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._begun = 0

    def prepare(self, packed: list[Any], settings: Settings, versions: dict[str, str]) -> tuple[str, int]:
        """Take up the work.

        Returns:
            The machine and the number of this process.

        Raises:
            WorkerError: this process has other versions than the one that calls.
        """
        ours = describe_versions()
        differing = [
            f"{name} {ours[name]} there and {wanted} here" for name, wanted in versions.items() if ours[name] != wanted
        ]
        if differing:
            raise WorkerError(f"a worker of Ray has {', '.join(differing)}; install the same on all machines")
        settings.apply()
        # A reference in a list is not looked up by Ray, so that the bytes go when this method ends.
        self._work = self._get(packed)
        return platform.node(), os.getpid()

    def run(self, task: Any, begun: int, shared: list[Any]) -> Any:
        """The result of a task."""
        assert self._work is not None
        if shared and begun != self._begun:
            self._work.begin(self._get(shared))
            self._begun = begun
        return self._work.run(task)

    def _get(self, packed: list[Any]) -> Any:
        return unpack(import_package("ray").get(packed[0]))
