"""The server remembers how long clients' lists of what is forgotten were, and reminds them of it.

The lists are on the clients' own disks. One that was deleted, or put back from an old copy, would
bring back what is forgotten, and only somebody who saw the newer one can tell.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from flwr.app import Message
from flwr.serverapp import Grid

from strategies import messages
from strategies.directory import Directory
from unlearning.plan import Answer


class Reminders:
    """Knows what every client said last of its list, and from which node.

    Parameters
    ----------
    directory
        Names the client behind a node.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._entries: dict[str, int] = {}
        self._nodes: dict[str, int] = {}

    def heard(self, answer: Answer) -> str | None:
        """Take note of a client's answer to ``Forget``; say what is wrong with it, if anything."""
        client = answer.client
        entries = int(answer.metrics.get(messages.ENTRIES, 0))
        known = self._entries.get(client, 0)
        if entries < known:
            return f"{messages.SHORTER}: it has {entries} entries, and had {known}"
        self._entries[client], self._nodes[client] = entries, self._directory.node(client)
        return None

    def moved(self) -> list[str]:
        """Return the clients that have another node than when they were last heard."""
        nodes = self._nodes.items()
        return [client for client, node in nodes if self._directory.node(client) != node]

    @staticmethod
    def doubted(rejected: Mapping[str, str]) -> list[str]:
        """Return the clients that say that their list is shorter than it was."""
        return [client for client, why in rejected.items() if messages.SHORTER in why]

    def tell(self, outgoing: Iterable[Message]) -> list[Message]:
        """Add to messages that begin training how long the client's list was."""
        told = list(outgoing)
        for message in told:
            if message.metadata.message_type.split(".")[0] != messages.TRAIN:
                continue
            entries = self._entries.get(self._directory.client(message.metadata.dst_node_id), 0)
            if entries:
                messages.tell(message, {messages.ENTRIES: entries})
        return told

    def on(self, grid: Grid) -> Grid:
        """Return a Grid on which every message that begins training is told so."""
        return cast(Grid, _TellingGrid(grid, self)) if self._entries else grid


class _TellingGrid:
    """A Grid behind which messages are told what ``Reminders.tell`` tells."""

    def __init__(self, grid: Grid, reminders: Reminders) -> None:
        self._grid = grid
        self._reminders = reminders

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def send_and_receive(
        self, outgoing: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send through the grid behind."""
        # Messages are changed in place: whoever sends them looks for the replies to its own.
        return self._grid.send_and_receive(self._reminders.tell(outgoing), timeout=timeout)
