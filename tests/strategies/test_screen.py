"""Screening: every kind of bad reply, first and last among good ones."""

import math
import re

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from strategies import messages
from strategies.exchange import Reply
from strategies.screen import Screen

SCHEMA = {"layer.weight": torch.zeros(4, 3), "layer.bias": torch.zeros(4)}


def arrays(weight, bias=None):
    bias = np.zeros(4, np.float32) if bias is None else bias
    return ArrayRecord({"layer.weight": Array(weight), "layer.bias": Array(bias)})


def good(value=1.0, shape=(4, 3), dtype=np.float32):
    return arrays(np.full(shape, value, dtype))


def metrics(num_examples=10, **more):
    return MetricRecord({"loss": 0.5, "num-examples": num_examples, **more})


def reply(client, content):
    """Return a reply as Flower delivers it."""
    message = Message(
        content=content if isinstance(content, RecordDict) else RecordDict(),
        dst_node_id=7,
        message_type="train",
    )
    if isinstance(content, Error):
        message = Message(content, reply_to=message)
    return Reply(client, 7, None if content is None else message)


def record(array_record=None, metric_record=None):
    return RecordDict(
        {
            messages.ARRAYS: array_record if array_record is not None else good(),
            messages.METRICS: metric_record if metric_record is not None else metrics(),
        }
    )


def lying_array():
    """Declare the right shape over the bytes of another."""
    array = Array(np.zeros((2, 3), np.float32))
    array.shape = [4, 3]
    return array


def garbage():
    array = Array(np.zeros((4, 3), np.float32))
    array.data = b"not an array"
    return array


def pickled():
    """Return bytes that only unpickling could read."""
    array = Array(np.zeros((4, 3), np.float32))
    array.data = b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."
    return array


