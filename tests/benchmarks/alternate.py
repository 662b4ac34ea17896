"""Comparing calls within one process: alternating, so that what disturbs the machine disturbs all of them."""

import gc
import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def time_alternating(
    calls: Mapping[str, Call], *, rounds: int, warm_up: int = 3, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of each call: the fastest tenth's slowest of many rounds, the calls taking turns.

    A low quantile, not the minimum, so that one lucky round decides nothing. `clock=time.process_time` counts what the
    processor spent, whatever else keeps it busy.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warm_up):
            call()
    _synchronize()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                start = clock()
                call()
                _synchronize()
                seconds[name].append(clock() - start)
    finally:
        gc.enable()
    return {name: sorted(values)[len(values) // 10] for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
