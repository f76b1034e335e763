"""The memory of rounds that are played again: written aside, and taken over if they count."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from strategies.archive import Archive
from strategies.memory import LastRound, Memory
from unlearning.catalogue import Need
from unlearning.parameters import Parameters, copied
from unlearning.plan import Answer, senders


@dataclass
class Rewriting:
    """Takes note of rounds that are played again.

    What was recorded of the rounds before them stays as it is until ``apply``: a method may fail on
    its way. Where clients' own models are wanted they are kept on disk until then.
    """

    memory: Memory
    newest: int
    """The last round that may be played again."""
    _rounds: list[tuple[int, Parameters | None, tuple[str, ...]]] = field(default_factory=list)
    """Number, model that it started from if somebody took part for the first time, and who did."""
    _seen: set[str] = field(default_factory=set)
    _folder: Any = None

    def wants(self, number: int) -> bool:
        """Say whether every client's own model is wanted of a round, and not their mean alone."""
        needs = set(self.memory.needs)
        if needs & {Need.HISTORY, Need.LEDGER}:
            return True
        sampled = Need.SAMPLED_HISTORY in needs and self.memory.samples(number)
        return sampled or (Need.LAST in needs and number >= self.newest)

    def note(self, number: int, previous: Parameters, answers: Sequence[Answer]) -> None:
        """Take note of a round that made a model.

        Parameters
        ----------
        number
            The number that it is replayed by; ascending.
        previous
            Model that it started from.
        answers
            What entered its aggregate.
        """
        clients = senders(answers)
        new = not self._seen.issuperset(clients)
        self._seen.update(clients)
        if self.wants(number):
            own = {a.client: a.arrays for a in answers if a.arrays is not None}
            weights = {a.client: float(a.num_examples) for a in answers}
            self._staged().record(number, previous, own, weights)
        self._rounds.append((number, previous if new else None, clients))

    def apply(self, origin: int) -> None:
        """Put these rounds in the place of those after ``origin``."""
        self.memory.rewind(origin)
        staged = self._staged() if self._folder is not None else None
        there = set(staged.rounds) if staged is not None else set()
        for number, previous, clients in self._rounds:
            if previous is not None:
                self.memory.joined(number, previous, clients)
            if staged is not None and number in there:
                models = staged.models(number)
                newest = number == self._rounds[-1][0]  # it outlives the files
                self.memory.remember(
                    LastRound(
                        number,
                        copied(staged.start(number)) if newest else staged.start(number),
                        {c: copied(m) if newest else m for c, m in models.items()},
                        staged.weights(number),
                    ),
                    clients,
                )
            else:
                self.memory.joined(number, {}, clients)
        if self._folder is not None:
            self._folder.cleanup()

    def _staged(self) -> Archive:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="secateur-")
        return Archive(Path(self._folder.name))
