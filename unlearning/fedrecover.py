"""FedRecover: replay all rounds, the others' updates estimated and seldom asked (``methods`` 2.5).

    X. Cao, J. Jia, Z. Zhang, N. Z. Gong. "FedRecover: Recovering from poisoning attacks in
    federated learning using historical information." IEEE S&P 2023, arXiv:2210.10936.

With w the recorded models that rounds started from, v the replayed ones and D_k the recorded
update of client k, which took g_k to be minus its update:

    D_k(v)  ~  D_k - B_k (v - w)

B_k is the L-BFGS estimate (:func:`unlearning.lbfgs.lbfgs_product`) from the client's last few
pairs s = v - w and y = -(D_k(v) - D_k), each from a round in which it trained from v. The minus
makes y the change of a gradient, so that s'y > 0 where the loss is convex along s. An update is the
learning rate times a sum of gradients, and so is B_k: both come in the unit of the weights, and the
learning rate is nowhere asked for.

Rounds are exact - the clients train, as in retraining - at first, every so often, and at the end.
In between a client trains only if an entry of its estimate is larger than all but a tiny share of
recorded ones, or if the estimate differs from the recorded update by more than |v - w|.

    paper          here
    -----          ----------------------------------------------------
    s              pairs
    T_w, T_c, T_f  Schedule.warm_up, every, final
    alpha          abnormal: share of recorded entries that may exceed tau

Departs from the paper: the second of these rules is ours. Training that converges brings two starts
closer, v + D(v) and w + D(w) are no further apart than v and w and on the same side, and so
|D(v) - D(w)| <= |v - w|. Where few pairs stand for the curvature of a network, estimates break that
by orders of magnitude within two rounds, no single entry beyond tau at first, and the model is
lost. Also, rounds are averaged, whatever rule the federation aggregates by, since
a rule that sees all updates at once would need all estimates at once; and both halves of a pair
come from the same round of the same client, where the paper's buffers fall out of step once one
client alone was asked.
"""

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.errors import SecateurError
from unlearning.history import History
from unlearning.lbfgs import lbfgs_product
from unlearning.parameters import Parameters, flat, trained_names
from unlearning.plan import Answer, Ask, Plan
from unlearning.replay import Played, beginning, participants, staying
from unlearning.retraining import federated_average

ROUNDING = 1e-4
"""Share by which an estimate may exceed its bound for want of digits."""
Pair = tuple[Tensor, Tensor]
"""v - w and D_k(v) - D_k of one round, each of shape (P,)."""


@dataclass(frozen=True)
class Schedule:
    """Which rounds of a replay every client trains in.

    Attributes
    ----------
    warm_up
        The first rounds; more than the pairs that are kept, as the first pair is always zero.
    every
        One round in so many after these; at least 1.
    final
        The last rounds.
    """

    warm_up: int
    every: int
    final: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SecateurError(f"corrections come every 1 or more rounds, got {self.every}")

    def exact(self, place: int, rounds: int) -> bool:
        """Return whether the round in a place from 1 to ``rounds`` is exact."""
        after = place - self.warm_up
        return after <= 0 or after % self.every == 0 or place > rounds - self.final


