"""What there is to say about a method: needs, targets, promises (``methods`` 10.1)."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Guarantee = Literal["exact", "conditional", "none"]
"""``exact``: the model is as if the target had never taken part. ``conditional``: proven under
conditions that are checked. ``none``: shown by measurement only."""


class Need(StrEnum):
    """State or help that a method may need; absence is a refusal, never a guess (``methods`` 0)."""

    INITIAL = "initial model"
    LAST = "last round"
    LEDGER = "ledger of each client's pull"
    SAMPLED_HISTORY = "history of some rounds"
    HISTORY = "history of every round"
    CHECKPOINTS = "checkpoints"
    ROOT = "labelled server data"
    UNLABELLED = "unlabelled server data"
    RETAINED = "retained clients answer"
    TARGET = "target answers"
    DROP = "holders drop the data"
    CLASSES = "a task with classes"
    CONVOLUTIONS = "a model with convolutions"
    BATCH_LOG = "batch log at the holders"
    CERTIFICATE = "training that certifies deletions"


RECORDED = frozenset(
    {
        Need.INITIAL,
        Need.LAST,
        Need.LEDGER,
        Need.SAMPLED_HISTORY,
        Need.HISTORY,
        Need.CHECKPOINTS,
    }
)
"""Needs that the server must have recorded while it trained; nothing can make up for them later."""
IMPLIED = {
    Need.TARGET: frozenset({Need.DROP}),
    Need.HISTORY: frozenset({Need.SAMPLED_HISTORY, Need.INITIAL}),
    Need.SAMPLED_HISTORY: frozenset({Need.INITIAL}),
}
"""What is there wherever something else is."""


class Target(StrEnum):
    """What may be asked to be forgotten."""

    CLIENT = "client"
    CLASS = "class"
    SAMPLES = "samples"
    BACKDOOR = "backdoor"


@dataclass(frozen=True)
class Entry:
    """One method.

    Attributes
    ----------
    safe
        Whether the target can neither steer nor stop it: it computes and reports nothing.
    several
        Whether it forgets several clients at once.
    events
        Whether it serves several requests at once, each with what was frozen for it.
    rounds
        Rounds of the federation that it takes, in words.
    stored
        What the server stores for it, in models; K clients, R rounds.
    replays
        Whether it plays past rounds again; whoever waits to be forgotten takes no part in them.
    routed
        Whether ``route`` may choose it; the others are there for comparison, by name.
    title
        How reports name it, where its name says too much.
    own_step
        Whether clients train by a step of its own in the rounds that it plays, whose models the
        strategy aggregates.
    federated
        Whether a federation can run it; the others are for one machine that has all the data.
    """

    summary: str
    needs: frozenset[Need]
    targets: frozenset[Target]
    guarantee: Guarantee
    safe: bool
    rounds: str
    stored: str
    source: str
    section: str
    several: bool = True
    events: bool = True
    replays: bool = False
    routed: bool = True
    title: str = ""
    own_step: bool = False
    federated: bool = True


DATA = frozenset({Target.CLASS, Target.SAMPLES})
"""Parts of what clients hold, who stay: they drop it before anything else is done."""
