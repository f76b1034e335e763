"""What a method is told, and what it returns."""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from strategies.actions import Selection
from strategies.memory import Memory
from strategies.tuning import Schedule
from unlearning import retraining
from unlearning.catalogue import Need
from unlearning.certificates import ExactCheck
from unlearning.channel_masks import Convolution
from unlearning.parameters import Parameters
from unlearning.plan import Answer, Ask, Plan
from unlearning.replay import Played
from unlearning.routing import Cause, Request


@dataclass
class Dropped:
    """How far the holders of what waits to be forgotten have dropped it."""

    rows: dict[str, int] = field(default_factory=dict)
    """Client -> rows that it dropped for good."""
    concerned: set[str] = field(default_factory=set)
    """Everybody who holds some of it, or may; also who has not answered, or leaves."""
    done: bool = False
    """Whether all have dropped it whom its method cannot do without."""
    asks: int = 0
    """Times that they were asked."""


@dataclass(frozen=True, eq=False)
class Pending:
    """What waits to be forgotten: clients, who are in quarantine already, or what clients hold."""

    clients: tuple[str, ...]
    """To be forgotten; of a class or samples, those who hold them."""
    cause: Cause
    number: int
    """Round of the detection or request."""
    method: str
    """How they are to be forgotten."""
    evidence: Any = None
    """What that method froze in that round."""
    most_rounds: int | None = None
    """Rounds that may be played again for them."""
    selection: Selection | None = None
    """Which rows of theirs, where the clients stay; ``None`` where they leave."""
    request: Request | None = None
    """As it was asked for, of a class or samples."""
    passed: frozenset[str] = frozenset()
    """Methods that turned out not to serve it."""
    dropped: Dropped | None = None
    """Of a class or samples; ``None`` where the clients leave."""

    @property
    def ready(self) -> bool:
        """Say whether its method may run: the holders have dropped what is to be forgotten."""
        return self.dropped is None or self.dropped.done


@dataclass(frozen=True)
class Network:
    """What is known of the class of models.

    Attributes
    ----------
    convolutions
        In the order in which they run.
    head
        Names of the last layer's tensors.
    classes
        Number of classes; 0 where the task has none.
    trained
        Names of the tensors that training moves, as the clients know them; ``None`` to judge by
        their names, which do not tell frozen parameters and buffers of one's own from others.
    """

    convolutions: tuple[Convolution, ...] = ()
    head: tuple[str, ...] = ()
    classes: int = 0
    trained: frozenset[str] | None = None

    def needs(self) -> frozenset[Need]:
        """Return which needs it meets."""
        found = {Need.CONVOLUTIONS: self.convolutions, Need.CLASSES: self.classes}
        return frozenset(need for need, there in found.items() if there)


UNKNOWN = Network()


