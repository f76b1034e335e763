"""Sums that clients send, against sums over all samples: methods 5.7."""

import math
from statistics import median_low

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.errors import MissingNeedError, ParametersError
from unlearning.sums import (
    Statistics,
    added,
    check_statistics,
    clipped_by_norm,
    clipped_to_median,
    limited,
    means,
    undiluted,
    weighted_median,
)

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


# ---------------------------------------------------------------- what a claim weighs
def test_statistics_weigh_no_more_than_a_limit_and_keep_their_averages():
    found = limited(stat(8, 4, 16), 2.9)
    assert (found.count, found.sums["w"].tolist()) == (2, [1, 4])  # averages .5 and 2, as before
    assert limited(stat(2, 1), 2) == limited(stat(2, 1), 7) == stat(2, 1)


def test_claims_of_many_samples_do_not_dilute_an_average():
    # Counts 5, 5, 5 and 2,000 of zeros: the median is 5, and the last counts as 5.
    parts = [stat(5, 5)] * 3 + [stat(2000, 0), stat(0, 0)]
    found = undiluted(parts)
    assert [part.count for part in found] == [5, 5, 5, 5, 0]
    assert means(added(found))["w"].item() == pytest.approx(15 / 20)
    # Averages of a tenth of the median are not far below; of less they are, and they stay averages.
    assert undiluted([*parts[:3], stat(2000, 200)])[3].count == 2000
    less = undiluted([*parts[:3], stat(2000, 199)])[3]
    assert (less.count, less.sums["w"].item()) == (5, pytest.approx(0.4975))
    # Who has most of a class is no liar.
    for most in (stat(500, 500), stat(500, 50_000)):
        assert undiluted([stat(1, 1), stat(1, 0), most])[2] is most
    assert undiluted(parts[2:]) == parts[2:]  # of two that have any nobody knows who lies
    assert undiluted([]) == []


# ---------------------------------------------------------------- clipping
@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.tuples(st.integers(-9, 9), st.integers(1, 5)), min_size=1, max_size=7
    )
)  # fmt: skip
def test_a_weighted_median_is_the_lower_median_of_as_many_copies(rows):
    values = torch.tensor([[float(value), -float(value)] for value, _ in rows])
    weights = torch.tensor([float(weight) for _, weight in rows])
    copies = [value for value, weight in rows for _ in range(weight)]
    found = weighted_median(values, weights).tolist()
    assert found == [median_low(copies), median_low([-value for value in copies])]


def test_the_clipping_by_hand():
    # Averages (1, 4), (2, 0), (300, 6) of 2, 2 and 10 samples, which weigh 2, 2 and 2: medians 2
    # and 4, limits 6 and 12 with a factor of 3.
    parts = [stat(2, 2, 8), stat(2, 4, 0), stat(10, 3000, 60)]
    found = clipped_to_median(parts, 3.0)
    assert values(found.parts) == [[2, 8], [4, 0], [60, 60]]
    assert values(parts) == [[2, 8], [4, 0], [3000, 60]]
    # Of 2 + 8 + 4 + 3000 + 60 = 3074 there were 2940 too many.
    assert found.share == pytest.approx(2940 / 3074)
    assert found.compared == 3
    # The default is 10: limits 20 and 40.
    assert values(clipped_to_median(parts).parts) == [[2, 8], [4, 0], [200, 60]]


def test_in_a_median_samples_weigh_up_to_those_of_the_median_client():
    # Averages 1, 2 and 400 of 1, 4 and 100 samples: weights 1, 4, 4, of which half is reached at 2.
    assert values(clipped_to_median([stat(1, 1), stat(4, 8), stat(100, 40000)]).parts)[2] == [2000]
    # The same averages of one sample each.
    assert values(clipped_to_median([stat(1, 1), stat(1, 2), stat(1, 400)]).parts)[2] == [20]
    # A third of the clients is not half, whatever it claims: zeros of 10,000 samples are 4 of 9.
    parts = [stat(1, 1), stat(4, 4), stat(10_000, 0)]
    assert values(clipped_to_median(parts).parts) == values(parts)


def test_where_most_have_nothing_what_is_usual_of_the_tensor_bounds():
    # The first entry has a median of 0. Positive averages: of the first client 2 and 3, of the
    # second and third 1: medians 2 (the lower), 1, 1, and of those 1. The limit is 10.
    parts = [stat(1, 40, 3), stat(1, 0, 1), stat(1, 0, 1)]
    assert values(clipped_to_median([stat(1, 2, 3), *parts[1:]]).parts)[0] == [2, 3]
    assert values(clipped_to_median(parts).parts) == [[10, 3], [0, 1], [0, 1]]
    # Nobody has anything: nothing to clip.
    nothing = [stat(1, 0), stat(1, 0), stat(2, 0)]
    found = clipped_to_median(nothing)
    assert (values(found.parts), found.share) == (values(nothing), 0)
    # Only one has: it is believed, as there is nobody to compare it with.
    assert values(clipped_to_median([stat(500, 500), stat(1, 0), stat(1, 0)]).parts)[0] == [500]


