"""Parameters as a vector space, and the top-k rule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearning import parameters as p
from unlearning.errors import ParametersError

scores = st.lists(st.integers(0, 5), min_size=1, max_size=40).map(
    lambda values: torch.tensor(values, dtype=torch.float32)
)


def test_weighted_mean_by_hand():
    # (1 * 1 + 3 * 5) / 4 = 4
    models = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([5.0])}]
    assert p.weighted_mean(models, [1, 3])["w"].tolist() == [4.0]


def test_weighted_mean_rounds_integer_buffers_back():
    # (2 * 1 + 5 * 2) / 3 = 4
    models = [{"n": torch.tensor(2)}, {"n": torch.tensor(5)}]
    mean = p.weighted_mean(models, [1, 2])["n"]
    assert mean.dtype == torch.int64
    assert int(mean) == 4


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, math.nan], [math.inf, 1], [1]])
def test_weights_that_define_no_average_are_refused(weights):
    models = [{"w": torch.ones(1)}, {"w": torch.ones(1)}]
    with pytest.raises(ParametersError):
        p.weighted_mean(models, weights)


def test_models_that_differ_are_refused_by_name():
    with pytest.raises(ParametersError, match="differ in their tensors: b"):
        p.check_alike({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ParametersError, match=r"tensor a is \(1,\)"):
        p.check_alike({"a": torch.ones(1)}, {"a": torch.ones(1, 1)})
    with pytest.raises(ParametersError, match="float64"):
        p.check_alike({"a": torch.ones(1)}, {"a": torch.ones(1).double()})
    with pytest.raises(ParametersError, match="not finite"):
        p.check_finite({"a": torch.tensor([math.nan])})


def test_finite_values_whose_sum_is_not_are_finite():
    p.check_finite({"a": torch.full((4,), 3e38), "n": torch.tensor(2**62)})
    p.check_finite({"a": torch.full((3,), 6e4, dtype=torch.float16)})
    for bad in (math.inf, -math.inf, math.nan):
        with pytest.raises(ParametersError, match="tensor a holds"):
            p.check_finite({"a": torch.tensor([math.inf, 1.0, bad])})


class Counted(dict):
    reads = 0

    def __getitem__(self, name):
        self.reads += 1
        return super().__getitem__(name)

    def form(self, name):
        return torch.empty_like(super().__getitem__(name), device="meta")


def test_an_average_looks_each_tensor_up_once_and_writes_to_none():
    models = [Counted(w=torch.full((2,), float(k)), n=torch.tensor(k)) for k in range(4)]
    found = p.weighted_mean(models, [1, 2, 3, 4])
    assert [model.reads for model in models] == [2, 2, 2, 2]
    assert found["w"].tolist() == [2.0, 2.0]  # (0 + 2 + 6 + 12) / 10
    assert [model["w"].tolist() for model in models] == [[float(k)] * 2 for k in range(4)]


def test_a_tensor_longer_than_a_stretch_is_averaged_whole():
    # Scaled, then added, model after model: the order of Flower's FedAvg, to the last bit.
    draw = torch.Generator().manual_seed(1)
    size = 2 * p.STRETCH + 5
    models = [{"w": torch.randn(size, generator=draw).reshape(1, size)} for _ in range(3)]
    shares = [1 / 6, 2 / 6, 3 / 6]
    expected = models[0]["w"] * shares[0]
    expected = expected + models[1]["w"] * shares[1]
    expected = expected + models[2]["w"] * shares[2]
    assert torch.equal(p.weighted_mean(models, [1, 2, 3])["w"], expected)


def test_norm_and_difference_leave_buffers_out():
    model = {"w": torch.tensor([3.0, 4.0]), "n": torch.tensor(7)}
    start = {"w": torch.zeros(2), "n": torch.tensor(1)}
    assert p.norm(p.difference(model, start)) == 5.0  # sqrt(9 + 16)
    assert p.flat(model).tolist() == [3.0, 4.0]


def test_prunable_names_are_weights_of_two_or_more_dimensions():
    model = {
        "conv.weight": torch.zeros(2, 1, 3, 3),
        "conv.bias": torch.zeros(2),
        "norm.weight": torch.zeros(2),
        "head.weight": torch.zeros(4, 2),
        "token": torch.zeros(1, 1, 2),
    }
    assert p.prunable_names(model) == ("conv.weight", "head.weight")


@pytest.mark.parametrize(
    ("size", "fraction", "count"),
    # 5 * .2 = 1 exactly; 7 * .1 = .7 -> 1; 100 * .07 = 7.000000000000001 in floats, but 7
    [(5, 0.2, 1), (7, 0.1, 1), (100, 0.07, 7), (9, 0.0, 0), (9, 1.0, 9), (1000, 0.0001, 1)],
)
def test_top_count_rounds_up_but_not_rounding_errors(size, fraction, count):
    assert p.top_count(size, fraction) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_the_top_of_any_type(dtype):
    mask = p.top_mask(torch.tensor([3, 1, 2, 3], dtype=dtype), 3)
    assert mask.tolist() == [True, False, True, True]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ParametersError, match=r"must lie in \[0, 1\]"):
        p.top_count(3, fraction)


@given(scores=scores, data=st.data())
def test_top_mask_equals_a_stable_sort(scores, data):
    count = data.draw(st.integers(0, len(scores)))
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[order] = True
    assert torch.equal(p.top_mask(scores, count), expected)


def test_prunable_are_weights_of_two_dimensions_and_more_that_hold_numbers_with_a_point():
    model = {
        "conv.weight": torch.ones(2, 2, 1, 1),
        "norm.weight": torch.ones(2),
        "fc.bias": torch.ones(2, 2),
        "packed.weight": torch.ones(2, 2, dtype=torch.int8),
        "fc.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    }
    assert p.prunable_names(model) == ("conv.weight", "fc.weight")


def test_top_mask_refuses_scores_that_are_not_finite():
    with pytest.raises(ParametersError):
        p.top_mask(torch.tensor([1.0, math.nan]), 1)
