"""FedEraser: replay some recorded rounds without the forgotten clients (``methods`` 2.4).

    G. Liu, X. Ma, Y. Yang, C. Wang, J. Liu. "FedEraser: Enabling efficient client-level data
    removal from federated learning models." IWQoS 2021.

A recorded update tells how far a client moved, and a little training from today's replayed model v
in which direction it would move now. From v = w^0, with D_k the recorded update and d_k the fresh
one, in every recorded round but the first:

    c_k = |D_k| d_k / |d_k|  per tensor        v <- v + sum_k p_k c_k

In round 1 v is the model that the recorded updates started from, so they are used as they are.

Stored updates of the others are trusted; where they were poisoned too, so is the result. Needs the
rounds 1, 1 + interval, 1 + 2 interval, ... of the history.

Departs from the printed equation, which divides the mean by K - 1 once more; and from public
code, which scales the mean of the updates instead of each of them, takes recorded updates from the
model after their round instead of before, weighs all clients alike and divides by |d_k| = 0.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from unlearning.errors import SecateurError
from unlearning.history import History, shares
from unlearning.parameters import Parameters, trained_names
from unlearning.plan import Answer, Ask, Plan
from unlearning.replay import Played, beginning, participants, staying


def calibrated(recorded: Tensor, fresh: Tensor) -> Tensor:
    """Return an update as long as ``recorded`` in the direction of ``fresh``.

    Parameters
    ----------
    recorded, fresh
        Updates of one tensor, of the same shape. A fresh one of zeros has no direction and gives
        zeros.
    """
    exact = fresh.double()
    length = float(exact.norm())
    if length == 0:
        return torch.zeros_like(fresh)
    return (exact * (float(recorded.double().norm()) / length)).to(fresh.dtype)


def calibrated_model(
    model: Parameters, answer: Parameters, start: Parameters, recorded: Parameters
) -> dict[str, Tensor]:
    """Return ``model`` moved by one client's calibrated update.

    Parameters
    ----------
    model
        v, which the client trained from.
    answer
        What it made of v. Its buffers are taken as they are: they are statistics of data, and
        their recorded movement says nothing about how far they should move.
    start, recorded
        The model that the recorded round started from, and what the client made of it then.
    """
    result = dict(answer)
    for name in trained_names(model):
        fresh = answer[name] - model[name]
        result[name] = model[name] + calibrated(recorded[name] - start[name], fresh)
    return result


def federaser(
    history: History,
    forgotten: Collection[str],
    retained: Collection[str],
    *,
    interval: int = 2,
    ratio: float = 0.5,
    local_epochs: int = 1,
    played: Played | None = None,
) -> Plan[Parameters]:
    """Replay every ``interval``-th round with calibrated updates; return the last model.

    A round is averaged over those who stay, took part in it when it was recorded and, but for
    round 1, answer now, by their recorded weights. A round that nobody stays in or answers leaves
    the model as it was. Clients train with the setting ``local-epochs`` at
    ``max(1, round(ratio * local_epochs))``, numbered as the recorded round.

    Parameters
    ----------
    history
        Of its rounds those numbered 1, 1 + interval, ... are used. Of a history recorded at
        another interval these are only the rounds that both have: recorded as 1, 4, 7, ... and
        replayed with an interval of 2, rounds 1, 7, 13, ....
    forgotten
        Clients whose updates are in no sum.
    retained
        Clients that may be asked.
    interval
        At least 1.
    ratio
        Share of the usual local epochs that calibration trains for, over 0.
    local_epochs
        Epochs of an ordinary round.
    played
        Told of every replayed round, with the calibrated models; that takes one more model for
        every client.

    Raises
    ------
    MissingNeedError
        If round 1 is not recorded.
    SecateurError
        If no retained client is in the history.
    """
    if interval < 1:
        raise SecateurError(f"the interval must be at least 1 round, got {interval}")
    model = beginning(history)
    stay = staying(history, forgotten, retained)
    epochs = max(1, round(ratio * local_epochs))
    for number in (n for n in history.rounds if (n - 1) % interval == 0):
        weights = participants(history, number, stay)
        if not weights:
            continue
        past = history.models(number)
        if number == 1:
            if played is not None:
                played(1, model, [Answer(c, past[c], num_examples=w) for c, w in weights.items()])
            model = _sum(((part, past[client]) for client, part in shares(weights).items()), model)
            continue
        answers = yield Ask(
            "train",
            to=tuple(weights),
            arrays=model,
            config={"round": number, "local-epochs": epochs},
        )
        fresh = {answer.client: answer.arrays for answer in answers if answer.arrays is not None}
        if fresh:
            start = dict(history.start(number))
            parts = shares({client: weights[client] for client in fresh})
            moved: Iterable[tuple[str, Parameters]] = (
                (client, calibrated_model(model, arrays, start, past[client]))
                for client, arrays in fresh.items()
            )
            if played is not None:
                moved = list(moved)
                played(number, model, [Answer(c, m, num_examples=weights[c]) for c, m in moved])
            model = _sum(((parts[client], arrays) for client, arrays in moved), model)
    return model


def _sum(parts: Iterable[tuple[float, Parameters]], like: Parameters) -> dict[str, Tensor]:
    """Return the sum of share times model, one model at a time; integers are rounded back."""
    sums = {
        name: torch.zeros_like(tensor if tensor.is_floating_point() else tensor.double())
        for name, tensor in like.items()
    }
    for part, model in parts:
        for name, tensor in model.items():
            sums[name] += part * tensor
    return {
        name: total if like[name].is_floating_point() else total.round().to(like[name].dtype)
        for name, total in sums.items()
    }
