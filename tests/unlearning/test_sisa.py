"""SISA against its definition: methods 6.5."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import sisa
from unlearning.distillation import fine_tune
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.randomness import generator

INPUTS = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3
START = {"head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}


def forward(model, inputs):
    return inputs @ model["head.weight"].T + model["head.bias"]


def train(model, rows, purpose):
    chosen = torch.tensor(rows)
    return fine_tune(
        model, forward, functional.cross_entropy, INPUTS[chosen], LABELS[chosen],
        epochs=2, learning_rate=0.1, batch_size=3, generator=generator(7, *purpose),
    )  # fmt: skip


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def all_same(one, other):
    return len(one) == len(other) and all(
        len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(one, other, strict=True)
    )


BY_HAND = sisa.Division((((0, 1), (2,), (3,)), ((4,), (5,), (6, 7))))


# ---------------------------------------------------------------- division


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), shards=st.integers(1, 5), slices=st.integers(1, 4), extra=st.integers(0, 20))  # fmt: skip
def test_every_row_lies_in_one_slice(seed, shards, slices, extra):
    rows = range(3, 3 + shards * slices + extra)
    found = sisa.divided(rows, shards, slices, generator(seed))
    assert [len(parts) for parts in found.shards] == [slices] * shards
    parts = [part for shard in found.shards for part in shard]
    assert sorted(row for part in parts for row in part) == list(rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    sizes = [sum(map(len, shard)) for shard in found.shards]
    assert max(sizes) - min(sizes) <= 1
    assert found.rows == set(rows)
    assert found == sisa.divided(list(rows)[::-1], shards, slices, generator(seed))


def test_rows_are_divided_at_random():
    # 2,000 draws of where row 0 of 8 lies among 4 slices: 500 each, with a deviation of 19.
    counts = dict.fromkeys([(s, p) for s in range(2) for p in range(2)], 0)
    draw = generator(0)
    for _ in range(2000):
        found = sisa.divided(range(8), 2, 2, draw)
        counts[next((s, p) for s in range(2) for p in range(2) if 0 in found.shards[s][p])] += 1
    assert all(abs(count - 500) < 100 for count in counts.values())


def test_what_cannot_be_divided_is_refused():
    for shards, slices in ((3, 3), (0, 1), (1, 0)):
        with pytest.raises(ParametersError, match="8 rows cannot be divided"):
            sisa.divided(range(8), shards, slices, generator(0))
    with pytest.raises(ParametersError, match="more than once"):
        sisa.divided([1, 2, 1], 1, 1, generator(0))


def test_what_a_deletion_touches():
    assert sisa.touched(BY_HAND, []) == {}
    assert sisa.touched(BY_HAND, [6]) == {1: 2}
    assert sisa.touched(BY_HAND, [3, 2, 4]) == {0: 1, 1: 0}
    gone = sisa.without(BY_HAND, [3, 2, 4])
    assert gone.shards == (((0, 1), (), ()), ((), (5,), (6, 7)))
    with pytest.raises(ParametersError, match=r"rows \[3, 9\] are in no shard"):
        sisa.touched(gone, [3, 9, 0])


# ---------------------------------------------------------------- training


def test_slices_are_trained_one_after_the_other():
    asked = []

    def note(model, rows, purpose):
        asked.append((model["w"], rows, purpose))
        return {"w": (*model["w"], purpose)}

    found = sisa.trained({"w": ()}, BY_HAND, note)
    assert asked == [
        ((), (0, 1), (0, 0)),
        (((0, 0),), (0, 1, 2), (0, 1)),
        (((0, 0), (0, 1)), (0, 1, 2, 3), (0, 2)),
        ((), (4,), (1, 0)),
        (((1, 0),), (4, 5), (1, 1)),
        (((1, 0), (1, 1)), (4, 5, 6, 7), (1, 2)),
    ]
    asked.clear()
    rest, after = sisa.unlearned({"w": ()}, BY_HAND, found, [2], note)
    # Back to the checkpoint before slice 1 of shard 0; nothing else is trained.
    assert asked == [
        (((0, 0),), (0, 1), (0, 1)),
        (((0, 0), (0, 1)), (0, 1, 3), (0, 2)),
    ]
    assert rest == sisa.without(BY_HAND, [2])
    assert after[1] == found[1]
    assert after[0][0] is found[0][0]


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 50),
    shards=st.integers(1, 4),
    slices=st.integers(1, 3),
    forgotten=st.sets(st.integers(0, 39), max_size=12),
)
def test_forgetting_is_training_without_the_rows_bit_for_bit(seed, shards, slices, forgotten):
    division = sisa.divided(range(40), shards, slices, generator(seed))
    before = sisa.trained(START, division, train)
    copies = [[{n: t.clone() for n, t in model.items()} for model in models] for models in before]
    rest, after = sisa.unlearned(START, division, before, forgotten, train)
    assert rest.rows == set(range(40)) - forgotten
    assert all_same(after, sisa.trained(START, rest, train))
    assert all_same(before, copies)
    first = sisa.touched(division, forgotten)
    for shard in range(shards):
        for place in range(slices):
            unseen = place < first.get(shard, slices)
            assert same(after[shard][place], before[shard][place]) or not unseen
            assert (after[shard][place] is before[shard][place]) == unseen


def test_deletions_one_after_the_other_are_one():
    division = sisa.divided(range(40), 3, 2, generator(1))
    start = sisa.trained(START, division, train)
    rest, once = sisa.unlearned(START, division, start, [1, 2, 3, 4], train)
    halfway = sisa.unlearned(START, division, start, [3, 1], train)
    again, twice = sisa.unlearned(START, *halfway, [4, 2], train)
    assert again == rest
    assert all_same(once, twice)
    with pytest.raises(ParametersError, match=r"rows \[3\] are in no shard"):
        sisa.unlearned(START, again, twice, [3], train)


def test_a_shard_without_rows_has_no_say():
    division = sisa.divided(range(6), 2, 3, generator(0))
    found = sisa.trained(START, division, train)
    assert list(sisa.members(division, found)) == [0, 1]
    assert sisa.members(division, found)[1] is found[1][-1]
    gone = [row for part in division.shards[0] for row in part]
    rest, after = sisa.unlearned(START, division, found, gone, train)
    assert all(same(model, START) for model in after[0])
    assert list(sisa.members(rest, after)) == [1]
    rest, after = sisa.unlearned(START, rest, after, rest.rows, train)
    with pytest.raises(MissingNeedError, match="every row is forgotten"):
        sisa.members(rest, after)


def test_checkpoints_of_another_division_are_refused():
    found = sisa.trained(START, BY_HAND, train)
    for wrong in (found[:1], (found[0][:2], found[1])):
        with pytest.raises(ParametersError, match="as many checkpoints"):
            sisa.unlearned(START, BY_HAND, wrong, [1], train)


# ---------------------------------------------------------------- prediction


def test_predictions_by_hand():
    def logits(*posteriors):
        return torch.tensor([posteriors]).log()

    shards = [logits(0.9, 0.1), logits(0.4, 0.6), logits(0.4, 0.6)]
    # The mean is (1.7 / 3, 1.3 / 3), and two of three vote for class 1.
    torch.testing.assert_close(sisa.aggregated(shards), torch.tensor([[1.7, 1.3]]) / 3)
    torch.testing.assert_close(sisa.aggregated(shards, "vote"), torch.tensor([[1.0, 2.0]]) / 3)
    tie = sisa.aggregated(shards[:2], "vote")
    assert tie.tolist() == [[0.5, 0.5]]
    assert tie.argmax(dim=1).tolist() == [0]
    with pytest.raises(MissingNeedError, match="at least one shard"):
        sisa.aggregated([])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), how=st.sampled_from(["average", "vote"]), shift=st.floats(-9, 9))
def test_predictions_are_distributions(seed, how, shift):
    logits = list(5 * torch.randn(3, 6, 4, generator=generator(seed)))
    found = sisa.aggregated(logits, how)
    assert found.shape == (6, 4)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6))
    assert math.isclose(float(found.min()), max(0.0, float(found.min())))
    torch.testing.assert_close(sisa.aggregated([x + shift for x in logits[::-1]], how), found)
