"""The infinitesimal jackknife against closed forms: methods 2.14."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import jackknife
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.fisher import fisher_statistics, influence_step
from unlearning.gradients import gradient
from unlearning.randomness import generator
from unlearning.sums import Statistics, added, means

NETWORK = torch.nn.Sequential(
    torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.Flatten(),
    torch.nn.Linear(8, 3),
).eval()  # fmt: skip
INPUTS = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
cross_entropy = functional.cross_entropy


def network(model, inputs):
    return torch.func.functional_call(NETWORK, dict(model), (inputs,))


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    model = {
        name: torch.randn(tensor.shape, generator=draw)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in NETWORK.state_dict().items()
    }
    model["1.running_var"] = model["1.running_var"].square() + 0.5
    return model


def linear(model, inputs):
    return functional.linear(inputs, model["head.weight"], model.get("head.bias"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def double(seed, *shape):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ---------------------------------------------------------------- the correction itself


def ridge_regression(inputs, targets, penalty):
    return torch.linalg.solve(
        inputs.T @ inputs + penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype),
        inputs.T @ targets,
    )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), row=st.integers(0, 39))
def test_leaving_one_out_of_a_ridge_regression(seed, row):
    # sum (x w - y)^2 / 2 + n ridge |w|^2 / 2 keeps its penalty without a row. By the formula of
    # Sherman and Morrison the correction H^-1 x e / n, e the row's residual, falls short of the
    # exact one by the factor 1 - h, h = x (n H)^-1 x its leverage, which is O(1/n).
    inputs, ridge = double(seed, 40, 3), 0.1
    targets = inputs.sum(dim=1) + double(seed + 1000, 40)
    w = ridge_regression(inputs, targets, 40 * ridge)
    slope = inputs[row] * (inputs[row] @ w - targets[row])
    found = jackknife.correction(inputs.T @ inputs, slope, 40, ridge)
    others = [place for place in range(40) if place != row]
    exact = ridge_regression(inputs[others], targets[others], 40 * ridge) - w
    scatter = inputs.T @ inputs + 40 * ridge * torch.eye(3, dtype=torch.float64)
    leverage = inputs[row] @ torch.linalg.solve(scatter, inputs[row])
    torch.testing.assert_close(found, exact * (1 - leverage))


def test_the_error_of_leaving_one_out_falls_with_the_square_of_n():
    def error(n):
        # Repeating the same 20 rows leaves n H / n as it is, and leverages shrink with 1/n.
        inputs = double(3, 20, 3).repeat(n // 20, 1)
        targets = (double(3, 20, 3).sum(dim=1) + double(4, 20)).repeat(n // 20)
        w = ridge_regression(inputs, targets, 0.1 * n)
        slope = inputs[0] * (inputs[0] @ w - targets[0])
        found = w + jackknife.correction(inputs.T @ inputs, slope, n, 0.1)
        exact = ridge_regression(inputs[1:], targets[1:], 0.1 * n)
        return float(torch.linalg.vector_norm(found - exact))

    errors = [error(n) for n in (200, 400, 800)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99))
def test_corrections_add_up(seed):
    inputs = double(seed, 30, 4)
    hessian, one, other = inputs.T @ inputs, double(seed + 1, 4), double(seed + 2, 4)
    both = jackknife.correction(hessian, one + other, 30)
    parts = jackknife.correction(hessian, one, 30) + jackknife.correction(hessian, other, 30)
    torch.testing.assert_close(both, parts)


def test_a_correction_by_hand():
    # H/n + ridge = diag(2, 4) + 1 = diag(3, 5); (6, 10) / (3, 5) / 2 = (1, 1)
    found = jackknife.correction(
        torch.diag(torch.tensor([4.0, 8.0])), torch.tensor([6.0, 10.0]), 2, 1.0
    )
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64))


def test_sums_that_no_data_give_are_refused():
    vector = torch.ones(2)
    with pytest.raises(ParametersError, match="negative eigenvalues"):
        jackknife.correction(torch.diag(torch.tensor([1.0, -1.0])), vector, 1)
    with pytest.raises(ParametersError, match="symmetric"):
        jackknife.correction(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), vector, 1)
    for samples, ridge in ((0, 1.0), (1, 0.0), (1, math.nan)):
        with pytest.raises(ParametersError, match="at least 1 sample"):
            jackknife.correction(torch.eye(2), vector, samples, ridge)


# ---------------------------------------------------------------- features, Hessian, gradient


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_features_are_what_the_last_layer_is_given(chunk):
    model = drawn(1)
    entering, logits = jackknife.features(model, network, INPUTS, "4", chunk)
    expected = torch.func.functional_call(
        NETWORK[:4], {n: t for n, t in model.items() if not n.startswith("4")}, (INPUTS,)
    )
    torch.testing.assert_close(entering[:, :8], expected.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(entering[:, 8], torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(logits.float(), network(model, INPUTS))
    assert jackknife.last_layer(model) == "4"
    none = jackknife.features(model, network, INPUTS[:0], "4")
    assert [part.shape for part in none] == [(0, 9), (0, 3)]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), classes=st.integers(2, 4), width=st.integers(1, 3), rows=st.integers(1, 6))  # fmt: skip
def test_hessian_and_gradient_are_those_of_autograd(seed, classes, width, rows):
    entering, matrix = double(seed, rows, width), double(seed + 1, classes, width)
    labels = torch.randint(classes, (rows,), generator=generator(seed))

    def total(flat):
        logits = entering @ flat.reshape(classes, width).T
        return cross_entropy(logits, labels, reduction="sum")

    flat, logits = matrix.reshape(-1), entering @ matrix.T
    found = jackknife.softmax_hessian(entering, logits)
    torch.testing.assert_close(found, torch.func.hessian(total)(flat))
    assert torch.equal(found, found.T)
    torch.testing.assert_close(
        jackknife.softmax_gradient(entering, logits, labels), torch.func.grad(total)(flat)
    )


@pytest.mark.parametrize("parts", [(12,), (5, 7), (0, 1, 11)])
def test_sums_of_clients_are_those_of_all_rows(parts):
    model = drawn(2)

    def sums(rows):
        labels = LABELS[rows]
        return (
            jackknife.hessian_statistics(model, network, INPUTS[rows], "4"),
            jackknife.gradient_statistics(model, network, INPUTS[rows], labels, "4"),
        )

    starts = [sum(parts[:place]) for place in range(len(parts))]
    sent = [sums(slice(a, a + n)) for a, n in zip(starts, parts, strict=True)]
    for together, whole in zip(zip(*sent, strict=True), sums(slice(None)), strict=True):
        total = added(together)
        assert total.count == whole.count == 12
        torch.testing.assert_close(total.sums["4"], whole.sums["4"])
    # The gradient is that of the model's own loss, in the order of expected().
    slope = gradient(model, network, cross_entropy, INPUTS, LABELS)
    rows = torch.cat([slope["4.weight"], slope["4.bias"].unsqueeze(1)], dim=1).double()
    found = sums(slice(None))[1].sums["4"]
    torch.testing.assert_close(found, 12 * rows.reshape(-1), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the last layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_softmax_regression_nearly_without_some_rows(bias):
    inputs = torch.randn(200, 3, generator=generator(1), dtype=torch.float64)
    labels = (inputs[:, 0] + torch.randn(200, generator=generator(2)) > 0).long()
    ridge = 0.05
    wide = functional.pad(inputs, (0, 1), value=1.0) if bias else inputs

    def fitted(rows):
        """Newton's method on 1/200 sum of rows + ridge/2 |w|^2."""
        w = torch.zeros(2, wide.shape[1], dtype=torch.float64)
        for _ in range(20):
            logits = wide[rows] @ w.T
            slope = jackknife.softmax_gradient(wide[rows], logits, labels[rows]) / 200
            curved = jackknife.softmax_hessian(wide[rows], logits) / 200
            curved += ridge * torch.eye(len(curved), dtype=torch.float64)
            w = w - torch.linalg.solve(curved, slope + ridge * w.reshape(-1)).reshape(w.shape)
        found = {"head.weight": w[:, :3].clone()}
        return {**found, "head.bias": w[:, 3].clone()} if bias else found

    model, gone = fitted(list(range(200))), [0, 7, 11]
    exact = fitted([row for row in range(200) if row not in gone])
    found = jackknife.corrected(
        model,
        "head",
        jackknife.hessian_statistics(model, linear, inputs, "head"),
        jackknife.gradient_statistics(model, linear, inputs[gone], labels[gone], "head"),
        ridge,
    )
    assert found.keys() == exact.keys()
    for name in exact:
        before = torch.linalg.vector_norm(model[name] - exact[name])
        assert torch.linalg.vector_norm(found[name] - exact[name]) < 0.1 * before


