"""How often the model may be pruned; those who must wait are served together."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RateLimit:
    """At least ``rounds`` rounds between two unlearnings (FedUP, ``methods`` 1.5).

    Attackers could get themselves caught one after another to have the model pruned every round.
    Quarantine is immediate all the same: only the pruning waits.
    """

    rounds: int = 10

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(
                f"rounds between two unlearnings must be at least 1, got {self.rounds}"
            )

    def allows(self, number: int, last: int | None) -> bool:
        """Say whether an unlearning may run in round ``number``, the last one being in ``last``."""
        return last is None or number - last >= self.rounds

    def next_round(self, number: int, last: int | None) -> int:
        """Return the first round after ``number`` in which an unlearning may run."""
        return number + 1 if last is None else max(number + 1, last + self.rounds)
