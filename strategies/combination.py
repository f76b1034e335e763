"""Which strategies, detectors and methods may stand together; whatever may not is refused early."""

from collections.abc import Sequence

from flwr.serverapp.strategy import FedXgbBagging, FedXgbCyclic, Strategy

from strategies.detectors.interface import Detector
from strategies.ffmu import FFMU
from strategies.forgetting import Forgetting
from strategies.methods.interface import Method
from strategies.screen import Screen
from unlearning.catalogue import METHODS, RECORDED, Need, with_implied
from unlearning.errors import SecateurError


def check_combination(
    strategy: Strategy,
    screen: Screen | None,
    detector: Detector | None,
    method: Method | None,
    others: Sequence[Method],
) -> None:
    """Raise ``SecateurError`` if a part could not do, or could be made to do harm, beside another.

    Parameters as of ``Unlearning``.
    """
    if isinstance(strategy, FedXgbBagging | FedXgbCyclic):
        raise SecateurError(
            f"{type(strategy).__name__} exchanges trees, not parameters: nothing here can screen "
            "or prune them; wrap a strategy that averages models"
        )
    for part in (detector, method, *others):
        if part is not None and screen is None:
            raise SecateurError(
                f"{part.name} trusts the updates it sees, so replies must be screened; pass "
                "screen=Screen()"
            )
    entry = METHODS.get(method.name) if method is not None else None
    if method is not None and entry is not None and entry.own_step and takes_gradients(strategy):
        raise SecateurError(
            f"{method.name} plays rounds of models, and {type(strategy).__name__} takes what "
            "clients send for gradients; choose another method, such as retrain"
        )
    if detector is not None and method is not None and not METHODS[method.name].safe:
        raise SecateurError(
            f"{method.name} trusts what the clients to be forgotten sent, and {detector.name} "
            "finds malicious ones; choose a method that is safe, such as fedup"
        )


def takes_gradients(strategy: Strategy) -> bool:
    """Say whether a strategy takes what clients send for gradients; FFMU-N is sent models."""
    return isinstance(strategy, FFMU) and not strategy.action.models


def check_needs(method: Method, forgetting: Forgetting) -> None:
    """Raise ``SecateurError`` where a detector's findings could never be acted upon."""
    at_hand = forgetting.lab.needs() if forgetting.lab is not None else frozenset()
    recorded = with_implied(forgetting.memory.needs) & RECORDED
    lacking = METHODS[method.name].needs - recorded - at_hand - forgetting.offers - {Need.RETAINED}
    if lacking:
        raise SecateurError(
            f"{method.name} needs {' and '.join(sorted(lacking))}, which will not be there; set "
            "server-examples for server data, or choose another method"
        )
