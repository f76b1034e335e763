"""Train many clients in one step: their models stacked, ``torch.func.vmap`` over the stack.

The arithmetic is that of ``client.train.train``: the same batches in the same order, the same
dropout masks, and the same optimizer, which does not see that its tensors hold several models.
Clients of unequal sizes are padded: an example that is not there repeats the client's first one
with weight 0. Results differ from one client at a time by rounding alone.
"""

import functools
import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.train import Job, order_seed
from simulation.engines.schedule import Schedule
from simulation.engines.step import StackedStep, tensors_of
from simulation.engines.work import PLAIN, Optimizer, Work
from strategies.messages import LocalTraining
from unlearning.parameters import Parameters
from unlearning.randomness import generator

CPU_BUDGET = 16 * 2**20
"""Bytes that the models and activations of one chunk may take on a CPU: about what caches hold."""
DEVICE_SHARE = 0.5
"""Of an accelerator's free memory, for one chunk."""
MOST_CLIENTS = 256
"""In one chunk; beyond, a step takes as long as its clients do."""
KEPT_DATA = 512 * 2**20
"""Bytes of clients' data that are kept, put together, from one round to the next."""


@dataclass(frozen=True)
class Trained:
    """What several clients' training gave.

    Attributes
    ----------
    stack
        Name -> shape (clients, ...), on the device.
    losses
        Mean loss of each client's last epoch; NaN where the client itself would raise.
    """

    stack: dict[str, Tensor]
    losses: list[float]


