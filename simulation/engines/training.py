"""Run many clients' training jobs in this process, in the fastest way that is right for them."""

import collections
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from client.scratch import scratch_for
from client.task.protocol import size_of
from client.train import Job, do
from simulation.engines.batched import (
    BatchedTraining,
    NotBatchableError,
    Trained,
    kind_of,
    tensors_of,
)
from strategies.screen import one_line
from unlearning.parameters import Parameters

log = logging.getLogger("secateur")

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Update:
    """One client's model after training.

    Attributes
    ----------
    tensors
        The model; where ``row`` is given, those of several clients, shape (clients, ...).
    row
        Which of them is this client's.
    metrics
        What the client says of its training.
    """

    tensors: Mapping[str, Tensor]
    row: int | None
    metrics: Mapping[str, float]


Outcome = tuple[int, Update | Exception]
"""Position among the jobs, and the update or what the client raised."""


class Training:
    """Runs jobs: together in one step, side by side in threads, or one after another.

    Which of the three follows from the task and the device alone, never from a clock, so that the
    same run always gives the same model. A model that cannot be batched is told in the log, once.

    Parameters
    ----------
    workers
        Threads; as many as there are CPUs by default.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or cpus()
        self._batched: dict[object, BatchedTraining | str] = {}
        self._tasks: list[object] = []  # kept, so that no other object gets their ids
        self._limits: dict[int, int] = {}
        self._in_threads: dict[object, bool] = {}
        self._pool: ThreadPoolExecutor | None = None

    def run(self, jobs: Sequence[Job], start: Parameters) -> Iterator[list[Outcome]]:
        """Yield the outcomes of all jobs, some at a time, in an order that depends on them only.

        Memory grows with what is yielded at a time, not with the jobs.
        """
        empty, groups = [], collections.defaultdict(list)
        for position, job in enumerate(jobs):
            try:
                kind = kind_of(job) if size_of(job.examples) else None
            except NotBatchableError as error:
                kind = (id(job.task), str(error))
                self._refuse(kind, job, error)
            if kind is None:
                empty.append(position)
            else:
                groups[kind].append(position)
        for position in empty:
            yield [(position, alone(jobs[position], start))]
        for kind, positions in groups.items():
            largest = max(positions, key=lambda position: size_of(jobs[position].examples))
            batched = self._prepared(kind, jobs[largest], start)
            if isinstance(batched, BatchedTraining):
                yield from self._together(batched, jobs, positions, start)
            elif len(positions) > 1 and self._threads_help(kind, jobs[positions[0]], start):
                yield from self._side_by_side(jobs, positions, start)
            else:
                for position in positions:
                    yield [(position, alone(jobs[position], start))]

    def _prepared(self, kind: object, job: Job, start: Parameters) -> BatchedTraining | str:
        if kind not in self._batched:
            try:
                self._batched[kind] = BatchedTraining(job, start)
                self._tasks.append(job.task)
            except NotBatchableError as error:
                self._refuse(kind, job, error)
        return self._batched[kind]

    def _refuse(self, kind: object, job: Job, error: NotBatchableError) -> None:
        if kind not in self._batched:
            self._batched[kind] = str(error)
            self._tasks.append(job.task)
            log.info("clients are not trained in batches: %s", error)

    # ------------------------------------------------------------ together
    def _together(
        self,
        batched: BatchedTraining,
        jobs: Sequence[Job],
        positions: Sequence[int],
        start: Parameters,
    ) -> Iterator[list[Outcome]]:
        # Clients of one chunk wait for the largest of it: those of a size belong together.
        ordered = sorted(positions, key=lambda p: (-size_of(jobs[p].examples), p))
        limit = min(batched.chunk, self._limits.get(id(batched), len(jobs)))
        chunks = [ordered[i : i + limit] for i in range(0, len(ordered), limit)]
        threads = batched.prepare(start, [[jobs[p] for p in chunk] for chunk in chunks])
        threads = threads and len(chunks) > 1 and jobs[positions[0]].device.type == "cpu"
        attempt = functools.partial(self._attempt, batched, jobs, start=start)
        if not threads:
            for chunk in chunks:
                yield from attempt(chunk)
        else:
            made = in_order(self._threads(), lambda c: list(attempt(c)), chunks, self._workers)
            for outcomes in made:
                yield from outcomes

    def _attempt(
        self,
        batched: BatchedTraining,
        jobs: Sequence[Job],
        chunk: Sequence[int],
        start: Parameters,
    ) -> Iterator[list[Outcome]]:
        chosen = [jobs[position] for position in chunk]
        try:
            trained = batched.train(chosen, start)
        except torch.OutOfMemoryError as error:
            if len(chunk) == 1:
                yield [(chunk[0], error)]
                return
            half = len(chunk) // 2
            self._limits[id(batched)] = half
            log.warning("out of memory with %d clients at once: going on with %d", len(chunk), half)
            torch.cuda.empty_cache()
            yield from self._attempt(batched, jobs, chunk[:half], start)
            yield from self._attempt(batched, jobs, chunk[half:], start)
        except Exception as error:  # noqa: BLE001  one client's data may break the whole step
            log.warning("%d clients are trained one by one: %s", len(chunk), one_line(error))
            for position in chunk:
                yield [(position, alone(jobs[position], start))]
        else:
            yield list(zip(chunk, _updates(trained, chosen, start), strict=True))

    # ------------------------------------------------------------ side by side
    def _threads_help(self, kind: object, job: Job, start: Parameters) -> bool:
        if kind not in self._in_threads:
            self._in_threads[kind] = self._may_use_threads(job, start)
        return self._in_threads[kind]

    def _may_use_threads(self, job: Job, start: Parameters) -> bool:
        """Say whether threads are faster and safe: heavy operations, and nothing drawn at random.

        Torch's own generator, which dropout draws from, is one for all threads.
        """
        if job.device.type != "cpu" or self._workers < 2:
            return False
        scratch = scratch_for(job.task, job.device)
        heavy = any(isinstance(module, _ConvNd) for module in scratch.model.modules())
        try:
            inputs, targets = tensors_of(job)
        except NotBatchableError:
            return False
        if not heavy:
            return False
        scratch.load(start)
        scratch.model.train()
        with torch.random.fork_rng(devices=[]):
            before = torch.random.get_rng_state()
            loss = job.task.loss(scratch.model(inputs[:2]), targets[:2])
            loss.backward()  # type: ignore[no-untyped-call]
            return torch.equal(before, torch.random.get_rng_state())

    def _side_by_side(
        self, jobs: Sequence[Job], positions: Sequence[int], start: Parameters
    ) -> Iterator[list[Outcome]]:
        # Every thread sets the seed and puts back what it found, which may be another's.
        with torch.random.fork_rng(devices=[]):
            made = in_order(
                self._threads(), lambda p: alone(jobs[p], start), positions, 2 * self._workers
            )
            for position, outcome in zip(positions, made, strict=True):
                yield [(position, outcome)]

    def _threads(self) -> ThreadPoolExecutor:
        """Return the threads, started once: each keeps a model of its own."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(
                self._workers, initializer=torch.set_num_threads, initargs=(1,)
            )
            weakref.finalize(self, self._pool.shutdown, wait=False)
        return self._pool


def cpus() -> int:
    """Return how many CPUs this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def alone(job: Job, start: Parameters) -> Update | Exception:
    """Do one job; return what the client raised, if anything."""
    try:
        model, metrics = do(job, start)
    except Exception as error:  # noqa: BLE001  a client may raise anything
        return error
    return Update(model, None, metrics)


def in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[Item], Made],
    items: Iterable[Item],
    ahead: int,
) -> Iterator[Made]:
    """Yield ``function(item)`` in the order of the items, computed in a pool.

    No more than ``ahead`` are under way or wait to be taken.
    """
    waiting: collections.deque[Future[Made]] = collections.deque()
    try:
        for item in items:
            if len(waiting) == ahead:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _updates(trained: Trained, jobs: Sequence[Job], start: Parameters) -> Iterator[Update]:
    for row, (job, loss) in enumerate(zip(jobs, trained.losses, strict=True)):
        if job.finish is None:
            yield Update(trained.stack, row, {"loss": loss})
        else:
            own = {name: tensor[row].cpu() for name, tensor in trained.stack.items()}
            yield Update(job.sent(start, own), None, {"loss": loss})
