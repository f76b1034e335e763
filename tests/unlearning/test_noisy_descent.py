"""Noisy descent and its accounting against their definition: methods 2.15."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import noisy_descent as noisy
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.gradients import clipped, gradient, per_sample_gradients
from unlearning.parameters import norm
from unlearning.randomness import generator

INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 3
TRAINED = ("head.weight", "head.bias")
cross_entropy = functional.cross_entropy


def forward(model, inputs):
    return inputs @ model["head.weight"].T + model["head.bias"]


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(3, 4, generator=draw),
        "norm.running_mean": torch.randn(2, generator=draw),
        "head.bias": torch.randn(3, generator=draw),
        "norm.num_batches_tracked": torch.tensor(2),
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(model, rows=slice(None), seed=0, **more):
    chunk = more.pop("chunk", 16)
    return noisy.train(
        model, forward, cross_entropy, INPUTS[rows], LABELS[rows],
        steps=more.pop("steps", 5), generator=generator(seed), chunk=chunk,
        settings=noisy.Settings(**more),
    )  # fmt: skip


# ---------------------------------------------------------------- descent


def test_a_step_by_hand():
    # 1 - .1 (2 + .5 * 1) = .75, and noise of deviation sqrt(.2) 3
    numbers = noisy.Settings(learning_rate=0.1, decay=0.5, noise=3.0)
    found = noisy.step({"w": torch.ones(1)}, {"w": torch.tensor([2.0])}, generator(0), numbers)
    drawn_ = torch.randn(1, generator=generator(0))
    torch.testing.assert_close(found["w"], 0.75 + math.sqrt(0.2) * 3 * drawn_)


def test_the_noise_has_the_variance_it_says():
    # 200,000 draws know a variance to .3 %: 2 eta s^2 = 2 * .1 * 4 = .8.
    numbers = noisy.Settings(learning_rate=0.1, decay=0.0, noise=2.0)
    start = {"a": torch.zeros(400, 250), "b": torch.zeros(100_000)}
    found = noisy.step(start, start, generator(0), numbers)
    both = torch.cat([tensor.reshape(-1) for tensor in found.values()])
    assert float(both.var()) == pytest.approx(0.8, rel=0.02)
    assert abs(float(both.mean())) < 0.01
    assert abs(float((found["a"].reshape(-1) * found["b"]).mean())) < 0.02


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 50), chunk=st.integers(1, 25), longest=st.floats(0.05, 5))
def test_rows_are_clipped_one_by_one(seed, chunk, longest):
    model = drawn(seed)
    found = noisy.clipped_gradient(model, forward, cross_entropy, INPUTS, LABELS, longest, chunk)
    rows = per_sample_gradients(model, forward, cross_entropy, INPUTS, LABELS)
    alone = [clipped({n: t[i] for n, t in rows.items()}, longest) for i in range(20)]
    assert max(map(norm, alone)) <= longest * (1 + 1e-5)
    for name in TRAINED:
        expected = torch.stack([part[name] for part in alone]).mean(dim=0)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 50),
    clip=st.floats(0.1, 2),
    gone=st.sets(st.integers(0, 19), min_size=1, max_size=19),
)
def test_rows_that_go_move_the_gradient_by_no_more_than_is_accounted_for(seed, clip, gone):
    model, scale = drawn(seed), 50.0
    rest = [row for row in range(20) if row not in gone]
    whole = noisy.clipped_gradient(model, forward, cross_entropy, scale * INPUTS, LABELS, clip)
    less = noisy.clipped_gradient(
        model, forward, cross_entropy, scale * INPUTS[rest], LABELS[rest], clip
    )
    moved = norm({name: whole[name] - less[name] for name in whole})
    assert moved <= 2 * clip * len(gone) / 20 * (1 + 1e-5)


def test_without_noise_and_decay_it_is_gradient_descent_on_the_rows_left():
    rest = slice(3, None)
    found = train(drawn(0), rest, noise=0.0, decay=0.0, clip=None, learning_rate=0.3)
    # A bound that nothing reaches is no bound.
    wide = train(drawn(0), rest, noise=0.0, decay=0.0, clip=1e6, learning_rate=0.3, chunk=7)
    expected = drawn(0)
    for _ in range(5):
        slope = gradient(expected, forward, cross_entropy, INPUTS[rest], LABELS[rest])
        for name in TRAINED:
            expected[name] = expected[name] - 0.3 * slope[name]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
        torch.testing.assert_close(wide[name], tensor)
    decayed = train(drawn(0), rest, noise=0.0, decay=0.5, clip=None)
    assert norm(decayed) < norm(found)


def test_same_seed_same_path_and_inputs_and_buffers_stay():
    model = drawn(0)
    found = train(model, noise=0.1)
    assert same(found, train(drawn(0), noise=0.1))
    assert not same(found, train(drawn(0), noise=0.1, seed=1))
    assert same(model, drawn(0))
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(found[name], model[name])
    assert same(train(model, slice(0, 0)), model)
    assert same(train(model, steps=0), model)
    one = noisy.train(
        model, forward, cross_entropy, INPUTS, LABELS, steps=2, generator=(draw := generator(5))
    )
    two = noisy.train(one, forward, cross_entropy, INPUTS, LABELS, steps=1, generator=draw)
    whole = noisy.train(
        model, forward, cross_entropy, INPUTS, LABELS, steps=3, generator=generator(5)
    )
    assert same(two, whole)


def test_it_learns_and_unlearns_as_long_as_it_should():
    def loss_of(model):
        return float(cross_entropy(forward(model, INPUTS), LABELS))

    assert loss_of(train(drawn(0), steps=50)) < 0.8 * loss_of(drawn(0))
    assert [noisy.unlearning_rounds(n) for n in (0, 1, 5, 6, 200)] == [0, 1, 1, 2, 40]
    numbers = noisy.DEFAULT
    assert (numbers.learning_rate, numbers.decay, numbers.clip, numbers.noise) == (
        0.1, 1e-4, 1.0, 1e-3,
    )  # fmt: skip


def test_what_makes_no_sense_is_refused():
    for wrong in (
        {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"decay": -1.0}, {"noise": -1.0},
        {"noise": math.inf}, {"clip": 0.0}, {"clip": math.nan},
    ):  # fmt: skip
        with pytest.raises(ParametersError):
            noisy.Settings(**wrong)
    broken = INPUTS.clone()
    broken[3, 1] = math.inf
    with pytest.raises(ParametersError, match="not finite"):
        noisy.clipped_gradient(drawn(0), forward, cross_entropy, broken, LABELS, 1.0)
    with pytest.raises(MissingNeedError, match="at least one row"):
        noisy.clipped_gradient(drawn(0), forward, cross_entropy, INPUTS[:0], LABELS[:0], 1.0)
    for longest, chunk in ((0.0, 1), (1.0, 0)):
        with pytest.raises(ParametersError, match="a chunk holds"):
            noisy.clipped_gradient(drawn(0), forward, cross_entropy, INPUTS, LABELS, longest, chunk)
    with pytest.raises(ParametersError, match="cannot go with"):
        noisy.train(
            drawn(0), forward, cross_entropy, INPUTS, LABELS[:2], steps=1, generator=generator(0)
        )


# ---------------------------------------------------------------- accounting


def test_the_accounting_by_hand():
    # A step moves by at most .1 * 2 * 1 / 1000 = 2e-4, under noise of sqrt(.2) .01 = 4.472136e-3:
    # z = 22.36068, 1 / (2 z^2) = 1e-3 a step, rho = .1 after 100. log 1e5 = 11.512925:
    # .1 + 2 sqrt(1.1512925) = 2.245966.
    found = noisy.guarantee(noisy.Settings(noise=0.01), rows=1000, steps=100)
    assert found.multiplier == pytest.approx(22.36068, rel=1e-6)
    assert found.rho == pytest.approx(0.1)
    assert found.divergence(8) == pytest.approx(0.8)
    assert found.epsilon() == pytest.approx(2.245966, abs=1e-6)
    line = noisy.statement(found)
    for part in ("0.1 a", "1 of 1000 rows", "epsilon 2.246", "1e-05", "100 steps", "22.36"):
        assert part in line
    # Five rows: five times as far, 25 times the divergence.
    five = noisy.guarantee(noisy.Settings(noise=0.01), rows=1000, forgotten=5, steps=100)
    assert five.rho == pytest.approx(2.5)


@settings(deadline=None, max_examples=40)
@given(
    eta=st.floats(1e-3, 1), clip=st.floats(0.1, 10), noise=st.floats(1e-4, 1),
    rows=st.integers(1, 10**6), steps=st.integers(1, 1000), order=st.floats(1.001, 100),
)  # fmt: skip
def test_a_bound_is_the_sum_of_the_divergences_of_gaussians(eta, clip, noise, rows, steps, order):
    # Of N(x, v) and N(y, v) it is a (x - y)^2 / (2 v); here x - y = eta 2c / n, v = 2 eta s^2.
    found = noisy.guarantee(
        noisy.Settings(learning_rate=eta, clip=clip, noise=noise), rows=rows, steps=steps
    )
    one = order * (eta * 2 * clip / rows) ** 2 / (2 * 2 * eta * noise**2)
    assert found.divergence(order) == pytest.approx(steps * one)
    assert found.rho == pytest.approx(steps * eta * (clip / (noise * rows)) ** 2)
    # As if the mean gradient itself had noise of s sqrt(2 / eta).
    assert found.multiplier == pytest.approx(noise * math.sqrt(2 / eta) / (2 * clip / rows))


@settings(deadline=None, max_examples=40)
@given(rho=st.floats(1e-6, 100), delta=st.floats(1e-12, 0.5))
def test_epsilon_is_the_best_over_all_orders(rho, delta):
    found = noisy.Guarantee(rho, 1.0, 1, 1, 1)
    best = 1 + math.sqrt(math.log(1 / delta) / rho)

    def at(order):
        return found.divergence(order) + math.log(1 / delta) / (order - 1)

    assert found.epsilon(delta) == pytest.approx(at(best))
    for factor in (0.5, 0.9, 1.1, 2):
        assert at(1 + (best - 1) * factor) >= found.epsilon(delta) * (1 - 1e-9)


def test_the_bound_covers_what_an_attacker_can_see():
    # One weight, two rows of which one has a gradient of c and the other of -c wherever it is:
    # T steps with both give N(0, 2 eta s^2 T), with the first alone a mean of -eta c T. Telling
    # them apart at any threshold, no probability exceeds e^epsilon times the other, plus delta.
    numbers = noisy.Settings(learning_rate=0.1, decay=0.0, clip=1.0, noise=0.5)
    found = noisy.guarantee(numbers, rows=2, steps=4)
    deviation, away, delta = math.sqrt(2 * 0.1 * 4) * 0.5, 0.1 * 4, 1e-3
    epsilon = found.epsilon(delta)
    # Here the bound holds with equality: the divergence of these two is a rho.
    assert away**2 / (2 * deviation**2) == pytest.approx(found.rho)

    def over(threshold, mean):
        return 0.5 * math.erfc((threshold - mean) / deviation / math.sqrt(2))

    for number in range(-60, 61):
        with_, without = over(number / 20, 0.0), over(number / 20, -away)
        assert with_ <= math.exp(epsilon) * without + delta
        assert 1 - without <= math.exp(epsilon) * (1 - with_) + delta


def test_the_path_of_that_example_is_what_it_says():
    # The loss w x of rows x = 1 and x = -1 has gradients of x.
    numbers = noisy.Settings(learning_rate=0.1, decay=0.0, clip=1.0, noise=0.5)
    rows = torch.tensor([[1.0], [-1.0]])

    def end(count, seed):
        return noisy.train(
            {"w": torch.zeros(1)}, lambda model, x: x * model["w"],
            lambda outputs, targets: outputs.mean(), rows[:count], rows[:count],
            steps=4, generator=generator(seed), settings=numbers,
        )["w"].item()  # fmt: skip

    ends = torch.tensor([[end(2, seed), end(1, seed)] for seed in range(60)])
    # The same seed draws the same noise, and only the rows differ.
    torch.testing.assert_close(ends[:, 0] - ends[:, 1], torch.full((60,), 0.4))
    # .447214; 60 draws know a deviation to 9 %.
    assert float(ends[:, 0].std()) == pytest.approx(math.sqrt(0.2), rel=0.35)


def test_without_clipping_or_noise_nothing_is_guaranteed():
    for more in ({"clip": None}, {"noise": 0.0}):
        found = noisy.guarantee(noisy.Settings(**more), rows=1000, steps=10)
        assert found is None
        assert noisy.statement(found) == "none"
    never = noisy.guarantee(noisy.DEFAULT, rows=1000, steps=0)
    assert (never.rho, never.epsilon()) == (0, 0)
    for wrong in (
        {"rows": 0, "steps": 1}, {"rows": 5, "forgotten": 6, "steps": 1},
        {"rows": 5, "forgotten": 0, "steps": 1}, {"rows": 5, "steps": -1},
    ):  # fmt: skip
        with pytest.raises(ParametersError, match="has a bound"):
            noisy.guarantee(noisy.DEFAULT, **wrong)
    found = noisy.guarantee(noisy.DEFAULT, rows=10, steps=1)
    for order in (1.0, math.nan):
        with pytest.raises(ParametersError, match="over 1"):
            found.divergence(order)
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(ParametersError, match="lie in"):
            found.epsilon(delta)
