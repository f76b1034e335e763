"""Squared gradients layer by layer against one gradient a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from client.forgetting.squares import squared_gradients
from client.task import models
from client.task.evaluation import forward_of, state_of
from unlearning.errors import ParametersError
from unlearning.fisher import fisher_statistics

CPU = torch.device("cpu")


def rows(seed, count, shape=(2, 7, 6), classes=4):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=draw), torch.randint(
        classes, (count,), generator=draw
    )


def network(seed, bias=True, stride=1, padding=0, dilation=1):
    torch.manual_seed(seed)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    return nn.Sequential(
        nn.Conv2d(2, 3, (3, 2), bias=bias, **options), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
        nn.Dropout(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(12, 5, bias=bias), nn.ReLU(inplace=True), nn.Linear(5, 4),
    )  # fmt: skip


def disturbed(net):
    """Give normalisations statistics other than 0 and 1."""
    draw = torch.Generator().manual_seed(9)
    return {
        name: tensor + torch.rand(tensor.shape, generator=draw)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state_of(net).items()
    }


def compared(net, model, inputs, targets, loss=functional.cross_entropy):
    quick = squared_gradients(net.eval(), model, loss, inputs, targets)
    slow = fisher_statistics(model, forward_of(net, CPU), loss, inputs, targets)
    assert quick is not None
    assert quick.count == slow.count == len(inputs)
    assert list(quick.sums) == list(slow.sums)
    for name in slow.sums:
        torch.testing.assert_close(quick.sums[name], slow.sums[name], rtol=1e-4, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99), st.integers(0, 5), st.booleans(), st.integers(1, 2), st.integers(0, 2),
    st.integers(1, 2),
)  # fmt: skip
def test_they_are_those_of_one_gradient_a_row(seed, count, bias, stride, padding, dilation):
    net = network(seed, bias, stride, padding, dilation)
    compared(net, disturbed(net), *rows(seed, count))


@pytest.mark.parametrize("name", ["lenet", "mlp-20-10", "resnet18"])
def test_so_they_are_for_built_in_models(name):
    torch.manual_seed(0)
    net = models.build(name, (1, 16, 16), 10, mean=[0.1], deviation=[0.3])
    compared(net, state_of(net), *rows(3, 4, (1, 16, 16), 10))


def test_normalisation_of_constant_activations_divides_by_its_epsilon():
    """Variance 0: (x - 0) / sqrt(0 + eps) with eps 0.25 is 2 x."""
    net = nn.Sequential(nn.BatchNorm2d(1, eps=0.25), nn.Flatten()).eval()
    model = state_of(net) | {"0.running_var": torch.zeros(1)}
    inputs = torch.tensor([[[[3.0]]]])
    found = squared_gradients(net, model, lambda o, t: o.sum(), inputs, torch.zeros(1))
    # d o / d weight = 2 * 3, d o / d bias = 1.
    assert {name: float(tensor) for name, tensor in found.sums.items()} == {
        "0.weight": 36.0, "0.bias": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("near", [1, 500, 1 << 18])
def test_chunks_of_rows_add_up(near, monkeypatch):
    monkeypatch.setattr("client.forgetting.squares.AT_ONCE", 500)
    monkeypatch.setattr("client.forgetting.squares.NEAR", near)
    net = network(1)
    compared(net, disturbed(net), *rows(1, 7))


def test_as_many_rows_at_once_as_their_outputs_allow(monkeypatch):
    """A row puts out 3 x 5 x 5 from the convolution, as many from the normalisation, and 5 + 4."""
    monkeypatch.setattr("client.forgetting.squares.AT_ONCE", 3 * 159 + 158)
    net, seen = network(1), []
    model = disturbed(net)
    net.register_forward_pre_hook(lambda _, taken: seen.append(len(taken[0])))
    squared_gradients(net.eval(), model, functional.cross_entropy, *rows(1, 7))
    assert seen == [1, 3, 3, 1]  # the first, to see what a row puts out


def test_a_loss_of_its_own_scale_counts_row_by_row():
    """Class weights make a batch's mean something else than the mean of its rows."""
    net = network(2)
    weights = torch.tensor([1.0, 5.0, 0.5, 2.0])
    compared(net, disturbed(net), *rows(2, 6), lambda o, t: functional.cross_entropy(o, t, weights))


def test_by_hand():
    """One row (1, 2), targets 0: l = (w x)^2 / 2, gradient (w x) x = 3 (1, 2), squares (9, 36)."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False))
    model = {"0.weight": torch.tensor([[1.0, 1.0]])}
    inputs = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    found = squared_gradients(
        net, model, lambda o, t: o.square().mean() / 2, inputs, torch.zeros(2)
    )
    # The second row: (w x) x = 2 (2, 0), squares (16, 0).
    assert torch.equal(found.sums["0.weight"], torch.tensor([[25.0, 36.0]]))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        return self.layer(self.layer(inputs))


class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(1))

    def forward(self, inputs):
        return self.scale * self.layer(inputs)


UNKNOWN = {
    "runs twice": (Twice(), (4,)),
    "a subclass": (Doubled(4, 4), (4,)),
    "a parameter of its own": (Own(), (4,)),
    "groups": (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten()), (2, 3, 3)),
    "padding by reflection": (
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten()), (2, 3, 3)),
    "more dimensions": (nn.Sequential(nn.Linear(4, 4), nn.Flatten()), (2, 4)),
    "without statistics": (
        nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()), (2, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_not_known_is_left_to_others(kind):
    net, shape = UNKNOWN[kind]
    found = squared_gradients(
        net.eval(), state_of(net), functional.cross_entropy, *rows(0, 3, shape)
    )
    assert found is None


def test_what_cannot_be_squared_is_told():
    net = network(1)
    inputs, targets = rows(1, 2)
    with pytest.raises(ParametersError, match="not finite"):
        squared_gradients(net.eval(), state_of(net), functional.cross_entropy, inputs / 0, targets)
    with pytest.raises(ParametersError, match="2 inputs cannot go with 1 targets"):
        squared_gradients(net, state_of(net), functional.cross_entropy, inputs, targets[:1])
