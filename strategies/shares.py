"""What clients that keep a batch log are told: their shares, and what was taken back."""

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Message

from strategies import messages
from strategies.directory import Directory
from strategies.memory import Memory


class Shares:
    """Knows which rounds asked every client, and so which shares it has yet to be told.

    A message may be lost, so a share is told with every message until the client has entered the
    average of a later round: to train in it, it must have got that round's message. Of rounds that
    are played again nothing is told before they count.

    Parameters
    ----------
    on
        Whether clients keep logs; nobody is told anything otherwise.
    memory
        Knows who entered which average last, with what share.
    directory
        Names the client behind a node.
    """

    def __init__(self, memory: Memory, directory: Directory, *, on: bool) -> None:
        self.on = on
        self._memory = memory
        self._directory = directory
        self._asked: dict[str, list[int]] = {}
        """Client -> rounds that asked it, ascending; none before the last that it entered."""
        self._replayed: dict[str, tuple[int, Mapping[int, float]]] = {}
        """Client -> the last round played again, and its shares in those and before."""

    def tell(self, outgoing: Sequence[Message], number: int) -> list[Message]:
        """Add to the messages of round ``number`` what each client has yet to be told."""
        for message in outgoing if self.on else ():
            client = self._directory.client(message.metadata.dst_node_id)
            if told := self.told(client):
                messages.tell(message, told)
            self.asked(client, number)
        return list(outgoing)

    def asked(self, client: str, number: int) -> None:
        """Take note that a round asks a client."""
        entered, _ = self._memory.shares.get(client, (0, 0.0))
        before = [asked for asked in self._asked.get(client, ()) if asked >= entered]
        self._asked[client] = [*before, number]

    def told(self, client: str) -> dict[str, Any]:
        """Return what a message to a client says."""
        told: dict[str, Any] = {}
        if not self.on:
            return told
        if shares := self.of(client):
            told = {messages.SHARE: list(shares.values()), messages.SHARE_ROUND: list(shares)}
        if self._memory.taken_back:
            told[messages.TAKEN_BACK] = list(self._memory.taken_back)
        return told

    def of(self, client: str) -> Mapping[int, float]:
        """Return a client's shares by round, ascending: 0 of those that asked it in vain."""
        entered, share = self._memory.shares.get(client, (0, 0.0))
        newest, found = self._replayed.get(client, (0, {}))
        asked = {n: share if n == entered else 0.0 for n in self._asked.get(client, ())}
        return {
            **(found if entered <= newest else {}),
            **{n: own for n, own in asked.items() if n >= entered},
        }

    def replayed(self, origin: int, newest: int, shares: Mapping[int, Mapping[str, float]]) -> None:
        """Take note of the rounds after ``origin``, which were played again as ever, and count.

        Everybody is told of all of them, 0 where it was not in one: what its log has of that round
        is of the course that is undone. To be called before the memory is rewritten.
        """
        for client in self._directory.clients():
            kept = {n: own for n, own in self.of(client).items() if n <= origin}
            again = {n: shares.get(n, {}).get(client, 0.0) for n in range(origin + 1, newest + 1)}
            self._replayed[client] = newest, kept | again
            self._asked[client] = []
        known = self._memory.unlogged.items()
        self._memory.unlogged = {client: first for client, first in known if first <= origin}

    def mixed_up(self, clients: Mapping[str, int]) -> None:
        """Take note that from a round on, logs tell of training that the model is not made of."""
        known = self._memory.unlogged
        earlier = {client: min(n, known.get(client, n)) for client, n in clients.items()}
        self._memory.unlogged = {**known, **earlier}
