"""Divide a data set among simulated clients, with flwr-datasets' partitioners."""

import logging
from typing import Any

import torch
from torch import Tensor

from client.task.protocol import TaskError
from unlearning.randomness import derive_seed

MIN_EXAMPLES = 10
"""A client with fewer could neither train nor test."""


def partition_indices(
    targets: Tensor, partitions: int, *, scheme: str, alpha: float, seed: int
) -> list[Tensor]:
    """Return the rows of each part; together they are all rows, each once.

    Parameters
    ----------
    targets
        Class labels, shape (n,).
    scheme
        ``iid``, or ``dirichlet``: each class is divided by proportions drawn from a symmetric
        Dirichlet distribution with concentration ``alpha``.
    """
    # Imported here because it takes seconds, and real clients, whose every message starts a new
    # process, never divide anything.
    from datasets import Dataset  # noqa: PLC0415

    if partitions < 1:
        raise TaskError(f"there must be at least one client, got {partitions}")
    if len(targets) < MIN_EXAMPLES * partitions:
        raise TaskError(
            f"{len(targets)} training examples are too few for {partitions} clients: each needs "
            f"{MIN_EXAMPLES}; use fewer clients or more examples"
        )
    partition_seed = derive_seed(seed, "partition") % 2**32
    # The partitioners divide rows in their given order unless shuffled first.
    order = torch.randperm(
        len(targets), generator=torch.Generator().manual_seed(derive_seed(seed, "shuffle rows"))
    )
    rows = Dataset.from_dict({"row": order.tolist(), "label": targets[order].tolist()})
    partitioner = _partitioner(scheme, partitions, alpha, partition_seed)
    partitioner.dataset = rows
    quiet = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # the partitioner logs every attempt at length
    try:
        return [
            torch.tensor(partitioner.load_partition(number)["row"], dtype=torch.int64)
            for number in range(partitions)
        ]
    except ValueError as error:
        raise TaskError(
            f"a Dirichlet partition with alpha {alpha:g} leaves some of {partitions} clients fewer "
            f"than {MIN_EXAMPLES} of {len(targets)} examples; use a larger alpha or fewer clients"
        ) from error
    finally:
        logging.getLogger().setLevel(quiet)


def _partitioner(scheme: str, partitions: int, alpha: float, seed: int) -> Any:
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner  # noqa: PLC0415

    if scheme == "iid":
        return IidPartitioner(num_partitions=partitions)
    return DirichletPartitioner(
        num_partitions=partitions,
        partition_by="label",
        alpha=alpha,
        min_partition_size=MIN_EXAMPLES,
        self_balancing=False,
        shuffle=True,
        seed=seed,
    )
