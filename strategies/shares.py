"""What clients that keep a batch log are told: their shares, and what was taken back."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from flwr.app import ConfigRecord, Message, RecordDict

from strategies import messages
from strategies.directory import Directory
from strategies.memory import Memory


class Shares:
    """Knows which rounds asked every client, and so which shares it has yet to be told.

    A message may be lost, so a share is told with every message until the client has entered the
    average of a later round: to train in it, it must have got that round's message.

    Parameters
    ----------
    memory
        Knows who entered which average last, with what share.
    directory
        Names the client behind a node.
    """

    def __init__(self, memory: Memory, directory: Directory) -> None:
        self._memory = memory
        self._directory = directory
        self._asked: dict[str, list[int]] = {}
        """Client -> rounds that asked it, ascending; none before the last that it entered."""

    def tell(self, outgoing: Sequence[Message], number: int) -> list[Message]:
        """Add to the messages of round ``number`` what each client has yet to be told."""
        for message in outgoing:
            client = self._directory.client(message.metadata.dst_node_id)
            if told := self.told(client):
                config = cast(Any, message.content[messages.CONFIG])
                arrays = message.content[messages.ARRAYS]
                message.content = RecordDict(
                    {messages.ARRAYS: arrays, messages.CONFIG: ConfigRecord({**config, **told})}
                )
            entered, _ = self._memory.shares.get(client, (0, 0.0))
            asked = [before for before in self._asked.get(client, ()) if before >= entered]
            self._asked[client] = [*asked, number]
        return list(outgoing)

    def told(self, client: str) -> dict[str, Any]:
        """Return what a message to a client says."""
        told: dict[str, Any] = {}
        if shares := self.of(client):
            told = {messages.SHARE: list(shares.values()), messages.SHARE_ROUND: list(shares)}
        if self._memory.taken_back:
            told[messages.TAKEN_BACK] = list(self._memory.taken_back)
        return told

    def of(self, client: str) -> Mapping[int, float]:
        """Return a client's shares by round, ascending: 0 of those that asked it in vain."""
        entered, share = self._memory.shares.get(client, (0, 0.0))
        asked = self._asked.get(client, ())
        return {n: share if n == entered else 0.0 for n in asked if n >= entered}
