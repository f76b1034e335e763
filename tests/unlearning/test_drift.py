"""Drift subtraction against its definition: methods 1.9."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning import drift
from unlearning.errors import ParametersError
from unlearning.parameters import weighted_mean

seeds = st.integers(0, 40)
TRAINED = ("head.weight", "head.bias", "norm.weight")


def scalar(value):
    return {"w": torch.tensor([float(value)])}


def model(draw):
    return {
        "head.weight": torch.randn(4, 3, generator=draw),
        "head.bias": torch.randn(4, generator=draw),
        "norm.weight": torch.randn(3, generator=draw),
        "norm.running_mean": torch.randn(3, generator=draw),
        "norm.num_batches_tracked": torch.tensor(5),
    }


def rounds(seed, clients="abcde", count=3):
    """Return (models, weights) of rounds in which everybody takes part with a fixed weight."""
    draw = torch.Generator().manual_seed(seed)
    weights = {client: 1.0 + place for place, client in enumerate(clients)}
    return [({client: model(draw) for client in clients}, weights) for _ in range(count)]


def ledger_of(past, memory=1.0):
    ledger = {}
    for models, weights in past:
        ledger = drift.updated(ledger, models, weights, memory)
    return ledger


def without(models, weights, forgotten):
    """Return b, the average of the clients that are not forgotten, and p_F."""
    kept = [client for client in models if client not in forgotten]
    average = weighted_mean([models[c] for c in kept], [weights[c] for c in kept])
    return average, sum(weights[c] for c in forgotten) / sum(weights.values())


def close(one, other, **tolerance):
    assert one
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


def test_the_ledger_by_hand():
    # Weights 1 and 3: wbar = (4 + 0) / 4 = 1, so a pulls by 1/4 (4 - 1) and b by 3/4 (0 - 1).
    first = drift.updated({}, {"a": scalar(4), "b": scalar(0)}, {"a": 1, "b": 3}, 0.5)
    assert {client: row["w"].item() for client, row in first.items()} == {"a": 0.75, "b": -0.75}
    # b sits out. wbar = 1: a has 1/2 .75 + 1/2 (2 - 1), c has 1/2 (0 - 1).
    second = drift.updated(first, {"a": scalar(2), "c": scalar(0)}, {"a": 1, "c": 1}, 0.5)
    values = {client: row["w"].item() for client, row in second.items()}
    assert values == {"a": 0.875, "b": -0.75, "c": -0.5}
    assert second["b"] is first["b"]


def test_the_subtraction_by_hand():
    # 10 - .4 / (1 - .2) .75 - .4 / (1 - .5) (-2 + 1) = 10 - .375 + .8
    events = [[scalar(0.75)], [scalar(-2), scalar(1)]]
    result = drift.subtract(scalar(10), events, [0.2, 0.5])
    assert result["w"].item() == pytest.approx(10.425)
    assert drift.STRENGTH == 0.4


@settings(deadline=None)
@given(seed=seeds)
def test_pulls_of_all_clients_cancel(seed):
    ledger = ledger_of(rounds(seed))
    for name in TRAINED:
        total = sum(row[name] for row in ledger.values())
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-5)


def test_rows_hold_trained_tensors_only_and_buffers_are_the_retained_average():
    past = rounds(0)
    ledger = ledger_of(past)
    assert all(tuple(row) == TRAINED for row in ledger.values())
    kept, share = without(*past[-1], "a")
    result = drift.subtract(kept, [[ledger["a"]]], [share], 1.0)
    assert list(result) == list(kept)
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(result[name], kept[name])
        assert result[name].dtype == kept[name].dtype
    assert not torch.equal(result["head.bias"], kept["head.bias"])


@settings(deadline=None)
@given(seed=seeds)
def test_strength_zero_is_the_retained_average_bit_for_bit(seed):
    past = rounds(seed)
    kept, share = without(*past[-1], "ab")
    ledger = ledger_of(past)
    result = drift.subtract(kept, [[ledger["a"], ledger["b"]]], [share], 0.0)
    assert all(torch.equal(result[name], kept[name]) for name in kept)


@settings(deadline=None)
@given(seed=seeds)
def test_who_always_sent_the_average_of_the_others_leaves_no_trace(seed):
    past = []
    for models, weights in rounds(seed):
        average, _ = without(models, weights, "a")
        past.append(({**models, "a": average}, weights))
    kept, share = without(*past[-1], "a")
    result = drift.subtract(kept, [[ledger_of(past)["a"]]], [share], 1.0)
    close(result, kept, rtol=0, atol=1e-5)
    # Had it sent 1 more in one round, p_F 1 would be taken back.
    models, weights = past[0]
    past[0] = ({**models, "a": {n: models["a"][n] + 1 for n in models["a"]}}, weights)
    traced = drift.subtract(kept, [[ledger_of(past)["a"]]], [share], 1.0)
    for name in TRAINED:
        torch.testing.assert_close(traced[name], kept[name] - share, rtol=0, atol=1e-5)


@settings(deadline=None)
@given(seed=seeds, count=st.integers(1, 4))
def test_strength_one_takes_back_what_they_added_to_the_others_in_every_round(seed, count):
    # w' = b - sum_t p_F (m^t - b^t), m and b being the averages of the two groups
    past, forgotten = rounds(seed, count=count), "bd"
    kept, share = without(*past[-1], forgotten)
    ledger = ledger_of(past)
    result = drift.subtract(kept, [[ledger[client] for client in forgotten]], [share], 1.0)
    for name in TRAINED:
        expected = kept[name].clone()
        for models, weights in past:
            one, _ = without(models, weights, "ace")
            other, _ = without(models, weights, forgotten)
            expected -= share * (one[name] - other[name])
        torch.testing.assert_close(result[name], expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(seed=seeds, strength=st.floats(0, 3))
def test_linear_in_strength_and_additive_in_clients_and_events(seed, strength):
    past = rounds(seed)
    kept, _ = without(*past[-1], "ab")
    ledger = ledger_of(past)
    a, b = ledger["a"], ledger["b"]

    def moved(events, shares, by):
        result = drift.subtract(kept, events, shares, by)
        return {name: result[name] - kept[name] for name in TRAINED}

    both = moved([[a, b]], [0.2], 1.0)
    for name in TRAINED:  # -1 / (1 - .2) times the rows
        expected = -1.25 * (a[name] + b[name])
        torch.testing.assert_close(both[name], expected, rtol=1e-4, atol=1e-5)
        assert float(both[name].abs().max()) > 0.01
    close(
        moved([[a, b]], [0.2], strength),
        {name: strength * tensor for name, tensor in both.items()},
        rtol=1e-4,
        atol=1e-5,
    )
    one, other = moved([[a]], [0.2], 1.0), moved([[b]], [0.2], 1.0)
    apart = {name: one[name] + other[name] for name in TRAINED}
    close(both, apart, rtol=1e-4, atol=1e-5)
    close(moved([[a], [b]], [0.2, 0.2], 1.0), apart, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(seed=seeds, order=st.permutations("abcde"))
def test_the_order_of_clients_changes_nothing(seed, order):
    past = rounds(seed)
    shuffled = [
        ({client: models[client] for client in order}, {c: weights[c] for c in reversed(order)})
        for models, weights in past
    ]
    one, other = ledger_of(past), ledger_of(shuffled)
    assert all(torch.equal(one[c][name], other[c][name]) for c in "abcde" for name in TRAINED)


def test_weights_may_have_any_unit_and_memory_fades_geometrically():
    past = rounds(1, count=3)
    doubled = [(models, {c: 2 * w for c, w in weights.items()}) for models, weights in past]
    one, other = ledger_of(past), ledger_of(doubled)
    assert all(torch.equal(one[c][name], other[c][name]) for c in "abcde" for name in TRAINED)
    apart = [ledger_of([entry])["a"]["head.bias"] for entry in past]
    faded = ledger_of(past, memory=0.5)["a"]["head.bias"]
    torch.testing.assert_close(faded, apart[0] / 4 + apart[1] / 2 + apart[2])


def test_inputs_are_left_untouched():
    past = rounds(2)
    ledger = ledger_of(past[:2])
    models, weights = past[2]
    kept, share = without(models, weights, "a")
    given_ = [*ledger.values(), *models.values(), kept]
    before = [{name: tensor.clone() for name, tensor in m.items()} for m in given_]
    drift.updated(ledger, models, weights)
    drift.subtract(kept, [[ledger["a"]]], [share])
    for one, other in zip(given_, before, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("memory", [0.0, -0.5, 1.1, math.nan])
def test_memory_out_of_range_is_refused(memory):
    with pytest.raises(ParametersError, match=r"must lie in \(0, 1\]"):
        drift.updated({}, {"a": scalar(1)}, {"a": 1}, memory)


@pytest.mark.parametrize(
    ("models", "weights"),
    [
        ({}, {}),
        ({"a": scalar(1)}, {"b": 1}),
        ({"a": scalar(1)}, {"a": 0}),
        ({"a": scalar(1), "b": scalar(1)}, {"a": 2, "b": -1}),
        ({"a": scalar(1), "b": {"w": torch.ones(2)}}, {"a": 1, "b": 1}),
    ],
)
def test_rounds_that_define_no_average_are_refused(models, weights):
    with pytest.raises(ParametersError):
        drift.updated({}, models, weights)


@pytest.mark.parametrize(
    ("rows", "shares", "strength", "message"),
    [
        ([[scalar(1)]], [1.0], 0.4, r"shares in \[0, 1\), got \[1.0\]"),
        ([[scalar(1)]], [-0.1], 0.4, r"shares in \[0, 1\)"),
        ([[scalar(1)]], [math.nan], 0.4, r"shares in \[0, 1\)"),
        ([[scalar(1)]], [], 0.4, "1 events need as many shares"),
        ([[scalar(1)]], [0.5], -1.0, "strength must be a number of at least 0, got -1.0"),
        ([[scalar(1)]], [0.5], math.inf, "strength must be"),
        ([[{"v": torch.ones(1)}]], [0.5], 0.4, "differ in their tensors: v, w"),
        ([[{"w": torch.ones(2)}]], [0.5], 0.4, r"tensor w is \(1,\)"),
        ([[scalar(math.nan)]], [0.5], 0.4, "not finite"),
    ],
)
def test_what_cannot_be_subtracted_is_refused(rows, shares, strength, message):
    with pytest.raises(ParametersError, match=message):
        drift.subtract(scalar(1), rows, shares, strength)


def test_nobody_to_forget_is_the_retained_average():
    assert drift.subtract(scalar(3), [], [])["w"].tolist() == [3.0]


class CountedModel(dict):
    """Counts how often each tensor is read."""

    reads = 0

    def __getitem__(self, name):
        self.reads += 1
        return super().__getitem__(name)


def test_each_tensor_sent_is_read_once():
    models, weights = rounds(3, count=1)[0]
    counted = {client: CountedModel(sent) for client, sent in models.items()}
    drift.updated({}, counted, weights)
    assert [sent.reads for sent in counted.values()] == [len(TRAINED)] * 5


def test_nothing_is_read_of_a_round_without_them():
    models, weights = rounds(3, count=1)[0]
    counted = {client: CountedModel(sent) for client, sent in models.items()}
    assert list(drift.updated_rows({}, counted, weights, 1.0, {"nobody"})) == []
    assert [sent.reads for sent in counted.values()] == [0] * 5


@pytest.mark.parametrize("memory", [1.0, 0.6])
def test_rows_built_client_by_client_are_those_of_the_ledger(memory):
    past = rounds(5)
    past[1] = (
        {c: m for c, m in past[1][0].items() if c != "b"},
        {c: w for c, w in past[1][1].items() if c != "b"},
    )
    ledger, rows = ledger_of(past, memory), {}
    for models, weights in past:
        rows |= drift.updated_rows(rows, models, weights, memory, {"b", "d"})
    assert rows.keys() == {"b", "d"}
    assert all(torch.equal(rows[c][name], ledger[c][name]) for c in rows for name in TRAINED)
    with pytest.raises(ParametersError, match="cannot be averaged"):
        list(drift.updated_rows({}, {}, {}, 1.0, {"b"}))
