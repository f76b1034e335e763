"""Gradients against formulas and against a loop over rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import gradients
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import norm
from unlearning.randomness import generator

NETWORK = torch.nn.Sequential(
    torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.Flatten(),
    torch.nn.Linear(8, 3),
).eval()  # fmt: skip


def network(model, inputs):
    return torch.func.functional_call(NETWORK, dict(model), (inputs,))


def drawn(seed, rows=5):
    """Return a small convolutional model, with normalisation, and data for it."""
    draw = torch.Generator().manual_seed(seed)
    model = {
        name: torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor
        for name, tensor in NETWORK.state_dict().items()
    }
    model["1.running_var"] = model["1.running_var"].square() + 0.5
    inputs = torch.randn(rows, 1, 4, 4, generator=draw)
    return model, inputs, torch.randint(3, (rows,), generator=draw)


def line(model, inputs):
    return inputs @ model["w"]


def squares(outputs, targets):
    return (outputs - targets).square() / 2


def test_the_gradient_of_a_line_by_hand():
    # Residuals 1*1 + 2*1 - 1 = 2 and 0*1 + 3*1 - 4 = -1: (2 (1, 2) - 1 (0, 3)) / 2 = (1, .5).
    model = {"w": torch.ones(2), "unused": torch.ones(3)}
    inputs, targets = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([1.0, 4.0])

    found = gradients.gradient(model, line, squares, inputs, targets)
    rows = gradients.per_sample_gradients(model, line, squares, inputs, targets)

    assert torch.equal(found["w"], torch.tensor([1.0, 0.5]))
    assert torch.equal(found["unused"], torch.zeros(3))
    assert torch.equal(rows["w"], torch.tensor([[2.0, 4.0], [0.0, -3.0]]))
    assert torch.equal(rows["unused"], torch.zeros(2, 3))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 50), rows=st.integers(1, 6), mean=st.booleans())
def test_rows_apart_are_as_a_loop_over_them(seed, rows, mean):
    model, inputs, targets = drawn(seed, rows)

    def loss(outputs, wanted):
        return functional.cross_entropy(outputs, wanted, reduction="mean" if mean else "none")

    found = gradients.per_sample_gradients(model, network, loss, inputs, targets)

    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]
    for row in range(rows):
        one = slice(row, row + 1)
        expected = gradients.gradient(model, network, loss, inputs[one], targets[one])
        for name in expected:
            torch.testing.assert_close(found[name][row], expected[name], rtol=1e-4, atol=1e-5)
    whole = gradients.gradient(model, network, loss, inputs, targets)
    for name in whole:
        torch.testing.assert_close(found[name].mean(dim=0), whole[name], rtol=1e-4, atol=1e-5)


def test_nothing_is_written_to_and_gradients_may_be_off():
    model, inputs, targets = drawn(3)
    before = {name: tensor.clone() for name, tensor in model.items()}

    expected = gradients.gradient(model, network, functional.cross_entropy, inputs, targets)
    with torch.no_grad():
        found = gradients.gradient(model, network, functional.cross_entropy, inputs, targets)
        rows = gradients.per_sample_gradients(
            model, network, functional.cross_entropy, inputs, targets
        )

    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(rows[name].abs().sum() > 0 for name in rows)
    assert all(torch.equal(model[name], before[name]) for name in before)
    assert not any(t.requires_grad for t in [*model.values(), *found.values(), *rows.values()])


def test_a_long_step_is_scaled_to_its_bound_and_a_short_one_is_not():
    # |(3, 4)| = 5
    step = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}

    short = gradients.clipped(step, 1.0)

    torch.testing.assert_close(short, {"a": torch.tensor([0.6]), "b": torch.tensor([0.8])})
    assert norm(short) == pytest.approx(1)
    for longest in (5.0, 10.0):
        assert all(torch.equal(gradients.clipped(step, longest)[name], step[name]) for name in step)
    zero = {"a": torch.zeros(2)}
    assert torch.equal(gradients.clipped(zero, 1.0)["a"], zero["a"])


@pytest.mark.parametrize("longest", [0.0, -1.0, float("nan")])
def test_bounds_are_over_zero(longest):
    with pytest.raises(ParametersError, match="must be over 0"):
        gradients.clipped({"w": torch.ones(1)}, longest)


def test_a_step_that_is_not_finite_is_refused():
    with pytest.raises(ParametersError, match="not finite"):
        gradients.clipped({"w": torch.tensor([float("inf")])}, 1.0)


def test_batches_hold_every_row_once_with_its_target():
    inputs = torch.arange(7)

    found = list(gradients.batches(inputs, inputs * 10, 3, generator(0)))

    assert [len(rows) for rows, _ in found] == [3, 3, 1]
    assert all(torch.equal(rows * 10, targets) for rows, targets in found)
    assert sorted(torch.cat([rows for rows, _ in found]).tolist()) == list(range(7))


def test_rows_that_do_not_fit_are_refused():
    model, inputs, targets = drawn(0)
    for function in (gradients.gradient, gradients.per_sample_gradients):
        with pytest.raises(ParametersError, match="5 inputs cannot go with 4 targets"):
            function(model, network, functional.cross_entropy, inputs, targets[:4])
    with pytest.raises(ParametersError, match="at least one row, got a size of 0"):
        next(gradients.batches(inputs, targets, 0, generator(0)))
    with pytest.raises(MissingNeedError, match="there are none"):
        next(gradients.batches(inputs[:0], targets[:0], 1, generator(0)))


# ---------------------------------------------------------------- many rows


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 50), rows=st.integers(1, 7), chunk=st.integers(1, 8))
def test_chunks_make_no_difference(seed, rows, chunk):
    model, inputs, targets = drawn(seed, rows)
    found = gradients.chunked_gradient(
        model, network, functional.cross_entropy, inputs, targets, chunk
    )
    whole = gradients.gradient(model, network, functional.cross_entropy, inputs, targets)
    assert found.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-4, atol=1e-5)


def test_the_gradient_of_no_rows_is_zero_in_chunks():
    model, inputs, targets = drawn(0)
    found = gradients.chunked_gradient(
        model, network, functional.cross_entropy, inputs[:0], targets[:0]
    )
    assert not any(tensor.any() for tensor in found.values())
    with pytest.raises(ParametersError, match="at least one row, got 0"):
        gradients.chunked_gradient(model, network, functional.cross_entropy, inputs, targets, 0)
    with pytest.raises(ParametersError, match="cannot go with"):
        gradients.chunked_gradient(model, network, functional.cross_entropy, inputs, targets[:2])


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_a_rows_loss_is_that_of_a_batch_of_it(reduction):
    model, inputs, targets = drawn(1)

    def loss(outputs, wanted):
        return functional.cross_entropy(outputs, wanted, reduction=reduction)

    found = gradients.row_losses(model, network, loss, inputs, targets)
    expected = functional.cross_entropy(network(model, inputs), targets, reduction="none")
    torch.testing.assert_close(found, expected)
    assert gradients.row_losses(model, network, loss, inputs[:0], targets[:0]).shape == (0,)
    with pytest.raises(ParametersError, match="cannot go with"):
        gradients.row_losses(model, network, loss, inputs, targets[:2])
