"""Requests to forget a class or samples: their holders stay, and are asked to drop them."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from strategies.actions import Forget, Selection
from strategies.directory import Directory
from strategies.ffmu import FFMU
from strategies.forgetting import Forgetting
from strategies.methods.dropping import (
    AlreadyForgottenError,
    NothingHeldError,
    asked_to_drop,
    described,
)
from strategies.methods.interface import Dropped, Pending
from strategies.reminders import Reminders
from strategies.rounds import PlanRounds, UnansweredError
from unlearning.catalogue import METHODS, Need, Target
from unlearning.certificates import ExactCheck
from unlearning.errors import (
    BudgetError,
    ImpossibleRequestError,
    NoBatchLogError,
    NotCertifiedError,
    RefusedRequestError,
    SecateurError,
)
from unlearning.parameters import Parameters
from unlearning.plan import Answer
from unlearning.routing import Request, Route

log = logging.getLogger("flwr")


@dataclass
class _Forgotten:
    """Who is to drop a class or samples that are forgotten, and who has done so."""

    asked: set[str] = field(default_factory=set)
    everywhere: bool = False
    """Whether whoever joins later must drop it, too."""
    served: bool = False
    """Whether a method has forgotten it."""
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
        """Numbers of classes that all clients dropped; measures that recovery is judged by leave
        them out."""
        self.certified: dict[str, int] = {}
        """Client -> rows that went before, certified to change nothing."""
        self._certified_parts: set[str] = set()
        """Which these were."""
        self._exactly: dict[str, set[str]] = {}
        """What is forgotten exactly -> the clients whose training was undone."""
        self.barred: dict[str, str] = {}
        """Client -> why it may not take part in this round."""
        self._forgotten: dict[Selection, _Forgotten] = {}
        self.reminders = Reminders(directory)
        self._just_asked: set[Selection] = set()
        """What holders were asked to drop before this round."""

    def wait(
        self,
        request: Request,
        method: str,
        active: Sequence[str],
        number: int,
        model: Parameters,
        passed: frozenset[str] = frozenset(),
        dropped: Dropped | None = None,
    ) -> None:
        """Put a request on the waiting list; of ``active`` clients all where it names none.

        ``dropped`` is what its holders have dropped of it already. What waits already does not wait
        twice.
        """
        if any(entry.request == request for entry in self._forgetting.pending):
            log.info("round %d: the same request waits already", number)
            return
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
            dropped or Dropped(),
        )

    def check(self, strategy: FFMU, removed: Mapping[str, int]) -> ExactCheck:
        """Say whether the training would have been the same without these clients' rows, too."""
        together = {
            client: removed.get(client, 0) + self.certified.get(client, 0)
            for client in removed.keys() | self.certified.keys()
        }
        return strategy.check({self._directory.node(c): n for c, n in together.items()})

    def certify(self, entries: Iterable[Pending]) -> None:
        """Take note of rows that were dropped, and changed nothing."""
        for entry in entries:
            for client, rows in self.dropped([entry]).items():
                self.certified[client] = self.certified.get(client, 0) + rows
            self._certified_parts |= parts(entry)

    def start_anew(self) -> None:
        """Take note that nothing is certified any more: the model was changed."""
        self.certified, self._certified_parts = {}, set()

    # ------------------------------------------------------------ dropping
    @property
    def idle(self) -> bool:
        """Say whether nobody has anything to drop."""
        return not self._forgotten and all(entry.ready for entry in self._forgetting.pending)

    def drop(
        self, clients: Sequence[str], there: Collection[str], carrier: PlanRounds
    ) -> list[tuple[Pending, SecateurError]]:
        """Ask holders to drop what waits to be forgotten, whenever its method's time will be.

        Of several holders all are asked first whether they will, so that nobody drops anything
        where somebody refuses. Whoever has not dropped what it is known to hold, or may hold of
        what others hold, is barred until it has.

        Parameters
        ----------
        clients
            All that may take part or are barred only.
        there
            Those that can be asked now.

        Returns
        -------
        list
            Requests that are held up or come to an end here, and why.
        """
        failed: list[tuple[Pending, SecateurError]] = []
        self._just_asked = set()
        for entry in [*self._forgetting.pending]:
            if entry.selection is None or entry.dropped is None or entry.ready:
                continue
            if self._goes_with_its_holders(entry):
                continue
            self._just_asked.add(entry.selection)
            asks = carrier.asks
            try:
                self._drop(entry, entry.selection, entry.dropped, clients, there, carrier)
            except RefusedRequestError as error:
                failed.append((entry, error))
            entry.dropped.asks += carrier.asks - asks
        return failed

    def _drop(
        self,
        entry: Pending,
        selection: Selection,
        state: Dropped,
        clients: Sequence[str],
        there: Collection[str],
        carrier: PlanRounds,
    ) -> None:
        """Ask for one request; raises where not all have dropped it that must."""
        holders = [c for c in clients if everywhere(entry) or c in entry.clients]
        state.concerned.update(holders if everywhere(entry) else entry.clients)
        if self._needs_nothing(entry, selection):
            raise AlreadyForgottenError(selection)
        if not holders:
            if not METHODS[entry.method].replays:
                raise AllLeaveError(selection)
            state.done = True  # they take no part when the rounds are played again
            return
        late = [client for client in holders if client not in state.rows]
        asked = [client for client in late if client in there]
        silent = dict.fromkeys(late, "away")
        if len(asked) > 1:
            heard = self._ask(selection, asked, carrier, silent, dry=True)
            asked = list(heard)  # the others would let themselves be waited for twice
            counts = [*heard.values(), *state.rows.values()]
            if len(heard) == len(late) and not any(rows > 0 for rows in counts):
                raise NothingHeldError(len(holders), selection)
        state.rows |= self._ask(selection, asked, carrier, silent)
        if state.rows or not everywhere(entry):
            known = self._forgotten.setdefault(selection, _Forgotten())
            known.asked.update(holders)
            known.everywhere = known.everywhere or everywhere(entry)
            known.dropped.update(state.rows)
        silent = {client: why for client, why in silent.items() if client not in state.rows}
        held = any(rows > 0 for rows in state.rows.values())
        if silent and not (selection.forget == "class" and held):
            raise UnansweredError(asked_to_drop(selection, late), silent)
        if not held:
            raise NothingHeldError(len(holders), selection)
        state.done = True

    def _needs_nothing(self, entry: Pending, selection: Selection) -> bool:
        """Say whether all of an exact request was served exactly; who joined since never had it."""
        if entry.request is None or entry.request.promise != "exact" or entry.dropped is None:
            return False
        known = self._forgotten.get(selection)
        never = known.dropped if known is not None and known.everywhere else set()
        return all(
            part in self._exactly and entry.dropped.concerned <= self._exactly[part] | never
            for part in parts(entry)
        )

    def _ask(
        self,
        selection: Selection,
        clients: Sequence[str],
        carrier: PlanRounds,
        silent: dict[str, str],
        *,
        dry: bool = False,
    ) -> dict[str, int]:
        """Return how many rows each holds that answers, and note in ``silent`` why others do not.

        Raises
        ------
        UnansweredError
            If it is only asked whether they will, and somebody refuses.
        """
        if not clients:
            return {}
        question = asked_to_drop(selection, clients, dry=dry)
        answers = carrier.ask(question)
        silent |= carrier.rejected
        unheard = UnansweredError(question, carrier.rejected)
        if dry and unheard.refused:
            raise unheard
        if not dry:
            answers = self._believed(answers, silent)
        return {answer.client: int(answer.metrics.get("rows", 0)) for answer in answers}

    def _believed(self, answers: Iterable[Answer], silent: dict[str, str]) -> list[Answer]:
        """Return the answers of clients whose lists are as long as they were."""
        faults = {answer.client: self.reminders.heard(answer) for answer in answers}
        silent |= {client: fault for client, fault in faults.items() if fault is not None}
        return [answer for answer in answers if faults[answer.client] is None]

    def doubt(self, clients: Iterable[str]) -> None:
        """Ask clients again, before the next round, for all that they have dropped."""
        for known in self._forgotten.values():
            again = known.dropped.intersection(clients)
            known.asked |= again
            known.dropped -= again

    def _goes_with_its_holders(self, entry: Pending) -> bool:
        """Say whether all who hold it were, or are to be, forgotten exactly, and it with them.

        It is withdrawn once they were. A method that replays serves it along with theirs.
        """
        if everywhere(entry) or METHODS[entry.method].replays:
            return False
        if set(entry.clients) <= self._forgetting.exactly:
            self._forgetting.withdraw([entry])
            self._excuse(entry)
            log.info("%s went with %s", told(entry), ", ".join(entry.clients))
            return True
        leaving = {
            client
            for other in self._forgetting.pending
            if other.selection is None and METHODS[other.method].guarantee == "exact"
            for client in other.clients
        }
        return set(entry.clients) <= leaving | self._forgetting.exactly

    def _excuse(self, entry: Pending) -> None:
        """Let those be who have not dropped what was withdrawn."""
        known = self._forgotten.get(entry.selection) if entry.selection is not None else None
        others = any(other.selection == entry.selection for other in self._forgetting.pending)
        if known is not None and not known.served and not others:
            known.asked, known.everywhere = set(known.dropped), False

    def served(self, entry: Pending, method: str, active: Collection[str]) -> Pending:
        """Return what waits as a method is told of it, with the holders that concern it.

        Where past rounds are played again these are all who had a part in them; otherwise those who
        have dropped it and can be asked.

        Raises
        ------
        AllLeaveError
            If there are none by now.
        RefusedRequestError
            If somebody is away that the method cannot do without.
        """
        if entry.dropped is None or entry.selection is None:
            return entry
        found = entry.dropped.concerned
        late = ", ".join(sorted(found & self.late([entry])))
        if Need.BATCH_LOG in METHODS[method].needs:
            if late:  # what they brought into the model would stay in it
                raise RefusedRequestError(f"{method} needs every holder, and {late} is away")
        elif not METHODS[method].replays:
            dropped = set(entry.dropped.rows)
            if everywhere(entry):
                dropped |= self._forgotten[entry.selection].dropped
            found = dropped & set(active)
        if not found:
            raise AllLeaveError(entry.selection)
        return replace(entry, clients=tuple(sorted(found)))

    def dropped(self, entries: Iterable[Pending]) -> dict[str, int]:
        """Return how many rows each client dropped of what is forgotten, but those certified."""
        found: dict[str, int] = {}
        counted = set(self._certified_parts)
        for entry in entries:
            if entry.dropped is not None and not parts(entry) <= counted:
                counted |= parts(entry)
                for client, rows in entry.dropped.rows.items():
                    found[client] = found.get(client, 0) + rows
        return found

    def late(self, entries: Iterable[Pending]) -> set[str]:
        """Return who has yet to drop what is about to be forgotten."""
        found: set[str] = set()
        for entry in entries:
            if entry.selection is not None and entry.dropped is not None:
                owed = self.owed(sorted(entry.dropped.concerned))
                found.update(owed.get(entry.selection, ()))
        return found

    def forgot(self, due: Iterable[Pending], *, exactly: bool) -> None:
        """Take note of what was forgotten, and of the classes that everybody has dropped."""
        for entry in due:
            if entry.selection is None:
                continue
            self._forgotten.setdefault(entry.selection, _Forgotten()).served = True
            if exactly and entry.dropped is not None:
                for part in parts(entry):
                    self._exactly.setdefault(part, set()).update(entry.dropped.concerned)
            if entry.selection.forget == "class" and everywhere(entry):
                self.forgotten_classes.add(entry.selection.forget_class)

    def owed(self, clients: Iterable[str]) -> dict[Selection, tuple[str, ...]]:
        """Return what was dropped while some clients were away or had not joined yet."""
        found = {}
        for selection, known in self._forgotten.items():
            if late := tuple(client for client in clients if known.owed_by(client)):
                found[selection] = late
        return found

    def settle(self, clients: Sequence[str], there: Collection[str], carrier: PlanRounds) -> None:
        """Ask clients for what they owe; who does not drop it is barred until it does.

        Who has another node than when it dropped something, having started anew, owes it again.

        Parameters
        ----------
        there
            Those that can be asked now.
        """
        self.barred = {}
        self.doubt(self.reminders.moved())
        for selection, late in self.owed(clients).items():
            silent = dict.fromkeys(late, "away")
            asked = [client for client in late if client in there]
            if selection not in self._just_asked:
                dropped = self._ask(selection, asked, carrier, silent)
                self._forgotten[selection].dropped.update(dropped)
                for entry in self._forgetting.pending:
                    if entry.selection == selection and entry.dropped is not None:
                        entry.dropped.rows |= dropped
            for client in self.owed(late).get(selection, ()):
                self.barred[client] = f"has yet to drop {described(selection)}: {silent[client]}"

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
                self._excuse(entry)
                continue
            passed = entry.passed | {entry.method}
            try:
                found = route(request, passed)
            except RefusedRequestError as none_left:
                log.warning("round %d: %s", number, none_left)
                self._excuse(entry)
            else:
                self.wait(request, found.method, active, number, model, passed, entry.dropped)


