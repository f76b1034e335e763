"""Requests to forget a class or samples: their holders stay, and are asked to drop them."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from strategies.actions import Forget, Selection
from strategies.directory import Directory
from strategies.ffmu import FFMU
from strategies.forgetting import Forgetting
from strategies.methods.dropping import NothingHeldError, asked_to_drop, described
from strategies.methods.interface import Pending
from strategies.rounds import PlanRounds, UnansweredError
from unlearning.catalogue import Target
from unlearning.certificates import ExactCheck
from unlearning.errors import (
    NoBatchLogError,
    NotCertifiedError,
    RefusedRequestError,
    SecateurError,
)
from unlearning.parameters import Parameters
from unlearning.routing import Request, Route

log = logging.getLogger("flwr")


@dataclass
class _Forgotten:
    """Who was asked to drop a class that is forgotten, and who has done so."""

    asked: set[str] = field(default_factory=set)
    everywhere: bool = False
    """Whether whoever joins later must drop it, too."""
    dropped: set[str] = field(default_factory=set)

    def owed_by(self, client: str) -> bool:
        return client not in self.dropped and (self.everywhere or client in self.asked)


class DataRequests:
    """What is known of the classes and samples that were forgotten, and who waits for it.

    Parameters
    ----------
    forgetting
        The waiting list.
    directory
        Knows the node of a client.
    """

    def __init__(self, forgetting: Forgetting, directory: Directory) -> None:
        self._forgetting = forgetting
        self._directory = directory
        self.forgotten_classes: set[int] = set()
        """Numbers of classes; measures that recovery is judged by leave them out."""
        self.certified: dict[str, int] = {}
        """Client -> rows that went before, certified to change nothing."""
        self.barred: dict[str, str] = {}
        """Client -> why it may not take part in this round."""
        self._forgotten: dict[Selection, _Forgotten] = {}

    def wait(
        self,
        request: Request,
        method: str,
        active: Sequence[str],
        number: int,
        model: Parameters,
        passed: frozenset[str] = frozenset(),
    ) -> None:
        """Put a request on the waiting list; of ``active`` clients all where it names none."""
        self._forgetting.wait(
            request.clients or active,
            request.cause,
            number,
            model,
            method,
            request.most_rounds,
            selection_of(request),
            request,
            passed,
        )

    def check(self, strategy: FFMU, removed: Mapping[str, int]) -> ExactCheck:
        """Say whether the training would have been the same without these clients' rows, too."""
        together = {
            client: removed.get(client, 0) + self.certified.get(client, 0)
            for client in removed.keys() | self.certified.keys()
        }
        return strategy.check({self._directory.node(c): n for c, n in together.items()})

    def certify(self, dropped: Mapping[str, int]) -> None:
        """Take note of rows per client that were dropped, and changed nothing."""
        for client, rows in dropped.items():
            self.certified[client] = self.certified.get(client, 0) + rows

    def forgot(self, due: Iterable[Pending], away: Collection[str]) -> None:
        """Take note of the classes among what was forgotten, and of who has yet to drop them."""
        for entry in due:
            if entry.selection is None or entry.selection.forget != "class":
                continue
            self.forgotten_classes.add(entry.selection.forget_class)
            known = self._forgotten.setdefault(entry.selection, _Forgotten())
            known.dropped.update(set(entry.clients) - set(away))
            known.asked.update(entry.clients)
            known.everywhere = known.everywhere or everywhere(entry)
        self.barred |= dict.fromkeys(away, "was away when a class was forgotten")

    def owed(self, clients: Iterable[str]) -> dict[Selection, tuple[str, ...]]:
        """Return what was forgotten while some clients were away or had not joined yet."""
        found = {}
        for selection, known in self._forgotten.items():
            if late := tuple(client for client in clients if known.owed_by(client)):
                found[selection] = late
        return found

    def settle(self, clients: Sequence[str], there: Collection[str], carrier: PlanRounds) -> None:
        """Ask clients for what they owe; who does not drop it is barred until it does.

        Parameters
        ----------
        there
            Those that can be asked now.
        """
        self.barred = {}
        for selection, late in self.owed(clients).items():
            asked = [client for client in late if client in there]
            if asked:
                answers = carrier.ask(replace(asked_to_drop(selection, asked), everybody=False))
                self._forgotten[selection].dropped.update(answer.client for answer in answers)
            for client in self.owed(late).get(selection, ()):
                why = carrier.rejected.get(client, "away") if client in asked else "away"
                self.barred[client] = f"has yet to drop {described(selection)}: {why}"

    def find_others(
        self,
        due: Sequence[Pending],
        error: SecateurError,
        route: Callable[[Request, Collection[str]], Route],
        active: Sequence[str],
        number: int,
        model: Parameters,
    ) -> None:
        """Find other methods for requests that theirs turned out not to serve.

        A method that was named has no other; nor has a request that its holders refuse, or of which
        nobody holds anything. Such requests are withdrawn, and the log says why. Whoever else
        waits, waits on: clients that leave, holders of other data, and what may be served later.
        """
        for entry in hopeless(due, error):
            self._forgetting.withdraw([entry])
            request = entry.request
            if request is None or request.method is not None or not _of_the_method(error):
                continue
            passed = entry.passed | {entry.method}
            try:
                found = route(request, passed)
            except RefusedRequestError as none_left:
                log.warning("round %d: %s", number, none_left)
            else:
                self.wait(request, found.method, active, number, model, passed)


def selection_of(request: Request) -> Selection:
    """Return which rows a request for a class or samples means."""
    if request.target is Target.CLASS:
        return Selection(forget="class", forget_class=request.label)
    return Selection(forget="samples", forget_tokens=",".join(request.tokens))


def everywhere(entry: Pending) -> bool:
    """Say whether a class was asked of all clients, those to come among them."""
    return entry.request is not None and not entry.request.clients


def with_newcomers(entry: Pending, active: Sequence[str]) -> Pending:
    """Return what waits, asked of the clients that there are now if it is of all."""
    return replace(entry, clients=tuple(active)) if everywhere(entry) else entry


def hopeless(due: Sequence[Pending], error: SecateurError) -> list[Pending]:
    """Return the requests for data that an error ends: no later try can end otherwise."""
    data = [entry for entry in due if entry.selection is not None]
    if isinstance(error, NotCertifiedError | NoBatchLogError):
        return data
    if isinstance(error, NothingHeldError) or (
        isinstance(error, UnansweredError) and error.refused
    ):
        asked = error.config.items()
        return [e for e in data if e.selection and e.selection.config().items() <= asked]
    return []


def _of_the_method(error: SecateurError) -> bool:
    """Say whether another method might serve where this error came up."""
    if isinstance(error, UnansweredError):
        return error.action != Forget.action
    return isinstance(error, NotCertifiedError | NoBatchLogError)


def told(entry: Pending) -> str:
    """Say what an entry of the waiting list is about."""
    if entry.selection is None:
        return ", ".join(entry.clients)
    return described(entry.selection)
