"""NoT against its definition: methods 2.3, arXiv:2503.05657."""

import pytest
import torch
from torch import nn

from unlearning.errors import ParametersError
from unlearning.negation import first_layer, negate
from unlearning.parameters import norm, prunable_names


def network(*, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.mark.parametrize("bias", [True, False])
def test_what_the_first_layer_puts_out_is_exactly_negated(bias):
    net = network(bias=bias)
    images = torch.randn(2, 1, 6, 6)
    before = net[0](images)
    model = net.state_dict()
    names = first_layer(model, prunable_names(model))
    assert names == (("0.weight", "0.bias") if bias else ("0.weight",))
    net.load_state_dict(negate(model, names))
    assert torch.equal(net[0](images), -before)


def test_a_linear_layer_can_be_the_first():
    layer = nn.Linear(3, 2)
    model = layer.state_dict()
    values = torch.randn(5, 3)
    before = layer(values)
    names = first_layer(model, prunable_names(model))
    layer.load_state_dict(negate(model, names))
    assert names == ("weight", "bias")
    assert torch.equal(layer(values), -before)


def test_only_the_named_tensors_change_and_no_norm_does():
    model = network().state_dict()
    names = first_layer(model, prunable_names(model))
    negated = negate(model, names)
    assert list(negated) == list(model)
    for name, tensor in model.items():
        assert torch.equal(negated[name], -tensor if name in names else tensor)
        assert negated[name].dtype == tensor.dtype
        assert negated[name].data_ptr() != tensor.data_ptr()
        assert norm({name: negated[name]}) == norm({name: tensor})


def test_twice_is_the_identity_and_inputs_are_left_untouched():
    model = network().state_dict()
    copy = {name: tensor.clone() for name, tensor in model.items()}
    names = ("0.weight", "0.bias", "4.weight")
    twice = negate(negate(model, names), names)
    assert all(torch.equal(twice[name], copy[name]) for name in copy)
    assert all(torch.equal(model[name], copy[name]) for name in copy)


def test_the_first_layer_is_the_first_in_forward_order_whatever_the_models_order():
    model = {"head.weight": torch.ones(1, 1), "stem.weight": torch.ones(1, 1)}
    assert first_layer(model, ("stem.weight", "head.weight")) == ("stem.weight",)


def test_a_model_without_layers_and_a_name_it_lacks_are_refused():
    with pytest.raises(ParametersError, match="no linear or convolutional layer"):
        first_layer({"scale": torch.ones(1)}, ())
    with pytest.raises(ParametersError, match="no tensor a, b"):
        negate({"scale": torch.ones(1)}, ("b", "a", "scale"))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_what_is_no_weight_is_not_negated(dtype):
    model = {"scale": torch.ones(1), "mask": torch.ones(1, dtype=dtype)}
    with pytest.raises(ParametersError, match=f"mask is {dtype}; only floating-point tensors"):
        negate(model, ("mask",))
