"""The private pieces of Flower that an engine needs, in one place; held by a contract test."""

import itertools
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from flwr.app import ArrayRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from unlearning.errors import SecateurError

FIRST_NODE_ID = SUPERLINK_NODE_ID + 1000
"""Node ids of simulated clients start here; the SuperLink's own must not be among them."""


_ids = itertools.count(1)
Record = TypeVar("Record", ArrayRecord, MetricRecord, RecordDict)
_EMPTY = {kind: kind() for kind in (ArrayRecord, MetricRecord, RecordDict)}


def begin_run(run_id: int) -> Run:
    """Make this process the server of run ``run_id``; there can be one per process."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SUPERLINK_NODE_ID
    return Run.create_empty(run_id=run_id)


def with_id(message: Message) -> Message:
    """Give a message an id, as a SuperLink does when it takes a message."""
    message.metadata.__dict__["_message_id"] = f"{next(_ids):032x}"
    return message


def with_own_content(message: Message) -> Message:
    """Detach a message from others that carry the same content object."""
    records = {key: record.copy() for key, record in message.content.items()}
    message.content = filled(RecordDict, records)
    return message


def filled(kind: type[Record], items: Mapping[str, Any]) -> Record:
    """Return ``kind(items)`` without a check of every entry's type.

    Flower's checks take longer than small models train. For entries of types that are known.
    """
    record = kind.__new__(kind)
    record.__dict__.update(_EMPTY[kind].__dict__, _data=dict(items))
    return record


def reply_to(message: Message, content: RecordDict) -> Message:
    """Return ``Message(content, reply_to=message)`` without the checks of its constructor."""
    asked = message.metadata.__dict__
    now = time.time()
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(
        _run_id=asked["_run_id"],
        _message_id="",
        _src_node_id=asked["_dst_node_id"],
        _dst_node_id=asked["_src_node_id"],
        _src_task_id=asked["_dst_task_id"],
        _dst_task_id=asked["_src_task_id"],
        _reply_to_message_id=asked["_message_id"],
        _group_id=asked["_group_id"],
        _created_at=now,
        _ttl=asked["_created_at"] + asked["_ttl"] - now,
        _message_type=asked["_message_type"],
        _delivered_at="",
    )
    reply = Message.__new__(Message)
    reply.__dict__.update(_metadata=metadata, _content=content, _error=None)
    return reply


def error_reply(message: Message, raised: Exception) -> Message:
    """Return the reply that Flower makes of an exception in a ClientApp; of our own, their text."""
    text = str(raised) if isinstance(raised, SecateurError) else f"{type(raised)}:<'{raised}'>"
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text)
    return Message(error, reply_to=message)


def refusal_reply(message: Message, reason: str) -> Message:
    """Return the reply of a client that was not let do what it was asked."""
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)


def client_context(run_id: int, node_id: int, partition: int, partitions: int) -> Context:
    """Return the context that a simulated client keeps between messages."""
    return Context(
        run_id=run_id,
        node_id=node_id,
        node_config={"partition-id": partition, "num-partitions": partitions},
        state=RecordDict(),
        run_config={},
    )
