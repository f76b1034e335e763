"""Clients are told what their last update had in its round's average, where a log needs it."""

from collections.abc import Sequence
from typing import Any, cast

from flwr.app import ConfigRecord, Message, RecordDict

from strategies import messages
from strategies.directory import Directory
from strategies.memory import Memory


class Shares:
    """Knows which round asked every client last, and so which share it has yet to be told.

    Parameters
    ----------
    memory
        Knows who entered which average, with what share.
    directory
        Names the client behind a node.
    """

    def __init__(self, memory: Memory, directory: Directory) -> None:
        self._memory = memory
        self._directory = directory
        self._asked: dict[str, int] = {}

    def tell(self, outgoing: Sequence[Message], number: int) -> list[Message]:
        """Add to the messages of round ``number`` what each client's last update had."""
        for message in outgoing:
            client = self._directory.client(message.metadata.dst_node_id)
            share = self.of(client)
            if share is not None:
                config = cast(Any, message.content[messages.CONFIG])
                told = ConfigRecord({**config, messages.SHARE: share})
                arrays = message.content[messages.ARRAYS]
                message.content = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: told})
            self._asked[client] = number
        return list(outgoing)

    def of(self, client: str) -> float | None:
        """Return a client's share of the round that asked it last; 0 where it was not used.

        ``None`` where no round has asked it yet.
        """
        if client not in self._asked:
            return None
        number, share = self._memory.shares.get(client, (0, 0.0))
        return share if number == self._asked[client] else 0.0
