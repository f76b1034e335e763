"""How clients train in the rounds after a mask: the training's rates, in fewer rounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from strategies.messages import LocalTraining
from unlearning.masking import TUNED, replayed_rate
from unlearning.plan import Scalar

Kind = Literal["replay", "constant"]
"""The training's rates squeezed into fewer rounds, or its first rate all the time."""
RATE = "learning-rate"


@dataclass(frozen=True)
class Schedule:
    """Rates of the rounds of recovery, each of one local epoch (``methods`` 5).

    Attributes
    ----------
    rounds
        T rounds of the training that is replayed, at least 1.
    kind
        How.
    budget
        S rounds that it is squeezed into, at least 1; the last rate stays.
    """

    rounds: int
    kind: Kind = "replay"
    budget: int = TUNED

    def told(self, spent: int, config: Mapping[str, object]) -> dict[str, Scalar]:
        """Return what clients are told of a round of recovery in the place of its settings.

        Clients find a rate by the number of a round, which goes on, so they get the rate itself,
        and no milestones. A round has the rate of its beginning, as ordinary ones have.

        Parameters
        ----------
        spent
            Number of the round of recovery, from 1.
        config
            What clients are told otherwise. Where it has no learning rate, clients are your own and
            know theirs: nothing is returned.
        """
        if RATE not in config:
            return {}
        training = LocalTraining.model_validate(dict(config))
        rate = training.learning_rate
        if self.kind == "replay":
            rate = replayed_rate(
                spent - 1,
                rate,
                training.milestones,
                training.learning_rate_factor,
                self.rounds,
                self.budget,
            )
        return {RATE: rate, "learning-rate-milestones": "", "local-epochs": 1}

    def settings(self, config: Mapping[str, object]) -> dict[str, str]:
        """Return what is to be recorded of it."""
        rates = [self.told(spent, config).get(RATE) for spent in range(1, self.budget + 1)]
        if rates[0] is None:
            return {"recovery_schedule": "none"}
        told = {"recovery_schedule": self.kind}
        return told | {"recovery_rates": ", ".join(f"{rate:.4g}" for rate in rates)}