def header(descr="'<f4'", shape="(4, 3)", closing="}"):
    """Return bytes whose header lies in a way that the decoder does not expect."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {closing}"
    text = text.ljust(117) + "\n"
    array = Array(np.zeros((4, 3), np.float32))
    array.data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    return record(ArrayRecord({**dict(good().items()), "layer.weight": array}))


def without(key):
    kept = {k: v for k, v in good().items() if k != key}
    return ArrayRecord(kept)


def with_extra():
    return ArrayRecord({**dict(good().items()), "extra": Array(np.zeros(1, np.float32))})


BAD = {
    "NaN weights": (record(good(math.nan)), "holds NaN or Inf"),
    "Inf weights": (record(good(math.inf)), "holds NaN or Inf"),
    "huge weights": (record(good(1e30)), "times the (model's own|round's median)"),
    "large weights": (record(good(100.0)), "times the round's median"),
    "other shape": (record(good(shape=(5, 3))), r"shape \(5, 3\), expected \(4, 3\)"),
    "transposed": (record(good(shape=(3, 4))), r"shape \(3, 4\), expected \(4, 3\)"),
    "broadcastable shape": (record(good(shape=(1, 3))), r"shape \(1, 3\)"),
    "scalar": (record(good(shape=())), r"shape \(\)"),
    "more dimensions": (record(good(shape=(2, 4, 3))), r"shape \(2, 4, 3\)"),
    "float64": (record(good(dtype=np.float64)), "dtype float64"),
    "float16": (record(good(dtype=np.float16)), "dtype float16"),
    "int32": (record(good(dtype=np.int32)), "dtype int32"),
    "bool": (record(good(dtype=np.bool_)), "dtype bool"),
    "complex": (record(good(dtype=np.complex64)), "dtype complex64|bytes, at most"),
    "missing tensor": (record(without("layer.bias")), "missing tensors layer.bias"),
    "extra tensor": (record(with_extra()), "unknown tensors extra"),
    "no tensors": (record(ArrayRecord()), "missing tensors"),
    "lie about the shape": (record(ArrayRecord({**dict(good().items()), "layer.weight": lying_array()})), r"shape \(2, 3\)"),
    "garbage": (record(ArrayRecord({**dict(good().items()), "layer.weight": garbage()})), "cannot be decoded"),
    "pickle": (record(ArrayRecord({**dict(good().items()), "layer.weight": pickled()})), "cannot be decoded"),
    "header with a huge shape": (header(shape=f"({10**28},)"), "cannot be decoded"),
    "header without a type": (header(descr="()"), "cannot be decoded"),
    "header that never ends": (header(shape="(4, 3", closing=""), "cannot be decoded"),
    "oversize": (record(good(shape=(400, 300))), "bytes, at most"),
    "other record name": (RecordDict({"model": good(), "metrics": metrics()}), "expected array records"),
    "two array records": (RecordDict({"arrays": good(), "more": good(), "metrics": metrics()}), "expected array records"),
    "no array record": (RecordDict({"metrics": metrics()}), "expected array records"),
    "no metrics": (RecordDict({"arrays": good()}), "expected metric records"),
    "two metric records": (RecordDict({"arrays": good(), "metrics": metrics(), "more": metrics()}), "expected metric records"),
    "no num-examples": (record(None, MetricRecord({"loss": 0.5})), "'num-examples' is missing"),
    "zero num-examples": (record(None, metrics(0)), "must be positive"),
    "negative num-examples": (record(None, metrics(-10)), "must be positive"),
    "NaN num-examples": (record(None, metrics(math.nan)), "is nan"),
    "Inf num-examples": (record(None, metrics(math.inf)), "is inf"),
    "absurd num-examples": (record(None, metrics(10**18)), "exceeds"),
    "largest num-examples": (record(None, metrics(2**63 - 1)), "exceeds"),
    "list of num-examples": (record(None, metrics([10, 10])), "is a list"),
    "NaN metric": (record(None, MetricRecord({"loss": math.nan, "num-examples": 10})), "'loss' is nan"),
    "accuracy over 1": (record(None, metrics(10, accuracy=1e6)), r"'accuracy' is 1e\+06; it must"),
    "list metric": (record(None, MetricRecord({"loss": [0.5], "num-examples": 10})), "is a list"),
    "other metric names": (record(None, metrics(10, surprise=1.0)), "differ from most clients'"),
    "error": (Error(2, "raised: <script>\n\x1b[31m"), r"error 2: raised: <script>  \[31m"),
    "silence": (None, "no reply before the deadline"),
}  # fmt: skip


@pytest.mark.parametrize("position", ["first", "last"])
@pytest.mark.parametrize("kind", BAD)
def test_one_bad_reply_is_dropped_and_named(kind, position):
    content, reason = BAD[kind]
    bad = "a" if position == "first" else "z"
    replies = [
        reply(client, record(good(value))) for client, value in (("k", 1), ("l", 2), ("m", 3))
    ]
    replies.insert(0 if position == "first" else 3, reply(bad, content))

    screened = Screen().check(replies, SCHEMA)

    assert [answer.client for answer in screened.answers] == ["k", "l", "m"]
    assert list(screened.rejected) == [bad]
    assert re.search(reason, screened.rejected[bad])
    assert all(
        answer.arrays[name].shape == tensor.shape and answer.arrays[name].dtype == tensor.dtype
        for answer in screened.answers
        for name, tensor in SCHEMA.items()
    )


def test_silence_and_errors_are_no_strikes_but_broken_rules_are():
    replies = [
        reply("a", None),
        reply("b", Error(5, "Node Unavailable")),
        reply("c", record(good(math.nan))),
        reply("d", record()),
    ]
    screened = Screen().check(replies, SCHEMA)
    assert set(screened.rejected) == {"a", "b", "c"}
    assert screened.faults == {"c"}


@pytest.mark.parametrize("kind", ["huge weights", "absurd num-examples", "other metric names"])
def test_rules_that_compare_with_the_others_are_strikes_too(kind):
    replies = [reply(c, record()) for c in "abc"] + [reply("z", BAD[kind][0])]
    assert Screen().check(replies, SCHEMA).faults == {"z"}


def test_of_two_clients_neither_can_outvote_the_other_by_more_than_the_cap():
    replies = [reply("a", record(None, metrics(10))), reply("b", record(None, metrics(10**18)))]
    screened = Screen().check(replies, SCHEMA)
    assert {a.client: a.num_examples for a in screened.answers} == {"a": 10, "b": 20}


def test_an_absurd_update_is_refused_even_if_there_is_nobody_to_compare_with():
    screened = Screen().check([reply("a", record(good(1e30))), reply("b", record())], SCHEMA)
    assert [answer.client for answer in screened.answers] == ["b"]
    assert "times the model's own" in screened.rejected["a"]


def test_all_bad_leaves_nothing():
    replies = [reply(c, record(good(math.nan))) for c in "abc"]
    screened = Screen().check(replies, SCHEMA)
    assert screened.answers == ()
    assert set(screened.rejected) == {"a", "b", "c"}


def test_a_large_weight_is_capped_at_twice_the_median():
    # Median of 10, 10, 30 is 10: the cap is 20.
    sizes = {"a": 10, "b": 30, "c": 10}
    screened = Screen().check(
        [reply(c, record(None, metrics(n))) for c, n in sizes.items()], SCHEMA
    )
    assert {a.client: a.num_examples for a in screened.answers} == {"a": 10, "b": 20, "c": 10}
    assert screened.capped == {"b": 30}
    assert not screened.rejected


def test_error_texts_are_cut_and_printable():
    screened = Screen().check([reply("a", Error(2, "x" * 10_000 + "\n"))], SCHEMA)
    assert len(screened.rejected["a"]) < 300
    assert screened.rejected["a"].isprintable()


@given(
    st.lists(
        st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=True, allow_infinity=True)),
        min_size=1,
        max_size=6,
    )
)
def test_no_reported_weight_ever_outvotes_the_cap(sizes):
    replies = [reply(f"c{n}", record(None, metrics(size))) for n, size in enumerate(sizes)]
    screened = Screen().check(replies, SCHEMA)
    weights = sorted(answer.num_examples for answer in screened.answers)
    assert len(weights) + len(screened.rejected) == len(sizes)
    assert all(math.isfinite(weight) and weight > 0 for weight in weights)
    if weights:
        reported = sorted(size for n, size in enumerate(sizes) if f"c{n}" not in screened.rejected)
        lower_middle = reported[(len(reported) - 1) // 2]
        assert weights[-1] <= 2 * lower_middle * (1 + 1e-9)


@given(value=st.floats(width=32, allow_nan=True, allow_infinity=True))
def test_whatever_survives_is_finite(value):
    replies = [reply(c, record(good(1.0))) for c in "abc"] + [reply("z", record(good(value)))]
    for answer in Screen().check(replies, SCHEMA).answers:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in answer.arrays.values())


def test_metrics_only_replies_are_screened_without_a_model():
    content = RecordDict({messages.METRICS: MetricRecord({"accuracy": 0.5, "num-examples": 3})})
    screened = Screen().check([reply("a", content), reply("b", record())], None)
    assert [answer.client for answer in screened.answers] == ["a"]
    assert "array records" in screened.rejected["b"]
