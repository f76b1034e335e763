"""Who is who: the map between Flower's node ids and clients, and a Grid that hides some."""

import time
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from strategies import messages
from unlearning.errors import SecateurError

Identify = Callable[[Grid, Iterable[int]], Mapping[int, str]]
"""Names the client behind each node id; called once for each new node."""

IDENTIFY_TIMEOUT_S = 120.0


class QuorumError(SecateurError):
    """Too few clients are there, or answered, for a round to count."""


def by_node(grid: Grid, nodes: Iterable[int]) -> dict[int, str]:
    """Identify a client by its node id, which in a deployment follows from its registered key."""
    del grid
    return {node: f"node-{node}" for node in nodes}


def by_partition(grid: Grid, nodes: Iterable[int]) -> dict[int, str]:
    """Identify a simulated client by its partition, asking each node once.

    Only a simulation may trust this: there the answer comes from the engine's own process. In a
    deployment a client could claim any name.
    """
    asked = list(nodes)
    questions = [
        Message(content=RecordDict(), dst_node_id=node, message_type=messages.QUERY_IDENTITY)
        for node in asked
    ]
    replies = list(grid.send_and_receive(questions, timeout=IDENTIFY_TIMEOUT_S))
    node_of = {m.metadata.message_id: m.metadata.dst_node_id for m in questions}
    partitions: dict[int, int] = {}
    for reply in replies:
        if reply.has_error():
            raise SecateurError(f"a simulated client failed to say who it is: {reply.error.reason}")
        record = reply.content.metric_records[messages.METRICS]
        partitions[node_of[reply.metadata.reply_to_message_id]] = int(record[messages.PARTITION])  # type: ignore[arg-type]
    if len(partitions) < len(asked):
        raise SecateurError(
            f"only {len(partitions)} of {len(asked)} simulated clients said who they are within "
            f"{IDENTIFY_TIMEOUT_S:.0f} s"
        )
    if len(set(partitions.values())) < len(partitions):
        raise SecateurError("two simulated clients claim the same partition")
    return {node: client_name(partition) for node, partition in partitions.items()}


def client_name(partition: int) -> str:
    """Return the identity of the simulated client that holds a partition; sorts numerically."""
    return f"client-{partition:04d}"


def wait_for_nodes(
    grid: Grid,
    count: int,
    *,
    patience_s: float,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Return once ``count`` nodes are connected; raise ``QuorumError`` after ``patience_s``.

    A simulation's nodes appear one by one; a run that began with those that happened to be there
    could not be repeated.
    """
    end = clock() + patience_s
    while (connected := len(list(grid.get_node_ids()))) < count:
        if clock() > end:
            raise QuorumError(
                f"only {connected} of {count} clients connected within {patience_s:g} s"
            )
        pause(0.05)


class Directory:
    """Remembers which client each node is; asks ``identify`` about nodes it has not seen."""

    def __init__(self, identify: Identify = by_node) -> None:
        self._identify = identify
        self._clients: dict[int, str] = {}
        self._newest: dict[str, int] = {}

    def refresh(self, grid: Grid) -> dict[int, str]:
        """Return the clients that are online now, by node id."""
        online = list(grid.get_node_ids())
        unknown = sorted(node for node in online if node not in self._clients)
        if unknown:
            named = self._identify(grid, unknown)
            self._clients.update(named)
            self._newest.update((client, node) for node, client in named.items())
        return {node: self._clients[node] for node in online}

    def client(self, node: int) -> str:
        """Return the client behind a node that was online before."""
        return self._clients[node]

    def node(self, client: str) -> int:
        """Return the newest node of a client."""
        if client in self._newest:
            return self._newest[client]
        raise SecateurError(f"no client is called {client!r}; known: {', '.join(self.clients())}")

    def clients(self) -> tuple[str, ...]:
        """Return every client seen so far, sorted."""
        return tuple(sorted(set(self._clients.values())))


class VisibleGrid(Grid):
    """A Grid on which only some clients exist, listed in the order of their names.

    Hidden clients are simply not there, so any strategy works unmodified, and sampling does not
    depend on the order in which nodes connected. Flower's sampler waits for ever when it finds too
    few nodes; here its next look after ``patience_s`` seconds raises ``QuorumError`` instead.
    """

    def __init__(
        self,
        grid: Grid,
        directory: Directory,
        allowed: Callable[[str], bool],
        *,
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid = grid
        self._directory = directory
        self._allowed = allowed
        self._patience_s = patience_s
        self._clock = clock
        self._first_look: float | None = None

    def get_node_ids(self) -> list[int]:
        """Return the visible nodes, sorted by client."""
        now = self._clock()
        self._first_look = now if self._first_look is None else self._first_look
        visible = [
            (client, node)
            for node, client in self._directory.refresh(self._grid).items()
            if self._allowed(client)
        ]
        if now - self._first_look > self._patience_s:
            raise QuorumError(
                f"the strategy still waits for clients after {self._patience_s:g} s and "
                f"{len(visible)} may take part; connect more, or lower its min_available_nodes "
                "and min_train_nodes"
            )
        return [node for _, node in sorted(visible)]

    def get_nodes(self) -> list[object]:  # type: ignore[override]
        """Return Flower's description of the visible nodes."""
        visible = set(self.get_node_ids())
        return [info for info in self._grid.get_nodes() if info.node_id in visible]

    @property
    def run(self):  # type: ignore[no-untyped-def]
        """Return the run of the grid behind."""
        return self._grid.run

    def set_run(self, run) -> None:  # type: ignore[no-untyped-def]
        """Set the run of the grid behind."""
        self._grid.set_run(run)

    def create_message(self, *args, **kwargs) -> Message:  # type: ignore[no-untyped-def]
        """Create a message through the grid behind; deprecated by Flower."""
        return self._grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the grid behind."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies through the grid behind."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send through the grid behind."""
        return self._grid.send_and_receive(messages, timeout=timeout)
