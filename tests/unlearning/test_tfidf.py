"""Class-discriminative pruning against its definition: methods 2.11."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.channel_masks import Convolution, parameter_masks
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.fedup import prune
from unlearning.masking import top_share
from unlearning.sums import Statistics, added
from unlearning.tfidf import SMALL, USUAL, class_statistics, tfidf_scores


def table(rows, count=2, layer="conv"):
    """Return statistics with the averages ``rows`` of every class, from ``count`` samples each."""
    return [Statistics({layer: count * torch.tensor(row)}, count) for row in rows]


def drawn(seed, count=20, classes=4):
    draw = torch.Generator().manual_seed(seed)
    activations = {
        "first": torch.randn(count, 5, 3, 3, generator=draw),
        "last": torch.randn(count, 8, 2, generator=draw),
    }
    return activations, torch.randint(classes, (count,), generator=draw)


def test_the_scores_by_hand():
    # methods 13: TF = (4, 1, 1, 2) / 8. Means of rows 2, 1.75 and 1.25: channel 0 is over it in one
    # class, 1 in one, 2 in none and 3 in all. IDF = log(4 / 2), log(4 / 2), log 4, log 1.
    found = tfidf_scores(table([[4.0, 1, 1, 2], [1.0, 3, 1, 2], [1.0, 1, 1, 2]]), 0)["conv"]
    expected = torch.tensor(
        [0.5 * math.log(2), 0.125 * math.log(2), 0.125 * math.log(4), 0.0], dtype=torch.float64
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        found,
        torch.tensor([0.346574, 0.086643, 0.173287, 0.0], dtype=torch.float64),
        rtol=0,
        atol=1e-6,
    )
    assert top_share({"conv": found}, 0.02, "tensor")["conv"].tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert (SMALL, USUAL) == (0.02, 0.05)


def test_statistics_by_hand():
    # Class 1 has samples 0 and 2; negative activations count as 0: means over space 1, 2; 3, 0.
    values = torch.tensor([[[2.0, -9.0], [2.0, 2.0]], [[5.0, 5.0], [5.0, 5.0]],
                           [[3.0, 3.0], [-1.0, -1.0]]])  # fmt: skip
    found = class_statistics({"conv": values}, torch.tensor([1, 0, 1]), 3)
    assert [part.count for part in found] == [1, 2, 0]
    assert [part.sums["conv"].tolist() for part in found] == [[5, 5], [4, 2], [0, 0]]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 40), cut=st.integers(0, 20))
def test_clients_add_up_to_one_data_holder(seed, cut):
    activations, labels = drawn(seed)
    parts = [
        class_statistics({layer: a[rows] for layer, a in activations.items()}, labels[rows], 4)
        for rows in (slice(0, cut), slice(cut, 20))
    ]
    whole = class_statistics(activations, labels, 4)
    for one in range(4):
        total = added([part[one] for part in parts])
        assert total.count == whole[one].count == int((labels == one).sum())
        for layer, tensor in whole[one].sums.items():
            torch.testing.assert_close(total.sums[layer], tensor)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 40), classes=st.integers(2, 5), scale=st.floats(0.01, 100))
def test_scores_are_a_share_times_a_rarity(seed, classes, scale):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(classes, 6, generator=draw).tolist()
    found = tfidf_scores(table(rows), 0)["conv"]

    usual = [sum(row) / 6 for row in rows]
    for place in range(6):
        active = sum(row[place] >= mean for row, mean in zip(rows, usual, strict=True))
        rarity = math.log((1 + classes) / (1 + active))
        assert float(found[place]) == pytest.approx(
            rows[0][place] / sum(rows[0]) * rarity, abs=1e-6
        )
    # The share of a channel knows no scale.
    louder = [[scale * value for value in row] for row in rows]
    torch.testing.assert_close(tfidf_scores(table(louder), 0)["conv"], found, rtol=1e-4, atol=1e-6)


def test_shares_add_up_to_one():
    # One class has every channel below its mean but one, the other likewise: IDF is log(3 / 2)
    # where one class is active and log 3 where none is.
    found = tfidf_scores(table([[6.0, 1, 1], [1.0, 6, 1]]), 0)["conv"]
    rarity = torch.tensor([math.log(1.5), math.log(1.5), math.log(3)], dtype=torch.float64)
    assert float((found / rarity).sum()) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "size"), [(0.1, 3), (0.7, 7), (1 / 3, 5), (1e-20, 7)])
def test_channels_that_are_all_alike_are_active_for_all(value, size, dtype):
    # In float64, the mean of three times .1 is rounded to more than .1.
    rows = torch.full((2, size), value, dtype=dtype)
    statistics = [Statistics({"conv": row}, 1) for row in rows]
    assert tfidf_scores(statistics, 1)["conv"].tolist() == [0.0] * size


def test_a_class_nobody_has_counts_for_nothing():
    rows = [[4.0, 1, 1, 2], [1.0, 3, 1, 2], [1.0, 1, 1, 2]]
    empty = Statistics({"conv": torch.zeros(4)}, 0)
    one, two, three = table(rows)
    with_gap = tfidf_scores([one, empty, two, three, empty], 2)["conv"]
    assert torch.equal(with_gap, tfidf_scores([one, two, three], 1)["conv"])


def test_a_layer_silent_for_the_class_has_no_scores():
    found = tfidf_scores(table([[0.0, 0.0], [1.0, 2.0]]), 0)["conv"]
    assert found.tolist() == [0, 0]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 40), rate=st.floats(0, 1))
def test_every_layer_loses_its_share_of_channels(seed, rate):
    activations, labels = drawn(seed)
    labels = torch.cat([torch.arange(4), labels[4:]])
    scores = tfidf_scores(class_statistics(activations, labels, 4), 3)
    chosen = top_share(scores, rate, "tensor")
    assert int(chosen["first"].sum()) == math.ceil(rate * 5 - 1e-9)
    assert int(chosen["last"].sum()) == math.ceil(rate * 8 - 1e-9)
    model = {"first.weight": torch.ones(5, 1, 3, 3), "last.weight": torch.ones(8, 5, 3)}
    masks = parameter_masks(model, [Convolution("first"), Convolution("last")], chosen)
    pruned = prune(model, masks)
    assert not pruned["last.weight"][chosen["last"]].any()
    assert pruned["last.weight"][~chosen["last"]].all()
    if rate == 0:
        assert all(torch.equal(pruned[name], model[name]) for name in model)


def test_the_channel_of_a_class_is_found_and_inputs_are_left_alone():
    labels = torch.arange(12) % 3
    values = torch.full((12, 4, 2, 2), 0.1)
    values[torch.arange(12), labels] = 5.0  # channel u shows class u; the last shows nothing
    before = values.clone()
    found = class_statistics({"conv": values}, labels, 3)
    for target in range(3):
        assert int(tfidf_scores(found, target)["conv"].argmax()) == target
    assert torch.equal(values, before)


def test_what_makes_no_sense_is_refused():
    activations, labels = drawn(0)
    with pytest.raises(MissingNeedError, match="network with convolutions"):
        class_statistics({}, labels, 4)
    with pytest.raises(MissingNeedError, match="of a convolution"):
        class_statistics({"a": torch.ones(20, 3)}, labels, 4)
    with pytest.raises(MissingNeedError, match="one integer label"):
        class_statistics(activations, labels.float(), 4)
    with pytest.raises(ParametersError, match="0 to 2"):
        class_statistics(activations, labels, 3)
    with pytest.raises(ParametersError, match="20 samples cannot go with 3 labels"):
        class_statistics(activations, labels[:3], 4)
    with pytest.raises(ParametersError, match="not finite"):
        class_statistics({"a": torch.full((20, 1, 1), math.nan)}, labels, 4)


def test_classes_that_cannot_be_told_apart_are_refused():
    one, two = table([[1.0, 2.0], [2.0, 1.0]])
    empty = Statistics({"conv": torch.zeros(2)}, 0)
    for target in (2, -1):
        with pytest.raises(ParametersError, match=f"from 0 to 1, got {target}"):
            tfidf_scores([one, two], target)
    with pytest.raises(MissingNeedError, match=r"there are samples of \[0, 1\]"):
        tfidf_scores([one, two, empty], 2)
    with pytest.raises(MissingNeedError, match="of another class"):
        tfidf_scores([one, empty], 0)
    with pytest.raises(ParametersError, match="negative"):
        tfidf_scores(table([[1.0, -2.0], [2.0, 1.0]]), 0)
    with pytest.raises(ParametersError):
        tfidf_scores([one, Statistics({"conv": torch.ones(3)}, 1)], 0)
