"""Gradient ascent against its definition: methods 2.12, 6.4."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import ascent
from unlearning import partial_updates as partial
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.gradients import clipped, gradient
from unlearning.parameters import weighted_mean
from unlearning.randomness import generator

INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 3
TRAINED = ("head.weight", "head.bias")


def forward(model, inputs):
    return inputs @ model["head.weight"].T + model["head.bias"]


def drawn(seed, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "head.weight": scale * torch.randn(3, 4, generator=draw),
        "norm.running_mean": torch.randn(2, generator=draw),
        "head.bias": scale * torch.randn(3, generator=draw),
        "norm.num_batches_tracked": torch.tensor(3),
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def vector(*values):
    return {"w": torch.tensor([float(value) for value in values])}


def quadratic(outputs, targets):
    """The loss ||w - x||^2 / 2 of every row x, whose gradient is w - x."""
    return (outputs - targets).square().sum(dim=1) / 2


def climb(start, leaver, rows, **more):
    return ascent.ascend_in_ball(
        start, leaver, lambda model, inputs: model["w"].expand(len(inputs), -1), quadratic,
        rows, rows,
        **{"radius": 100.0, "batch_size": len(rows) or 1, "generator": generator(0), "epochs": 1,
           "farthest": math.inf, **more},
    )  # fmt: skip


def loss_of(model):
    return float(functional.cross_entropy(forward(model, INPUTS), LABELS))


def leave(reference, leaver, seed=0, **more):
    return ascent.ascend_in_ball(
        reference, leaver, forward, functional.cross_entropy, INPUTS, LABELS,
        **{"radius": 0.5, "batch_size": 8, "generator": generator(seed), **more},
    )  # fmt: skip


# ---------------------------------------------------------------- the reference


def test_the_reference_by_hand():
    # w = (1 + 3 + 8) / 3 = 4; without the last (1 + 3) / 2 = 2
    found = ascent.others_average(vector(4), vector(8), 1 / 3)
    assert found["w"].item() == pytest.approx(2)


@given(seed=st.integers(0, 40), weights=st.lists(st.floats(0.1, 5), min_size=3, max_size=3))
@settings(deadline=None, max_examples=25)
def test_the_reference_is_the_weighted_average_of_the_others(seed, weights):
    models = [drawn(3 * seed + place) for place in range(3)]
    model = weighted_mean(models, weights)
    found = ascent.others_average(model, models[2], weights[2] / sum(weights))
    expected = weighted_mean(models[:2], weights[:2])
    for name in TRAINED:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
    assert torch.equal(found["norm.running_mean"], model["norm.running_mean"])
    assert list(found) == list(model)


def test_a_client_without_weight_changes_nothing():
    found = ascent.others_average(drawn(0), drawn(1), 0.0)
    assert same(found, drawn(0))


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan])
def test_a_client_cannot_be_all_there_is(share):
    with pytest.raises(ParametersError, match=r"share must lie in \[0, 1\)"):
        ascent.others_average(drawn(0), drawn(1), share)


def test_the_radius_by_hand():
    # Distances 3 and 9: sqrt((9 + 81) / 2 / 3) = sqrt(15). From a start at distance 3: 1.5.
    here = vector(0, 0, 0)
    assert ascent.random_radius(here, [vector(1, 2, 2), vector(0, 9, 0)]) == pytest.approx(15**0.5)
    assert ascent.start_radius(here, vector(1, 2, 2)) == 1.5
    with pytest.raises(MissingNeedError, match="freshly initialised"):
        ascent.random_radius(here, [])


def test_distances_are_over_trained_tensors_and_do_not_overflow():
    one, other = drawn(0), {**drawn(0), "norm.running_mean": torch.full((2,), 1e3)}
    assert ascent.distance(one, other) == 0
    assert ascent.distance(vector(3e38), vector(-3e38)) == pytest.approx(6e38)


# ---------------------------------------------------------------- projection


def test_the_projection_by_hand():
    # (3, 4) is 5 from the origin; radius 1 leaves a fifth.
    found = ascent.projected(vector(3, 4), vector(0, 0), 1.0)
    torch.testing.assert_close(found["w"], torch.tensor([0.6, 0.8]))
    found = ascent.projected(vector(4, 6), vector(1, 2), 2.5)
    torch.testing.assert_close(found["w"], torch.tensor([2.5, 4.0]))


@given(
    seed=st.integers(0, 60),
    scale=st.sampled_from([1e-3, 1.0, 1e3, 1e30]),
    radius=st.floats(0, 100),
)
@settings(deadline=None, max_examples=50)
def test_the_projection_is_the_nearest_point_of_the_ball(seed, scale, radius):
    model, centre = drawn(seed, scale), drawn(seed + 1)
    found = ascent.projected(model, centre, radius)
    away = ascent.distance(found, centre)

    assert away <= radius * (1 + 1e-5) + 1e-5
    if ascent.distance(model, centre) <= radius:
        assert same(found, model)
    else:
        # On the sphere, and on the way from the centre: both distances add up.
        assert away == pytest.approx(radius, rel=1e-4, abs=1e-5)
        total = ascent.distance(model, centre)
        assert away + ascent.distance(model, found) == pytest.approx(total, rel=1e-4)
    twice = ascent.projected(found, centre, radius)
    for name in TRAINED:
        torch.testing.assert_close(twice[name], found[name])
    assert same(model, drawn(seed, scale))
    assert list(found) == list(model)
    assert torch.equal(found["norm.running_mean"], model["norm.running_mean"])
    assert all(found[name].dtype == model[name].dtype for name in model)


def test_a_ball_without_extent_is_its_centre():
    found = ascent.projected(drawn(0), drawn(1), 0.0)
    assert all(torch.equal(found[name], drawn(1)[name]) for name in TRAINED)


@pytest.mark.parametrize("radius", [-1.0, math.nan, math.inf])
def test_a_radius_is_a_number(radius):
    with pytest.raises(ParametersError, match="radius must be a number"):
        ascent.projected(drawn(0), drawn(1), radius)


def test_the_server_projects_again_and_keeps_its_buffers():
    reference = drawn(0)
    lie = {**drawn(1, scale=1e30), "norm.running_mean": torch.full((2,), 1e30)}
    found = ascent.projected_again(lie, reference, 0.5)
    assert ascent.distance(found, reference) == pytest.approx(0.5, rel=1e-5)
    assert torch.equal(found["norm.running_mean"], reference["norm.running_mean"])
    assert list(found) == list(reference)
    for value in (math.nan, math.inf):
        with pytest.raises(ParametersError, match="not finite"):
            ascent.projected_again({**lie, "head.bias": torch.full((3,), value)}, reference, 0.5)
    with pytest.raises(ParametersError, match="differ"):
        ascent.projected_again({"head.bias": torch.ones(3)}, reference, 0.5)
    # An honest answer in the ball is used as it is.
    near = {name: t + 0.01 if name in TRAINED else t for name, t in reference.items()}
    assert same(ascent.projected_again(near, reference, 0.5), near)


# ---------------------------------------------------------------- ascent in a ball


def test_two_steps_by_hand():
    # x = 0, momentum .5, rate .1: w = 1, g = 1, v = 1, w = 1.1; g = 1.1, v = 1.6, w = 1.26
    found = climb(
        vector(1), vector(0), torch.zeros(1, 1), learning_rate=0.1, momentum=0.5, epochs=2
    )
    assert found.model["w"].item() == pytest.approx(1.26)
    assert found.distances == pytest.approx((0.1, 0.26))
    assert not found.stopped


def test_a_long_gradient_is_bounded_before_momentum():
    # |(3, 4)| = 5, bound 1: the step is (.6, .8); again in the same direction, plus .5 of it.
    one = climb(vector(3, 4), vector(0, 0), torch.zeros(1, 2), learning_rate=1, longest=1.0)
    torch.testing.assert_close(one.model["w"], torch.tensor([3.6, 4.8]))
    two = climb(
        vector(3, 4), vector(0, 0), torch.zeros(1, 2), learning_rate=1, longest=1.0, epochs=2,
        momentum=0.5,
    )  # fmt: skip
    torch.testing.assert_close(two.model["w"], torch.tensor([4.5, 6.0]))


def test_a_long_ascent_ends_on_the_sphere():
    found = climb(vector(1), vector(0), torch.zeros(1, 1), learning_rate=1, radius=2.0, epochs=9)
    assert found.model["w"].item() == pytest.approx(3)
    assert max(found.distances) <= 2 * (1 + 1e-5)


@given(seed=st.integers(0, 40), radius=st.floats(0.01, 3))
@settings(deadline=None, max_examples=15)
def test_every_step_is_in_the_ball(seed, radius):
    found = leave(drawn(seed), drawn(seed + 1), seed, radius=radius, learning_rate=0.5)
    assert all(away <= radius * (1 + 1e-5) for away in found.distances)
    assert ascent.distance(found.model, drawn(seed)) == found.distances[-1]


def test_a_rate_of_zero_returns_the_reference():
    found = leave(drawn(0), drawn(1), learning_rate=0.0, farthest=math.inf)
    assert same(found.model, drawn(0))
    assert found.distances == (0.0,) * 15


@given(seed=st.integers(0, 40))
@settings(deadline=None, max_examples=25)
def test_a_small_step_raises_the_loss(seed):
    start = drawn(seed)
    found = leave(start, start, learning_rate=1e-3, epochs=1, batch_size=20)
    assert loss_of(found.model) > loss_of(start)


def test_it_stops_far_from_the_leaving_client():
    # 1, 2, 4, 8, ... from a client at 0: the first over 3.5 is 4, at 3 from the reference.
    found = climb(
        vector(1), vector(0), torch.zeros(1, 1), learning_rate=1, momentum=0, epochs=9, farthest=3.5
    )
    assert found.model["w"].item() == 4
    assert found.stopped
    assert len(found.distances) == 2
    assert (ascent.FARTHEST, ascent.LONGEST, ascent.MOMENTUM) == (1.5, 5.0, 0.9)


def test_a_rule_is_asked_after_every_epoch():
    asked = []

    def stop(model):
        asked.append(model)
        return len(asked) == 2

    found = leave(drawn(0), drawn(1), farthest=math.inf, stop=stop)
    assert found.stopped
    assert len(found.distances) == 6
    assert same(found.model, asked[-1])


def test_without_data_the_reference_is_returned():
    found = climb(vector(1), vector(0), torch.zeros(0, 1), learning_rate=1)
    assert found == ascent.Ascent(found.model, (), stopped=False)
    assert same(found.model, vector(1))


def test_the_same_seed_gives_the_same_bits_and_inputs_are_left_untouched():
    start, leaver = drawn(0), drawn(1)
    one = leave(start, leaver, 4, farthest=math.inf, learning_rate=0.1)
    assert same(start, drawn(0))
    assert same(leaver, drawn(1))
    again = leave(start, leaver, 4, farthest=math.inf, learning_rate=0.1)
    assert same(one.model, again.model)
    other = leave(start, leaver, 5, farthest=math.inf, learning_rate=0.1)
    assert not same(one.model, other.model)
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(one.model[name], start[name])


@pytest.mark.parametrize(
    "settings_",
    [
        {"learning_rate": -0.1},
        {"learning_rate": math.nan},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"longest": 0.0},
        {"radius": -1.0},
        {"batch_size": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings_):
    with pytest.raises(ParametersError):
        leave(drawn(0), drawn(1), **settings_)


# ---------------------------------------------------------------- when to stop


def test_rules_by_hand():
    # Three of four labels are right, and the loss of every row is log 2 or so.
    inputs, labels = torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 0])
    model = {"head.weight": torch.eye(2), "head.bias": torch.zeros(2)}

    def reached(most):
        return ascent.accuracy_at_most(forward, inputs, labels, 2, most)(model)

    assert reached(0.75)
    assert not reached(0.74)
    # log(1 + e^-1) three times and log(1 + e) once: (3 * .313262 + 1.313262) / 4 = .563262
    for limit, expected in ((0.5633, False), (0.5632, True), (math.nan, True)):
        rule = ascent.loss_over(forward, functional.cross_entropy, inputs, labels, limit)
        assert rule(model) is expected
    broken = {**model, "head.bias": torch.full((2,), math.nan)}
    assert ascent.loss_over(forward, functional.cross_entropy, inputs, labels, 9.0)(broken)
    yes, no = (lambda model: True), (lambda model: False)
    assert ascent.either(no, yes)(model)
    assert not ascent.either(no, no)(model)
    assert ascent.most_uncertain_loss(10) == pytest.approx(4.60517)


def test_rules_that_make_no_sense_are_refused():
    with pytest.raises(MissingNeedError, match="at least one sample"):
        ascent.accuracy_at_most(forward, INPUTS[:0], LABELS[:0], 3)
    with pytest.raises(MissingNeedError, match="at least one sample"):
        ascent.loss_over(forward, functional.cross_entropy, INPUTS[:0], LABELS[:0], 1.0)
    with pytest.raises(ParametersError, match="0 to 1"):
        ascent.accuracy_at_most(forward, INPUTS, LABELS, 2)
    with pytest.raises(ParametersError, match="cannot go with"):
        ascent.accuracy_at_most(forward, INPUTS, LABELS[:3], 3)
    with pytest.raises(ParametersError, match="at least 2 classes"):
        ascent.most_uncertain_loss(1)


# ---------------------------------------------------------------- without a ball


def ascend(model, **more):
    return ascent.ascend_partially(
        model, forward, functional.cross_entropy, INPUTS, LABELS,
        **{"generator": generator(0), **more},
    )  # fmt: skip


@given(seed=st.integers(0, 40), share=st.floats(0.1, 1))
@settings(deadline=None, max_examples=25)
def test_a_small_partial_step_raises_the_loss(seed, share):
    start = drawn(seed)
    found = ascend(start, epochs=1, shares=dict.fromkeys(TRAINED, share))
    assert loss_of(found) > loss_of(start)
    assert same(start, drawn(seed))


def test_a_partial_step_by_hand():
    start = drawn(0, scale=9.0)
    shares = partial.shares_by_depth(start, partial.FEW, partial.MANY)
    chosen = partial.selections(start, shares)
    step = clipped(gradient(start, forward, functional.cross_entropy, INPUTS, LABELS), 0.5)
    found = ascend(start, epochs=1, shares=shares, longest=0.5, learning_rate=0.1)
    for name in TRAINED:
        expected = torch.where(chosen[name], start[name] + 0.1 * step[name], start[name])
        torch.testing.assert_close(found[name], expected)
        assert torch.equal(found[name][~chosen[name]], start[name][~chosen[name]])


def test_a_share_of_one_is_the_naive_ascent_bit_for_bit():
    assert same(ascend(drawn(0)), ascend(drawn(0), shares=dict.fromkeys(TRAINED, 1.0)))
    assert not same(ascend(drawn(0)), drawn(0))


def test_partial_ascent_stops_and_refuses():
    limit = ascent.most_uncertain_loss(3)
    rule = ascent.loss_over(forward, functional.cross_entropy, INPUTS, LABELS, limit)
    far = ascend(drawn(0), learning_rate=5.0, epochs=200, stop=rule)
    assert loss_of(far) > limit
    assert loss_of(ascend(drawn(0), learning_rate=5.0, epochs=200)) > 3 * loss_of(far)
    with pytest.raises(ParametersError, match="at least 0"):
        ascend(drawn(0), learning_rate=-1.0)
