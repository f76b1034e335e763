"""VeriFi's scale-to-unlearn: the leavers' last contribution down, the others' up."""

from collections.abc import Collection
from dataclasses import dataclass

from strategies.memory import LastRound, Memory
from strategies.methods.interface import Situation, Unlearned
from unlearning import verifi
from unlearning.errors import NoLastRoundError
from unlearning.parameters import Parameters, copied
from unlearning.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ScaleToUnlearn:
    """Scaled rounds among the retained clients (``methods`` 2.10).

    Attributes
    ----------
    strong
        Whether to take the leavers' last contribution back once more.
    """

    strong: bool = False
    name: str = "verifi"

    def freeze(
        self, memory: Memory, model: Parameters, clients: Collection[str]
    ) -> tuple[LastRound, dict[str, float]]:
        """Keep what these clients sent last, and their shares of that round."""
        del model
        last = memory.last
        if last is None or not set(clients) <= last.locals_.keys():
            raise NoLastRoundError(
                f"VeriFi needs the last round of {', '.join(sorted(clients))}, and it was not "
                "remembered; let them take part once more, or retrain without them"
            )
        total = sum(last.weights.values())
        theirs = last.without(last.locals_.keys() - set(clients))
        kept = {client: copied(model) for client, model in theirs.locals_.items()}
        theirs = LastRound(last.number, copied(last.previous), kept, theirs.weights)
        return theirs, {client: last.weights[client] / total for client in sorted(clients)}

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask the retained clients for two rounds."""
        last, shares = situation.evidence[0]  # one event at a time, says the catalogue
        model = yield from verifi.scale_to_unlearn(
            last.previous,
            situation.model,
            [last.locals_[client] for client in shares],
            list(shares.values()),
            situation.active,
            first_round=situation.number + 1,
            strong=self.strong,
            aggregate=situation.aggregate,
        )
        return Unlearned(model, settings={"share": sum(shares.values())})
