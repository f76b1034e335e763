"""Run many clients' training jobs in this process, in the fastest way that is right for them."""

import collections
import logging
import math
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
from client.task.protocol import Examples
from client.train import Job
from simulation.engines.batched import CPU_BUDGET, MOST_CLIENTS, BatchedTraining, Trained
from simulation.engines.step import (
    TRIED,
    NotBatchableError,
    kind_of,
    model_kind,
    tensors_of,
)
from simulation.engines.work import PLAIN, Work
from strategies.screen import one_line
from unlearning.parameters import Parameters, byte_size

log = logging.getLogger("secateur")

KEPT_MODELS = 4
"""Tasks, precisions and kinds of data for which a stacked model is kept."""
CANDIDATES = 3
"""Clients whose data training together is tried with, before it is given up."""

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
        self._batched: collections.OrderedDict[object, BatchedTraining] = collections.OrderedDict()
        self._reasons: dict[object, str] = {}
        self._tasks: list[object] = []  # kept, so that no other object gets their ids
        self._odd: dict[int, Examples] = {}
        self._limit = MOST_CLIENTS
        self._in_threads: dict[object, bool] = {}
        self._pool: ThreadPoolExecutor | None = None

    def run(
        self, jobs: Sequence[Job], start: Parameters, work: Work = PLAIN
    ) -> Iterator[list[Outcome]]:
        """Yield the outcomes of all jobs, some at a time, in an order that depends on them only.

        Memory grows with what is yielded at a time, not with the jobs. ``work`` says what the jobs
        are to be done by: trained on, or otherwise.
        """
        todo = _Round(jobs, start, work)
        groups = collections.defaultdict(list)
        for position, job in enumerate(jobs):
            if id(job.examples) in self._odd or not job.num_examples:
                yield [(position, todo.alone(position))]
                continue
            try:
                work.check(job)
                kind = kind_of(job)
            except NotBatchableError as error:
                kind = (id(job.task), str(error))
                self._refuse(kind, job, error)
            groups[kind].append(position)
        for kind, positions in groups.items():
            # Clients of one chunk wait for the largest of it: those of a size belong together.
            positions.sort(key=lambda position: (-jobs[position].num_examples, position))
            if work.at_once and kind not in self._reasons:
                yield from self._at_once(todo, positions)
                continue
            batched = self._prepared(kind, todo.chosen(positions), start)
            if batched is not None:
                yield from self._together(batched, todo, positions)
            elif len(positions) > 1 and self._threads_help(jobs[positions[0]], start):
                yield from self._side_by_side(todo, sorted(positions))
            else:
                for position in sorted(positions):
                    yield [(position, todo.alone(position))]

    def _prepared(
        self, kind: object, jobs: Sequence[Job], start: Parameters
    ) -> BatchedTraining | None:
        """Return what trains these jobs together; ``None`` if nothing does."""
        if kind in self._reasons:
            return None
        key = model_kind(jobs[0])
        if key in self._reasons:
            return None
        found = self._batched.get(key)
        if found is None or found.tried < min(TRIED, jobs[0].num_examples):
            found = self._tried(key, jobs, start)
        if found is not None:
            self._batched[key] = found
            self._batched.move_to_end(key)
            while len(self._batched) > KEPT_MODELS:
                self._batched.popitem(last=False)
        return found

    def _tried(self, key: object, jobs: Sequence[Job], start: Parameters) -> BatchedTraining | None:
        refused: Exception | None = None
        for job in jobs[:CANDIDATES]:  # the data of one may be what is at fault
            try:
                made = BatchedTraining(job, start)
            except NotBatchableError as error:
                refused = refused or error
            except Exception as error:  # noqa: BLE001  a user's model may raise anything here
                refused = refused or NotBatchableError(
                    f"it cannot be vectorised: {one_line(error)}"
                )
            else:
                self._tasks.append(job.task)
                return made
        self._refuse(key, jobs[0], refused)
        return None

    def _refuse(self, key: object, job: Job, reason: object) -> None:
        if key not in self._reasons:
            self._reasons[key] = str(reason)
            self._tasks.append(job.task)
            log.info("clients are not trained in batches: %s", reason)

    # ------------------------------------------------------------ together
    def _together(
        self, batched: BatchedTraining, todo: "_Round", ordered: Sequence[int]
    ) -> Iterator[list[Outcome]]:
        """Train jobs, the largest first, in chunks."""
        first = todo.jobs[ordered[0]]
        chunks = _chunks(ordered, min(batched.chunk(first), self._limit))
        threads = batched.prepare(todo.start, [todo.chosen(chunk) for chunk in chunks])
        threads = threads and len(chunks) > 1 and first.device.type == "cpu"

        def attempt(chunk: Sequence[int]) -> Trained | str | None:
            return _attempt(batched, todo, chunk)

        made = (
            in_order(self._threads(), attempt, chunks, self._workers)
            if threads
            else map(attempt, chunks)
        )
        for chunk, found in zip(chunks, made, strict=True):
            yield from self._finished(chunk, found, attempt, todo)

    def _finished(
        self,
        chunk: Sequence[int],
        found: Trained | str | None,
        attempt: Callable[[Sequence[int]], Trained | str | None],
        todo: "_Round",
    ) -> Iterator[list[Outcome]]:
        """Yield a chunk's outcomes; where its training failed, in this thread, some other way."""
        if isinstance(found, Trained):
            pairs = list(zip(chunk, _updates(found, todo, chunk), strict=True))
            yield [(p, update) for p, update in pairs if math.isfinite(update.metrics["loss"])]
            # Alone, a loss may be finite that is none as a mean of its examples' own.
            for position, update in pairs:
                if not math.isfinite(update.metrics["loss"]):
                    yield [(position, self._apart(todo, position))]
        elif isinstance(found, str):
            yield from self._one_by_one(todo, chunk, found)
        elif len(chunk) == 1:
            yield [(chunk[0], torch.OutOfMemoryError("this client's training does not fit"))]
        else:
            half = len(chunk) // 2
            self._limit = min(self._limit, half)
            log.warning("out of memory with %d clients at once: going on with %d", len(chunk), half)
            torch.cuda.empty_cache()
            for part in (chunk[:half], chunk[half:]):
                yield from self._finished(part, attempt(part), attempt, todo)

    def _at_once(self, todo: "_Round", ordered: Sequence[int]) -> Iterator[list[Outcome]]:
        """Do jobs whose rows are simply computed together, in chunks.

        Nothing is tried before: a row's part is computed apart from others' in any case.
        """
        a_client = 4 * max(1, byte_size([todo.start]))  # sums in float64, and what is sent
        for chunk in _chunks(ordered, max(1, min(MOST_CLIENTS, CPU_BUDGET // a_client))):
            try:
                made = todo.work.together(todo.chosen(chunk), todo.start)
            except Exception as error:  # noqa: BLE001  one client's data may break it for all
                yield from self._one_by_one(todo, chunk, one_line(error))
            else:
                pairs = zip(chunk, made, strict=True)
                yield [(p, Update(model, None, metrics)) for p, (model, metrics) in pairs]

    def _one_by_one(
        self, todo: "_Round", chunk: Sequence[int], why: str
    ) -> Iterator[list[Outcome]]:
        log.warning("%d clients are trained one by one: %s", len(chunk), why)
        for position in chunk:
            yield [(position, self._apart(todo, position))]

    def _apart(self, todo: "_Round", position: int) -> Update | Exception:
        """Train a client alone; one that fails, or differs from others, from now on always."""
        job, outcome = todo.jobs[position], todo.alone(position)
        if isinstance(outcome, Exception) or not math.isfinite(outcome.metrics.get("loss", 0.0)):
            self._odd[id(job.examples)] = job.examples
        return outcome

    # ------------------------------------------------------------ side by side
    def _threads_help(self, job: Job, start: Parameters) -> bool:
        key = id(job.task), job.device, job.settings.precision
        if key not in self._in_threads:
            self._in_threads[key] = self._may_use_threads(job, start)
            self._tasks.append(job.task)
        return self._in_threads[key]

    def _may_use_threads(self, job: Job, start: Parameters) -> bool:
        """Say whether threads are faster and safe: heavy operations, and nothing drawn at random.

        Torch's own generator, which dropout draws from, is one for all threads.
        """
        if job.device.type != "cpu" or self._workers < 2:
            return False
        try:
            inputs, targets = tensors_of(job)
            scratch = scratch_for(job.task, job.device)
            if not any(isinstance(module, _ConvNd) for module in scratch.model.modules()):
                return False
            scratch.load(start)
            scratch.model.train()
            with torch.random.fork_rng(devices=[]):
                before = torch.random.get_rng_state()
                loss = job.task.loss(scratch.model(inputs[:2].clone()), targets[:2])
                loss.backward()  # type: ignore[no-untyped-call]
                return torch.equal(before, torch.random.get_rng_state())
        except Exception:  # noqa: BLE001  said by the client itself, which is then trained alone
            return False

    def _side_by_side(self, todo: "_Round", positions: Sequence[int]) -> Iterator[list[Outcome]]:
        made = self.in_threads(lambda position: todo.alone(position, draws=False), positions)
        for position, outcome in zip(positions, made, strict=True):
            yield [(position, outcome)]

    @property
    def used_threads(self) -> bool:
        """Whether clients have been found to train faster in threads, bit for bit as alone."""
        return any(self._in_threads.values())

    def in_threads(self, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """Yield ``function(item)`` in the order of the items, one thread each."""
        return in_order(self._threads(), function, items, 2 * self._workers)

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


def alone(
    job: Job, start: Parameters, work: Work = PLAIN, *, draws: bool = True
) -> Update | Exception:
    """Do one job; return what the client raised, if anything."""
    try:
        model, metrics = work.alone(job, start, draws=draws)
    except Exception as error:  # noqa: BLE001  a client may raise anything
        return error
    return Update(model, None, metrics)


@dataclass(frozen=True)
class _Round:
    """The jobs of one round, each known by its position."""

    jobs: Sequence[Job]
    start: Parameters
    work: Work

    def chosen(self, positions: Sequence[int]) -> list[Job]:
        return [self.jobs[position] for position in positions]

    def alone(self, position: int, *, draws: bool = True) -> Update | Exception:
        return alone(self.jobs[position], self.start, self.work, draws=draws)


def _chunks(ordered: Sequence[int], limit: int) -> list[Sequence[int]]:
    return [ordered[i : i + limit] for i in range(0, len(ordered), limit)]


def _attempt(batched: BatchedTraining, todo: _Round, chunk: Sequence[int]) -> Trained | str | None:
    """Train a chunk; return why it failed, or ``None`` where memory was too small.

    The exception itself would keep alive whatever the failed attempt had made.
    """
    try:
        return batched.train(todo.chosen(chunk), todo.start, todo.work)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # noqa: BLE001  one client's data may break the whole step
        return one_line(error)


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


def _updates(trained: Trained, todo: _Round, chunk: Sequence[int]) -> Iterator[Update]:
    for row, (job, loss) in enumerate(zip(todo.chosen(chunk), trained.losses, strict=True)):
        if job.finish is None:
            yield Update(trained.stack, row, {"loss": loss})
        else:
            own = {name: tensor[row].cpu() for name, tensor in trained.stack.items()}
            yield Update(job.sent(todo.start, own), None, {"loss": loss})
