"""Fisher information, masks and noise against closed forms: methods 5.1, 5.6, 5.7."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import fisher
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.fedup import prune
from unlearning.gradients import gradient
from unlearning.masking import says_nothing, top_share
from unlearning.randomness import generator
from unlearning.sums import Statistics, added, means

TRAINED = ("head.weight", "head.bias")


def forward(model, inputs):
    return inputs @ model["head.weight"].T + model["head.bias"] + model["norm.running_mean"].sum()


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(3, 4, generator=draw),
        "norm.running_mean": torch.randn(2, generator=draw),
        "head.bias": torch.randn(3, generator=draw),
        "norm.num_batches_tracked": torch.tensor(3),
    }


def rows(seed, count):
    draw = torch.Generator().manual_seed(seed + 1000)
    return torch.randn(count, 4, generator=draw), torch.randint(3, (count,), generator=draw)


def statistics(model, inputs, labels, chunk=16, loss=functional.cross_entropy):
    return fisher.fisher_statistics(model, forward, loss, inputs, labels, chunk)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


def stat(count, *values):
    return Statistics({"w": torch.tensor([float(value) for value in values])}, count)


def line(model, inputs):
    return inputs @ model["w"]


def gaussian(outputs, targets):
    """Negative log likelihood of unit noise."""
    return ((outputs - targets).square() / 2).mean()


# ---------------------------------------------------------------- information


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 50), count=st.integers(1, 30), chunk=st.integers(1, 7))
def test_a_linear_gaussian_model_in_closed_form(seed, count, chunk):
    # d(-log p)/dw_j = -r x_j; with residuals r of +1 and -1, unit noise, F_j = mean x_j^2.
    draw = torch.Generator().manual_seed(seed)
    inputs, weights = torch.randn(count, 4, generator=draw), torch.randn(4, generator=draw)
    signs = torch.randint(2, (count,), generator=draw) * 2.0 - 1
    model = {"w": weights}

    found = fisher.fisher_statistics(model, line, gaussian, inputs, inputs @ weights + signs, chunk)

    assert found.count == count
    torch.testing.assert_close(means(found)["w"], inputs.square().mean(dim=0), rtol=1e-4, atol=1e-5)


def test_the_residual_counts_where_it_is_not_one():
    # r = 2 and -3 at x = 1 and 2: F = (2^2 1^2 + 3^2 2^2) / 2 = 20; the batch's gradient squared
    # is ((2 - 6) / 2)^2 = 4.
    inputs, weights = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0])
    targets = inputs @ weights - torch.tensor([2.0, -3.0])
    found = fisher.fisher_statistics({"w": weights}, line, gaussian, inputs, targets)
    assert means(found)["w"].item() == 20
    assert gradient({"w": weights}, line, gaussian, inputs, targets)["w"].item() ** 2 == 4


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 50), count=st.integers(1, 20), mean=st.booleans())
def test_a_logistic_model_in_closed_form(seed, count, mean):
    # d(-log p)/dz = softmax(z) - onehot; weights have this times x, biases this.
    model, (inputs, labels) = drawn(seed), rows(seed, count)
    slope = torch.softmax(forward(model, inputs), dim=1) - functional.one_hot(labels, 3)

    def loss(outputs, targets):
        return functional.cross_entropy(outputs, targets, reduction="mean" if mean else "none")

    found = means(statistics(model, inputs, labels, loss=loss))

    squares = (slope.unsqueeze(2) * inputs.unsqueeze(1)).square()
    torch.testing.assert_close(found["head.weight"], squares.mean(dim=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["head.bias"], slope.square().mean(0), rtol=1e-4, atol=1e-6)
    assert list(found) == list(TRAINED)
    assert all(found[name].dtype == torch.float32 for name in found)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 50), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_clients_add_up_to_one_data_holder(seed, sizes):
    model, (inputs, labels) = drawn(seed), rows(seed, sum(sizes))
    parts = [
        statistics(model, *part)
        for part in zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)
    ]
    whole, total = statistics(model, inputs, labels), added(parts)
    assert total.count == whole.count
    close(total.sums, whole.sums, rtol=1e-4, atol=1e-6)


def test_chunks_change_nothing_and_neither_do_inputs():
    model, (inputs, labels) = drawn(0), rows(0, 11)
    before = inputs.clone()
    one, other = statistics(model, inputs, labels), statistics(model, inputs, labels, chunk=3)
    close(one.sums, other.sums)
    assert same(one.sums, statistics(model, inputs, labels).sums)
    assert same(model, drawn(0))
    assert torch.equal(inputs, before)


def test_half_precision_is_summed_in_single():
    # A gradient of 1e-4 has a square of 1e-8, which half precision does not know.
    found = fisher.fisher_statistics(
        {"w": torch.ones(1, dtype=torch.float16)},
        lambda model, inputs: inputs * model["w"],
        lambda outputs, targets: outputs.mean(),
        torch.full((2, 1), 1e-4, dtype=torch.float16),
        torch.zeros(2),
    )
    assert found.sums["w"].dtype == torch.float32
    assert found.sums["w"].item() == pytest.approx(2e-8, rel=1e-2)


def test_no_rows_have_no_information_and_bad_ones_are_refused():
    model, (inputs, labels) = drawn(0), rows(0, 4)
    empty = statistics(model, inputs[:0], labels[:0])
    assert empty.count == 0
    assert not any(tensor.any() for tensor in empty.sums.values())
    with pytest.raises(ParametersError, match="4 inputs cannot go with 3"):
        statistics(model, inputs, labels[:3])
    with pytest.raises(ParametersError, match="chunk of 0"):
        statistics(model, inputs, labels, chunk=0)
    with pytest.raises(ParametersError, match="not finite"):
        statistics(model, inputs * math.nan, labels)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 50), count=st.integers(0, 40), most=st.integers(0, 45))
def test_rows_are_chosen_evenly_over_classes(seed, count, most):
    labels = torch.randint(4, (count,), generator=generator(seed)) ** 2
    found = fisher.balanced_rows(labels, most, generator(seed, "rows"))

    assert len(found) == min(count, most)
    assert found.tolist() == sorted(set(found.tolist()))
    assert not len(found) or (found.min() >= 0 and found.max() < count)
    for one in labels.unique():
        mine, all_ = int((labels[found] == one).sum()), int((labels == one).sum())
        largest = max(int((labels[found] == other).sum()) for other in labels.unique())
        assert mine == all_ or mine >= largest - 1
    assert torch.equal(found, fisher.balanced_rows(labels, most, generator(seed, "rows")))


def test_rows_of_a_class_are_equally_likely():
    labels = torch.tensor([0] * 10 + [1] * 2)
    draws = torch.zeros(12)
    for seed in range(300):
        draws[fisher.balanced_rows(labels, 5, generator(seed))] += 1
    # Both of class 1 and 3 of 10 of class 0: 90 of 300, with a standard deviation of 8.
    assert draws[10:].tolist() == [300, 300]
    assert (draws[:10] - 90).abs().max() < 40
    with pytest.raises(ParametersError, match="cannot be chosen"):
        fisher.balanced_rows(labels, -1, generator(0))


# ---------------------------------------------------------------- scores and masks


def test_forms_by_hand():
    # Means (3, 1, 0) of two and (1, 2, 0) of four samples
    forget, remain = stat(2, 6, 2, 0), stat(4, 4, 8, 0)
    found = {form: fisher.fisher_scores(forget, remain, form)["w"] for form in fisher.Form.__args__}
    assert found["mean"].tolist() == [2, -1, 0]
    assert found["sum"].tolist() == [2, -6, 0]
    torch.testing.assert_close(found["ratio"], torch.tensor([3 / 4, 1 / 3, 0.0]))
    assert fisher.fisher_scores(forget, None, "ratio")["w"].tolist() == [3, 1, 0]


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 50), times=st.integers(2, 4))
def test_repeating_the_remaining_data_changes_nothing(seed, times):
    model = drawn(seed)
    forget = statistics(model, *rows(seed, 5))
    inputs, labels = rows(seed + 100, 9)
    once = fisher.fisher_scores(forget, statistics(model, inputs, labels))
    often = fisher.fisher_scores(
        forget, statistics(model, inputs.repeat(times, 1), labels.repeat(times))
    )
    close(often, once, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 50),
    factor=st.sampled_from([0.125, 2.0, 1024.0]),
    form=st.sampled_from(["mean", "sum", "ratio"]),
)
def test_the_scale_of_the_loss_changes_no_mask(seed, factor, form):
    model, forget, remain = drawn(seed), rows(seed, 6), rows(seed + 100, 9)

    def masks(by):
        def loss(outputs, targets):
            return by * functional.cross_entropy(outputs, targets)

        scores = fisher.fisher_scores(
            statistics(model, *forget, loss=loss), statistics(model, *remain, loss=loss), form
        )
        return top_share(scores, 0.4)

    assert same(masks(factor), masks(1.0))


def test_the_same_data_on_both_sides_say_nothing():
    found = statistics(drawn(0), *rows(0, 8))
    for form in ("mean", "sum"):
        scores = fisher.fisher_scores(found, found, form)
        assert says_nothing(scores)
        assert not any(tensor.any() for tensor in scores.values())
    mask = top_share(fisher.fisher_scores(found, found), 0.2)
    assert mask["head.weight"].reshape(-1).tolist() == [True] * 3 + [False] * 9


def test_the_mask_of_a_class_forgets_it_and_spares_the_others():
    # Every class has three features of its own, a model that reads them, and data that show them.
    labels = torch.arange(30) % 3
    inputs = functional.one_hot(labels, 3).float().repeat_interleave(3, dim=1)
    inputs = inputs + 0.3 * torch.randn(30, 9, generator=generator(0))
    model = {
        "head.weight": torch.eye(3).repeat_interleave(3, dim=1),
        "head.bias": torch.zeros(3),
        "norm.running_mean": torch.zeros(1),
    }
    mine = labels == 1
    forget = statistics(model, inputs[mine], labels[mine])
    remain = statistics(model, inputs[~mine], labels[~mine])
    scores = fisher.fisher_scores(forget, remain)

    # All that reads the class's own features: 9 of 30 entries
    masks = top_share(scores, 9 / 30)
    found = forward(prune(model, masks), inputs).argmax(dim=1)

    assert masks["head.weight"][1, 3:6].all()
    assert int(masks["head.weight"].sum() + masks["head.bias"].sum()) == 9
    assert (forward(model, inputs).argmax(dim=1) == labels).float().mean() > 0.9
    assert (found[mine] == 1).float().mean() < 0.4
    assert (found[~mine] == labels[~mine]).float().mean() > 0.9


def test_scores_that_make_no_sense_are_refused():
    with pytest.raises(MissingNeedError, match="at least one sample"):
        fisher.fisher_scores(stat(0, 0), stat(1, 1))
    with pytest.raises(MissingNeedError, match="at least one sample"):
        fisher.fisher_scores(stat(1, 1), stat(0, 0))
    with pytest.raises(ParametersError):
        fisher.fisher_scores(stat(1, 1), stat(1, 1, 2))


# ---------------------------------------------------------------- noise


def information(seed, model):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.rand(model[name].shape, generator=draw) for name in TRAINED}


def spread(make, count=400):
    """Return mean and standard deviation of every trained entry over draws."""
    draws = [make(generator(seed)) for seed in range(count)]
    stacked = {name: torch.stack([found[name] for found in draws]) for name in TRAINED}
    return (
        {name: tensor.mean(dim=0) for name, tensor in stacked.items()},
        {name: tensor.std(dim=0) for name, tensor in stacked.items()},
    )


def test_the_noise_has_the_deviation_of_the_equation():
    # 400 draws know a deviation to 3.5 %; 20 % are over 5 times that.
    model = drawn(0)
    h = information(1, model)
    middle, deviation = spread(lambda draw: fisher.fisher_noise(model, h, 0.1, draw))
    for name in TRAINED:
        expected = 0.1 * (h[name] + 1e-8) ** -0.25
        torch.testing.assert_close(deviation[name], expected, rtol=0.2, atol=0)
        assert ((middle[name] - model[name]).abs() < 5 * expected / 20).all()


def test_the_scale_by_hand():
    # rms of (3, 4, 0, 0) is 2.5; (1/16)^(-1/4) = 2 and 1: mean 1.5; .05 * 2.5 / 1.5 = .083333
    model = {"w": torch.tensor([3.0, 4.0, 0.0, 0.0])}
    h = {"w": torch.tensor([1 / 16, 1.0, 1 / 16, 1.0])}
    assert fisher.noise_scale(model, h) == pytest.approx(1 / 12, rel=1e-5)
    assert fisher.noise_scale(model, h, 0.1) == pytest.approx(1 / 6, rel=1e-5)
    assert fisher.noise_scale({}, {}) == 0


@pytest.mark.parametrize("recipe", ["eq2", "golatkar"])
def test_noise_of_size_zero_changes_nothing_and_seeds_decide(recipe):
    model = drawn(0)
    h = information(1, model)

    def noise(size, seed):
        if recipe == "eq2":
            return fisher.fisher_noise(model, h, size, generator(seed))
        return fisher.golatkar_noise(model, h, generator(seed), alpha=size)

    assert same(noise(0.0, 1), model)
    assert same(noise(0.1, 1), noise(0.1, 1))
    one, other = noise(0.1, 1), noise(0.1, 2)
    assert all(not torch.equal(one[name], other[name]) for name in TRAINED)
    assert list(one) == list(model)
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(one[name], model[name])
    assert all(one[name].dtype == model[name].dtype for name in model)
    assert same(model, drawn(0))


def test_the_public_recipe():
    # alpha = 1e-2. Entries of 1/h: 4, and 1e9 clamped to 1e3: a row has a variance of
    # 1e-2 (4 + 1000) / 2 = 5.02. The vector: 1e-2 * 4 * 10 = .4.
    # The head: clamped to 1e2, (4 + 100) / 2 * 1e-2 * 10 = 5.2; the class's row 10 * 1e-4 around 0.
    # Its bias: 1e-2 * 4 * 10 = .4, and the class's entry as its row.
    h = torch.tensor([0.25, 1e-9])
    model = {
        "body.weight": torch.full((3, 2), 7.0),
        "body.bias": torch.full((3,), 7.0),
        "head.weight": torch.full((3, 2), 7.0),
        "head.bias": torch.full((3,), 7.0),
    }
    info = {name: h.expand(3, 2) if t.dim() > 1 else h[:1].expand(3) for name, t in model.items()}

    draws = [
        fisher.golatkar_noise(
            model, info, generator(seed), head=["head.weight", "head.bias"], forgotten_class=1,
            alpha=1e-2,
        )
        for seed in range(600)
    ]  # fmt: skip

    def variance(name):
        return torch.stack([found[name] for found in draws]).var(dim=0)

    def middle(name):
        return torch.stack([found[name] for found in draws]).mean(dim=0)

    rows_ = torch.tensor([5.2, 1e-3, 5.2])
    expected = {
        "body.weight": torch.full((3, 2), 5.02),
        "body.bias": torch.full((3,), 0.4),
        "head.weight": rows_.unsqueeze(1).expand(3, 2),
        "head.bias": torch.tensor([0.4, 1e-3, 0.4]),
    }
    for name, wanted in expected.items():
        # 600 draws know a variance to 6 %.
        torch.testing.assert_close(variance(name), wanted, rtol=0.3, atol=0)
        centre = torch.full_like(wanted, 7.0)
        if name.startswith("head"):
            centre[1] = 0
        assert ((middle(name) - centre).abs() < 5 * (wanted / 600).sqrt()).all()


def test_convolutions_are_averaged_over_their_inputs_only():
    # Two pixels of a filter with h of .25 and 1: variances of 4 alpha and 1 alpha stay apart.
    h = torch.tensor([0.25, 1.0]).expand(1, 3, 2).clone()
    model = {"conv.weight": torch.zeros(1, 3, 2)}
    draws = torch.stack([
        fisher.golatkar_noise(model, {"conv.weight": h}, generator(seed), alpha=1.0)["conv.weight"]
        for seed in range(600)
    ])  # fmt: skip
    expected = torch.tensor([4.0, 1.0]).expand(1, 3, 2)
    torch.testing.assert_close(draws.var(dim=0), expected, rtol=0.3, atol=0)


def test_noise_that_makes_no_sense_is_refused():
    model = drawn(0)
    h = information(1, model)
    negative = {**h, "head.bias": torch.full((3,), -1.0)}
    for bad in ({}, negative, {**h, "head.bias": torch.full((3,), math.nan)}):
        with pytest.raises(ParametersError):
            fisher.fisher_noise(model, bad, 0.1, generator(0))
        with pytest.raises(ParametersError):
            fisher.golatkar_noise(model, bad, generator(0))
        with pytest.raises(ParametersError):
            fisher.noise_scale(model, bad)
    for scale, epsilon in ((-1.0, 1e-8), (math.nan, 1e-8), (0.1, 0.0)):
        with pytest.raises(ParametersError, match="scale of noise"):
            fisher.fisher_noise(model, h, scale, generator(0), epsilon)
    with pytest.raises(ParametersError, match="size of noise"):
        fisher.noise_scale(model, h, -1.0)
    with pytest.raises(ParametersError, match="size of noise"):
        fisher.golatkar_noise(model, h, generator(0), alpha=-1.0)
    with pytest.raises(ParametersError, match="called other"):
        fisher.golatkar_noise(model, h, generator(0), head=["other"])
    for chosen in (3, -1):
        with pytest.raises(ParametersError, match="from 0 to 2"):
            fisher.golatkar_noise(
                model, h, generator(0), head=["head.bias"], forgotten_class=chosen
            )
    with pytest.raises(ParametersError, match="names of the head"):
        fisher.golatkar_noise(model, h, generator(0), forgotten_class=0)


# ---------------------------------------------------------------- influence


def test_an_influence_step_by_hand():
    # 1 + 1/4 * 6 / (2.99 + .01) = 1.5
    found = fisher.influence_step(
        {"w": torch.tensor([1.0])}, {"w": torch.tensor([6.0])}, {"w": torch.tensor([2.99])}, 4
    )
    assert found["w"].item() == pytest.approx(1.5)


def test_an_influence_step_nearly_leaves_one_out():
    # The mean of n numbers has curvature 1: without x_1 it is (n m - x_1) / (n - 1), which
    # m + (m - x_1) / n misses by (m - x_1) / (n (n - 1)). No damping to speak of.
    values = torch.randn(50, generator=generator(0))
    middle = values.mean()
    found = fisher.influence_step(
        {"w": middle.reshape(1)}, {"w": (middle - values[:1])}, {"w": torch.ones(1)}, 50, 1e-9
    )
    exact = values[1:].mean()
    error = (middle - values[0]) / (50 * 49)
    assert float(exact - found["w"]) == pytest.approx(float(error), abs=1e-6)
    assert abs(float(error)) < 0.1 * abs(float(exact - middle))


def test_without_forgotten_samples_there_is_no_influence():
    model = drawn(0)
    h = information(1, model)
    zero = {name: torch.zeros_like(tensor) for name, tensor in h.items()}
    assert same(fisher.influence_step(model, zero, h, 9), model)
    for samples, damping in ((0, 1e-2), (9, 0.0)):
        with pytest.raises(ParametersError, match="an influence needs"):
            fisher.influence_step(model, zero, h, samples, damping)
    with pytest.raises(ParametersError):
        fisher.influence_step(model, {}, h, 9)
