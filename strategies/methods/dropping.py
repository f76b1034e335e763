"""What holders of a class or samples are asked before it is forgotten: to drop it for ever."""

from collections.abc import Collection

from strategies.actions import Forget, Selection
from unlearning.errors import ImpossibleRequestError
from unlearning.plan import Ask


class NothingHeldError(ImpossibleRequestError):
    """Nobody holds what is to be forgotten."""

    def __init__(self, asked: int, selection: Selection) -> None:
        super().__init__(
            f"none of {asked} clients holds {described(selection)}: nothing is to be "
            "forgotten; check what was asked for"
        )


class AlreadyForgottenError(ImpossibleRequestError):
    """What is to be forgotten exactly was, and has not been trained on since."""

    def __init__(self, selection: Selection) -> None:
        super().__init__(
            f"{described(selection)}: forgotten exactly before, and not trained on since; nothing "
            "is to be done"
        )


def asked_to_drop(selection: Selection, clients: Collection[str], *, dry: bool = False) -> Ask:
    """Return what holders are asked; who will not drop what it holds says so.

    Parameters
    ----------
    dry
        Whether they are to say only what they would answer.
    """
    return Ask(
        Forget.action,
        to=tuple(clients),
        config=Forget(**selection.rows(), dry=dry).config(),
    )


def described(selection: Selection) -> str:
    """Say what is selected."""
    match selection.forget:
        case "class":
            return f"class {selection.forget_class}"
        case "samples":
            count = len(selection.tokens)
            return "1 sample" if count == 1 else f"{count} samples"
    return "all its data"
