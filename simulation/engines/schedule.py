"""Which examples of which client are in which step, when many clients train together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """Steps of clients that train side by side, each through its own batches.

    A client with fewer batches goes on to its next epoch earlier than the others, and is finished
    earlier. Nobody waits.

    Attributes
    ----------
    sizes
        Examples of each client, the largest first, at least one each.
    batch
        Examples per step and client; the last batch of an epoch may have fewer.
    epochs
        Passes over each client's examples.
    """

    sizes: tuple[int, ...]
    batch: int
    epochs: int

    @cached_property
    def batches(self) -> Counts:
        """Return the batches in one epoch of each client, shape (clients,)."""
        return np.array([math.ceil(size / self.batch) for size in self.sizes], dtype=np.int64)

    @property
    def steps(self) -> int:
        """Return the steps of the client with most."""
        return int(self.batches[0]) * self.epochs

    @cached_property
    def counts(self) -> Counts:
        """Return the examples in each step of each client, shape (steps, clients)."""
        step = np.arange(self.steps)[:, None]
        left = np.array(self.sizes) - step % self.batches * self.batch
        return np.where(step < self.batches * self.epochs, np.minimum(left, self.batch), 0)

    @cached_property
    def active(self) -> list[int]:
        """Return how many clients train in each step; they are the first ones."""
        return [int(count) for count in (self.counts > 0).sum(axis=1)]

    @cached_property
    def widths(self) -> list[int]:
        """Return with how many clients each step is computed.

        A power of two as clients finish: few shapes, and never twice the work.
        """
        most = len(self.sizes)
        return [min(most, 1 << (active - 1).bit_length()) for active in self.active]

    @cached_property
    def weights(self) -> npt.NDArray[np.float32]:
        """Return each example's weight in its batch's mean, shape (steps, clients, batch)."""
        counts = self.counts[:, :, None]
        there = np.arange(self.batch) < counts
        return (there / np.maximum(counts, 1)).astype(np.float32)

    def rows(self, orders: Sequence[Sequence[torch.Tensor]]) -> Counts:
        """Return which row of all clients' examples, one client after the other, is where.

        Parameters
        ----------
        orders
            Per client and epoch, a permutation of its examples.

        Returns
        -------
        numpy.ndarray
            Shape (steps, clients, batch). What is not there is the client's first example.
        """
        rows = self._first_rows.copy()
        order = torch.cat([order for epochs in orders for order in epochs])
        rows.reshape(-1)[self._places] += order.numpy()
        return rows

    @cached_property
    def _first_rows(self) -> Counts:
        """Return the row of the client's first example everywhere, shape as of ``rows``."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        shape = self.steps, len(self.sizes), self.batch
        return np.broadcast_to(starts[:, None], shape).copy()

    @cached_property
    def _places(self) -> Counts:
        """Return where in ``rows`` each client's examples go, epoch after epoch."""
        places = np.arange(self._first_rows.size).reshape(self._first_rows.shape).swapaxes(0, 1)
        there = np.arange(self.batch) < self.counts.T[:, :, None]
        return places[there]

    def last_epoch(self, losses: torch.Tensor) -> list[float]:
        """Return each client's mean loss over its last epoch.

        Parameters
        ----------
        losses
            Mean loss of each batch, shape (steps, clients).
        """
        step = np.arange(self.steps)[:, None]
        end = self.batches * self.epochs
        inside = (step >= end - self.batches) & (step < end)
        values = np.where(inside, losses.double().numpy(force=True) * self.counts, 0.0)
        return (values.sum(axis=0) / np.array(self.sizes)).tolist()  # type: ignore[no-any-return]
