"""Measures and verdicts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearning.metrics import accuracy, forgetting_rate
from unlearning.verdict import equivalence, paired_interval


def test_accuracy_is_the_share_of_equal_labels():
    assert accuracy(torch.tensor([1, 2, 3, 3]), torch.tensor([1, 2, 0, 3])) == 0.75
    assert accuracy(torch.tensor([]), torch.tensor([])) is None


def test_the_forgetting_rate_is_of_those_who_were_members():
    # Of four rows three were taken for members, and one of these is none any more; the fourth,
    # which is taken for one now, says nothing.
    before = torch.tensor([True, True, True, False])
    after = torch.tensor([True, False, True, True])
    assert forgetting_rate(before, after) == pytest.approx(1 / 3)
    assert forgetting_rate(before, before) == 0
    assert forgetting_rate(before, ~before) == 1
    assert forgetting_rate(~before & before, after) is None


def test_interval_by_hand():
    # n = 98, 3 hits of the first only, 1 of the second only; half added to each of four cells:
    # n' = 100, b = 3.5, c = 1.5; d = 2 / 100; var = 5 / 100 - .02^2 = .0496
    # half width = 1.959964 sqrt(.0496 / 100) = .043651
    first = torch.zeros(98, dtype=torch.bool)
    second = first.clone()
    first[:3], second[10] = True, True
    low, high = paired_interval(first, second)
    assert low == pytest.approx(0.02 - 0.043651, abs=1e-6)
    assert high == pytest.approx(0.02 + 0.043651, abs=1e-6)


def test_models_that_never_disagree_still_have_an_interval():
    low, high = paired_interval(torch.ones(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool))
    assert low < 0 < high


@pytest.mark.parametrize(("hits", "result"), [(0, "pass"), (60, "inconclusive"), (400, "fail")])
def test_a_verdict_needs_the_whole_interval(hits, result):
    # Of 1,000 examples the baseline hits none. 60 more are 6 % with half width 1.5 %: the
    # tolerance of 5 % lies inside the interval.
    mine = torch.zeros(1000, dtype=torch.bool)
    mine[:hits] = True
    verdict = equivalence(mine, torch.zeros(1000, dtype=torch.bool), 0.05)
    assert verdict.result == result
    assert verdict.value == hits / 1000
    assert verdict.baseline == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_interval_is_antisymmetric(pairs):
    a = torch.tensor([x for x, _ in pairs])
    b = torch.tensor([y for _, y in pairs])
    low, high = paired_interval(a, b)
    assert paired_interval(b, a) == pytest.approx((-high, -low))
