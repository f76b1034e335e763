"""Plans: unlearning methods that need clients, written as generators without any I/O.

A plan yields an ``Ask`` and receives one ``Answer`` per client that replied; what it returns is its
result. Because it neither sends nor stores anything, the same plan is driven over Flower's Grid, by
a test with canned answers, or, if it asks nobody, by the command line.

>>> def plan():
...     answers = yield Ask("query.size", to=("a", "b"))
...     return sum(answer.metrics["size"] for answer in answers)
>>> canned = [Answer("a", metrics={"size": 1}), Answer("b", metrics={"size": 2})]
>>> carry_out(plan(), lambda ask: canned)
3
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from unlearning.parameters import Parameters

Scalar = bool | int | float | str
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ask:
    """One question to several clients."""

    action: str
    """Message type: ``train``, ``train.<method step>``, ``evaluate`` or ``query.<question>``."""
    to: tuple[str, ...]
    """Clients asked."""
    arrays: Parameters | None = None
    """Model sent along, if any."""
    config: Mapping[str, Scalar] = field(default_factory=dict)
    """Settings sent along."""
    expects: Parameters | None = None
    """Names, shapes and dtypes of the arrays that are to come back, where they are not a model of
    the form of ``arrays``."""
    everybody: bool = False
    """Whether all are to answer; whoever carries the ask then refuses the request if one does
    not."""
    away: bool = False
    """Of ``everybody``: whether those that cannot be heard may be missing, as long as somebody
    answers. Who will not answer may not."""
    mean: bool = False
    """Whether the answers are wanted for the federation's average only. Whoever carries the ask
    may then hand over one answer for many clients, if that average is a weighted mean."""


@dataclass(frozen=True)
class Answer:
    """What one client answered, after screening."""

    client: str
    arrays: Parameters | None = None
    metrics: Mapping[str, int | float] = field(default_factory=dict)
    num_examples: int | float = 0
    """Weight in an average, already capped by the screen; 0 where the action has none."""
    of: tuple[str, ...] = ()
    """Clients that this is the mean of, with all their weight; empty for one client's own."""


def senders(answers: Sequence[Answer]) -> tuple[str, ...]:
    """Return the clients whose answers these are."""
    return tuple(client for answer in answers for client in answer.of or (answer.client,))


Plan = Generator[Ask, Sequence[Answer], Result]
Carrier = Callable[[Ask], Sequence[Answer]]
"""Sends an ask and returns the usable answers, sorted by client."""


class Journal(Protocol):
    """Durable list of the answers a plan has received."""

    def answers(self) -> Sequence[Sequence[Answer]]:
        """Return what was recorded, oldest first."""

    def record(self, answers: Sequence[Answer]) -> None:
        """Keep the answers to the plan's next ask, before the plan sees them."""


def carry_out(plan: Plan[Result], ask: Carrier, journal: Journal | None = None) -> Result:
    """Drive ``plan`` to its end and return its result.

    Answers in ``journal`` are replayed first, in journal order, without asking anyone: a plan
    that was cut short by a crash goes on where it was, and no client acts twice.
    """
    recorded = list(journal.answers()) if journal is not None else []
    try:
        question = next(plan)
        for answers in recorded:
            question = plan.send(answers)
        while True:
            answers = ask(question)
            if journal is not None:
                journal.record(answers)
            question = plan.send(answers)
    except StopIteration as stop:
        result: Result = stop.value
        return result
