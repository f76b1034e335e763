"""Masks of channels against their definitions and a small network: methods 5.2, 5.3."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from unlearning import channel_masks
from unlearning.channel_masks import Convolution
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.fedup import prune
from unlearning.masking import top_share
from unlearning.sums import Statistics, added, means

NETWORK = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(),
    nn.Flatten(), nn.Linear(27, 3),
).eval()  # fmt: skip
LAYERS = (Convolution("0", norm="1", following=("3",)), Convolution("3", following=("6",)))


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    model = {
        name: torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor
        for name, tensor in NETWORK.state_dict().items()
    }
    model["1.running_var"] = model["1.running_var"].square() + 0.5
    return model


def images(seed, count=6):
    draw = torch.Generator().manual_seed(seed + 100)
    return torch.randn(count, 1, 6, 6, generator=draw)


def run(model, inputs, until=7, start=0):
    part = {
        name: tensor for name, tensor in model.items() if start <= int(name.split(".")[0]) < until
    }
    layers = nn.Sequential(*[NETWORK[place] for place in range(start, until)]).eval()
    renamed = {
        f"{int(name.split('.')[0]) - start}.{name.split('.', 1)[1]}": tensor
        for name, tensor in part.items()
    }
    return torch.func.functional_call(layers, renamed, (inputs,))


def stat(count, **sums):
    return Statistics({layer: torch.tensor(values) for layer, values in sums.items()}, count)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def rows_loss(outputs, targets):
    return functional.cross_entropy(outputs, targets, reduction="none")


# ---------------------------------------------------------------- activations


def test_statistics_by_hand():
    # Two samples of two channels and two pixels: means (1, 3) and (2, 0)
    values = torch.tensor([[[[0.0, 2.0]], [[3.0, 3.0]]], [[[4.0, 0.0]], [[0.0, 0.0]]]])
    found = channel_masks.activation_statistics({"conv": values})
    assert found.count == 2
    assert found.sums["conv"].tolist() == [3, 3]
    assert channel_masks.channel_means(values).tolist() == [[1, 3], [2, 0]]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 40), cut=st.integers(0, 6))
def test_statistics_add_up(seed, cut):
    values = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(seed))
    parts = [
        channel_masks.activation_statistics({"a": part}) for part in values.split([cut, 6 - cut])
    ]
    whole = channel_masks.activation_statistics({"a": values})
    assert added(parts).count == whole.count
    torch.testing.assert_close(added(parts).sums["a"], whole.sums["a"])


def test_scores_by_hand():
    # Layer a: A_f = (4, 2) of one sample, A_r = (2, 2) of three. Mean over both sets and channels:
    # (4 + 6 + 2 + 6) / 4 / 2 = 2.25; scores (2, 0) / 2.25. Layer b is a hundred times as loud.
    forget = stat(1, a=[4.0, 2.0], b=[400.0, 200.0], silent=[0.0])
    remain = stat(3, a=[6.0, 6.0], b=[600.0, 600.0], silent=[0.0])
    found = channel_masks.activation_scores(forget, remain)
    torch.testing.assert_close(found["a"], torch.tensor([2 / 2.25, 0.0]))
    torch.testing.assert_close(found["b"], found["a"])
    assert found["silent"].tolist() == [0]
    # Without remaining data: (4, 2) / 3
    torch.testing.assert_close(
        channel_masks.activation_scores(forget, None)["a"], torch.tensor([4 / 3, 2 / 3])
    )


def test_the_same_data_on_both_sides_have_no_scores():
    found = stat(3, a=[1.0, 5.0])
    assert channel_masks.activation_scores(found, found)["a"].tolist() == [0, 0]


def test_activations_that_make_no_sense_are_refused():
    with pytest.raises(MissingNeedError, match="network with convolutions"):
        channel_masks.activation_statistics({})
    with pytest.raises(MissingNeedError, match=r"of a convolution.*got \(2, 3\)"):
        channel_masks.activation_statistics({"a": torch.ones(2, 3)})
    with pytest.raises(ParametersError, match=r"activations of \[2, 3\] samples"):
        channel_masks.activation_statistics({"a": torch.ones(2, 1, 1), "b": torch.ones(3, 1, 1)})
    with pytest.raises(ParametersError, match="after the ReLU"):
        channel_masks.activation_statistics({"a": torch.tensor([[[1.0, -0.1]]])})
    with pytest.raises(ParametersError, match="not finite"):
        channel_masks.activation_statistics({"a": torch.full((1, 1, 1), math.nan)})
    with pytest.raises(MissingNeedError, match="at least one sample"):
        channel_masks.activation_scores(stat(1, a=[1.0]), stat(0, a=[0.0]))
    with pytest.raises(ParametersError):
        channel_masks.activation_scores(stat(1, a=[1.0]), stat(1, b=[1.0]))


# ---------------------------------------------------------------- integrated gradients


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 40), mean=st.booleans())
def test_contributions_add_up_to_the_loss_without_the_layer(seed, mean):
    # Completeness, for a head of one layer: within 5 % with the default of 20 steps, and better
    # with more: the right-hand sum errs by about (g(1) - g(0)) / 2m, g being the slope of the path.
    draw = torch.Generator().manual_seed(seed)
    values = torch.rand(5, 4, 2, 3, generator=draw)
    weights = 0.3 * torch.randn(3, 24, generator=draw)
    targets = torch.randint(3, (5,), generator=draw)

    def head(activations):
        return activations.flatten(1) @ weights.T

    def loss(outputs, labels):
        rows = rows_loss(outputs, labels)
        return rows.mean() if mean else rows

    gain = rows_loss(head(0 * values), targets) - rows_loss(head(values), targets)
    for steps, slack in ((channel_masks.STEPS, 0.05), (200, 0.005)):
        found = channel_masks.integrated_gradients(values, head, loss, targets, steps)
        assert found.shape == (5, 4)
        error = (found.sum(dim=1) - gain).abs()
        assert error.sum() <= slack * gain.abs().sum()


def test_a_linear_loss_has_its_terms_for_contributions():
    # The loss is -sum w a: a channel's contribution is its own sum of w a, with any steps.
    values = torch.rand(3, 2, 4)
    weights = torch.randn(2, 4)
    for steps in (1, 7):
        found = channel_masks.integrated_gradients(
            values,
            lambda a: (a * weights).sum(dim=(1, 2)),
            lambda out, _: -out,
            torch.zeros(3),
            steps,
        )
        torch.testing.assert_close(found, (values * weights).sum(dim=2))


def test_the_path_ends_at_the_activations_by_hand():
    # Loss a^2 at a = 3 in two steps: gradients 2 * 1.5 and 2 * 3, mean 4.5; -3 * 4.5 = -13.5.
    found = channel_masks.integrated_gradients(
        torch.full((1, 1, 1), 3.0), lambda a: a.flatten(), lambda out, _: out.square(),
        torch.zeros(1), 2,
    )  # fmt: skip
    assert found.item() == -13.5


def test_silencing_what_contributes_most_raises_the_loss_most():
    model, inputs, label = drawn(1), images(1, 40), 2
    values = run(model, inputs, 3)
    recognised = run(model, inputs).argmax(dim=1) == label
    values, inputs = values[recognised], inputs[recognised]
    targets = torch.full((len(inputs),), label)
    found = channel_masks.gradient_statistics(
        {"0": values}, {"0": lambda a: run(model, a, start=3)}, rows_loss, targets
    )
    order = means(found)["0"].argsort(descending=True)

    def loss_without(channel):
        silenced = values.clone()
        silenced[:, channel] = 0
        return float(rows_loss(run(model, silenced, start=3), targets).mean())

    assert len(inputs) > 5
    assert found.count == len(inputs)
    assert loss_without(order[0]) > loss_without(order[-1])
    assert loss_without(order[0]) > float(rows_loss(run(model, inputs), targets).mean())


def test_contributions_add_up_over_clients_and_leave_inputs_alone():
    values, targets = torch.rand(5, 2, 3), torch.tensor([0, 1, 0, 1, 1])
    before = values.clone()

    def of(rows):
        return channel_masks.gradient_statistics(
            {"a": values[rows]}, {"a": lambda a: a.sum(dim=2)}, rows_loss, targets[rows], 5
        )

    parts = added([of(slice(0, 2)), of(slice(2, 5)), of(slice(0, 0))])
    with torch.no_grad():
        whole = of(slice(0, 5))
    assert parts.count == 5
    torch.testing.assert_close(parts.sums["a"], whole.sums["a"])
    assert torch.equal(values, before)
    assert not whole.sums["a"].requires_grad


def test_paths_that_make_no_sense_are_refused():
    values, targets = torch.rand(2, 2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ParametersError, match="path of 0 steps"):
        channel_masks.integrated_gradients(values, torch.sum, rows_loss, targets, 0)
    with pytest.raises(ParametersError, match="2 rows and 1 targets"):
        channel_masks.integrated_gradients(values, torch.sum, rows_loss, targets[:1])
    with pytest.raises(MissingNeedError, match="of a convolution"):
        channel_masks.integrated_gradients(values[:, :, 0], torch.sum, rows_loss, targets)
    with pytest.raises(ParametersError, match="differ in their layers: a, b"):
        channel_masks.gradient_statistics({"a": values}, {"b": torch.sum}, rows_loss, targets)


# ---------------------------------------------------------------- from channels to parameters


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 40),
    first=st.lists(st.booleans(), min_size=4, max_size=4),
    second=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_silenced_channels_are_exactly_zero_and_others_as_before(seed, first, second):
    model, inputs = drawn(seed), images(seed)
    channels = {"0": torch.tensor(first), "3": torch.tensor(second)}
    masks = channel_masks.parameter_masks(model, LAYERS, channels, norm=True, following=True)
    silent = prune(model, masks)

    for until in (1, 2, 3):
        values = run(silent, inputs, until)
        assert not values[:, channels["0"]].any()
        assert torch.equal(values[:, ~channels["0"]], run(model, inputs, until)[:, ~channels["0"]])
    assert not run(silent, inputs, 5)[:, channels["3"]].any()
    # Whatever a silenced channel held, nobody reads it any more.
    noise = run(silent, inputs, 5)
    noise[:, channels["3"]] = 99.0
    torch.testing.assert_close(run(silent, noise, start=5), run(silent, inputs))
    assert same(model, drawn(seed))
    if not any(first + second):
        assert same(silent, model)


def test_the_normalisation_leaves_a_constant_unless_it_is_zeroed():
    model, inputs = drawn(0), images(0)
    channels = {"0": torch.tensor([True, False, False, False])}
    plain = channel_masks.parameter_masks(model, LAYERS, channels)
    assert set(plain) == {"0.weight", "0.bias"}
    values = run(prune(model, plain), inputs, 2)[:, 0]
    assert values.abs().max() > 0
    assert values.max() == values.min()
    filters = channel_masks.parameter_masks(model, LAYERS, channels, bias=False)
    assert set(filters) == {"0.weight"}
    assert filters["0.weight"][0].all()
    assert not filters["0.weight"][1:].any()


def test_readers_by_hand():
    # Convolution 3 reads 4 channels; the linear layer reads 9 pixels each of 3.
    channels = {
        "0": torch.tensor([False, True, False, False]),
        "3": torch.tensor([False, False, True]),
    }
    masks = channel_masks.parameter_masks(drawn(0), LAYERS, channels, norm=True, following=True)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "6.weight"]
    assert sorted(masks) == sorted(names)
    third = torch.zeros(3, 4, 2, 2, dtype=torch.bool)
    third[:, 1] = True  # as what reads channel 1
    third[2] = True  # as a filter
    assert torch.equal(masks["3.weight"], third)
    last = torch.zeros(3, 27, dtype=torch.bool)
    last[:, 18:] = True
    assert torch.equal(masks["6.weight"], last)


def test_the_top_share_of_all_channels_is_masked():
    # ceil(.25 * 7) = 2 channels over both layers
    scores = {"0": torch.tensor([1.0, 5.0, 2.0, 3.0]), "3": torch.tensor([0.0, 9.0, 4.0])}
    chosen = top_share(scores, 0.25)
    masks = channel_masks.parameter_masks(drawn(0), LAYERS, chosen)
    assert masks["0.weight"].flatten(1).all(dim=1).tolist() == [False, True, False, False]
    assert masks["3.bias"].tolist() == [False, True, False]


def test_layers_without_bias_have_none_to_mask():
    model = {"c.weight": torch.ones(2, 1, 3)}
    masks = channel_masks.parameter_masks(
        model, [Convolution("c")], {"c": torch.tensor([True, False])}
    )
    assert list(masks) == ["c.weight"]


@pytest.mark.parametrize(
    ("layer", "channels", "error", "message"),
    [
        (Convolution("6"), 3, MissingNeedError, "convolutions, and 6 is none"),
        (Convolution("9"), 3, ParametersError, "no tensor 9.weight"),
        (Convolution("0"), 3, ParametersError, "0.weight has 4 channels"),
        (Convolution("0", norm="8"), 4, ParametersError, "no tensor 8.weight"),
        (Convolution("3", norm="1"), 3, ParametersError, "1.weight has 4 channels"),
        (Convolution("0", following=("9",)), 4, ParametersError, "no tensor 9.weight"),
        (
            Convolution("0", following=("6",)),
            4,
            ParametersError,
            "6 reads 27 inputs, not those of 4",
        ),
        (Convolution("3", following=("0",)), 3, ParametersError, "0 reads 1 inputs"),
        (Convolution("0", following=("1",)), 4, ParametersError, "1 reads 0 inputs"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layer, channels, error, message):
    silenced = {layer.layer: torch.ones(channels, dtype=torch.bool)}
    with pytest.raises(error, match=message):
        channel_masks.parameter_masks(drawn(0), [layer], silenced, norm=True, following=True)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ParametersError, match="nothing is known of the layers 7"):
        channel_masks.parameter_masks(drawn(0), LAYERS, {"7": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ParametersError, match="a mask is torch"):
        channel_masks.parameter_masks(drawn(0), LAYERS, {"0": torch.ones(4)})
    assert channel_masks.parameter_masks(drawn(0), LAYERS, {}) == {}


def test_convolutions_with_groups_are_not_read_by_channel():
    # Twice as many inputs as channels would pass for two pixels each in a linear layer.
    model = {"a.weight": torch.ones(2, 1, 3), "b.weight": torch.ones(4, 4, 3)}
    with pytest.raises(ParametersError, match="b reads 4 inputs, not those of 2"):
        channel_masks.parameter_masks(
            model,
            [Convolution("a", following=("b",))],
            {"a": torch.tensor([True, False])},
            following=True,
        )
