"""Say for every client asked what came back, or that nothing did."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flwr.app import Message

from strategies.directory import Directory

log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Reply:
    """What one client sent back."""

    client: str
    node: int
    message: Message | None
    """``None`` when no reply arrived in time."""


def match(
    outgoing: Sequence[Message], received: Iterable[Message], directory: Directory
) -> list[Reply]:
    """Return one ``Reply`` per message sent, sorted by client.

    Sorting makes the round independent of the order of arrival.
    """
    return sorted(matched(outgoing, received, directory), key=lambda reply: reply.client)


def matched(
    outgoing: Sequence[Message], received: Iterable[Message], directory: Directory
) -> Iterator[Reply]:
    """Yield one ``Reply`` per message sent: those that arrive, then those that did not.

    A reply belongs to the node that its *request* was sent to: error replies made by the
    SuperLink name the wrong source. Of several replies to one request the first counts.
    """
    # Messages carry an id only once they were sent; one that could not be sent has none.
    waiting = {
        m.metadata.message_id: m.metadata.dst_node_id for m in outgoing if m.metadata.message_id
    }
    for message in received:
        node = waiting.pop(message.metadata.reply_to_message_id, None)
        if node is None:
            log.warning("ignored a reply that answers no open request of this round")
            continue
        yield Reply(directory.client(node), node, message)
    unsent = [m.metadata.dst_node_id for m in outgoing if not m.metadata.message_id]
    for node in (*waiting.values(), *unsent):
        yield Reply(directory.client(node), node, None)