def parts(entry: Pending) -> frozenset[str]:
    """Return what a request is made of: tokens, or a class in words; nothing of a leaver."""
    if entry.selection is None:
        return frozenset()
    return frozenset(entry.selection.tokens or (described(entry.selection),))


def selection_of(request: Request) -> Selection:
    """Return which rows a request for a class or samples means."""
    if request.target is Target.CLASS:
        return Selection(forget="class", forget_class=request.label)
    return Selection(forget="samples", forget_tokens=",".join(request.tokens))


def everywhere(entry: Pending) -> bool:
    """Say whether a class was asked of all clients, those to come among them."""
    return entry.request is not None and not entry.request.clients


def hopeless(due: Sequence[Pending], error: SecateurError) -> list[Pending]:
    """Return the requests that an error ends: no later try can end otherwise.

    Of clients that leave that is so only where more rounds would be played than are allowed.
    """
    if isinstance(error, BudgetError):
        return list(due)
    data = [entry for entry in due if entry.selection is not None]
    if isinstance(error, UnansweredError):
        asked = error.config.items() if error.refused else {}.items()
        return [e for e in data if e.selection and e.selection.config().items() <= asked]
    final = isinstance(error, NotCertifiedError | NoBatchLogError | ImpossibleRequestError)
    return data if final else []


def _of_the_method(error: SecateurError) -> bool:
    """Say whether another method might serve where this error came up."""
    if isinstance(error, UnansweredError):
        return error.action != Forget.action
    return isinstance(error, NotCertifiedError | NoBatchLogError | AllLeaveError)


class AllLeaveError(ImpossibleRequestError):
    """Whoever holds what is to be forgotten is to be forgotten itself."""

    def __init__(self, selection: Selection) -> None:
        super().__init__(
            f"whoever holds {described(selection)} has left, or leaves and is forgotten whole: "
            "nobody is there to help; ask for rollback or retrain"
        )


def told(entry: Pending) -> str:
    """Say what an entry of the waiting list is about."""
    if entry.selection is None:
        return ", ".join(entry.clients)
    holders = entry.request.clients if entry.request is not None else ()
    named = f" of {', '.join(holders)}" if holders else ""
    return described(entry.selection) + (named if entry.selection.forget == "class" else "")
