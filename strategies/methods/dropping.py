"""Before a class or samples are forgotten, whoever holds them drops them for ever."""

from collections.abc import Callable, Collection
from dataclasses import replace

from strategies.actions import Forget, Selection
from strategies.methods.interface import Pending, Situation, Unlearned
from unlearning.errors import ImpossibleRequestError
from unlearning.plan import Ask, Plan


class NothingHeldError(ImpossibleRequestError):
    """Nobody holds what is to be forgotten."""

    def __init__(self, entry: Pending, selection: Selection) -> None:
        super().__init__(
            f"none of {len(entry.clients)} clients holds {described(selection)}: nothing is to be "
            "forgotten; check what was asked for"
        )
        self.config = selection.config()
        """What was asked for."""


def after_dropping(
    situation: Situation,
    plan: Callable[[Situation], Plan[Unlearned]],
    *,
    everybody: bool = False,
) -> Plan[Unlearned]:
    """Ask the holders to drop what is to be forgotten, then go on with a method's plan.

    How many rows each dropped is noted in ``situation``. Every holder must say that it did, so that
    nothing is forgotten here and learned again there. Of a class, which many hold, some may be
    away: they are noted, are no part of what the plan is told, and may not take part in any round
    until they have dropped it. Where nobody leaves or the clients leave themselves, the plan is the
    method's own.

    Parameters
    ----------
    everybody
        Whether all holders of a class must be there, too: what one that is away brought into the
        model would stay in it.

    Raises
    ------
    NothingHeldError
        If nobody holds anything of it.
    """
    for entry in situation.pending:
        if entry.selection is None:
            continue
        asked = asked_to_drop(entry.selection, entry.clients)
        answers = yield replace(asked, away=asked.away and not everybody)
        for answer in answers:
            rows = int(answer.metrics.get("rows", 0))
            situation.dropped[answer.client] = situation.dropped.get(answer.client, 0) + rows
        if not any(answer.metrics.get("rows", 0) > 0 for answer in answers):
            raise NothingHeldError(entry, entry.selection)
        situation.away.update(set(entry.clients) - {answer.client for answer in answers})
    if not situation.away:
        return (yield from plan(situation))
    outcome = yield from plan(_without(situation, situation.away))
    told = ", ".join(sorted(situation.away))
    warning = f"away: {told} may take part again only once the data are dropped there, too"
    return replace(outcome, warnings=(*outcome.warnings, warning))


def asked_to_drop(selection: Selection, clients: Collection[str]) -> Ask:
    """Return what holders are asked; who will not drop what it holds says so."""
    return Ask(
        Forget.action,
        to=tuple(clients),
        config=Forget(**selection.rows()).config(),
        everybody=True,
        away=selection.forget == "class",
    )


def _without(situation: Situation, away: Collection[str]) -> Situation:
    def present(clients: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(client for client in clients if client not in away)

    pending = tuple(
        entry if entry.selection is None else replace(entry, clients=present(entry.clients))
        for entry in situation.pending
    )
    return replace(
        situation,
        pending=pending,
        active=present(situation.active),
        retained=present(situation.retained),
    )


def described(selection: Selection) -> str:
    """Say what is selected."""
    match selection.forget:
        case "class":
            return f"class {selection.forget_class}"
        case "samples":
            return f"{len(selection.tokens)} samples"
    return "all its data"