@pytest.mark.parametrize("clip", [clipped_to_median, clipped_by_norm])
@pytest.mark.parametrize(
    "parts",
    [
        [],
        [stat(0, 0)],
        [stat(2, 1e6), stat(0, 0)],
        [stat(5, 5, 10), stat(1, 0, 0)],
        [stat(1, 1), stat(0, 0), stat(9, 1e9)],
    ],
)
def test_one_or_two_clients_cannot_be_compared_and_are_believed(clip, parts):
    found = clip(parts)
    assert values(found.parts) == values(parts)
    assert (found.share, found.compared) == (0, sum(part.count > 0 for part in parts))


def honest(seed, counts, entries=4):
    """Averages within [.5, 1.5]."""
    draw = torch.Generator().manual_seed(seed)
    return [Statistics({"w": n * (0.5 + torch.rand(entries, generator=draw))}, n) for n in counts]


COUNTS = st.lists(st.integers(1, 50), min_size=2, max_size=6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 50), counts=COUNTS, claimed=st.integers(1, 2000), lie=st.floats(0, 1e30))
@pytest.mark.parametrize("clip", [clipped_to_median, clipped_by_norm])
def test_one_liar_pulls_no_farther_than_ten_honest_clients(clip, seed, counts, claimed, lie):
    parts = honest(seed, counts)
    liar = Statistics({"w": torch.full((4,), lie) * claimed}, claimed)

    found = clip([*parts, liar]).parts

    # Honest averages lie in [.5, 1.5], and a median of which the liar has less than half within.
    # Of norms: those of four entries lie in [1, 3].
    assert (found[-1].sums["w"] / claimed <= 15 * (1 + 1e-6)).all()
    for one, other in zip(found[:-1], parts, strict=True):
        torch.testing.assert_close(one.sums["w"], other.sums["w"])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 50), counts=st.lists(st.integers(1, 50), min_size=1, max_size=6),
       claimed=st.integers(1, 2000))  # fmt: skip
@pytest.mark.parametrize("clip", [clipped_to_median, clipped_by_norm])
def test_a_liar_with_zeros_takes_nothing_from_the_others(clip, seed, counts, claimed):
    parts = honest(seed, counts)
    nothing = Statistics({"w": torch.zeros(4)}, claimed)
    found = added(clip([*parts, nothing]).parts)
    torch.testing.assert_close(found.sums["w"], added(parts).sums["w"])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 500), clients=st.integers(3, 8), rows=st.integers(20, 60))
@pytest.mark.parametrize("clip", [clipped_to_median, clipped_by_norm])
def test_of_alike_clients_hardly_anything_is_clipped(clip, seed, clients, rows):
    # Squares of normal numbers in every other row, as of a ReLU that half of the rows pass.
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(clients):
        sent = torch.randn(rows, 50, generator=draw).square()
        parts.append(Statistics({"w": (sent * (torch.rand(rows, 50, generator=draw) < 0.5)).sum(0)},
                                rows))  # fmt: skip
    assert clip(parts).share < 0.02


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 500), scale=st.sampled_from([2.0**-20, 0.5, 2.0**30]),
       order=st.permutations(range(5)))  # fmt: skip
@pytest.mark.parametrize("clip", [clipped_to_median, clipped_by_norm])
def test_clipping_knows_neither_order_nor_unit(clip, seed, scale, order):
    # Cubes of normal numbers, many of them 0: there is something to clip.
    draw = torch.Generator().manual_seed(seed)
    sums = torch.randn(5, 6, generator=draw) ** 9 * (torch.rand(5, 6, generator=draw) < 0.6)
    parts = [Statistics({"w": row}, 1 + n) for n, row in enumerate(sums)]
    found = clip(parts, 2.0)
    again = clip([parts[place] for place in order], 2.0)
    assert values(again.parts) == [values(found.parts)[place] for place in order]
    assert again.share == pytest.approx(found.share)
    larger = clip([Statistics({"w": scale * part.sums["w"]}, part.count) for part in parts], 2.0)
    for one, other in zip(larger.parts, found.parts, strict=True):
        torch.testing.assert_close(one.sums["w"], scale * other.sums["w"], rtol=1e-5, atol=0)


def test_lengths_are_clipped_over_all_tensors_and_directions_stay():
    # Averages of norm 5, 5 and, over both tensors, 500: the limit is 10 * 5, a tenth of it.
    parts = [
        Statistics({"a": torch.tensor([3.0]), "b": torch.tensor([-4.0])}, 1),
        Statistics({"a": torch.tensor([6.0]), "b": torch.tensor([8.0])}, 2),
        Statistics({"a": torch.tensor([300.0]), "b": torch.tensor([-400.0])}, 1),
    ]
    found = clipped_by_norm(parts)
    torch.testing.assert_close(found.parts[2].sums["a"], torch.tensor([30.0]))
    torch.testing.assert_close(found.parts[2].sums["b"], torch.tensor([-40.0]))
    assert values_of(found.parts[:2]) == values_of(parts[:2])
    # Of 7 + 14 + 700 the last lost 630.
    assert found.share == pytest.approx(630 / 721)


def values_of(parts):
    return [[tensor.tolist() for tensor in part.sums.values()] for part in parts]


@pytest.mark.parametrize(
    "clip", [clipped_to_median, clipped_by_norm, lambda p, f: undiluted(p, factor=f)]
)
@pytest.mark.parametrize("factor", [0.9, math.nan, math.inf])
def test_factors_out_of_range_are_refused(clip, factor):
    with pytest.raises(ParametersError, match="1 or more medians"):
        clip([stat(1, 1)], factor)
