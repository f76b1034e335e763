"""What must outlive a crash, as a protocol, and a version that lives in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from strategies.records import RoundRecord
from strategies.roster import Roster
from unlearning.parameters import Parameters
from unlearning.plan import Answer, Journal


class Store(Protocol):
    """One transaction per round, and a journal per plan."""

    def commit(self, record: RoundRecord, model: Parameters, roster: Roster) -> None:
        """Keep a finished round, the model it published and the roster, all or nothing."""

    def journal(self, plan: str) -> Journal:
        """Return the journal of one plan, empty for a plan not seen before."""

    def drop_journal(self, plan: str) -> None:
        """Delete the journal of a plan that has ended: it holds what clients answered."""

    def open_journals(self) -> Sequence[str]:
        """Return the plans whose journals are kept."""


@dataclass
class MemoryJournal:
    """A plan's answers, in a list."""

    kept: list[Sequence[Answer]] = field(default_factory=list)

    def answers(self) -> Sequence[Sequence[Answer]]:
        """Return what was recorded, oldest first."""
        return tuple(self.kept)

    def record(self, answers: Sequence[Answer]) -> None:
        """Keep the answers to the plan's next ask."""
        self.kept.append(answers)


class NoJournal:
    """Keeps nothing: where all ends with the process, no plan is ever taken up again."""

    def answers(self) -> Sequence[Sequence[Answer]]:
        """Return that nothing was recorded."""
        return ()

    def record(self, answers: Sequence[Answer]) -> None:
        """Let go of the answers."""


@dataclass
class MemoryStore:
    """Keeps records until the process ends; for simulations and tests.

    Of the models only the newest is kept, and no journal: nothing could resume from them here.
    """

    rounds: list[RoundRecord] = field(default_factory=list)
    model: Parameters | None = None
    roster: Mapping[str, str] = field(default_factory=dict)

    def commit(self, record: RoundRecord, model: Parameters, roster: Roster) -> None:
        """Keep a finished round."""
        self.rounds.append(record)
        self.model = model
        self.roster = roster.statuses()

    def journal(self, plan: str) -> Journal:
        """Return a journal that keeps nothing."""
        del plan
        return NoJournal()

    def drop_journal(self, plan: str) -> None:
        """Do nothing."""

    def open_journals(self) -> Sequence[str]:
        """Return none."""
        return ()