@dataclass(frozen=True)
class ServerLab:
    """What the server can compute on data of its own.

    Attributes
    ----------
    forward
        Model and inputs, shape (n, ...) -> outputs, as in evaluation: no dropout, frozen buffers.
    loss
        Outputs and targets -> mean loss.
    accuracy
        Share of ``root`` that a model gets right.
    root
        Labelled examples that nobody trains on, inputs and targets, if there are any.
    unlabelled
        Inputs, shape (n, ...), if there are any.
    """

    forward: Callable[[Parameters, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    accuracy: Callable[[Parameters], float]
    root: tuple[Tensor, Tensor] | None = None
    unlabelled: Tensor | None = None

    def needs(self) -> frozenset[Need]:
        """Return which needs it meets."""
        found = {Need.ROOT: self.root, Need.UNLABELLED: self.unlabelled}
        return frozenset(need for need, data in found.items() if data is not None)


@dataclass(frozen=True)
class Situation:
    """Everything a method may use when its time has come."""

    number: int
    """Round in which the unlearning runs."""
    model: Parameters
    """Aggregate of the retained clients in that round."""
    previous: Parameters
    """Model that the round started from."""
    memory: Memory
    pending: tuple[Pending, ...]
    retained: tuple[str, ...]
    """Clients that took part in the round and stay."""
    active: tuple[str, ...]
    """All clients that may take part, whether or not they did in this round."""
    aggregate: retraining.Aggregate
    """The federation's own rule of aggregation, with no memory of past rounds."""
    played: Played
    """To be told of every round that is played again."""
    remembers: bool
    """Whether that rule remembers past rounds, as FedAdam does."""
    averages: bool
    """Whether that rule is the weighted mean itself."""
    lab: ServerLab | None = None
    seed: int = 0
    check: Callable[[Mapping[str, int]], ExactCheck] | None = None
    """Client -> rows to be gone; whether the training would have been the same without. ``None``
    where it was no training of which that can be told."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Client -> rows that it dropped for good."""

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Return every client to be forgotten, sorted; none where clients stay."""
        leaving = (entry for entry in self.pending if entry.selection is None)
        return tuple(sorted({client for entry in leaving for client in entry.clients}))

    @property
    def holders(self) -> tuple[str, ...]:
        """Return every client that is concerned, sorted, whether it leaves or stays."""
        return tuple(sorted({client for entry in self.pending for client in entry.clients}))

    @property
    def selection(self) -> Selection:
        """Return what is to be forgotten at the holders, of a method that serves one event."""
        return self.pending[0].selection or Selection(forget="all")

    @property
    def evidence(self) -> list[Any]:
        """Return what the method froze, event by event."""
        return [entry.evidence for entry in self.pending]


@dataclass(frozen=True)
class Unlearned:
    """The model without what was to be forgotten, and how it was made."""

    model: Parameters
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """True where a weight was zeroed."""
    settings: Mapping[str, str | float | int] = field(default_factory=dict)
    rate: float = 0.0
    """Share of the prunable weights aimed at; bounds the recovery."""
    percentiles: Mapping[str, float] = field(default_factory=dict)
    """Per forgotten client, the share of retained clients with less conflict (``methods`` 1.6)."""
    exact: bool = False
    """Whether the model is as if they had never taken part; nothing needs to recover then."""
    origin: int | None = None
    """Round after which all rounds were played again; ``None`` where the model was changed."""
    warnings: tuple[str, ...] = ()
    progress: Mapping[str, float] = field(default_factory=dict)
    """How far holders got with their step: counts, sums and largest values."""
    schedule: Schedule | None = None
    """How clients train in the rounds of recovery; ``None`` for as ever."""

    @property
    def changes_nothing(self) -> bool:
        """Say whether the model is as it was, because it is certified to be as it would be."""
        return self.exact and self.origin is None


LARGEST, MOST = ("farthest", "distance"), "most_"
"""Numbers of ``Unlearned.progress`` that are the largest of something, others being sums; and what
names of such begin with."""


def together(outcomes: Sequence[Unlearned]) -> Unlearned:
    """Return what plans that followed one another have come to; there is one at least."""
    masks: dict[str, torch.Tensor] = {}
    settings: dict[str, str | float | int] = {}
    percentiles: dict[str, float] = {}
    progress: dict[str, float] = {}
    for one in outcomes:
        for key, value in one.progress.items():
            largest = key in LARGEST or key.startswith(MOST)
            known = progress.get(key, 0)
            progress[key] = max(known, value) if largest else known + value
        masks |= {n: masks[n] | mask if n in masks else mask for n, mask in one.masks.items()}
        settings |= one.settings
        percentiles |= one.percentiles
    return replace(
        outcomes[-1],
        masks=masks,
        settings=settings,
        percentiles=percentiles,
        progress=progress,
        rate=max(one.rate for one in outcomes),
        exact=all(one.exact for one in outcomes),
        warnings=tuple(dict.fromkeys(text for one in outcomes for text in one.warnings)),
    )


class Method(Protocol):
    """One way to forget clients."""

    @property
    def name(self) -> str:
        """Return its name in the catalogue, which says what it needs and promises."""

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> Any:
        """Keep what will be needed of these clients, whose data may be gone by the time it is.

        ``model`` is the aggregate of the retained clients in the same round.
        """

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Return the plan that forgets ``situation.pending``."""


def sums(situation: Situation, method: str) -> tuple[str, ...]:
    """Return a warning where a method takes the model for a sum of averages, and it is none."""
    if situation.averages:
        return ()
    return (
        f"not_an_average: {method} takes back shares of weighted means, and this federation's "
        "strategy makes its model otherwise",
    )


def done(result: Unlearned) -> Generator[Ask, Sequence[Answer], Unlearned]:
    """Return a plan that asks nobody."""
    return result
    yield  # a generator must contain one
