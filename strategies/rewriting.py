"""The memory of rounds that are played again: kept aside, and taken over if they count."""

from collections.abc import Mapping, Sequence

from strategies.memory import LastRound, Memory
from unlearning.catalogue import Need
from unlearning.history import shares
from unlearning.parameters import Parameters
from unlearning.plan import Answer, senders


class Rewriting:
    """Remembers rounds that are played again, as the federation's memory would.

    What was remembered of the rounds that they undo stays as it is until ``apply``: a method may
    fail on its way. Until then both exist, each within the memory's limit.

    Parameters
    ----------
    memory
        Of the federation.
    newest
        The last round that may be played again.
    logged
        Whether clients that keep a batch log are to be told their shares.
    """

    def __init__(self, memory: Memory, newest: int, *, logged: bool = False) -> None:
        self._memory = memory
        self._newest = newest
        self._logged = logged
        self.shares: dict[int, Mapping[str, float]] = {}
        """Round -> the shares of those who entered its average."""
        self.aside = Memory(
            memory.needs,
            limit=memory.limit,
            interval=memory.interval,
            forgetting=memory.forgetting,
        )
        self.aside.from_the_start = False

    def wants(self, number: int) -> bool:
        """Say whether every client's own model is wanted of a round, and not their mean alone."""
        return self._logged or self._remembers(number)

    def _remembers(self, number: int) -> bool:
        needs = set(self._memory.needs)
        if needs & {Need.HISTORY, Need.LEDGER}:
            return True
        sampled = Need.SAMPLED_HISTORY in needs and self._memory.samples(number)
        return sampled or (Need.LAST in needs and number >= self._newest)

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
        weights = {a.client: float(a.num_examples) for a in answers}
        if self._logged:
            self.shares[number] = shares(weights)
        if not self._remembers(number):
            self.aside.joined(number, previous, clients)
            return
        own = {a.client: a.arrays for a in answers if a.arrays is not None}
        self.aside.remember(LastRound(number, previous, own, weights), clients)

    def apply(self, origin: int) -> None:
        """Put these rounds in the place of those after ``origin``."""
        self._memory.rewind(origin)
        self._memory.adopt(self.aside)
