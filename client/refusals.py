"""What a data owner's client does not let itself be asked."""

from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from client.task.protocol import EVERYTHING, REFUSABLE, TaskOptions, refused
from strategies import messages
from strategies.actions import name_of
from unlearning.errors import RefusedRequestError, SecateurError


def refusals(options: Callable[[Context], TaskOptions]) -> Mod:
    """Return a Flower mod that answers what is refused, by the owner or on the way, as such.

    An error reply of its own: the text of an exception is lost on some engines, and a server could
    not tell it from a crash. What cannot be done for a reason that is known is answered so, too.
    """

    def refuse(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        try:
            if is_refusable(message):
                check_allowed(message, options(context).refuse)
            return call_next(message, context)
        except SecateurError as error:
            return messages.failure(message, error)

    return refuse


def is_refusable(message: Message) -> bool:
    """Say whether an owner may refuse what a message asks."""
    return name_of(message.metadata.message_type) in REFUSABLE


def check_allowed(message: Message, refuse: str) -> None:
    """Raise ``RefusedRequestError`` if the owner's setting names what a message asks."""
    config = message.content.get(messages.CONFIG) if message.has_content() else None
    selection = config.get("forget") if isinstance(config, ConfigRecord) else None
    asked = {EVERYTHING, name_of(message.metadata.message_type), selection}
    found = sorted(refused(refuse) & asked)
    if found:
        raise RefusedRequestError(f"this client's owner does not allow {found[0]!r}")
