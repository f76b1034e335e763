"""Say for every client asked what came back, or that nothing did."""

import logging
from collections.abc import Iterable, Sequence
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

    A reply belongs to the node that its *request* was sent to: error replies made by the
    SuperLink name the wrong source. Of several replies to one request the first counts. Sorting
    makes the round independent of the order of arrival.
    """
    # Messages carry an id only once they were sent; one that could not be sent has none.
    node_of = {
        m.metadata.message_id: m.metadata.dst_node_id for m in outgoing if m.metadata.message_id
    }
    first: dict[int, Message] = {}
    for message in received:
        node = node_of.get(message.metadata.reply_to_message_id)
        if node is None or node in first:
            log.warning("ignored a reply that answers no open request of this round")
            continue
        first[node] = message
    nodes = [m.metadata.dst_node_id for m in outgoing]
    replies = [Reply(directory.client(node), node, first.get(node)) for node in nodes]
    return sorted(replies, key=lambda reply: reply.client)
