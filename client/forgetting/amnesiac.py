"""Amnesiac unlearning at a client that keeps a batch log (``methods`` 6.1, 6.2, 6.6)."""

from client.batch_log import BatchLog
from client.forgetting.interface import Outcome
from unlearning.amnesiac import taken_back
from unlearning.parameters import Parameters


def amnesiac(
    start: Parameters, kept: BatchLog, samples: frozenset[str] | None, request: str
) -> Outcome:
    """Return ``w - Z_k``: the global model without what batches with the samples brought into it.

    Parameters
    ----------
    start
        Global model w.
    samples
        Contents of rows (``client.rows``); ``None`` for all that were ever logged.
    request
        What the server calls it by.

    Returns
    -------
    Outcome
        The model; how many ``batches`` were taken back, and the ``first-round`` that is logged.

    Raises
    ------
    BatchLogError, RefusedRequestError
        As ``BatchLog.take_back``.
    """
    found = kept.take_back(start, samples, request)
    metrics = {"batches": found.batches, "first-round": found.first}
    return Outcome(taken_back(start, found.update), metrics)