class BatchedTraining:
    """One task's model, ready to be trained for many clients at once with one set of settings.

    Parameters
    ----------
    job
        That with most examples of the jobs to come; they must have the same task, device, precision
        and kind of data.
    start
        Any model.

    Raises
    ------
    NotBatchableError
        If training two clients at once does not give what training each alone does.
    """

    def __init__(self, job: Job, start: Parameters) -> None:
        self._device = job.device
        self._step = StackedStep(job, start)
        self.tried = self._step.tried
        self._data: dict[tuple[int, ...], _ChunkData] = {}
        self._data_before: dict[tuple[int, ...], _ChunkData] = {}
        self._lock = threading.Lock()
        self._device_chunks: dict[LocalTraining, int] = {}

    def chunk(self, job: Job) -> int:
        """Return how many clients fit into memory at once; ``job`` is that with most examples."""
        settings = job.settings
        batch = min(settings.batch_size, job.num_examples)
        size = sum(p.nbytes for p in self._step.model.parameters())
        states = {"adam": 2, "sgd": int(settings.momentum > 0)}[settings.optimizer]
        a_client = max(1, size * (3 + states) + 2 * self._step.activations * batch)
        if self._device.type != "cuda":
            return max(1, min(MOST_CLIENTS, CPU_BUDGET // a_client))
        if settings not in self._device_chunks:  # later, memory is full of what is kept for reuse
            free = torch.cuda.mem_get_info(self._device)[0] * DEVICE_SHARE
            self._device_chunks[settings] = max(1, min(MOST_CLIENTS, int(free) // a_client))
        return self._device_chunks[settings]

    def prepare(self, start: Parameters, chunks: Sequence[Sequence[Job]]) -> bool:
        """Get ready for a round: set the model, and record steps that come often enough.

        To be called while nothing trains. Recorded steps need no model, which threads could not
        share; so with several chunks every step is recorded.

        Returns
        -------
        bool
            Whether the chunks may be trained in several threads.
        """
        # What the last round did not use is not kept: a task may make its data anew every time.
        self._data_before, self._data = self._data, {}
        schedules = [_schedule(jobs) for jobs in chunks]
        shapes = [(width, schedule.batch) for schedule in schedules for width in schedule.widths]
        return self._step.prepare(start, shapes, record_all=len(chunks) > 1)

    @torch.no_grad()
    def train(self, jobs: Sequence[Job], start: Parameters, work: Work = PLAIN) -> Trained:
        """Train the clients of one chunk, each from ``start``, the model given to ``prepare``.

        Parameters
        ----------
        jobs
            Sorted by size, the largest first; none without examples.
        work
            What they do.
        """
        settings, number = jobs[0].settings, jobs[0].purpose[0]
        data = self._chunk_data(jobs)
        schedule = data.schedule
        rows = torch.from_numpy(schedule.rows(_orders(jobs, schedule))).to(self._device)
        masks = self._draw_masks(jobs, schedule)
        origin = {name: start[name].to(self._device) for name in self._step.trainable}
        stack = {n: t.expand(len(jobs), *t.shape).clone() for n, t in origin.items()}
        optimizer = work.optimizer(list(stack.values()), settings, number)
        pull = work.proximal_mu(settings)
        done = {name: torch.empty_like(tensor) for name, tensor in stack.items()}
        losses = torch.zeros(schedule.steps, len(jobs), device=self._device)
        width = len(jobs)
        for step, active in enumerate(schedule.active):
            if schedule.widths[step] < width:
                width = schedule.widths[step]
                narrow = {name: tensor[:width].clone() for name, tensor in stack.items()}
                fresh = work.optimizer(list(narrow.values()), settings, number)
                _hand_over(optimizer, stack, fresh, narrow)
                stack, optimizer = narrow, fresh
            inputs, targets = data.batch(rows[step, :width])
            function = self._step.of(width, schedule.batch)
            gradients, values = function(
                stack, next(masks), inputs, targets, data.weights[step, :width]
            )
            for name, tensor in stack.items():
                tensor.grad = gradients[name]
                if pull:
                    tensor.grad += pull * (tensor - origin[name])
            optimizer.step()
            losses[step, :active] = values[:active]
            going_on = schedule.active[step + 1] if step + 1 < schedule.steps else 0
            if going_on < active:  # put aside who is finished, before another step moves them
                for name, tensor in stack.items():
                    made = work.made(optimizer, tensor, step + 1)
                    done[name][going_on:active] = made[going_on:active]
        done = dict(work.sent(origin, done))
        told = work.told(schedule.last_epoch(losses), done)
        everything = {
            name: done[name]
            if name in done
            else tensor.to(self._device).expand(len(jobs), *tensor.shape)
            for name, tensor in start.items()
        }
        return Trained(everything, told)

    # ------------------------------------------------------------ data and masks
    def _chunk_data(self, jobs: Sequence[Job]) -> "_ChunkData":
        settings = jobs[
            0
        ].settings  # which may change from round to round, and the schedule with it
        key = settings.batch_size, settings.local_epochs, *(id(job.examples) for job in jobs)
        with self._lock:
            data = self._data.get(key) or self._data_before.pop(key, None)
        data = data or _ChunkData(jobs, self._device)
        with self._lock:
            if sum(kept.nbytes for kept in self._data.values()) + data.nbytes <= KEPT_DATA:
                self._data[key] = data
        return data

    def _draw_masks(self, jobs: Sequence[Job], schedule: Schedule) -> Iterator[dict[str, Tensor]]:
        """Yield every step's masks, each client's drawn from its own generator.

        The draws are those of torch's dropout on a CPU: one for each entry of the layer's input,
        layer after layer, batch after batch.
        """
        if not self._step.masks:
            yield from itertools.repeat({}, schedule.steps)
            return
        sources = [generator(job.settings.seed, "dropout", *job.purpose) for job in jobs]
        for counts, width in zip(schedule.counts, schedule.widths, strict=True):
            masks = {
                name: torch.ones(width, schedule.batch, *shape)
                for name, shape in self._step.mask_shapes.items()
            }
            for client in range(width):
                count = int(counts[client])
                for name, shape in self._step.mask_shapes.items():
                    masks[name][client, :count] = _drawn(
                        (count, *shape), self._step.masks[name].rate, sources[client]
                    )
            yield {name: mask.to(self._device) for name, mask in masks.items()}


def _drawn(shape: tuple[int, ...], rate: float, source: torch.Generator) -> Tensor:
    if rate == 1:
        return torch.zeros(shape)  # torch draws nothing for it
    return torch.empty(shape).bernoulli_(1 - rate, generator=source).div_(1 - rate)


class _ChunkData:
    """The examples of one chunk's clients, one client after the other, and their schedule."""

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        tensors = [tensors_of(job) for job in jobs]
        self.inputs = torch.cat([inputs for inputs, _ in tensors]).to(device)
        self.targets = torch.cat([targets for _, targets in tensors]).to(device)
        self.schedule = _schedule(jobs)
        self.weights = torch.from_numpy(self.schedule.weights).to(device)
        self.nbytes = self.inputs.nbytes + self.targets.nbytes + self.weights.nbytes
        # Kept so that nothing else can take their place in memory, and with it their ids.
        self._examples = [job.examples for job in jobs]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of one step, shape (clients, batch, ...), given their rows."""
        chosen = rows.reshape(-1)
        return (
            self.inputs.index_select(0, chosen).view(*rows.shape, *self.inputs.shape[1:]),
            self.targets.index_select(0, chosen).view(*rows.shape, *self.targets.shape[1:]),
        )


def _schedule(jobs: Sequence[Job]) -> Schedule:
    settings = jobs[0].settings
    sizes = tuple(job.num_examples for job in jobs)
    return _scheduled(sizes, min(settings.batch_size, sizes[0]), settings.local_epochs)


_scheduled = functools.lru_cache(maxsize=8)(Schedule)


def _orders(jobs: Sequence[Job], schedule: Schedule) -> list[list[Tensor]]:
    source = torch.Generator()
    return [
        [
            torch.randperm(
                size, generator=source.manual_seed(order_seed(job.settings, job.purpose, epoch))
            )
            for epoch in range(schedule.epochs)
        ]
        for job, size in zip(jobs, schedule.sizes, strict=True)
    ]


def _hand_over(
    old: Optimizer,
    old_stack: Mapping[str, Tensor],
    new: Optimizer,
    new_stack: Mapping[str, Tensor],
) -> None:
    """Give an optimizer of fewer clients what another remembers of them (momentum, moments)."""
    for name, tensor in new_stack.items():
        width, shape = len(tensor), old_stack[name].shape
        new.state[tensor] = {
            key: value[:width].clone()
            if isinstance(value, Tensor) and value.shape == shape
            else value
            for key, value in old.state[old_stack[name]].items()
        }
