"""Plans of methods with canned answers: a situation made by hand, and clients that are functions."""

import torch

from strategies.actions import Selection
from strategies.memory import LastRound, Memory
from strategies.methods.interface import Pending, Situation
from tests.strategies.small import MODEL, client
from unlearning.catalogue import Need
from unlearning.plan import carry_out
from unlearning.retraining import federated_average

CLASS = Selection(forget="class", forget_class=1)
NUMBER = 4


def model(value=1.0):
    """Every trained entry alike; no copy of MODEL's own."""
    return {
        name: torch.full_like(tensor, value) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in MODEL.items()
    }


def trained(made):
    return {name: tensor for name, tensor in made.items() if tensor.is_floating_point()}


def memory(*locals_, weights=None):
    """What was remembered of round 4, in which these models were sent."""
    found = Memory({Need.INITIAL, Need.LAST})
    found.start(model(0.0))
    sent = {client(n): made for n, made in enumerate(locals_)}
    weights = weights or dict.fromkeys(sent, 1.0)
    found.remember(LastRound(NUMBER, model(0.5), sent, weights), list(sent))
    return found


def waiting(clients, selection=CLASS, evidence=None, method="fisher-mask"):
    return Pending(
        tuple(map(client, clients)), "privacy", NUMBER, method, evidence, selection=selection
    )


def situation(*pending, active=(0, 1, 2), start=None, remembered=None, played=None, **more):
    active = tuple(map(client, active))
    return Situation(
        NUMBER,
        start if start is not None else model(),
        model(0.5),
        remembered if remembered is not None else memory(),
        pending,
        active,
        active,
        more.pop("aggregate", federated_average),
        played or (lambda number, start, answers: None),
        remembers=False,
        averages=True,
        **more,
    )


def run(plan, reply):
    """Carry a plan out; ``reply`` makes a client's answer, or none. Return result and asks."""
    asked = []

    def ask(question):
        asked.append(question)
        found = [reply(name, question) for name in question.to]
        return [answer for answer in found if answer is not None]

    return carry_out(plan, ask), asked
