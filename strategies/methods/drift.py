"""Drift subtraction, our own: take back part of how clients pulled the model away."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from strategies.memory import Memory
from strategies.methods.interface import Situation, Unlearned, done, sums
from unlearning import drift
from unlearning.catalogue import Need
from unlearning.errors import BenignMajorityError, MissingNeedError, SecateurError
from unlearning.parameters import Parameters, copied
from unlearning.plan import Plan

ROUNDING = 1e-9
"""Shares of all who were averaged sum to 1 up to this."""


@dataclass(frozen=True)
class Pulls:
    """One detection event: what its clients had added until then (``methods`` 1.9)."""

    rows: Mapping[str, Parameters]
    share: float
    """p_F: their share of the last average that any of them entered."""


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
        if Need.LEDGER not in memory.available():
            why = "it began too late, after a rollback" if memory.restarted else "none was kept"
            raise MissingNeedError(f"drift subtraction needs a ledger of all rounds: {why}")
        # Who was never averaged in has no row, and nothing to take back.
        known = sorted(set(clients) & memory.ledger.keys())
        rows = {client: copied(memory.ledger[client]) for client in known}
        share = memory.share_of(clients)
        if not share < 1 - ROUNDING:
            raise BenignMajorityError(
                "all who were in the last average that these clients entered are to be forgotten: "
                "drift subtraction has nobody to compare them with; let them take part once more"
            )
        return Pulls(rows, share)

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
