"""Which method serves a request, or why none does (``methods`` 10.3). Nothing else decides.

The guarantee comes first: a request for exact forgetting is served exactly or refused, never
silently by something weaker. A request with a malicious cause never reaches a method in which the
target computes or reports anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from unlearning.catalogue import METHODS, RECORDED, Need, Target, missing, with_implied
from unlearning.errors import (
    BenignMajorityError,
    BudgetError,
    ImpossibleRequestError,
    MissingNeedError,
    NoExactMethodError,
    NoLastRoundError,
    RefusedRequestError,
    TooFewClientsError,
    UnsafeMethodError,
)
from unlearning.fedup import check_majority

Cause = Literal["malicious", "privacy"]
Promise = Literal["exact", "approximate"]

POLICY: dict[Cause, Promise] = {"privacy": "exact", "malicious": "approximate"}
"""Promised where a request does not say: attackers must go now, people must go wholly."""

EXACT = ("rollback", "retrain")
ORDER: dict[tuple[Target, Cause], tuple[str, ...]] = {
    (Target.CLIENT, "malicious"): ("fedup", "fedrecover", "kd", "not", "retrain"),
    (Target.CLIENT, "privacy"): ("fedup", "federaser", "not", "retrain"),
    (Target.BACKDOOR, "malicious"): ("fedup", "kd", "not", "retrain"),
    (Target.BACKDOOR, "privacy"): ("fedup", "kd", "not", "retrain"),
}
"""Approximate requests: the default, then its fallbacks."""
COOPERATIVE = ("fedup", "negative-gradients", "federaser", "not", "retrain")
"""In the place of (client, privacy) where the client helps to leave."""
NEED_MAJORITY = frozenset({"fedup", "random", "drift", "fedrecover", "fast"})
"""Trust that whoever is not to be forgotten is honest, so that most must be."""


@dataclass(frozen=True)
class Request:
    """Whom or what to forget, and on what terms.

    Attributes
    ----------
    clients
        Who is concerned; for a backdoor, who planted it, as far as known.
    target_cooperates, retained_cooperate
        Whether the clients concerned, and the others, answer.
    guarantee
        ``None`` for what ``POLICY`` says of the cause.
    method
        By name; ``None`` to let ``route`` choose.
    most_rounds
        Rounds that forgetting may take; ``None`` for as many as it needs.
    """

    target: Target
    clients: tuple[str, ...]
    cause: Cause
    target_cooperates: bool = False
    retained_cooperate: bool = True
    guarantee: Promise | None = None
    method: str | None = None
    most_rounds: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", tuple(dict.fromkeys(self.clients)))

    @property
    def promise(self) -> Promise:
        """Return the guarantee that is asked for."""
        return self.guarantee or POLICY[self.cause]


@dataclass(frozen=True)
class Available:
    """What the federation has.

    Attributes
    ----------
    needs
        State that was recorded, and data that is at hand.
    participants
        Clients that may take part, those concerned included.
    waiting
        Clients that wait to be forgotten already; they may not take part any more.
    methods
        Methods that were made ready.
    replay
        Exact method -> rounds that it would play again.
    default
        What a malicious client is forgotten by first.
    fewest
        Clients that a round waits for.
    present
        Clients in the last round that may take part, where it is remembered; ``None`` for all.
    """

    needs: frozenset[Need]
    participants: int
    replay: dict[str, int]
    default: Literal["fedup", "drift"] = "fedup"
    waiting: int = 0
    methods: frozenset[str] = frozenset(METHODS)
    fewest: int = 1
    present: frozenset[str] | None = None


@dataclass(frozen=True)
class Route:
    """The method chosen, and why not the ones before it."""

    method: str
    passed_over: tuple[tuple[str, str], ...] = ()
    """Method and what it lacked."""


def route(request: Request, available: Available) -> Route:
    """Return the method for a request.

    Raises
    ------
    RefusedRequestError
        One of its kinds, which says what is missing and the nearest method that would work.
    """
    if request.method is not None:
        _check_named(request.method, request, available)
        return Route(request.method)
    _check_possible(request)
    passed: list[tuple[str, str]] = []
    first: RefusedRequestError | None = None
    for name in _candidates(request, available):
        try:
            _check(name, request, available)
        except RefusedRequestError as error:
            if isinstance(error, BenignMajorityError) and request.cause == "malicious":
                raise  # who is malicious was decided by a majority that is not there
            first = first or error
            passed.append((name, str(error)))
        else:
            return Route(name, tuple(passed))
    if first is None:
        exactly = f" exactly ({_list(EXACT, 'or')})" if request.promise == "exact" else ""
        raise ImpossibleRequestError(
            f"no method that forgets a {request.target}{exactly} was made ready; add one to the "
            f"methods{_nearest(request, available)}"
        )
    raise type(first)(f"{first}{_nearest(request, available)}") from first


def _candidates(request: Request, available: Available) -> Iterator[str]:
    if request.promise == "exact":
        yield from (name for name in EXACT if name in available.methods)
        return
    order = ORDER[request.target, request.cause]
    if request.target is Target.CLIENT and request.cause == "privacy" and request.target_cooperates:
        order = COOPERATIVE
    for name in order:
        chosen = available.default if name == "fedup" and request.cause == "malicious" else name
        if chosen in available.methods:
            yield chosen


def _check_possible(request: Request) -> None:
    """Refuse what no method of this catalogue can serve."""
    if request.target is Target.CLASS:
        raise ImpossibleRequestError(
            "forgetting a class needs class statistics from the clients, and no method here asks "
            "for them; forget the clients that hold it"
        )
    if request.target is Target.SAMPLES:
        raise ImpossibleRequestError(
            "forgetting samples needs their holder's help, and no method here asks for it; the "
            "whole client can be forgotten instead"
        )
    if not request.clients:
        what = "who planted the backdoor is unknown" if request.target is Target.BACKDOOR else ""
        raise ImpossibleRequestError(
            f"{what or 'no client is named'}; name the clients, or run with a detector"
        )


def _check_named(name: str, request: Request, available: Available) -> None:
    if name in METHODS and name not in available.methods:
        raise ImpossibleRequestError(f"{name} was not made ready; add it to the methods")
    if name not in METHODS:
        raise ImpossibleRequestError(
            f"there is no method {name!r}; choose one of {', '.join(METHODS)}"
        )
    entry = METHODS[name]
    if request.target not in entry.targets:
        _check_possible(request)
        raise ImpossibleRequestError(
            f"{name} does not forget a {request.target}, only {_either(entry.targets)}; "
            "leave the method out to have one chosen"
        )
    if not request.clients:
        _check_possible(request)
    if request.promise == "exact" and entry.guarantee != "exact":
        raise NoExactMethodError(
            f"{name} is not exact, and exact forgetting was asked for; ask for {EXACT[0]}, or "
            "for an approximate guarantee"
        )
    try:
        _check(name, request, available)
    except RefusedRequestError as error:
        raise type(error)(f"{error}{_nearest(request, available, besides=name)}") from error


def _check(name: str, request: Request, available: Available) -> None:
    """Raise unless the method may and can serve the request."""
    entry = METHODS[name]
    if request.cause == "malicious" and (not entry.safe or Need.TARGET in entry.needs):
        raise UnsafeMethodError(
            f"{name} trusts what the clients to be forgotten report or sent, and they are malicious"
        )
    there = with_implied(available.needs)
    if not request.retained_cooperate:
        there -= {Need.RETAINED}
    if not request.target_cooperates:
        there -= {Need.TARGET}
    if lacking := missing(name, there):
        recorded = "recorded" if set(lacking) & RECORDED else "available"
        raise MissingNeedError(f"{name} needs {_list(lacking)}, which is not {recorded}")
    if Need.LAST in entry.needs and available.present is not None:
        absent = sorted(set(request.clients) - available.present)
        if absent:
            raise NoLastRoundError(
                f"{name} needs the last round of {_list(absent)}, who took no part in it; let them "
                "take part once more"
            )
    staying = available.participants - len(request.clients)
    if Need.RETAINED in entry.needs and 0 < staying < available.fewest:
        raise TooFewClientsError(
            f"{staying} of {available.participants} clients would stay, and a round waits for "
            f"{available.fewest}: lower min_available_nodes and min_train_nodes of the strategy, "
            "or wait until more clients have joined"
        )
    if name in NEED_MAJORITY:  # all who wait may be served together
        waiting, compared = available.waiting, available.participants
        if Need.LAST in entry.needs and available.present is not None:
            compared = len(available.present)  # whoever else there is says nothing of them
        check_majority(len(request.clients) + waiting, compared + waiting)
    elif len(request.clients) >= available.participants:
        raise BenignMajorityError(
            f"all {available.participants} clients are to be forgotten: nobody would be left to "
            "train with; keep one at least"
        )
    if len(request.clients) > 1 and not entry.several:
        raise ImpossibleRequestError(f"{name} forgets one client at a time")
    rounds = available.replay.get(name)
    if request.most_rounds is not None and rounds is not None and rounds > request.most_rounds:
        raise BudgetError(
            f"{name} would play {rounds} rounds again, and {request.most_rounds} are allowed"
        )


def _nearest(request: Request, available: Available, besides: str = "") -> str:
    """Say which methods would serve the request, if any."""
    fits = []
    for name, entry in METHODS.items():
        if name == besides or not entry.routed or request.target not in entry.targets:
            continue
        if name not in available.methods:
            continue
        try:
            _check(name, request, available)
        except RefusedRequestError:
            continue
        fits.append(name)
    exact = [name for name in fits if METHODS[name].guarantee == "exact"]
    if request.promise == "exact" and not exact:
        return f"; only approximate methods would work: {', '.join(fits)}" if fits else ""
    chosen = exact if request.promise == "exact" else fits
    return f"; {_list(chosen, 'or')} would work" if chosen else ""


def _list(words: object, last: str = "and") -> str:
    parts = [str(word) for word in words]  # type: ignore[attr-defined]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _either(targets: frozenset[Target]) -> str:
    return _list(sorted(targets), "or")
