"""What training does not move, no step and no mask changes: frozen parameters, buffers of one's own."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from client.central.case import Case
from client.central.methods import METHODS
from client.forgetting.statistics import fisher_of
from client.forgetting.steps import STEPS, do
from client.task.evaluation import state_of
from client.task.models import prunable_layers, trained_tensors
from client.task.protocol import ServerData
from server.federation import build_federation, network_of
from server.settings import read_settings
from strategies.actions import Ascend, Curvature, Selection, joined
from tests.client.forgetting.small import CLASSES, Small, images, made
from unlearning.errors import MissingNeedError

FIXED = {"scale", "lift", "early.weight", "early.bias", "late.bias"}
CHANNELS = ("activation-mask", "grad-mask", "tfidf")


class Partly(nn.Module):
    """A persistent buffer, and frozen parameters beside others, also in one layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((1, 6, 6), 1.25))
        self.lift = nn.Parameter(torch.full((CLASSES,), 1.5), requires_grad=False)
        self.early = nn.Conv2d(1, 4, 3, padding=1).requires_grad_(requires_grad=False)
        self.late = nn.Conv2d(4, 5, 3, padding=1)
        self.late.bias.requires_grad_(requires_grad=False)
        self.head = nn.Linear(5 * 36, CLASSES)

    def forward(self, inputs):
        found = self.late(self.early(inputs * self.scale).relu()).relu()
        return self.head(found.flatten(1)) * self.lift


@pytest.fixture(scope="module")
def trained():
    return made(Small(Partly), epochs=6)


def settings_of(kind):
    required = {"radius": 0.5} if kind is Ascend else {}
    class_0 = {"forget": "class", "forget_class": 0}
    return kind(**required, **(class_0 if issubclass(kind, Selection) else {}))


def check_fixed(found, model):
    """The fixed tensors are as they were, bit for bit, and some other is not."""
    assert found.keys() == model.keys()
    changed = {name for name, tensor in model.items() if not torch.equal(found[name], tensor)}
    assert changed
    assert not changed & FIXED


def test_what_requires_no_gradient_is_told_by_the_module_alone():
    found = trained_tensors(Partly())
    assert found == {"late.weight", "head.weight", "head.bias"}
    assert set(Partly().state_dict()) - found == FIXED
    assert prunable_layers(Partly()) == ("late.weight", "head.weight")


@pytest.mark.parametrize("kind", [kind for kind in STEPS if kind.action.startswith("train.")])
def test_no_step_of_a_client_changes_it(kind, trained):
    model, holding = trained
    sent = {name: tensor.clone() for name, tensor in model.items()}
    start = joined(reference=sent, leaver=sent) if kind is Ascend else sent
    # An untrained model is surer of nothing: MacForget would stop at once.
    rows = dataclasses.replace(holding, test=(holding.test[0][:0], holding.test[1][:0]))
    check_fixed(do(settings_of(kind), start, rows).arrays, model)
    assert all(torch.equal(sent[name], tensor) for name, tensor in model.items())


def test_sums_of_squares_are_of_what_training_moves(trained):
    model, holding = trained
    inputs, targets = (part[:4] for part in holding.forget)
    network = Partly()
    names = sorted(set(model) - FIXED)
    expected = {name: torch.zeros_like(model[name]) for name in names}
    for row, target in zip(inputs, targets, strict=True):
        leaves = {name: model[name].clone().requires_grad_() for name in names}
        outputs = functional_call(network, {**model, **leaves}, (row[None],))
        slopes = torch.autograd.grad(functional.cross_entropy(outputs, target[None]),
                                     list(leaves.values()))  # fmt: skip
        for name, slope in zip(names, slopes, strict=True):
            expected[name] += slope.square()
    found = fisher_of(model, holding, (inputs, targets)).sums
    assert sorted(found) == names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-8)


def test_the_diagonal_correction_is_of_what_training_moves(trained):
    model, holding = trained
    found = do(Curvature(forget="class", forget_class=0, scope="diag"), model, holding)
    names = set(model) - FIXED
    assert set(found.arrays) == {f"{g}/{n}" for g in ("hessian", "gradient") for n in names}
    case = Case(Small(Partly), holding, model, model, holding.training, (), 0, None)
    method = METHODS["ij"]
    (after,) = method.run(method.settings(scope="diag"), case).models
    check_fixed(after, model)
    frozen = dataclasses.replace(holding, trained=holding.trained - {"head.bias"})
    with pytest.raises(MissingNeedError, match=r"does not move head\.bias; set the scope to diag"):
        do(Curvature(forget="class", forget_class=0, scope="last"), model, frozen)


def test_the_server_is_told_what_training_moves():
    class Known(Small):
        def server_data(self):
            return ServerData(test=images(77, 30))

    for task in (Known(Partly), Small(Partly), None):
        model = Partly()
        federation = build_federation(read_settings({}), model, task)
        for name in ("fisher-mask", "fisher-noise", "tfidf", "ij"):
            network = federation.forgetting.methods[name].network
            assert network.trained == set(state_of(model)) - FIXED
    assert network_of(Known(Partly), Partly()).head == ("head.weight", "head.bias")


@pytest.mark.parametrize("name", ["fisher-mask", "fisher-noise", "random-mask", *CHANNELS])
def test_no_mask_and_no_noise_on_one_machine_changes_it(name, trained):
    model, holding = trained
    case = Case(Small(Partly), holding, model, model, holding.training, (), 0, None)
    method = METHODS[name]
    chosen = {} if name == "fisher-noise" else {"rate": 0.7}
    for more in ({}, {"recipe": "eq2"}) if name == "fisher-noise" else ({},):
        (found,) = method.run(method.settings(**chosen, **more), case).models
        check_fixed(found, model)
