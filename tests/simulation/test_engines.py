"""Engines: what the in-process Grid does as Flower does, and the private pieces it relies on."""

import torch
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

from strategies import flower, messages


def sent(model, node):
    return Message(
        content=RecordDict({messages.ARRAYS: messages.record_from(model)}),
        dst_node_id=node,
        message_type="query.identity",
    )


def test_messages_have_no_id_until_they_are_sent_and_replies_point_back(scripted_grid):
    grid = scripted_grid(lambda *_: RecordDict(), 2)
    first, second = grid.get_node_ids()
    outgoing = [sent({"w": torch.zeros(1)}, node) for node in (first, second)]
    assert all(message.metadata.message_id == "" for message in outgoing)
    replies = grid.send_and_receive(outgoing)
    assert {r.metadata.reply_to_message_id for r in replies} == {
        m.metadata.message_id for m in outgoing
    }
    assert [r.metadata.src_node_id for r in replies] == [first, second]
    assert grid.pull_messages([m.metadata.message_id for m in outgoing]) == []


def test_a_client_that_raises_becomes_flowers_error_reply(scripted_grid):
    grid = scripted_grid(lambda *_: RecordDict(), 1)
    message = Message(
        content=RecordDict(), dst_node_id=grid.get_node_ids()[0], message_type="train.nosuch"
    )
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error()
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "nosuch" in reply.error.reason


def test_clients_keep_their_context_and_never_share_content(scripted_grid):
    grid = scripted_grid(lambda *_: RecordDict(), 2)
    content = RecordDict({messages.ARRAYS: messages.record_from({"w": torch.zeros(1)})})
    shared = [Message(content, node, "query.identity") for node in grid.get_node_ids()]
    grid.push_messages(shared)
    assert shared[0].content is not shared[1].content
    contexts = list(grid.contexts.values())
    assert [c.node_config["partition-id"] for c in contexts] == [0, 1]
    assert flower.FIRST_NODE_ID > 1
