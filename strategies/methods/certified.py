"""FFMU's answer to a deletion: nothing, where it is certified that nothing would change."""

from collections.abc import Collection
from dataclasses import dataclass

from strategies.memory import Memory
from strategies.methods.interface import Situation, Unlearned, done
from unlearning.certificates import answer
from unlearning.errors import NotCertifiedError
from unlearning.parameters import Parameters
from unlearning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Certified:
    """Return the model as it is, with the exact check as evidence (``methods`` 3.6)."""

    name: str = "ffmu"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Check what holders have dropped; ask nobody.

        Raises
        ------
        NotCertifiedError
            Unless every coordinate of every round is certified; another method is needed then.
        """
        if situation.check is None:
            raise NotCertifiedError("this training certifies no deletion; choose another method")
        gone = {client: rows for client, rows in situation.dropped.items() if rows}
        found = situation.check(gone)
        model = answer(situation.model, found, situation.number)
        told = {"rows": sum(gone.values()), "certified_share": found.share or 0.0}
        return done(Unlearned(model, settings=told, exact=True, warnings=(found.statement,)))
