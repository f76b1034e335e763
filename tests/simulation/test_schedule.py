"""Which examples are in which step when clients of unequal sizes train side by side."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simulation.engines.schedule import Schedule

sizes = st.lists(st.integers(1, 23), min_size=1, max_size=9).map(lambda s: sorted(s, reverse=True))


def orders_of(schedule, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        [torch.randperm(size, generator=draw) for _ in range(schedule.epochs)]
        for size in schedule.sizes
    ]


def test_two_clients_by_hand():
    # Batches of 2: a client with 5 examples has 2 + 2 + 1 in an epoch, one with 2 has 2.
    schedule = Schedule((5, 2), batch=2, epochs=2)
    assert schedule.steps == 6
    assert schedule.counts.tolist() == [[2, 2], [2, 2], [1, 0], [2, 0], [2, 0], [1, 0]]
    assert schedule.active == [2, 2, 1, 1, 1, 1]
    assert schedule.weights[0].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert schedule.weights[2].tolist() == [[1.0, 0.0], [0.0, 0.0]]
    order = [[torch.tensor([4, 2, 0, 1, 3]), torch.arange(5)], [torch.tensor([1, 0])] * 2]
    rows = schedule.rows(order)
    # The second client's rows start at 5; what is not there is a client's first example.
    assert rows[:, 0].tolist() == [[4, 2], [0, 1], [3, 0], [0, 1], [2, 3], [4, 0]]
    assert rows[:3, 1].tolist() == [[6, 5], [6, 5], [5, 5]]
    # Mean losses 1 to 6 of the first client, 7 and 8 of the second. Their last epochs:
    # (2 * 4 + 2 * 5 + 1 * 6) / 5 = 4.8, and 8.
    losses = torch.tensor([[1.0, 7], [2, 8], [3, 9], [4, 9], [5, 9], [6, 9]])
    assert schedule.last_epoch(losses) == [4.8, 8.0]


def test_a_loss_that_is_not_finite_stays_its_clients_own():
    schedule = Schedule((4, 4), batch=4, epochs=1)
    first, second = schedule.last_epoch(torch.tensor([[1.0, math.nan]]))
    assert (first, math.isnan(second)) == (1.0, True)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, batch=st.integers(1, 8), epochs=st.integers(1, 3))
def test_every_example_is_seen_once_an_epoch_in_its_order(sizes, batch, epochs):
    schedule = Schedule(tuple(sizes), batch, epochs)
    orders = orders_of(schedule)
    rows, counts = schedule.rows(orders), schedule.counts
    start = 0
    for client, size in enumerate(sizes):
        seen = [
            row
            for step in range(schedule.steps)
            for row in rows[step, client, : counts[step, client]]
        ]
        expected = torch.cat(orders[client]) + start
        assert seen == expected.tolist()
        start += size


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, batch=st.integers(1, 8), epochs=st.integers(1, 3))
def test_weights_widths_and_the_order_of_finishing(sizes, batch, epochs):
    schedule = Schedule(tuple(sizes), batch, epochs)
    sums = schedule.weights.sum(axis=2)
    assert np.allclose(sums, schedule.counts > 0)
    assert schedule.weights.shape == (schedule.steps, len(sizes), batch)
    going = schedule.counts > 0
    assert not (going[:, 1:] & ~going[:, :-1]).any()  # who is active comes first
    assert not (going[1:] & ~going[:-1]).any()  # and who is finished does not come back
    for active, width in zip(schedule.active, schedule.widths, strict=True):
        assert active <= width <= len(sizes)
        assert width < 2 * active
    assert schedule.widths == sorted(schedule.widths, reverse=True)
