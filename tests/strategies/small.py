"""A federation of seven tiny clients, and how to play it."""

import torch
from flwr.serverapp.strategy import FedAvg
from torch.nn import functional

from strategies import messages
from strategies.directory import by_partition
from strategies.loop import run_rounds
from strategies.methods.catalogue import MAKE
from strategies.methods.interface import ServerLab
from strategies.rate_limit import RateLimit
from strategies.recovery import Recovery
from strategies.screen import Screen
from strategies.wrapper import Unlearning
from unlearning.catalogue import Target
from unlearning.routing import Request

DRAW = torch.Generator().manual_seed(3)
MODEL = {
    "first.weight": torch.randn(4, 3, generator=DRAW),
    "first.bias": torch.zeros(4),
    "norm.num_batches_tracked": torch.tensor(0),
    "last.weight": torch.randn(2, 4, generator=DRAW),
    "last.bias": torch.zeros(2),
}
GONE = ("client-0003", "client-0004")


def client(number):
    return f"client-{number:04d}"


def forward(model, inputs):
    hidden = functional.relu(inputs @ model["first.weight"].T + model["first.bias"])
    return hidden @ model["last.weight"].T + model["last.bias"]


def lab():
    inputs = torch.randn(12, 3, generator=torch.Generator().manual_seed(9))
    targets = (inputs.sum(dim=1) > 0).long()

    def accuracy(model):
        return float((forward(model, inputs).argmax(dim=1) == targets).float().mean())

    return ServerLab(forward, functional.cross_entropy, accuracy, (inputs, targets), inputs)


def learning(steps=None):
    """Clients move a little towards values of their own, and note who was asked and for what."""

    def reply(partition, number, model):
        if steps is not None:
            steps.append((partition, number))
        draw = torch.Generator().manual_seed(100 * partition + number)
        pull = 2.0 if client(partition) in GONE else 0.5
        moved = {
            name: tensor + 0.1 * (pull * torch.randn(tensor.shape, generator=draw) + partition)
            if tensor.is_floating_point()
            else tensor + 3
            for name, tensor in model.items()
        }
        return messages.train_reply(moved, {"loss": 1.0}, 10 + partition)

    return reply


def federation(name, *, strategy=None, others=(), **more):
    method = MAKE[name]() if isinstance(name, str) else name
    more = {"lab": lab(), "recovery": Recovery(cap=2), "rate_limit": RateLimit(rounds=1)} | more
    return Unlearning(
        strategy or FedAvg(fraction_evaluate=0.0),
        screen=Screen(),
        method=method,
        others=others,
        identify=by_partition,
        seed=3,
        deadline_s=5.0,
        **more,
    )


def play(wrapped, grid, rounds, *, played=0, model=MODEL):
    records, models = [], []

    def on_round(record, parameters):
        records.append(record)
        models.append(parameters)

    run_rounds(wrapped, grid, model, rounds=rounds, played=played, on_round=on_round)
    return records, models


def forgotten_by(name, grid, *, before=4, **more):
    """Train, ask to forget two of seven, and go on until that is done."""
    wrapped = federation(name, **more)
    _, first = play(wrapped, grid, before)
    wrapped.forget(GONE, "privacy")
    records, models = play(wrapped, grid, before, played=before, model=first[-1])
    return wrapped, records, [*first, *models]


def late(joins):
    """Clients that join in a certain round."""

    def reply(partition, number, model):
        if number < joins.get(partition, 1):
            raise RuntimeError("not yet here")
        return learning()(partition, number, model)

    return reply


def without_gone(partition, number, model):
    if client(partition) in GONE:
        raise RuntimeError("not here")
    return learning()(partition, number, model)


def everything():
    return [make() for make in MAKE.values()]


def approximately(method, *numbers, cause="privacy"):
    clients = tuple(client(n) for n in numbers)
    return Request(Target.CLIENT, clients, cause, guarantee="approximate", method=method)
