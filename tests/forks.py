"""Processes that are forked from the test's own: all is imported and made there, and they may be killed."""

import contextlib
import os
import traceback
from collections.abc import Callable

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by forking")


def run_in_child(work: Callable[[], object]) -> int:
    """The id of a process that does the work and ends."""
    child = os.fork()
    if child:
        return child
    # Nothing of the test run's may happen in the child.
    code = 1
    with contextlib.suppress(BaseException):
        try:
            # The threads that share a product's work are not forked with the rest.
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
    os._exit(code)


def wait_for(child: int) -> int:
    """The exit code of such a process, or the number of the signal that ended it, negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
