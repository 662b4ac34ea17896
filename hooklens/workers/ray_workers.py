"""Workers that Ray keeps: each holds the work once; tasks go to whoever is free, results come back in order."""

import platform
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from hooklens.errors import InputError, WorkerError
from hooklens.files import is_running
from hooklens.optional import import_package
from hooklens.workers.holder import Holder, describe_versions
from hooklens.workers.work import Settings, Work, pack

_MOST_DEATHS = 3
"""How often workers may die at one task, or one after another before they are ready."""
_AT_ONCE = 2
"""Tasks that a worker has: one that runs and one that waits, so that it never waits itself."""
_PATIENCE = 10.0
"""Seconds that workers which were told to end are waited for."""
_AHEAD = 4
"""Tasks for each worker that may be given and not yet be passed on, because an earlier one is not done."""


@dataclass(eq=False)
class _Task:
    number: int
    content: Any
    deaths: int = 0


@dataclass(frozen=True)
class _Failure:
    """What stands in a task's place when it could not be done: raised after the results before it are passed on."""

    error: Exception
    cause: Exception


@dataclass(eq=False)
class _Worker:
    """A process, by machine and number; `given` has the tasks that it has not done, by what Ray calls their results."""

    actor: Any
    preparing: Any
    is_ready: bool = False
    process: tuple[str, int] | None = None
    given: dict[Any, _Task] = field(default_factory=dict)


