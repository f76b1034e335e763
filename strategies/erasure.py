"""Every place where a client's influence can live, and what forgetting does to each.

The one list of it. ``holds`` looks whether anything of a client is there, so that a test can walk
the list after an unlearning; places that cannot be looked into say why.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from strategies.wrapper import Unlearning

Fate = Literal["changed", "reset", "purged", "kept", "out of reach"]


@dataclass(frozen=True)
class Place:
    """One place.

    Attributes
    ----------
    fate
        What forgetting does to it.
    how
        In one sentence, with the time until which anything is kept.
    holds
        Whether anything that comes from a client is there; ``None`` where nobody can tell.
    """

    name: str
    fate: Fate
    how: str
    holds: Callable[[Unlearning, str], bool] | None = None


SCOPE = (
    Place(
        "global model",
        "changed",
        "By the method, at once; how well is measured, not known.",
    ),
    Place(
        "wrapped strategy",
        "reset",
        "Moments and momentum hold past updates: the strategy is as it was at first.",
        lambda federation, client: (
            federation.memory.last_rounds.get(client, 0) > federation.strategy_since
        ),
    ),
    Place(
        "detector",
        "purged",
        "Its history of the client is deleted.",
        lambda federation, client: (
            federation.detector is not None and client in federation.detector.known()
        ),
    ),
    Place(
        "last round",
        "purged",
        "The client's model is deleted.",
        lambda federation, client: (
            federation.memory.last is not None and client in federation.memory.last.locals_
        ),
    ),
    Place(
        "ledger",
        "purged",
        "The client's row is deleted.",
        lambda federation, client: client in federation.memory.ledger,
    ),
    Place(
        "history",
        "purged",
        "The client's models are deleted; rounds that were played again take their rounds' places.",
        lambda federation, client: client in federation.memory.recorded_clients(),
    ),
    Place(
        "models that recorded rounds started from, and the others' rows",
        "kept",
        "Aggregates that the client had a part in, needed to tell the others' updates; until the "
        "rounds are played again, or the federation ends.",
    ),
    Place(
        "model that the round started from",
        "changed",
        "Replaced when the next round begins.",
    ),
    Place(
        "checkpoints",
        "purged",
        "All from after the client first took part are deleted.",
        lambda federation, client: any(
            number >= federation.memory.first_rounds.get(client, math.inf)
            for number in federation.memory.checkpoints
        ),
    ),
    Place(
        "waiting list",
        "purged",
        "What was frozen of the client is dropped once it is served.",
        lambda federation, client: any(
            client in entry.clients for entry in federation.forgetting.pending
        ),
    ),
    Place(
        "journal",
        "purged",
        "Answers to a plan are deleted when it ends.",
        lambda federation, client: bool(federation.store.open_journals()),
    ),
    Place(
        "clients' state",
        "reset",
        "Every client is told with its next message, and clears what it kept between rounds.",
    ),
    Place(
        "clients' batch logs",
        "out of reach",
        "On their own disks, until a request takes updates back, which deletes them, the log drops "
        "the round, or the owner deletes the folder.",
    ),
    Place(
        "clients' lists of what is forgotten",
        "kept",
        "Hashes of rows and numbers of classes, on their own disks, for ever: without them a new "
        "import would bring the rows back.",
    ),
    Place(
        "leavers' marks",
        "out of reach",
        "Hashes of rows and losses, on their own disks, until the owner deletes the file.",
    ),
    Place(
        "records of rounds",
        "kept",
        "Who took part, scores and measures: no parameters; they are the evidence of forgetting.",
    ),
    Place(
        "exported models",
        "out of reach",
        "Files written, and models sent to clients, before: whoever has them must delete them.",
    ),
)
