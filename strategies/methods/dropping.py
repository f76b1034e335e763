"""Before a class or samples are forgotten, whoever holds them drops them for ever."""

from collections.abc import Callable

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


def after_dropping(situation: Situation, plan: Callable[[], Plan[Unlearned]]) -> Plan[Unlearned]:
    """Ask the holders to drop what is to be forgotten, then go on with a method's plan.

    How many rows each dropped is noted in ``situation``. Every holder must say that it did, so that
    nothing is forgotten here and learned again there.
    Where nobody leaves or the clients leave themselves, the plan is the method's own.

    Raises
    ------
    NothingHeldError
        If nobody holds anything of it.
    """
    for entry in situation.pending:
        if entry.selection is None:
            continue
        answers = yield Ask(
            Forget.action,
            to=entry.clients,
            config=Forget(**entry.selection.rows()).config(),
            everybody=True,
        )
        for answer in answers:
            rows = int(answer.metrics.get("rows", 0))
            situation.dropped[answer.client] = situation.dropped.get(answer.client, 0) + rows
        if not any(answer.metrics.get("rows", 0) > 0 for answer in answers):
            raise NothingHeldError(entry, entry.selection)
    return (yield from plan())


def described(selection: Selection) -> str:
    """Say what is selected."""
    match selection.forget:
        case "class":
            return f"class {selection.forget_class}"
        case "samples":
            return f"{len(selection.tokens)} samples"
    return "all its data"
