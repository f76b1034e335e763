"""A Grid that runs every client in this process: no start-up, no copies."""

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from client.contexts import start_of, use_one_thread
from client.forgetting.ffmu import settings_of
from client.forgetting.steps import LEARNING, STEPS
from client.train import Job
from simulation.engines.training import Training, Update
from simulation.engines.work import PLAIN, FfmuRound, Work
from strategies import flower, messages
from strategies.actions import Ffmu

JobOf = Callable[[Message, Context], Job]
"""Says what a client's ClientApp would do with a ``train`` message."""


YOUNG_OBJECTS = 50_000
"""Objects made before the collector of cycles looks at them; a round's messages are in none."""


def collect_rarely() -> None:
    """Spare this process most of the collector's passes, a tenth of a round of small models.

    To be called once, by a program that does nothing but simulate, when everything is loaded.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


class InProcessGrid(Grid):
    """Runs a ClientApp for ``clients`` simulated clients.

    Each client has a ``Context`` that lives as long as the grid. A client that raises becomes an
    error reply, as everywhere in Flower.

    Parameters
    ----------
    app
        Any ClientApp; run for one message after the other.
    clients
        Number of clients; each holds one partition.
    job_of
        Given, ``train`` and ``train.ffmu`` messages go neither through the app nor its mods, and
        ``Context.state`` is not touched: many clients train at once, and ``send_and_receive``
        returns an iterator that trains as it is read. All other messages go through the app.
    """

    def __init__(
        self, app: ClientApp, clients: int, *, job_of: JobOf | None = None, run_id: int = 1
    ) -> None:
        self._app = app
        self._job_of = job_of
        self._training = Training()
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
        sent = [flower.with_id(message) for message in messages]
        for reply in self._answers(sent):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages; each is given out once."""
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies to ``messages``; an iterator if clients train at once."""
        del timeout  # a client that does not return cannot be interrupted in its own process
        sent = [flower.with_id(message) for message in messages]
        answers = self._answers(sent)
        return list(answers) if self._job_of is None else answers

    def _answers(self, sent: Sequence[Message]) -> Iterator[Message]:
        use_one_thread()
        # Whoever is asked for something else does not part those who train on the same content.
        ordered = sorted(sent, key=lambda m: (_trains_on(m) is not None, m.metadata.dst_node_id))
        if self._job_of is None:
            yield from (flower.with_id(self._answer(message)) for message in ordered)
            return
        for content, group in itertools.groupby(ordered, key=_trains_on):
            if content is not None:
                yield from self._train(list(group))
            else:
                yield from map(flower.with_id, self._through_app(list(group)))

    def _through_app(self, sent: Sequence[Message]) -> Iterator[Message]:
        """Answer other messages: steps side by side in threads, where these help training too."""
        nodes = {message.metadata.dst_node_id for message in sent}
        steps = all(message.metadata.message_type in SIDE_BY_SIDE for message in sent)
        if not (steps and len(nodes) == len(sent) and self._training.used_threads):
            yield from map(self._answer, sent)
            return
        first, *others = sent
        yield self._answer(first)  # makes what all clients share, such as the task, once
        yield from self._training.in_threads(self._answer, others)

    def _answer(self, message: Message) -> Message:
        flower.with_own_content(message)
        try:
            return self._app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # noqa: BLE001  a client may raise anything
            return flower.error_reply(message, error)

    def _train(self, sent: Sequence[Message]) -> Iterator[Message]:
        """Train the clients written to; the messages carry the same content."""
        try:
            start, work = start_of(sent[0]), _work_of(sent[0])
        except Exception as error:  # noqa: BLE001  so would every client's ClientApp
            yield from (flower.with_id(messages.failure(message, error)) for message in sent)
            return
        asked, jobs = [], []
        for message in sent:
            try:
                job = self._job_of(message, self.contexts[message.metadata.dst_node_id])  # type: ignore[misc]
                job.num_examples  # noqa: B018  counted here: a client's data may raise
            except Exception as error:  # noqa: BLE001  so would the ClientApp
                yield flower.with_id(messages.failure(message, error))
            else:
                asked.append(message)
                jobs.append(job)
        for outcomes in self._training.run(jobs, start, work):
            for position, outcome in outcomes:
                reply = _reply(asked[position], outcome, jobs[position].num_examples)
                yield flower.with_id(reply)


SIDE_BY_SIDE = frozenset(kind.action for kind in STEPS if kind not in LEARNING)
"""Messages whose answers are computed from the message and the client's rows alone, by a network in
evaluation mode and generators of their own."""
TRAINING = frozenset({messages.TRAIN, Ffmu.action})
"""Messages that jobs say how to answer."""


def _trains_on(message: Message) -> tuple[int, str] | None:
    """Return which content a client is to train on, and how; equal for messages that share it."""
    kind = message.metadata.message_type
    return (id(message.content), kind) if kind in TRAINING else None


def _work_of(message: Message) -> Work:
    """Return what a message that trains asks for."""
    if message.metadata.message_type == messages.TRAIN:
        return PLAIN
    return FfmuRound(settings_of(message.content[messages.CONFIG]))


def _reply(message: Message, outcome: Update | Exception, num_examples: int) -> Message:
    if isinstance(outcome, Exception):
        return messages.failure(message, outcome)
    content = messages.train_reply(outcome.tensors, outcome.metrics, num_examples, row=outcome.row)
    return flower.reply_to(message, content)
