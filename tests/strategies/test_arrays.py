"""Arrays that stay tensors, and Flower's private pieces that messages are made with."""

import copy
import pickle

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_type_from_object_content

from strategies import flower, messages
from strategies.arrays import TensorArray, tensor_of

TENSORS = [
    torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    torch.tensor(7),
    torch.tensor([True, False]),
    torch.arange(6, dtype=torch.int64).reshape(2, 3).t(),  # not contiguous
    torch.zeros(0, 2, dtype=torch.float64),
]


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_tensor_array_is_what_flower_would_have_made(tensor):
    ours, flowers = TensorArray(tensor), Array(np.array(tensor.numpy(), order="C"))
    assert (ours.dtype, ours.shape, ours.stype) == (flowers.dtype, flowers.shape, flowers.stype)
    assert np.array_equal(ours.numpy(), flowers.numpy())
    assert np.array_equal(
        Array(ours.dtype, ours.shape, ours.stype, ours.data).numpy(), flowers.numpy()
    )
    assert TensorArray(tensor.contiguous()) == flowers
    assert isinstance(ours, Array)


def test_a_row_of_a_stack_is_one_clients_array():
    stack = torch.arange(6.0).reshape(2, 3)
    second = TensorArray(stack, 1)
    assert second.shape == (3,)
    assert second.numpy().tolist() == [3, 4, 5]
    assert second == Array(np.array([3, 4, 5], dtype=np.float32))
    assert second != TensorArray(stack, 0)


def test_copies_may_be_written_to_and_the_tensor_itself_is_shared():
    tensor = torch.zeros(2)
    array = TensorArray(tensor)
    array.numpy()[0] = 1
    assert tensor.tolist() == [0, 0]
    assert tensor_of(array) is not None
    assert tensor_of(array).data_ptr() == tensor.data_ptr()
    record = messages.record_from({"w": tensor})
    messages.parameters_from(record)["w"] += 1
    assert tensor.tolist() == [0, 0]


@pytest.mark.parametrize("travel", [pickle.dumps, copy.deepcopy])
def test_elsewhere_it_is_a_plain_array(travel):
    arrived = travel(TensorArray(torch.ones(2)))
    arrived = pickle.loads(arrived) if isinstance(arrived, bytes) else arrived  # noqa: S301
    assert type(arrived) is Array
    assert arrived.numpy().tolist() == [1, 1]


def test_replacing_the_bytes_replaces_the_tensor():
    array = TensorArray(torch.ones(2))
    array.data = Array(np.zeros(2, dtype=np.float32)).data
    assert array.tensor is None
    assert array.numpy().tolist() == [0, 0]
    assert (array.dtype, array.shape) == ("float32", (2,))


def test_the_wire_knows_it_as_an_array_and_its_id_is_flowers():
    ours, flowers = TensorArray(torch.ones(2)), Array(np.ones(2, dtype=np.float32))
    assert get_object_type_from_object_content(ours.deflate()) == "Array"
    assert ours.object_id == flowers.object_id
    assert ours.deflate() == flowers.deflate()


# ---------------------------------------------------------------- private pieces
def test_filled_records_are_what_their_constructors_make():
    array, number = Array(np.ones(1)), {"loss": 0.5, "num-examples": 3}
    plain = RecordDict({"arrays": ArrayRecord({"w": array}), "metrics": MetricRecord(number)})
    quick = flower.filled(
        RecordDict,
        {
            "arrays": flower.filled(ArrayRecord, {"w": array}),
            "metrics": flower.filled(MetricRecord, number),
        },
    )
    assert quick == plain
    assert quick.array_records["arrays"]["w"].numpy().tolist() == [1]
    assert quick.object_id == plain.object_id


def test_a_quick_reply_is_what_flowers_constructor_makes():
    asked = flower.with_id(Message(RecordDict(), 1003, "train", ttl=100.0, group_id="g"))
    content = RecordDict({"metrics": MetricRecord({"a": 1})})
    quick, plain = flower.reply_to(asked, content), Message(content, reply_to=asked)
    assert quick.content is content
    assert not quick.has_error()
    one, other = vars(quick.metadata), vars(plain.metadata)
    assert one.keys() == other.keys()
    for name in one.keys() - {"_created_at", "_ttl"}:
        assert one[name] == other[name], name
    ends = [vars(m.metadata)["_created_at"] + vars(m.metadata)["_ttl"] for m in (quick, plain)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-3)
    assert one["_created_at"] == pytest.approx(other["_created_at"], abs=10)


def test_message_ids_are_never_given_twice():
    ids = [flower.with_id(Message(RecordDict(), 1, "train")).metadata.message_id for _ in range(9)]
    assert len(set(ids)) == 9
    assert all(len(text) == 32 for text in ids)
