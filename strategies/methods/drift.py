"""Drift subtraction, our own: take back part of how clients pulled the model away."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from strategies.memory import Memory
from strategies.methods.interface import Situation, Unlearned, done, sums
from unlearning import drift
from unlearning.errors import MissingNeedError, SecateurError
from unlearning.parameters import Parameters, copied
from unlearning.plan import Plan


@dataclass(frozen=True)
class Pulls:
    """One detection event: what its clients had added until then (``methods`` 1.9)."""

    rows: Mapping[str, Parameters]
    share: float
    """p_F: their shares of the last averages that they entered."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Drift subtraction; asks nobody.

    Attributes
    ----------
    strength
        beta: share of the pull that is taken back, at least 0.
    """

    strength: float = drift.STRENGTH
    name: str = "drift"

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise SecateurError(f"the drift strength must be at least 0, got {self.strength}")

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> Pulls:
        """Keep the clients' rows of the ledger."""
        del model
        if not memory.ledger:
            raise MissingNeedError("drift subtraction needs a ledger, and none was kept")
        # Who was never averaged in has no row, and nothing to take back.
        known = sorted(set(clients) & memory.ledger.keys())
        rows = {client: copied(memory.ledger[client]) for client in known}
        return Pulls(rows, sum(memory.shares.get(client, 0.0) for client in clients))

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Take back; yields nothing."""
        events: list[Pulls] = situation.evidence
        model = drift.subtract(
            situation.model,
            [list(event.rows.values()) for event in events],
            [event.share for event in events],
            self.strength,
        )
        settings = {"strength": self.strength}
        return done(Unlearned(model, settings=settings, warnings=sums(situation, self.name)))
