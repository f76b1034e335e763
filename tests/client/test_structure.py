"""What is found out about a network by running it, against networks whose structure is known."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from client.task import models
from client.task.evaluation import state_of
from client.task.protocol import TaskError
from client.task.structure import behind, outputs_of, readout, structure_of
from unlearning.channel_masks import Convolution, parameter_masks
from unlearning.fedup import prune


def built(name, shape=(1, 28, 28)):
    torch.manual_seed(1)
    channels = shape[0]
    return models.build(name, shape, 10, mean=[0.1] * channels, deviation=[0.3] * channels)


class Wrapped(nn.Module):
    """A network whose way through its layers is a function of the test's."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, inputs):
        return self._forward(self, inputs)


def conv(inputs=3, outputs=5, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


SAMPLE = torch.rand(2, 3, 6, 6)


def found(forward, **layers):
    structure = structure_of(Wrapped(forward, **layers), SAMPLE)
    return {c.layer: (c.norm, c.following) for c in structure.convolutions}, structure.head


def test_built_in_models_are_read_layer_by_layer():
    assert structure_of(built("lenet"), torch.rand(1, 1, 28, 28)).convolutions == (
        Convolution("1.0", None, ("1.3",)),
        Convolution("1.3", None, ("1.7",)),
    )
    assert structure_of(built("cnn", (1, 8, 8)), torch.rand(1, 1, 8, 8)).convolutions == (
        Convolution("1.0", None, ("1.2",)),
        Convolution("1.2", None, ("1.6",)),
    )
    assert structure_of(built("lenet"), torch.rand(1, 1, 28, 28)).head == "1.11"
    network = structure_of(built("mlp"), torch.rand(1, 1, 28, 28))
    assert (network.convolutions, network.head) == ((), "1.3")


def test_of_a_resnet_only_channels_inside_a_block_have_known_readers():
    network = built("resnet18", (3, 16, 16))
    structure = structure_of(network, torch.rand(1, 3, 16, 16))
    following = {c.layer: c.following for c in structure.convolutions}
    assert len(following) == 20
    assert structure.head == "1.fc"
    for convolution in structure.convolutions:
        layer = convolution.layer
        # The stem, the second of a block and the projection are added to one another.
        inside = layer.endswith("conv1") and layer != "1.conv1"
        expected = (layer.replace("conv1", "conv2"),) if inside else ()
        assert convolution.following == expected, layer
        norm = layer.replace("conv", "bn").replace("downsample.0", "downsample.1")
        assert convolution.norm == norm
        assert readout(convolution) == norm


def test_a_normalisation_counts_where_it_takes_the_output_as_it_is():
    layers = {"a": conv(), "norm": nn.BatchNorm2d(5), "b": conv(5)}

    def end(net, x):
        return net.b(functional.relu(x)).mean(dim=(2, 3))

    assert found(lambda net, x: end(net, net.norm(net.a(x))), **layers)[0]["a"] == ("norm", ("b",))
    # Behind a rectifier it belongs to whoever reads.
    behind_relu, _ = found(lambda net, x: end(net, net.norm(functional.relu(net.a(x)))), **layers)
    assert behind_relu["a"] == (None, ("b",))


def test_names_and_places_of_definition_mean_nothing():
    layers = {"conv2": conv(), "conv1": conv(5, 5), "bn1": nn.BatchNorm2d(5), "unused": conv()}
    structure, head = found(lambda net, x: net.conv1(net.bn1(net.conv2(x))), **layers)
    assert structure == {"conv2": ("bn1", ("conv1",)), "conv1": (None, ())}
    assert list(structure) == ["conv2", "conv1"]
    assert head is None


MIXED = {
    "added": lambda net, x: net.b(net.a(x) + net.c(x)),
    "skipped over": lambda net, x: net.b(torch.relu(y := net.a(x))) + y,
    "joined with the input": lambda net, x: net.b(net.a(x) + x.sum(dim=1, keepdim=True)),
    "in another order": lambda net, x: net.b(net.a(x).flip(1)),
    "mixed": lambda net, x: net.b((y := net.a(x)) - y.mean(dim=1, keepdim=True)),
    "mixed by neighbours": lambda net, x: net.b((y := net.a(x)) + y.roll(1, dims=1)),
    "output": lambda net, x: (net.b(y := net.a(x)), y),
    "grouped reader": lambda net, x: net.grouped(net.a(x)),
}


@pytest.mark.parametrize("kind", MIXED)
def test_where_channels_cannot_be_traced_nobody_follows(kind):
    layers = {"a": conv(), "b": conv(5), "c": conv(), "grouped": conv(5, 5, groups=5)}
    structure, _ = found(MIXED[kind], **layers)
    assert structure["a"] == (None, ())


def test_a_way_around_the_normalisation_is_seen():
    layers = {"a": conv(), "norm": nn.BatchNorm2d(5), "b": conv(5)}
    ways = (
        lambda net, x: net.b(net.norm(y := net.a(x)) + y),
        lambda net, x: (net.b(net.norm(y := net.a(x))), net.b2(y)),
        lambda net, x: (net.b(net.norm(y := net.a(x))), y),
    )
    for way in ways:
        structure, _ = found(way, **layers, b2=conv(5))
        assert structure["a"] == ("norm", ())


def test_linear_layers_follow_behind_flattening_and_pooling():
    flat = {"a": conv(), "fc": nn.Linear(5 * 36, 4), "pooled": nn.Linear(5, 4)}
    assert found(lambda net, x: net.fc(net.a(x).flatten(1)), **flat)[0]["a"] == (None, ("fc",))
    pooled, head = found(lambda net, x: net.pooled(net.a(x).mean(dim=(2, 3))), **flat)
    assert pooled["a"] == (None, ("pooled",))
    assert head == "pooled"
    # Pixels before channels: a column is no longer a channel's.
    moved, _ = found(lambda net, x: net.fc(net.a(x).permute(0, 2, 3, 1).flatten(1)), **flat)
    assert moved["a"] == (None, ())
    both, _ = found(
        lambda net, x: net.fc((y := net.a(x)).flatten(1)) + net.pooled(y.mean(dim=(2, 3))), **flat
    )
    assert both["a"] == (None, ("fc", "pooled"))


def test_a_convolution_that_runs_twice_is_left_out_and_is_no_reader():
    layers = {"a": conv(), "again": conv(5, 5)}
    structure, _ = found(lambda net, x: net.again(net.again(net.a(x))), **layers)
    assert structure == {"a": (None, ())}


@pytest.mark.parametrize("last", ["a", "b"])
def test_a_reader_that_runs_twice_hides_no_other_one(last):
    layers = {"a": conv(), "b": conv(), "twice": conv(5, 5), "once": conv(5)}
    first = "b" if last == "a" else "a"
    structure, _ = found(
        lambda net, x: (
            net.twice(getattr(net, first)(x)) + net.twice(y := getattr(net, last)(x)),
            net.once(y),
        ),
        **layers,
    )
    assert structure == {first: (None, ()), last: (None, ()), "once": (None, ())}
    again, _ = found(lambda net, x: (net.twice(net.twice(y := net.a(x))), net.once(y)), **layers)
    assert again["a"] == (None, ())


def test_silenced_channels_change_nothing_but_what_they_fed():
    """Zeroing filters, biases and readers of some channels equals zeroing these activations."""
    network = built("lenet").eval()
    inputs = torch.rand(4, 1, 28, 28)
    structure, model = structure_of(network, inputs), state_of(network)
    silenced = {"1.0": torch.tensor([True, False, False, True, False, False])}
    masks = parameter_masks(model, structure.convolutions, silenced, following=True)
    activations = outputs_of(network, model, inputs, ["1.0"])["1.0"]
    activations[:, silenced["1.0"]] = 0
    wanted = behind(network, model, inputs, "1.0")(activations)
    pruned = prune(model, masks)
    network.load_state_dict(pruned)
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), wanted)


def test_outputs_are_taken_before_they_are_rectified_in_place():
    network = nn.Sequential(conv(), nn.ReLU(inplace=True))
    taken = outputs_of(network, state_of(network), SAMPLE, ["0"])["0"]
    torch.testing.assert_close(taken, network[0](SAMPLE).detach())
    assert bool((taken < 0).any())


def test_looking_changes_neither_network_nor_generator():
    network = built("resnet18", (3, 16, 16)).train()
    network[1].bn1.eval()
    before, state = state_of(network), torch.get_rng_state()
    modes = [module.training for module in network.modules()]
    structure_of(network, torch.rand(2, 3, 16, 16, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    after = state_of(network)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module._forward_hooks for module in network.modules())


def test_a_network_that_fails_is_one_line():
    with pytest.raises(TaskError, match=r"fails on a sample of shape \(1, 2\)"):
        structure_of(built("lenet"), torch.rand(1, 2))
