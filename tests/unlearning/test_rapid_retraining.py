"""Rapid retraining against its definition: methods 2.8."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import rapid_retraining as rapid
from unlearning.errors import ParametersError
from unlearning.gradients import gradient, per_sample_gradients
from unlearning.randomness import generator

INPUTS = torch.randn(14, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(14) % 3


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


def loss_of(model):
    return float(functional.cross_entropy(forward(model, INPUTS), LABELS))


def train(model, rows=slice(None), **more):
    return rapid.train(
        model, forward, functional.cross_entropy, INPUTS[rows], LABELS[rows],
        **{"epochs": 3, "batch_size": 5, "generator": generator(0), **more},
    )  # fmt: skip


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (1, [1, 2, 6, 4, 8, 3, 5]),
        # (1 + 2 + 6) / 3, (4 + 8 + 3) / 3, and what is left of a block
        (3, [3, 3, 3, 5, 5, 5, 5]),
        (2, [1.5, 1.5, 5, 5, 5.5, 5.5, 5]),
        # 29 / 7
        (9, [29 / 7] * 7),
    ],
)
def test_blocks_by_hand(block, expected):
    values = torch.tensor([1.0, 2, 6, 4, 8, 3, 5])
    torch.testing.assert_close(rapid.block_mean(values, block), torch.tensor(expected).float())


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), rows=st.integers(0, 5), columns=st.integers(1, 5), block=st.integers(1, 8))  # fmt: skip
def test_blocks_keep_shape_and_sum_and_are_constant(seed, rows, columns, block):
    values = torch.rand(rows, columns, generator=generator(seed))
    found = rapid.block_mean(values, block)
    assert found.shape == values.shape
    assert float(found.sum()) == pytest.approx(float(values.sum()), rel=1e-4)
    for part in torch.split(found.reshape(-1), block):
        assert (part == part[0]).all() if len(part) else rows == 0


# ---------------------------------------------------------------- steps


def test_two_steps_by_hand():
    # g = 2, F = 3: m = .2, v = .001 * 9; corrected 2 and 9: w = 5 - .1 * 2 / (3 + 1) = 4.95.
    # g = -1, F = 1: m = .18 - .1 = .08, v = .008991 + .001 = .009991; corrected by .19 and .001999:
    # .4210526 and 4.997999, so w = 4.95 - .1 * .4210526 / (2.235621 + 1) = 4.936987.
    numbers = rapid.Settings(learning_rate=0.1, damping=1.0)

    def of(value):
        return {"w": torch.tensor([float(value)], dtype=torch.float64)}

    model = of(5)
    once, state = rapid.step(model, rapid.initial(model), of(2), of(3), numbers)
    twice, after = rapid.step(once, state, of(-1), of(1), numbers)
    assert once["w"].item() == pytest.approx(4.95)
    assert twice["w"].item() == pytest.approx(4.936987, abs=1e-6)
    assert (state.steps, after.steps) == (1, 2)
    assert state.first["w"].item() == pytest.approx(0.2)
    assert after.second["w"].item() == pytest.approx(0.009991)
    assert model["w"].item() == 5


@settings(deadline=None, max_examples=20)
@given(g=st.floats(0.5, 20), steps=st.integers(1, 30))
def test_a_constant_gradient_moves_by_eta_g_over_h(g, steps):
    # Bias correction makes averages of a constant that constant: every step is eta g / (h + eps),
    # with h = g^2 that is eta / g up to damping.
    model = {"w": torch.tensor([0.0], dtype=torch.float64)}
    slope = {"w": torch.tensor([g], dtype=torch.float64)}
    fisher = {"w": slope["w"].square()}
    state = rapid.initial(model)
    for number in range(1, steps + 1):
        model, state = rapid.step(model, state, slope, fisher)
        assert model["w"].item() == pytest.approx(-number * 1e-3 * g / (g**2 + 1e-2))
        assert model["w"].item() == pytest.approx(-number * 1e-3 / g, rel=1e-2 / g**2)


def test_blocks_of_one_are_the_plain_diagonal():
    model, slope = drawn(0), {n: t for n, t in drawn(1).items() if n.startswith("head")}
    fisher = {name: tensor.square() for name, tensor in slope.items()}
    plain, _ = rapid.step(
        model, rapid.initial(model), slope, fisher, rapid.Settings(block=1, learning_rate=1)
    )
    for name, tensor in slope.items():
        expected = model[name] - tensor / (tensor.square() + 1e-2)
        torch.testing.assert_close(plain[name], expected, rtol=1e-3, atol=1e-4)
    # With blocks, the curvatures are averaged first and squared afterwards.
    averaged, _ = rapid.step(
        model, rapid.initial(model), slope, fisher, rapid.Settings(learning_rate=1)
    )
    bias = model["head.bias"] - slope["head.bias"] / (fisher["head.bias"].mean() + 1e-2)
    torch.testing.assert_close(averaged["head.bias"], bias, rtol=1e-3, atol=1e-4)


def test_a_step_leaves_its_inputs_alone_and_buffers_too():
    model, slope = drawn(0), {n: t for n, t in drawn(1).items() if n.startswith("head")}
    state = rapid.initial(model)
    moved, after = rapid.step(model, state, slope, slope)
    assert same(model, drawn(0))
    assert not any(tensor.any() for tensor in [*state.first.values(), *state.second.values()])
    assert state.steps == 0
    assert after.steps == 1
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(moved[name], model[name])
        assert moved[name] is not model[name]


def test_what_does_not_fit_is_refused():
    model = drawn(0)
    slope = {n: t for n, t in model.items() if n.startswith("head")}
    state = rapid.initial(model)
    with pytest.raises(ParametersError, match="differ in their tensors"):
        rapid.step(model, state, {}, slope)
    with pytest.raises(ParametersError, match="differ in their tensors"):
        rapid.step(model, state, slope, model)
    with pytest.raises(ParametersError, match="not finite"):
        rapid.step(model, state, {**slope, "head.bias": torch.full((3,), math.nan)}, slope)
    for wrong in (
        {"beta1": 1.0}, {"beta2": 1.0}, {"beta1": -0.1}, {"damping": 0.0}, {"block": 0},
        {"learning_rate": -1.0}, {"learning_rate": math.nan},
    ):  # fmt: skip
        with pytest.raises(ParametersError):
            rapid.Settings(**wrong)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", ["batch", "per_sample"])
def test_training_is_steps_on_batches(kind):
    # One batch an epoch, so that its order does not matter up to rounding.
    numbers = rapid.Settings(fisher=kind, learning_rate=0.1)
    found, state = train(drawn(2), batch_size=14, epochs=2, settings=numbers)
    model, expected = drawn(2), rapid.initial(drawn(2))
    for _ in range(2):
        slope = gradient(model, forward, functional.cross_entropy, INPUTS, LABELS)
        rows = per_sample_gradients(model, forward, functional.cross_entropy, INPUTS, LABELS)
        fisher = {
            name: slope[name].square() if kind == "batch" else rows[name].square().mean(dim=0)
            for name in slope
        }
        model, expected = rapid.step(model, expected, slope, fisher, numbers)
    assert state.steps == 2
    for name, tensor in model.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["batch", "per_sample"])
def test_it_learns(kind):
    numbers = rapid.Settings(fisher=kind, learning_rate=3e-3)
    found, _ = train(drawn(0), epochs=30, settings=numbers)
    assert loss_of(found) < 0.9 * loss_of(drawn(0))


def test_training_may_go_on_where_it_was():
    draw = generator(3)
    whole, last = train(drawn(0), epochs=4, generator=generator(3))
    first, state = train(drawn(0), epochs=2, generator=draw)
    second, end = train(first, epochs=2, generator=draw, state=state)
    assert same(second, whole)
    assert end.steps == last.steps == 12
    assert same(end.second, last.second)
    assert not same(train(first, epochs=2, generator=draw)[0], whole)


def test_same_seed_same_bits_and_no_rows_no_change():
    assert same(train(drawn(0))[0], train(drawn(0))[0])
    assert not same(train(drawn(0))[0], train(drawn(0), generator=generator(1))[0])
    model = drawn(0)
    found, state = train(model, rows=slice(0, 0))
    assert same(found, drawn(0))
    assert not any(found[name] is model[name] for name in model)
    assert state.steps == 0
    train(model)
    assert same(model, drawn(0))
    with pytest.raises(ParametersError, match="cannot go with"):
        rapid.train(
            model, forward, functional.cross_entropy, INPUTS, LABELS[:3],
            epochs=1, batch_size=2, generator=generator(0),
        )  # fmt: skip


def test_the_numbers_of_the_specification():
    numbers = rapid.DEFAULT
    assert (numbers.beta1, numbers.beta2, numbers.learning_rate) == (0.9, 0.999, 1e-3)
    assert (numbers.damping, numbers.block, numbers.fisher) == (1e-2, 3, "batch")
