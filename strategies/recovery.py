"""Recovery: when the rounds after an unlearning end (FedUP, ``methods`` 1.4)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from strategies.records import UnlearningRecord
from strategies.tuning import Schedule
from unlearning.plan import Scalar
from unlearning.recovery import recovery_bound, rounds_to_reach

VALIDATION = "validation_accuracy"
"""Measure that recovery is judged by: data that neither trains nor grades."""
SETTLING_ROUNDS = 5
"""Rounds after an unlearning in which flags do not count, if recovery takes that long."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """When the rounds after an unlearning end.

    They end when validation accuracy is back within ``tolerance`` of what it was before, or after
    ``cap`` rounds. The forget set, triggers and test data are never looked at.
    """

    tolerance: float = 0.02
    cap: int = 20

    def __post_init__(self) -> None:
        if not (0 <= self.tolerance < 1 and self.cap >= 1):
            raise ValueError(
                f"tolerance must lie in [0, 1) and cap be at least 1, got {self.tolerance} and "
                f"{self.cap}"
            )


class RecoveryWatch:
    """Follows validation accuracy, and says when a recovery is over."""

    def __init__(self, rule: Recovery) -> None:
        self.rule = rule
        self.current: UnlearningRecord | None = None
        """The unlearning that the model recovers from."""
        self._schedule: Schedule | None = None
        self._accuracies: dict[int, float] = {}

    def begin(
        self, record: UnlearningRecord, rate: float, schedule: Schedule | None = None
    ) -> None:
        """Start the recovery from an unlearning that cut a share ``rate`` of the weights.

        ``schedule`` says how clients train until it is over; ``None`` for as ever.
        """
        before = self._accuracies.get(record.number - 1)
        if before is None:
            record.warnings.append("no validation accuracy from before: recovery runs to its cap")
        else:
            record.recovery_target = before - self.rule.tolerance
            curve = [self._accuracies.get(n, math.nan) for n in range(1, record.number)]
            reached = rounds_to_reach(curve, record.recovery_target)
            if reached is not None and rate > 0:
                record.recovery_bound = recovery_bound(reached, rate)
        self.current, self._schedule = record, schedule

    def told(self, number: int, config: Mapping[str, object]) -> dict[str, Scalar]:
        """Return what clients are told of round ``number`` in the place of its settings."""
        if self.current is None or self._schedule is None:
            return {}
        return self._schedule.told(number - self.current.number, config)

    def measured_anew(self, before: float | None) -> None:
        """Take the accuracy from before, measured on the rows that recovery is judged by now.

        Once a class is forgotten these are the rows of the others, which may have been easier or
        harder all along.
        """
        if self.current is not None and before is not None:
            self.current.recovery_target = before - self.rule.tolerance

    def observe(self, number: int, accuracy: float | None) -> None:
        """Take note of a round's validation accuracy; end the recovery if it is time."""
        if accuracy is not None:
            self._accuracies[number] = accuracy
        record = self.current
        if record is None or record.number == number:
            return
        spent, target = number - record.number, record.recovery_target
        recovered = accuracy is not None and target is not None and accuracy >= target
        if not recovered and spent < self.rule.cap:
            return
        record.recovery_rounds = spent
        record.recovery_ended_by = "recovered" if recovered else "cap"
        if record.recovery_bound is not None and spent > record.recovery_bound:
            record.warnings.append(
                f"recovery took {spent} rounds, more than FedUP's bound of {record.recovery_bound}"
            )
        self.current = None

    def settling(self, number: int) -> bool:
        """Say whether the model was just pruned.

        Its honest clients all pull the same way, to regrow what was cut, as they do in a fresh
        model. Not for long: an attacker who starts meanwhile must not go unseen.
        """
        return self.current is not None and number - self.current.number <= SETTLING_ROUNDS
