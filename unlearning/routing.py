"""Which method serves a request, or why none does (``methods`` 10.3). Nothing else decides.

The guarantee comes first: a request for exact forgetting is served exactly or refused, never
silently by something weaker. A request with a malicious cause never reaches a method in which the
target computes or reports anything.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from unlearning.catalogue import DATA, METHODS, RECORDED, Need, Target, missing, with_implied
from unlearning.errors import (
    BenignMajorityError,
    BudgetError,
    ImpossibleRequestError,
    MissingNeedError,
    NeedsRetainedClientsError,
    NoBatchLogError,
    NoExactMethodError,
    NoLastRoundError,
    NotCertifiedError,
    RefusedRequestError,
    TooFewClientsError,
    UnsafeMethodError,
)
from unlearning.fedup import check_majority
from unlearning.verifi_marks import Kind

Cause = Literal["malicious", "privacy"]
Promise = Literal["exact", "approximate"]

POLICY: dict[Cause, Promise] = {"privacy": "exact", "malicious": "approximate"}
"""Promised where a request does not say: attackers must go now, people must go wholly."""

EXACT = ("rollback", "retrain")
PROVEN = frozenset({"exact", "conditional"})
"""Guarantees that are as good as exact; conditions are needs, checked before anything is done."""
ORDER: dict[tuple[Target, Cause], tuple[str, ...]] = {
    (Target.CLIENT, "malicious"): ("fedup", "fedrecover", "kd", "not", "retrain"),
    (Target.CLIENT, "privacy"): ("fedup", "federaser", "not", "retrain"),
    (Target.BACKDOOR, "malicious"): ("fedup", "kd", "not", "retrain"),
    (Target.BACKDOOR, "privacy"): ("fedup", "kd", "not", "retrain"),
    (Target.CLASS, "privacy"): ("fisher-mask", "tfidf", "ascent", "retrain"),
    (Target.SAMPLES, "privacy"): ("fisher-mask", "label-flip", "retrain"),
}
"""Approximate requests: the default, then its fallbacks. Of a malicious client no part of its data
is forgotten, since only it could say which: it is forgotten itself."""
LOGGED = ("amnesiac", "fisher-mask", "rapid-retraining", "retrain")
"""In the place of (samples, privacy) where their holders keep a batch log."""
DROPPED = ("not", "retrain")
"""In the place of (class, privacy) where clients drop it, and answer nothing."""
CERTIFIED = "ffmu"
"""Before all others, for whatever guarantee, where the training certifies the deletion."""
COOPERATIVE = ("fedup", "negative-gradients", "federaser", "not", "retrain")
"""In the place of (client, privacy) where the client helps to leave."""
WHOLE = frozenset({Need.HISTORY, Need.SAMPLED_HISTORY, Need.LEDGER})
"""Needs of which a part is not enough."""
NEED_MAJORITY = frozenset({"fedup", "random", "drift", "fedrecover", "fast"})
"""Trust that whoever is not to be forgotten is honest, so that most must be."""


@dataclass(frozen=True)
class Request:
    """Whom or what to forget, and on what terms.

    Attributes
    ----------
    clients
        Who is concerned; for a backdoor, who planted it, as far as known; for a class or samples,
        who holds them, or nobody where all clients are to look.
    target_cooperates, retained_cooperate
        Whether the clients concerned, and the others, answer. ``None`` for what is usual: holders
        of a class or samples do, clients that are to be forgotten do not.
    target_drops
        Whether holders at least drop the data; ``None`` if they do whenever they answer.
    label
        Number of the class, from 0 on.
    tokens
        Of the samples; only their holders know what they stand for.
    guarantee
        ``None`` for what ``POLICY`` says of the cause.
    method
        By name; ``None`` to let ``route`` choose.
    most_rounds
        Rounds that forgetting may take; ``None`` for as many as it needs.
    marks
        How the client that leaves marks rows of its own before it does, so that it can tell
        whether it was forgotten (``methods`` 2.10); empty if it does not.
    """

    target: Target
    clients: tuple[str, ...]
    cause: Cause
    target_cooperates: bool | None = None
    retained_cooperate: bool = True
    guarantee: Promise | None = None
    method: str | None = None
    most_rounds: int | None = None
    target_drops: bool | None = None
    label: int | None = None
    tokens: tuple[str, ...] = ()
    marks: Literal[""] | Kind = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "clients", tuple(dict.fromkeys(self.clients)))
        object.__setattr__(self, "tokens", tuple(dict.fromkeys(self.tokens)))
        if self.target_cooperates is None:
            helps = self.target in DATA or bool(self.marks)
            object.__setattr__(self, "target_cooperates", helps)
        if self.target_drops is None:
            object.__setattr__(self, "target_drops", self.target_cooperates)

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
        Exact method -> rounds that it would play again; one that is not there fits no budget.
    default
        What a malicious client is forgotten by first.
    fewest
        Clients that a round waits for.
    present
        Clients in the last round that may take part, where it is remembered; ``None`` for all.
    classes
        Number of classes of a task that has some; 0 where it is not known.
    gradients
        Whether the strategy takes what clients send for gradients, so that it cannot aggregate
        models that another step made.
    """

    needs: frozenset[Need]
    participants: int
    replay: dict[str, int]
    default: Literal["fedup", "drift"] = "fedup"
    waiting: int = 0
    methods: frozenset[str] = frozenset(METHODS)
    fewest: int = 1
    present: frozenset[str] | None = None
    classes: int = 0
    gradients: bool = False
    uncertified: str = ""
    """Why a training that could certify deletions does not, if so."""
    purged: Mapping[str, int] = field(default_factory=dict)
    """Client that may take part, or is concerned -> round up to which what it sent was deleted."""


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
    if request.marks:
        _check_marks(request)
    if request.method is not None:
        _check_named(request.method, request, available)
        return Route(request.method)
    _check_possible(request, available)
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
            f"no method that forgets {_a(request.target)}{exactly} was made ready; add one to the "
            f"methods{_nearest(request, available)}"
        )
    raise type(first)(f"{first}{_nearest(request, available)}") from first


