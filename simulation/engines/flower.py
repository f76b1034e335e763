"""The private pieces of Flower that an engine needs, in one place; held by a contract test."""

import uuid

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE_ID = SUPERLINK_NODE_ID + 1000
"""Node ids of simulated clients start here; the SuperLink's own must not be among them."""


def begin_run(run_id: int) -> Run:
    """Make this process the server of run ``run_id``; there can be one per process."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
    return Run.create_empty(run_id=run_id)


def with_id(message: Message) -> Message:
    """Give a message an id, as a SuperLink does when it takes a message."""
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    return message


def with_own_content(message: Message) -> Message:
    """Detach a message from others that carry the same content object."""
    message.content = RecordDict({key: record.copy() for key, record in message.content.items()})
    return message


def error_reply(message: Message, raised: Exception) -> Message:
    """Return the reply that Flower makes of an exception in a ClientApp."""
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(raised)}:<'{raised}'>")
    return Message(error, reply_to=message)


def client_context(run_id: int, node_id: int, partition: int, partitions: int) -> Context:
    """Return the context that a simulated client keeps between messages."""
    return Context(
        run_id=run_id,
        node_id=node_id,
        node_config={"partition-id": partition, "num-partitions": partitions},
        state=RecordDict(),
        run_config={},
    )