def usual_schedule(rounds: int, pairs: int = 2) -> Schedule:
    """Return the paper's schedule, or a shorter one for at most 40 rounds (``methods`` 2.5)."""
    if rounds > 40:
        return Schedule(warm_up=20, every=20, final=5)
    return Schedule(warm_up=max(pairs + 1, rounds // 10), every=max(2, rounds // 8), final=2)


def estimated(recorded: Tensor, movement: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """Return what a client's update would be, had the round started elsewhere.

    Parameters
    ----------
    recorded
        Its update D_k in the recorded round, shape (P,).
    movement
        v - w, shape (P,).
    pairs
        Oldest first. Without a usable one the update is the recorded one.
    """
    if not pairs:
        return recorded
    movements = torch.stack([pair[0] for pair in pairs])
    gradients = -torch.stack([pair[1] for pair in pairs])
    return recorded - lbfgs_product(movements, gradients, movement)


def credible(update: Tensor, recorded: Tensor, movement: Tensor, threshold: float) -> bool:
    """Say whether an estimated update may stand for the client's own.

    Parameters
    ----------
    update, recorded, movement
        The estimate, D_k, and v - w, each of shape (P,).
    threshold
        tau, the largest usual entry.
    """
    # Written so that what is not a number is not credible.
    usual = bool((update.abs() <= threshold).all())
    change = float((update - recorded).double().norm())
    return usual and change <= float(movement.double().norm()) * (1 + ROUNDING)


def abnormality_threshold(history: History, clients: Collection[str], abnormal: float) -> float:
    """Return tau: no recorded round has more than a share of its entries beyond it.

    Reads the whole history once, a model at a time.

    Parameters
    ----------
    clients
        Whose updates count.
    abnormal
        Share of all entries of these clients' updates in a round, from 0 to below 1.
    """
    threshold = 0.0
    for number in history.rounds:
        present = participants(history, number, clients)
        start, models = dict(history.start(number)), history.models(number)
        names = trained_names(start)
        origin = _vector(start, names)
        beyond = math.floor(abnormal * len(present) * origin.numel() + 1e-9)
        largest = origin.new_empty(0)
        for client in present:
            magnitudes = torch.cat([largest, (_vector(models[client], names) - origin).abs()])
            largest = magnitudes.topk(min(beyond + 1, magnitudes.numel())).values
        if present:
            threshold = max(threshold, float(largest[-1]))
    return threshold


def fedrecover(
    history: History,
    forgotten: Collection[str],
    retained: Collection[str],
    *,
    pairs: int = 2,
    schedule: Schedule | None = None,
    abnormal: float = 1e-6,
    played: Played | None = None,
) -> Plan[Parameters]:
    """Replay every recorded round among those who stay; return the last model.

    A round is replayed by those of them who took part in it when it was recorded. In an exact
    round all of them train and are averaged as in any round; who does not answer is left out, and
    if nobody does the model stays as it was. In the other rounds estimates, and the answers of
    those whose estimate is abnormal, are averaged by their recorded weights. Buffers, such as
    running means, are statistics of data which nothing here estimates: they move in exact rounds
    only, the last rounds being such, and never take anything from the recorded models.

    Memory: 2 vectors of model size for each of ``pairs`` rounds and every client at most.

    Parameters
    ----------
    history
        Every round from round 1 on.
    forgotten
        Clients whose updates are in no sum.
    retained
        Clients that may be asked.
    pairs
        Pairs kept a client, at least 1.
    schedule
        By default :func:`usual_schedule` for as many rounds as are recorded. One with a warm-up
        of all rounds is retraining.
    abnormal
        Share of the recorded entries of a round that may count as abnormal, from 0 to below 1.
    played
        Told of every replayed round, with the models that were sent or estimated; that takes one
        more model for every client.

    Raises
    ------
    MissingNeedError
        If round 1 is not recorded.
    SecateurError
        If no retained client is in the history.
    """
    model: Parameters = beginning(history)
    stay = staying(history, forgotten, retained)
    rounds = history.rounds
    schedule = schedule or usual_schedule(len(rounds), pairs)
    threshold = abnormality_threshold(history, stay, abnormal)
    known: dict[str, deque[Pair]] = {client: deque(maxlen=pairs) for client in stay}
    names = trained_names(model)
    for place, number in enumerate(rounds, start=1):
        weights, models = participants(history, number, stay), history.models(number)
        origin, here = _vector(history.start(number), names), _vector(model, names)
        movement, total, weight = here - origin, torch.zeros_like(here), 0.0
        exact, asked = schedule.exact(place, len(rounds)), []
        entered: list[Answer] = []
        for client in weights:
            if not exact:
                recorded = _vector(models[client], names) - origin
                update = estimated(recorded, movement, known[client])
                if credible(update, recorded, movement, threshold):
                    total += weights[client] * update
                    weight += weights[client]
                    if played is not None:
                        guessed = _moved(model, names, update)
                        entered.append(Answer(client, guessed, num_examples=weights[client]))
                    continue
            asked.append(client)
        answers: Sequence[Answer] = ()
        if asked:
            answers = yield Ask("train", to=tuple(asked), arrays=model, config={"round": number})
        fresh = {answer.client: answer.arrays for answer in answers if answer.arrays is not None}
        for client, arrays in fresh.items():
            update = _vector(arrays, names) - here
            recorded = _vector(models[client], names) - origin
            known[client].append((movement, update - recorded))
            total += weights[client] * update
            weight += weights[client]
            entered.append(Answer(client, arrays, num_examples=weights[client]))
        before = model
        if exact and fresh:
            model, entered = federated_average(number, model, answers), list(answers)
        elif weight > 0:
            model = _moved(model, names, total / weight)
        if played is not None and entered:
            played(number, before, entered)
    return model


def _vector(model: Parameters, names: Sequence[str]) -> Tensor:
    """Return the named tensors as one vector, each read once."""
    return flat({name: model[name] for name in names})


def _moved(model: Parameters, names: Sequence[str], step: Tensor) -> dict[str, Tensor]:
    """Return a model whose named tensors are moved by the parts of a vector."""
    result = dict(model)
    parts = torch.split(step, [model[name].numel() for name in names])
    for name, part in zip(names, parts, strict=True):
        result[name] = model[name] + part.reshape(model[name].shape).to(model[name].dtype)
    return result