class RayWorkers:
    """Some processes of Ray that hold the same work; to be opened by `with`.

    Joins the cluster that is running (`RAY_ADDRESS`, or `ray.init` before), or starts one on this machine, which ends
    with the block. A worker takes as many cores as torch has threads here, and a GPU where the model lies on one.

    Args:
        work: what they hold.
        device: where its model lies.
        workers: how many; None: as many as the cluster has room for.
        what: the call, for messages.

    Raises:
        MissingDependencyError: Ray is not installed.
        InputError: the cluster has no room for so many.
    """

    def __init__(self, work: Work, *, device: torch.device, workers: int | None, what: str) -> None:
        self._ray: Any = import_package("ray")
        self._on_gpu, self._what = device.type == "cuda", what
        self._settings = Settings.read()
        self._started = not self._ray.is_initialized()
        if self._started:
            # One worker's loss is dealt with here, so what Ray prints about it stays in its logs.
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._n_begun = 0
        try:
            self.n_workers = self._count(workers)
            self._packed = self._ray.put(pack(work))
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> "RayWorkers":
        self._workers = [self._start() for _ in range(self.n_workers)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)
        # Ray does not wait, and who goes on here may meet what a dying worker still writes.
        _wait_for_ends([worker.process for worker in self._workers if worker.process is not None])
        self._workers = []
        if self._started:
            self._ray.shutdown()

    def run(self, tasks: Iterable[Any], shared: Any = None) -> Iterator[Any]:
        """The results of tasks, in their order; those before a task that fails come before its error is raised.

        Args:
            tasks: what `Work.run` takes; read as workers become free.
            shared: what `Work.begin` is given; None: it is not called.

        Raises:
            WorkerError: several workers died at the same task, or before they could begin, or have other versions.
            Exception: what `Work` raised there.
        """
        self._n_begun += 1
        reference = [] if shared is None else [self._ray.put(pack(shared))]
        source = (_Task(number, content) for number, content in enumerate(tasks))
        again: deque[_Task] = deque()
        done: dict[int, Any] = {}
        n_given, n_passed, is_over = 0, 0, False
        while True:
            while (worker := self._free()) is not None:
                if again:
                    self._give(worker, again.popleft(), reference)
                    continue
                is_over = is_over or any(isinstance(result, _Failure) for result in done.values())
                has_room = n_given - n_passed < _AHEAD * self.n_workers
                task = next(source, None) if has_room and not is_over else None
                is_over = is_over or (has_room and task is None)
                if task is None:
                    break
                n_given += 1
                self._give(worker, task, reference)
            if n_passed in done:
                result = done.pop(n_passed)
                if isinstance(result, _Failure):
                    raise result.error from result.cause
                n_passed += 1
                yield result
            elif is_over and n_passed == n_given:
                return
            else:
                self._wait(done, again)

    def _count(self, workers: int | None) -> int:
        """How many workers there are to be."""
        wanted = "GPU" if self._on_gpu else "CPU"
        each = 1 if self._on_gpu else self._settings.threads
        nodes = [node["Resources"].get(wanted, 0) for node in self._ray.nodes() if node["Alive"]]
        room = sum(int(number // each) for number in nodes)
        if room >= (workers or 1):
            return workers or room
        threads = f"{each} CPU{'s' if each > 1 else ''} of one machine, as many as torch has threads here"
        raise InputError(
            f"{self._what}: no room for {workers or 1} worker{'s' if (workers or 1) > 1 else ''}: each takes "
            f"{'a GPU' if self._on_gpu else threads}, and Ray's machines have "
            f"{', '.join(f'{number:g}' for number in nodes) or 'none'}"
            f"{'' if self._on_gpu or each == 1 else '; torch.set_num_threads(1) makes room for more'}"
        )

    def _start(self) -> _Worker:
        options = {"num_cpus": 1, "num_gpus": 1} if self._on_gpu else {"num_cpus": self._settings.threads}
        actor = self._ray.remote(Holder).options(max_restarts=0, **options).remote()
        prepared = actor.prepare.remote([self._packed], self._settings, describe_versions())
        return _Worker(actor, prepared)

    def _free(self) -> _Worker | None:
        """Whoever has the least to do, if anybody can take more."""
        free = [worker for worker in self._workers if worker.is_ready and len(worker.given) < _AT_ONCE]
        return min(free, key=lambda worker: len(worker.given), default=None)

    def _give(self, worker: _Worker, task: _Task, shared: list[Any]) -> None:
        worker.given[worker.actor.run.remote(task.content, self._n_begun, shared)] = task

    def _wait(self, done: dict[int, Any], again: "deque[_Task]") -> None:
        """Wait until something happens, and take it up."""
        watched = {worker.preparing: worker for worker in self._workers if not worker.is_ready}
        watched |= {result: worker for worker in self._workers for result in worker.given}
        # In short turns, so that an interrupt is noticed.
        found: list[Any] = []
        while not found:
            found, _ = self._ray.wait(list(watched), num_returns=1, timeout=1.0)
        [result] = found
        worker = watched[result]
        errors = self._ray.exceptions
        try:
            value = self._ray.get(result)
        except errors.RayTaskError as error:
            failure = _Failure(error.cause if isinstance(error.cause, Exception) else error, error)
            if not worker.is_ready:
                raise failure.error from error
            done[worker.given.pop(result).number] = failure
            return
        except (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError) as error:
            self._replace(worker, done, again, error)
            return
        if not worker.is_ready:
            worker.is_ready, worker.process, self._failed_starts = True, value, 0
            return
        task = worker.given.pop(result)
        done[task.number] = value

    def _replace(self, worker: _Worker, done: dict[int, Any], again: "deque[_Task]", error: Exception) -> None:
        """Have what a dead worker was given done by others, and start another one in its place.

        A task at which several have died is not given again: its failure stands among what is done.
        """
        lost = list(worker.given.values())
        if not worker.is_ready:
            self._failed_starts += 1
        elif lost:
            lost[0].deaths += 1
        deaths = max([self._failed_starts, *(task.deaths for task in lost)])
        if deaths >= _MOST_DEATHS:
            where = "the same task" if worker.is_ready else "taking up the model"
            failure = WorkerError(
                f"{self._what}: {deaths} workers died at {where}, perhaps for want of memory (each keeps a copy of the "
                "model); give fewer workers, or smaller batches"
            )
            if not worker.is_ready:
                raise failure from error
            done[lost.pop(0).number] = _Failure(failure, error)
        again.extendleft(reversed(lost))
        # It may only be out of reach.
        self._ray.kill(worker.actor)
        self._workers[self._workers.index(worker)] = self._start()


def _wait_for_ends(processes: list[tuple[str, int]]) -> None:
    """Wait until the processes on this machine have ended, or for some seconds."""
    here = {number for machine, number in processes if machine == platform.node()}
    until = time.monotonic() + _PATIENCE
    while here and time.monotonic() < until:
        here = {number for number in here if is_running(number)}
        if here:
            time.sleep(0.02)