def test_everything_but_the_last_layer_stays():
    model = drawn(0)
    hessian = jackknife.hessian_statistics(model, network, INPUTS, "4")
    slope = jackknife.gradient_statistics(model, network, INPUTS[:2], LABELS[:2], "4")
    found = jackknife.corrected(model, "4", hessian, slope)
    assert same(model, drawn(0))
    for name in model:
        assert torch.equal(found[name], model[name]) == (name not in ("4.weight", "4.bias"))
        assert found[name].dtype == model[name].dtype
    flat = jackknife.correction(hessian.sums["4"], slope.sums["4"], 12).reshape(3, 9)
    torch.testing.assert_close(found["4.weight"] - model["4.weight"], flat[:, :8].float(), rtol=1e-3, atol=1e-4)  # fmt: skip
    torch.testing.assert_close(found["4.bias"] - model["4.bias"], flat[:, 8].float(), rtol=1e-3, atol=1e-4)  # fmt: skip
    # Nothing to forget changes nothing.
    none = jackknife.gradient_statistics(model, network, INPUTS[:0], LABELS[:0], "4")
    assert same(jackknife.corrected(model, "4", hessian, none), model)


def test_forgetting_raises_the_loss_on_what_is_forgotten():
    # Along + the gradient, whatever the curvature: H is positive definite.
    model = drawn(3)
    hessian = jackknife.hessian_statistics(model, network, INPUTS, "4")
    slope = jackknife.gradient_statistics(model, network, INPUTS[:1], LABELS[:1], "4")
    found = jackknife.corrected(model, "4", hessian, slope, 10.0)
    before, after = (cross_entropy(network(m, INPUTS[:1]), LABELS[:1]) for m in (model, found))
    assert after > before


