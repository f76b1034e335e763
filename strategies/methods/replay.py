"""Methods that replay recorded rounds: FedEraser and FedRecover."""

from collections.abc import Collection
from dataclasses import dataclass

from strategies.memory import Memory
from strategies.methods.interface import Situation, Unlearned
from strategies.methods.subtraction import history_of
from unlearning import federaser, fedrecover
from unlearning.parameters import Parameters
from unlearning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class FedEraser:
    """Replay with directions corrected by short training (``methods`` 2.4).

    Attributes
    ----------
    interval
        Rounds from one replayed round to the next.
    ratio
        Share of the local epochs that the correction takes.
    local_epochs
        Of the federation.
    """

    interval: int = 2
    ratio: float = 0.5
    local_epochs: int = 1
    name: str = "federaser"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask the retained clients, recorded round after recorded round."""
        model = yield from federaser.federaser(
            history_of(situation, self.name),
            frozenset(situation.forgotten),
            situation.active,
            interval=self.interval,
            ratio=self.ratio,
            local_epochs=self.local_epochs,
            played=situation.played,
        )
        settings = {"interval": self.interval, "ratio": self.ratio}
        return Unlearned(model, settings=settings, origin=0)


@dataclass(frozen=True, kw_only=True)
class FedRecover:
    """Replay with the retained clients' updates estimated (``methods`` 2.5)."""

    name: str = "fedrecover"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask the retained clients in some of the rounds."""
        history = history_of(situation, self.name)
        model = yield from fedrecover.fedrecover(
            history, frozenset(situation.forgotten), situation.active, played=situation.played
        )
        return Unlearned(model, settings={"rounds": len(history.rounds)}, origin=0)
