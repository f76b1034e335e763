"""Who waits to be forgotten, by which method, and what the federation has to do it with."""

from collections.abc import Collection, Iterable, Sequence

from strategies.actions import Selection
from strategies.memory import Memory
from strategies.methods.interface import Dropped, Method, Pending, ServerLab
from strategies.methods.retraining import Retrain
from strategies.rate_limit import RateLimit
from unlearning.catalogue import DATA, METHODS, Need
from unlearning.errors import BudgetError, ImpossibleRequestError, SecateurError
from unlearning.parameters import Parameters
from unlearning.routing import Available, Cause, Request, Route, route


class Forgetting:
    """The requests of one federation, and its methods.

    Parameters
    ----------
    method
        What malicious clients that a detector finds are forgotten by; the default of all else that
        asks for nothing in particular.
    others
        Methods that requests may name or be routed to, as far as their needs are met.
    needs
        What to record; by default all that these methods need.
    memory
        Where to record it.
    rate_limit
        How often to forget at most.
    lab
        What the server can compute on data of its own.
    offers
        Needs that the task and the clients meet.
    classes
        Number of classes, where the task has some and it is known; 0 otherwise.
    """

    def __init__(
        self,
        method: Method | None,
        others: Sequence[Method],
        *,
        memory: Memory,
        rate_limit: RateLimit,
        lab: ServerLab | None,
        offers: Collection[Need] = (),
        classes: int = 0,
    ) -> None:
        self.method = method
        self.methods: dict[str, Method] = {m.name: m for m in others}
        if method is not None:
            self.methods[method.name] = method
        self.memory = memory
        self.rate_limit = rate_limit
        self.lab = lab
        self.offers = frozenset(offers)
        self.classes = classes
        self.pending: list[Pending] = []
        self.exactly: set[str] = set()
        """Clients that were forgotten exactly."""
        self.last: int | None = None
        """Round of the last unlearning."""
        self.tried: dict[Pending, int] = {}
        """Who waits -> round in which clients were asked for it, and it was refused."""
        self.refused: set[Pending] = set()
        """Those that were refused since the last unlearning, and wait on."""

    def route(
        self,
        request: Request,
        *,
        number: int,
        active: Collection[str],
        fewest: int,
        remembers: bool,
        certifies: bool = False,
        gradients: bool = False,
        uncertified: str = "",
        without: Collection[str] = (),
    ) -> Route:
        """Return how a request is served; see ``unlearning.routing.route``.

        Parameters
        ----------
        number
            The last round.
        active
            Clients that may take part, those concerned included.
        fewest
            Clients that a round of the wrapped strategy waits for.
        remembers
            Whether the wrapped strategy remembers past rounds.
        certifies
            Whether it may certify that a deletion changes nothing.
        gradients
            Whether it takes what clients send for gradients.
        uncertified
            Why it does not though it could, if so.
        without
            Methods that turned out not to serve it.
        """
        default = self.method.name if self.method is not None else "fedup"
        last = self.memory.last
        available = Available(
            needs=self.available() | ({Need.CERTIFICATE} if certifies else set()),
            participants=len(active),
            replay=self._replay(
                request.clients, self.rate_limit.next_round(number, self.last), remembers
            ),
            default="drift" if default == "drift" else "fedup",
            waiting=sum(len(e.clients) for e in self.pending if e.selection is None),
            methods=frozenset(self.methods) - frozenset(without),
            fewest=fewest,
            present=frozenset(last.locals_ if last is not None else ()) & frozenset(active),
            classes=self.classes,
            gradients=gradients,
            uncertified=uncertified,
            purged=self.memory.purged_of({*active, *request.clients}),
        )
        return route(request, available)

    def available(self) -> frozenset[Need]:
        """Return which needs are met."""
        at_hand = self.lab.needs() if self.lab is not None else frozenset()
        return self.memory.available() | at_hand | self.offers | {Need.RETAINED}

    def wait(
        self,
        clients: Iterable[str],
        cause: Cause,
        number: int,
        model: Parameters,
        method: str,
        most_rounds: int | None = None,
        selection: Selection | None = None,
        request: Request | None = None,
        passed: frozenset[str] = frozenset(),
        dropped: Dropped | None = None,
    ) -> None:
        """Put clients, or what they hold, on the list, with what their method needs to keep.

        Raises
        ------
        RefusedRequestError
            If ``method`` cannot forget them; nothing is changed.
        """
        chosen = tuple(sorted(clients))
        evidence = self.methods[method].freeze(self.memory, model, chosen)
        self.pending.append(
            Pending(
                chosen,
                cause,
                number,
                method,
                evidence,
                most_rounds,
                selection,
                request,
                passed,
                dropped,
            )
        )

    def due(self, number: int) -> list[tuple[str, tuple[tuple[Pending, ...], ...]]]:
        """Return who may be forgotten now: methods and whom each serves, the oldest first.

        One method is to serve, by one plan for each of its groups. What plays rounds again serves
        all who wait, whatever they asked for, since nobody of them takes part in it; but nobody who
        is to be forgotten exactly is served by less. Of a method that forgets one event at a time,
        every event is a group, and of requests for data one plan may follow the other. Who has not
        dropped its data holds up nobody else. After a refusal that cost rounds, those concerned
        wait as long as after an unlearning.
        """
        if not self.rate_limit.allows(number, self.last):
            return []
        ready = [
            entry
            for entry in self.pending
            if entry.ready and self.rate_limit.allows(number, self.tried.get(entry))
        ]
        found: list[tuple[str, tuple[tuple[Pending, ...], ...]]] = []
        for name in dict.fromkeys(entry.method for entry in ready):
            entry = METHODS[name]
            exact = entry.guarantee == "exact"
            group = tuple(
                other
                for other in ready
                if other.method == name
                or (entry.replays and (exact or METHODS[other.method].guarantee != "exact"))
            )
            if entry.events:
                found.append((name, (group,)))
                continue
            data = tuple((one,) for one in group if one.selection is not None)
            leaving = [(name, ((one,),)) for one in group if one.selection is None]
            found += [(name, data), *leaving] if data else leaving
        return found

    def affordable(
        self, method: str, served: Sequence[Pending], number: int, remembers: bool
    ) -> tuple[tuple[Pending, ...], dict[Pending, BudgetError]]:
        """Return whom a method can serve together now, and for whom it is too late.

        Whoever allows fewer rounds than all need together is served alone. Who allows fewer than it
        needs itself will never be served: only more rounds can come.
        """

        def over(entries: Sequence[Pending], allowed: int | None) -> BudgetError | None:
            clients = [client for entry in entries for client in entry.clients]
            rounds = self._replay(clients, number, remembers).get(method)
            if rounds is None or allowed is None or rounds <= allowed:
                return None
            return BudgetError(
                f"{method} would play {rounds} rounds again by now, and {allowed} "
                "are allowed; ask again with more, or for an approximate guarantee"
            )

        alone = {entry: over([entry], entry.most_rounds) for entry in served}
        late = {e: error for e, error in alone.items() if error and e.method == method}
        left = tuple(entry for entry, error in alone.items() if error is None)
        tight = [entry for entry in left if over(left, entry.most_rounds)]
        return ((tight[0],) if tight else left), late

    def refuse(self, number: int, entries: Iterable[Pending], *, asked: bool) -> None:
        """Take note that some were refused, and whether clients were asked for them."""
        for entry in entries:
            self.refused.add(entry)
            if asked:
                self.tried[entry] = number

    def withdraw(self, served: Sequence[Pending]) -> None:
        """Take off the list what will not be served."""
        self.pending = [entry for entry in self.pending if entry not in served]
        self.refused -= set(served)
        self.tried = {entry: number for entry, number in self.tried.items() if entry not in served}

    def done(self, served: Sequence[Pending], number: int, *, counts: bool = True) -> None:
        """Take those who were forgotten off the list.

        Parameters
        ----------
        counts
            Whether the model was changed, so that the rate limit counts from here.
        """
        self.withdraw(served)
        if counts:
            self.last, self.refused, self.tried = number, set(), {}

    def check_excluded(self, client: str, request: Request, *, banned: bool) -> None:
        """Raise unless a client that takes no part may still be asked to be forgotten.

        It may if nobody has forgotten it and it does not wait, as where what waited was withdrawn;
        and exactly as long as that is not to come, whatever else was done (``methods`` 10.3).

        Parameters
        ----------
        banned
            Whether it was forgotten.

        Raises
        ------
        ImpossibleRequestError
            If it may not.
        """
        waits = [e for e in self.pending if e.selection is None and client in e.clients]
        why = ""
        if request.target in DATA:
            why = "nothing of it alone can be forgotten any more"
        elif client in self.exactly:
            why = "it was forgotten exactly"
        elif any(METHODS[entry.method].guarantee == "exact" for entry in waits):
            why = "it waits to be forgotten exactly"
        elif (waits or banned) and request.promise != "exact":
            why = "it waits or was forgotten, and only exact forgetting can follow"
        if why:
            raise ImpossibleRequestError(f"{client} takes no part any more: {why}")

    @property
    def stuck(self) -> bool:
        """Whether everybody who waits was refused already."""
        return bool(self.pending) and self.refused.issuperset(self.pending)

    def _replay(self, clients: Collection[str], number: int, remembers: bool) -> dict[str, int]:
        """Return how many rounds exact methods would play again at the end of a round."""
        found = {}
        for name, method in self.methods.items():
            if isinstance(method, Retrain) and self.memory.initial is not None:
                origin, _ = method.origin(self.memory, clients, remembers)
                found[name] = method.rounds(number - origin)
        return found


def needs_of(methods: Iterable[Method]) -> frozenset[Need]:
    """Return all that methods need.

    Raises
    ------
    SecateurError
        If the catalogue does not know one.
    """
    methods = list(methods)
    for method in methods:
        if method.name not in METHODS:
            raise SecateurError(
                f"no catalogue knows the method {method.name!r}; name it as one of "
                f"{', '.join(METHODS)}"
            )
    return frozenset().union(*(METHODS[method.name].needs for method in methods))
