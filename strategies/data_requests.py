"""Requests to forget a class or samples: their holders stay, and are asked to drop them."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from strategies.actions import Selection
from strategies.directory import Directory
from strategies.ffmu import FFMU
from strategies.forgetting import Forgetting
from strategies.methods.dropping import NothingHeldError, described
from strategies.methods.interface import Pending
from strategies.rounds import UnansweredError
from unlearning.catalogue import Target
from unlearning.certificates import ExactCheck
from unlearning.errors import RefusedRequestError, SecateurError
from unlearning.parameters import Parameters
from unlearning.routing import Request, Route

log = logging.getLogger("flwr")


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

    def wait(
        self, request: Request, method: str, active: Sequence[str], number: int, model: Parameters
    ) -> None:
        """Put a request on the waiting list; of ``active`` clients all where it names none."""
        selection = (
            Selection(forget="class", forget_class=request.label)
            if request.target is Target.CLASS
            else Selection(forget="samples", forget_tokens=",".join(request.tokens))
        )
        self._forgetting.wait(
            request.clients or active,
            request.cause,
            number,
            model,
            method,
            request.most_rounds,
            selection,
            request,
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

    def forgot(self, due: Iterable[Pending]) -> None:
        """Take note of the classes among what was forgotten."""
        self.forgotten_classes |= {
            entry.selection.forget_class
            for entry in due
            if entry.selection is not None and entry.selection.forget == "class"
        }

    def route_again(
        self,
        due: Sequence[Pending],
        route: Callable[[Request], Route],
        active: Sequence[str],
        number: int,
        model: Parameters,
    ) -> None:
        """Find another method for what turned out not to be certified, unless this one was named.

        Where there is none either, the request is withdrawn; the log says why.
        """
        self._forgetting.withdraw(due)
        for entry in due:
            if entry.request is None or entry.request.method is not None:
                continue
            try:
                found = route(entry.request)
            except RefusedRequestError as error:
                log.warning("round %d: %s", number, error)
            else:
                self.wait(entry.request, found.method, active, number, model)


def hopeless(due: Sequence[Pending], error: SecateurError) -> list[Pending]:
    """Return the requests for data that holders refused, as they may, or that nobody holds.

    Whoever else waits, waits on: clients that leave, and holders of other data.
    """
    if isinstance(error, NothingHeldError) or (
        isinstance(error, UnansweredError) and error.refused
    ):
        asked = error.config.items()
        return [e for e in due if e.selection is not None and e.selection.config().items() <= asked]
    return []


def told(entry: Pending) -> str:
    """Say what an entry of the waiting list is about."""
    if entry.selection is None:
        return ", ".join(entry.clients)
    return described(entry.selection)
