"""A Grid that runs every client in this process, one after the other: no start-up, no copies."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from simulation.engines import flower


class InProcessGrid(Grid):
    """Runs a ClientApp for ``clients`` simulated clients.

    Each client has a ``Context`` that lives as long as the grid. A client that raises becomes an
    error reply, as everywhere in Flower.
    """

    def __init__(self, app: ClientApp, clients: int, *, run_id: int = 1) -> None:
        self._app = app
        self._run = flower.begin_run(run_id)
        self._replies: dict[str, Message] = {}
        self.contexts: dict[int, Context] = {
            flower.FIRST_NODE_ID + number: flower.client_context(
                run_id, flower.FIRST_NODE_ID + number, number, clients
            )
            for number in range(clients)
        }

    @property
    def run(self) -> Any:
        """Return the run."""
        return self._run

    def set_run(self, run: Any) -> None:
        """Set the run."""
        self._run = run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Create a message; deprecated by Flower."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> list[int]:
        """Return all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run every client that is written to, and keep the replies."""
        sent = [flower.with_own_content(flower.with_id(message)) for message in messages]
        for message in sent:
            reply = flower.with_id(self._answer(message))
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages; each is given out once."""
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the replies to ``messages``."""
        del timeout  # a client that does not return cannot be interrupted in its own process
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # noqa: BLE001  a client may raise anything
            return flower.error_reply(message, error)