def test_what_clients_send_is_checked():
    model = drawn(0)
    hessian = jackknife.hessian_statistics(model, network, INPUTS, "4")
    slope = jackknife.gradient_statistics(model, network, INPUTS[:2], LABELS[:2], "4")
    zero = {"4": torch.zeros(27, 27)}
    for bad_hessian, bad_slope, message in (
        (Statistics({"4": torch.zeros(3, 3)}, 12), slope, "are expected"),
        (hessian, Statistics({"4": torch.zeros(3)}, 2), "are expected"),
        (hessian, Statistics({"3": slope.sums["4"]}, 2), "differ"),
        (hessian, Statistics(slope.sums, 13), "at most 12"),
        (hessian, Statistics({"4": torch.full((27,), math.nan)}, 2), "not finite"),
        (Statistics({"4": -hessian.sums["4"]}, 12), slope, "negative eigenvalues"),
    ):
        with pytest.raises(ParametersError, match=message):
            jackknife.corrected(model, "4", bad_hessian, bad_slope)
    with pytest.raises(MissingNeedError, match="at least one sample"):
        jackknife.corrected(model, "4", Statistics(zero, 0), Statistics({"4": torch.zeros(27)}, 0))


def test_layers_that_cannot_be_solved_are_refused():
    # 10 (399 + 1) = 4,000 unknowns are solved, and 10 (400 + 1) = 4,010 are not.
    largest = {"head.weight": torch.zeros(10, 399), "head.bias": torch.zeros(10)}
    assert jackknife.expected(largest, "head")[1]["head"].shape == (4000,)
    assert jackknife.expected({"weight": torch.zeros(10, 400)}, "")[1][""].shape == (4000,)
    larger = {"head.weight": torch.zeros(10, 400), "head.bias": torch.zeros(10)}
    with pytest.raises(MissingNeedError, match=r"4,010 unknowns.*set the scope to diag"):
        jackknife.hessian_statistics(larger, linear, torch.zeros(2, 400), "head")
    with pytest.raises(MissingNeedError, match="no linear layer called 'tail'"):
        jackknife.expected(larger, "tail")
    with pytest.raises(MissingNeedError, match="no linear layer called '0'"):
        jackknife.expected(drawn(0), "0")
    with pytest.raises(MissingNeedError, match="ends in a linear layer"):
        jackknife.last_layer({"0.weight": torch.zeros(2, 1, 3, 3)})
    two = {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)}

    def deep(model, inputs):
        return (inputs @ model["0.weight"].T).relu() @ model["1.weight"].T

    with pytest.raises(MissingNeedError, match="does not end in"):
        jackknife.features(two, deep, torch.ones(3, 2), "0")
    with pytest.raises(MissingNeedError, match="integer label"):
        jackknife.gradient_statistics(two, deep, torch.ones(3, 2), torch.ones(3), "1")


# ---------------------------------------------------------------- the diagonal, and the warning


def test_the_diagonal_is_an_influence_step_by_sums():
    model, gone = drawn(0), slice(0, 2)
    slope = jackknife.slope_statistics(model, network, cross_entropy, INPUTS[gone], LABELS[gone])
    fisher = fisher_statistics(model, network, cross_entropy, INPUTS, LABELS)
    found = jackknife.corrected_diagonally(model, slope, fisher)
    average = gradient(model, network, cross_entropy, INPUTS[gone], LABELS[gone])
    sums = {name: 2 * tensor for name, tensor in average.items()}
    for name, tensor in influence_step(model, sums, means(fisher), 12).items():
        torch.testing.assert_close(found[name], tensor)
    assert slope.count == 2
    none = jackknife.slope_statistics(model, network, cross_entropy, INPUTS[:0], LABELS[:0])
    assert same(jackknife.corrected_diagonally(model, none, fisher), model)
    for bad in (Statistics({}, 1), Statistics(slope.sums, 13)):
        with pytest.raises(ParametersError):
            jackknife.corrected_diagonally(model, bad, fisher)
    with pytest.raises(MissingNeedError):
        jackknife.corrected_diagonally(model, none, Statistics(none.sums, 0))


def test_more_than_a_twentieth_is_warned_about():
    assert jackknife.warning(0, 0) is None
    assert jackknife.warning(5, 100) is None
    assert jackknife.warning(50, 1000) is None
    assert "6 of 100 samples are more than 5%" in jackknife.warning(6, 100)
    assert jackknife.warning(1, 19) is not None
