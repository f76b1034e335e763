"""Divide a data set among simulated clients."""

import logging

import torch
from torch import Tensor

from client.task.protocol import TaskError
from unlearning.randomness import derive_seed

MIN_EXAMPLES = {"iid": 2, "dirichlet": 10}
"""Scheme -> least examples of a client.

IID parts are as large as the number of clients allows, so only what cannot work is refused: a
client needs one example to train on and one to test on. Under Dirichlet chance decides, and a
draw that leaves a client with fewer is drawn again; this number is thus part of every such result.
"""


def partition_indices(
    targets: Tensor, partitions: int, *, scheme: str, alpha: float, seed: int
) -> list[Tensor]:
    """Return the rows of each part; together they are all rows, each once.

    Parameters
    ----------
    targets
        Class labels, shape (n,).
    scheme
        ``iid``: parts that differ by one row at most; or ``dirichlet``: each class is divided by
        proportions drawn from a symmetric Dirichlet distribution with concentration ``alpha``.
    """
    if partitions < 1:
        raise TaskError(f"there must be at least one client, got {partitions}")
    least = MIN_EXAMPLES[scheme]
    if len(targets) < least * partitions:
        raise TaskError(
            f"{len(targets)} training examples are too few for {partitions} clients: each needs "
            f"{least}; use fewer clients or more examples"
        )
    order = torch.randperm(
        len(targets), generator=torch.Generator().manual_seed(derive_seed(seed, "shuffle rows"))
    )
    if scheme == "iid":
        # The same parts as flwr-datasets' IidPartitioner gives, in no time for any number of them.
        return list(torch.tensor_split(order, partitions))
    return _dirichlet(targets, order, partitions, alpha, derive_seed(seed, "partition") % 2**32)


def _dirichlet(
    targets: Tensor, order: Tensor, partitions: int, alpha: float, seed: int
) -> list[Tensor]:
    # Imported here because it takes seconds, and only this scheme needs it.
    from datasets import Dataset  # noqa: PLC0415
    from flwr_datasets.partitioner import DirichletPartitioner  # noqa: PLC0415

    least = MIN_EXAMPLES["dirichlet"]
    partitioner = DirichletPartitioner(
        num_partitions=partitions,
        partition_by="label",
        alpha=alpha,
        min_partition_size=least,
        self_balancing=False,
        shuffle=True,
        seed=seed,
    )
    partitioner.dataset = Dataset.from_dict(
        {"row": order.tolist(), "label": targets[order].tolist()}
    )
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
            f"than {least} of {len(targets)} examples; use a larger alpha or fewer clients"
        ) from error
    finally:
        logging.getLogger().setLevel(quiet)