def _candidates(request: Request, available: Available) -> Iterator[str]:
    order: tuple[str, ...] = EXACT
    if request.promise != "exact":
        order = _approximate(request, available)
    certifies = Need.CERTIFICATE in available.needs or bool(available.uncertified)
    if request.target in METHODS[CERTIFIED].targets and certifies:
        order = (CERTIFIED, *order)
    for name in order:
        chosen = available.default if name == "fedup" and request.cause == "malicious" else name
        if chosen in available.methods:
            yield chosen


def _approximate(request: Request, available: Available) -> tuple[str, ...]:
    match request.target:
        case Target.CLIENT if request.cause == "privacy" and request.target_cooperates:
            return COOPERATIVE
        case Target.CLASS if not request.target_cooperates:
            return DROPPED
        case Target.SAMPLES if Need.BATCH_LOG in available.needs:
            return LOGGED
    return ORDER[request.target, request.cause]


def _check_possible(request: Request, available: Available) -> None:
    """Refuse what no method can serve."""
    if request.target in DATA:
        _check_data(request, available)
    elif not request.clients:
        what = "who planted the backdoor is unknown" if request.target is Target.BACKDOOR else ""
        raise ImpossibleRequestError(
            f"{what or 'no client is named'}; name the clients, or run with a detector"
        )


def _check_marks(request: Request) -> None:
    """Refuse marks of whoever does not leave, or cannot be believed."""
    if request.cause == "malicious":
        raise UnsafeMethodError("marks are the leaver's word, and it is malicious; leave marks out")
    if request.target is not Target.CLIENT:
        raise ImpossibleRequestError(
            f"clients mark rows before they leave, and {_a(request.target)} is to be forgotten; "
            "leave marks out, or forget the client"
        )
    if len(request.clients) != 1:
        raise ImpossibleRequestError(
            f"a client marks rows before it leaves, and {len(request.clients)} are named; ask once "
            "for each"
        )
    if not request.target_cooperates:
        raise ImpossibleRequestError(
            f"{request.clients[0]} is to mark rows of its own, and does not cooperate; leave marks "
            "out"
        )


def _check_data(request: Request, available: Available) -> None:
    """Refuse to forget part of what clients hold where they cannot be trusted, or will not act."""
    if request.cause == "malicious":
        raise UnsafeMethodError(
            f"forgetting {_a(request.target)} trusts those who hold such data, and they are "
            "malicious; forget the clients"
        )
    if request.target is Target.CLASS:
        if request.label is None or request.label < 0:
            raise ImpossibleRequestError(
                f"no class is named ({request.label}); give its number, from 0 on"
            )
        if Need.CLASSES not in available.needs:
            raise MissingNeedError(
                f"forgetting class {request.label} needs {Need.CLASSES}, and the server knows of "
                "none; name samples instead, or, if the task has some, give its server_data a row "
                "to tell by"
            )
        if 0 < available.classes <= request.label:
            raise ImpossibleRequestError(
                f"there is no class {request.label}; classes are numbered from 0 to "
                f"{available.classes - 1}"
            )
        if not request.target_drops:
            raise ImpossibleRequestError(
                "forgetting a class needs class statistics from the clients, or that they drop its "
                "data at least, and they do neither; forget the clients that hold it"
            )
    elif not request.tokens:
        raise ImpossibleRequestError("no samples are named; give the tokens that their holder gave")
    elif not request.target_drops:
        raise ImpossibleRequestError(
            "forgetting samples needs their holder, who must act or leave; the whole client can "
            "be forgotten instead"
        )


