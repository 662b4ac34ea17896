"""What every test runs under: no network, shape annotations checked on every call, one profile for hypothesis."""

import gc
import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers that each take every core only get in each other's way, and so do the interpreters that they start.
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.annotations import check_annotations, count_anew

# Benchmarks time the package as users run it, without the checks. In Python 3.10 `Unpack` and unions in texts come from
# elsewhere, and beartype does not know them there.
if sys.version_info >= (3, 11) and not any("benchmarks" in argument for argument in sys.argv):
    check_annotations("hooklens")

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

# How long a machine takes says nothing about the package: no deadline, and slow strategies are fine. CI draws the
# same examples for the same code, so that a change is judged by itself; everybody else's runs draw new ones.
settings.register_profile(
    "hooklens",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    derandomize=os.environ.get("CI") == "true",
)
settings.load_profile("hooklens")

transformers.utils.logging.disable_progress_bar()

if os.environ.get("PYTEST_XDIST_WORKER"):
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let a worker that has nothing left take tests from another: the slowest ones stand beside each other."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what is there for all tests, a million objects, whenever it looks."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _checks_of_annotations() -> None:
    count_anew()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
