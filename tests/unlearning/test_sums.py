"""Sums that clients send, against sums over all samples: methods 5.7."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.errors import MissingNeedError, ParametersError
from unlearning.sums import Statistics, added, check_statistics, clipped_to_median, means

LIKE = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def stat(count, *values):
    return Statistics({"w": torch.tensor([float(value) for value in values])}, count)


def of_rows(rows):
    return Statistics(
        {"a": rows[:, :6].sum(dim=0).reshape(2, 3), "b": rows[:, 6:].sum(dim=0)}, len(rows)
    )


def values(parts):
    return [part.sums["w"].tolist() for part in parts]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 50), sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_sums_of_parts_are_the_sum_of_all(seed, sizes):
    rows = torch.rand(sum(sizes), 10, generator=torch.Generator().manual_seed(seed))
    parts = [of_rows(part) for part in torch.split(rows, sizes)]

    total = added(parts)

    assert total.count == sum(sizes)
    for name, tensor in of_rows(rows).sums.items():
        torch.testing.assert_close(total.sums[name], tensor)
        assert total.sums[name].dtype == torch.float32
    for part in parts:
        check_statistics(part, LIKE)
    if sum(sizes):
        torch.testing.assert_close(means(total)["b"], rows[:, 6:].mean(dim=0))


def test_clients_weigh_by_their_samples():
    # (1 + 9) / (1 + 4) = 2, where the average of averages would be (1 + 2.25) / 2
    assert means(added([stat(1, 1), stat(4, 9)]))["w"].item() == 2


def test_without_samples_or_clients_there_is_no_average():
    with pytest.raises(MissingNeedError, match="at least one sample"):
        means(stat(0, 0))
    with pytest.raises(MissingNeedError, match="no clients"):
        added([])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (stat(-1, 0), "whole number of at least 0, got -1"),
        (stat(1.5, 0), "whole number of at least 0, got 1.5"),
        (stat(True, 0), "whole number of at least 0, got True"),
        (stat(8, 0), "claim 8 samples, and there are at most 7"),
        (stat(1, math.nan), "not finite"),
        (stat(1, math.inf), "not finite"),
        (stat(1, -1), "sums of w are negative"),
        (stat(0, 1), "over no samples"),
        (stat(1, 1, 2), r"sums of w are \(2,\)"),
        (Statistics({"w": torch.ones(1, dtype=torch.long)}, 1), "floating-point"),
        (Statistics({"v": torch.ones(1)}, 1), "differ in their tensors: v, w"),
        (Statistics({}, 1), "differ in their tensors: w"),
    ],
)
def test_what_no_data_could_give_is_refused(found, message):
    with pytest.raises(ParametersError, match=message):
        check_statistics(found, {"w": torch.zeros(1)}, most=7)


def test_what_data_could_give_is_not_refused():
    for found in (stat(0, 0), stat(7, 0), stat(7, 1e30)):
        check_statistics(found, {"w": torch.zeros(1)}, most=7)
    check_statistics(stat(10**9, 1), {"w": torch.zeros(1)})
    check_statistics(stat(1, -1), {"w": torch.zeros(1)}, signed=True)


def test_the_clipping_by_hand():
    # Averages (1, 4), (2, 0), (300, 6): medians 2 and 4, limits 6 and 12 with a factor of 3.
    parts = [stat(1, 1, 4), stat(2, 4, 0), stat(10, 3000, 60)]
    assert values(clipped_to_median(parts, 3.0)) == [[1, 4], [4, 0], [60, 60]]
    assert values(parts) == [[1, 4], [4, 0], [3000, 60]]
    # The default is 10: limits 20 and 40.
    assert values(clipped_to_median(parts)) == [[1, 4], [4, 0], [200, 60]]


def test_of_two_medians_the_lower_counts_and_clients_without_samples_do_not():
    # Averages 1 and 100, and one client without: the limit is 10.
    parts = [stat(1, 1), stat(0, 0), stat(1, 100)]
    assert values(clipped_to_median(parts)) == [[1], [0], [10]]
    assert values(clipped_to_median([stat(0, 0)])) == [[0]]
    assert clipped_to_median([]) == []


def test_a_client_alone_is_believed():
    assert values(clipped_to_median([stat(2, 1e6), stat(0, 0)])) == [[1e6], [0]]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 50), honest=st.integers(2, 6), lie=st.floats(0, 1e30))
def test_one_liar_pulls_no_farther_than_ten_honest_clients(seed, honest, lie):
    draw = torch.Generator().manual_seed(seed)
    parts = [Statistics({"w": 5 * (0.5 + torch.rand(3, generator=draw))}, 5) for _ in range(honest)]
    liar = Statistics({"w": torch.full((3,), lie)}, 5)

    found = clipped_to_median([*parts, liar])

    # Honest averages lie in [.5, 1.5]; the median is one of them, or below.
    assert (found[-1].sums["w"] / 5 <= 15 * (1 + 1e-6)).all()
    for one, other in zip(found[:-1], parts, strict=True):
        torch.testing.assert_close(one.sums["w"], other.sums["w"])


@pytest.mark.parametrize("factor", [0.9, math.nan, math.inf])
def test_factors_out_of_range_are_refused(factor):
    with pytest.raises(ParametersError, match="1 or more medians"):
        clipped_to_median([stat(1, 1)], factor)
