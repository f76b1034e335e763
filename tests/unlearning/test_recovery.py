"""Recovery: its bound and the published rows."""

import math

import pytest

from unlearning.recovery import recovery_bound, rounds_to_reach

# arXiv:2508.13853, Tables II, III and IV: (R*, P in percent, R_rec), printed.
PUBLISHED = [
    (24, 10, 1), (32, 5, 1), (26, 11, 1), (37, 4, 2), (27, 11, 1), (43, 4, 2), (42, 11, 2),
    (75, 3, 4), (67, 10, 2), (66, 3, 2),
    (22, 10, 1), (19, 6, 2), (34, 10, 1), (36, 5, 1), (19, 10, 1), (19, 5, 1), (51, 10, 1),
    (64, 5, 2), (35, 11, 1), (41, 5, 2),
    (33, 10, 2), (40, 5, 2), (31, 10, 2), (32, 4, 2), (26, 10, 1), (23, 5, 1), (46, 10, 3),
    (56, 3, 2), (37, 12, 3), (47, 3, 2),
]  # fmt: skip


@pytest.mark.parametrize(("rounds", "rate", "bound"), [(24, 0.10, 3), (75, 0.03, 3), (9, 0.0, 1)])
def test_bound_is_the_ceiling_of_rounds_times_rate(rounds, rate, bound):
    assert recovery_bound(rounds, rate) == bound


def test_every_published_row_but_one_keeps_the_bound():
    beyond = [row for row in PUBLISHED if row[2] > recovery_bound(row[0], row[1] / 100)]
    assert beyond == [(75, 3, 4)]


def test_rounds_to_reach_counts_from_one():
    assert rounds_to_reach([0.2, math.nan, 0.9, 0.95], 0.9) == 3
    assert rounds_to_reach([0.2], 0.9) is None