def _check_named(name: str, request: Request, available: Available) -> None:
    entry = METHODS.get(name)
    if entry is None:
        raise ImpossibleRequestError(
            f"there is no method {name!r}; choose one of {', '.join(METHODS)}"
        )
    if not entry.federated:  # it never can be made ready
        raise ImpossibleRequestError(
            f"{name} is for one machine that has all the data, not for a federation; leave the "
            "method out to have one chosen"
        )
    if name not in available.methods:
        raise ImpossibleRequestError(f"{name} was not made ready; add it to the methods")
    if request.target not in entry.targets:
        _check_possible(request, available)
        raise ImpossibleRequestError(
            f"{name} does not forget {_a(request.target)}, only {_either(entry.targets)}; "
            "leave the method out to have one chosen"
        )
    _check_possible(request, available)
    if request.promise == "exact" and entry.guarantee not in PROVEN:
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
    if entry.own_step and available.gradients:
        raise ImpossibleRequestError(
            f"{name} plays rounds of models, and this federation's strategy takes what clients "
            "send for gradients"
        )
    _check_needs(name, request, available)
    check_whole(name, request.clients, available.purged)
    if request.target not in DATA:  # of which nobody leaves
        _check_company(name, request, available)
    if request.most_rounds is not None:
        _check_budget(name, request.most_rounds, available.replay.get(name))


def _check_budget(name: str, allowed: int, rounds: int | None) -> None:
    """Refuse what would play too many rounds again, or, to be exact, nobody knows how many."""
    if rounds is None and METHODS[name].guarantee == "exact":
        raise BudgetError(
            f"nobody knows how many rounds {name} would play again, and {allowed} are allowed; "
            "allow any number"
        )
    if rounds is not None and rounds > allowed:
        raise BudgetError(f"{name} would play {rounds} rounds again, and {allowed} are allowed")


def _check_needs(name: str, request: Request, available: Available) -> None:
    """Refuse what lacks state, data or somebody's help."""
    there = with_implied(available.needs)
    if not request.retained_cooperate:
        there -= {Need.RETAINED}
    helped = {Need.TARGET: request.target_cooperates, Need.DROP: request.target_drops}
    there = with_implied(there - helped.keys() | {need for need, given in helped.items() if given})
    lacking = missing(name, there)
    if Need.BATCH_LOG in lacking:
        raise NoBatchLogError(
            f"{name} needs {Need.BATCH_LOG}, which was not kept, or not of plain averages; set "
            "batch-log, and FedAvg or FedProx as the strategy, before training"
        )
    if Need.CERTIFICATE in lacking:
        if available.uncertified:
            raise NotCertifiedError(
                f"{name} certifies nothing here: {available.uncertified}; choose another method"
            )
        raise NotCertifiedError(
            f"{name} needs {Need.CERTIFICATE}, and this one certifies no such deletion; choose "
            "another method, or train with strategy = ffmu and local = full from the start"
        )
    if lacking:
        recorded = "recorded" if set(lacking) & RECORDED else "available"
        kind = NeedsRetainedClientsError if Need.RETAINED in lacking else MissingNeedError
        raise kind(f"{name} needs {_list(lacking)}, which is not {recorded}")


def check_whole(name: str, concerned: Collection[str], purged: Mapping[str, int]) -> None:
    """Refuse what rests on a history, or a ledger, that was deleted in part.

    What clients that stay had sent is deleted when data of theirs are forgotten. To subtract a
    client's influence its own record must be whole; to replay a history everybody's.

    Parameters
    ----------
    concerned
        Who is to be forgotten.
    purged
        Client -> round up to which what it sent was deleted.

    Raises
    ------
    MissingNeedError
        If it is not whole.
    """
    entry = METHODS[name]
    if not entry.needs & WHOLE:
        return
    broken = sorted(purged if entry.replays else purged.keys() & set(concerned))
    if broken:
        newest = max(purged[client] for client in broken)
        raise MissingNeedError(
            f"{name} needs the whole record of {_list(broken)}, and what they sent until round "
            f"{newest} was deleted when data of theirs were forgotten; ask for {EXACT[0]}"
        )


def _check_company(name: str, request: Request, available: Available) -> None:
    """Refuse what clients cannot be taken out of: too few would stay, or were in the last round."""
    entry = METHODS[name]
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


def _nearest(request: Request, available: Available, besides: str = "") -> str:
    """Say which methods would serve the request, if any."""
    fits = []
    for name, entry in METHODS.items():
        if name == besides or not (entry.routed and entry.federated):
            continue
        if request.target not in entry.targets:
            continue
        if name not in available.methods:
            continue
        try:
            _check(name, request, available)
        except RefusedRequestError:
            continue
        fits.append(name)
    proven = [name for name in fits if METHODS[name].guarantee in PROVEN]
    if request.promise == "exact" and not proven:
        return f"; only approximate methods would work: {', '.join(fits)}" if fits else ""
    chosen = proven if request.promise == "exact" else fits
    return f"; {_list(chosen, 'or')} would work" if chosen else ""


def _list(words: object, last: str = "and") -> str:
    parts = [str(word) for word in words]  # type: ignore[attr-defined]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {last} {parts[-1]}"


def _either(targets: frozenset[Target]) -> str:
    return _list(sorted(targets), "or")


def _a(target: Target) -> str:
    return f"{target}" if target is Target.SAMPLES else f"a {target}"
