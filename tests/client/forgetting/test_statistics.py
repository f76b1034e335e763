"""A client's sums: of which rows, in evaluation mode, and additive over clients."""

import dataclasses

import pytest
import torch
from torch.utils.data import TensorDataset

from client.forgetting.statistics import fisher_of, structure_for
from client.forgetting.steps import do
from client.task.protocol import Split
from strategies.actions import Statistics, parted
from strategies.methods.interface import Network
from strategies.methods.masks import channels_of
from tests.client.forgetting.small import Regression, Small, images, made
from unlearning import sums, tfidf
from unlearning.channel_masks import activation_scores, parameter_masks
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.fedup import prune
from unlearning.fisher import fisher_scores, fisher_statistics
from unlearning.masking import top_share

CLASS = {"forget": "class", "forget_class": 0}


@pytest.fixture(scope="module")
def trained():
    return made(Small())


def asked(kind, trained, **changes):
    outcome = do(Statistics(**{**CLASS, "kind": kind, **changes}), *trained)
    return {
        group: sums.Statistics(tensors, int(outcome.metrics[f"{group}-count"]))
        for group, tensors in parted(outcome.arrays).items()
    }, outcome


def test_fisher_sums_are_those_of_both_sets(trained):
    model, holding = trained
    found, outcome = asked("fisher", trained)
    assert {name: part.count for name, part in found.items()} == {"forget": 20, "remain": 40}
    assert set(outcome.metrics) == {"forget-count", "remain-count"}
    for name, rows in (("forget", holding.forget), ("remain", holding.remain)):
        expected = fisher_statistics(model, holding.forward, holding.loss, *rows)
        for tensor in expected.sums:
            torch.testing.assert_close(
                found[name].sums[tensor], expected.sums[tensor], rtol=1e-4, atol=1e-8
            )


def test_networks_that_are_not_known_layer_by_layer_are_served_too():
    class Odd(torch.nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs.flatten(1))

    model, holding = made(Small(lambda: Odd(36, 3)), epochs=1)
    found = fisher_of(model, holding, holding.forget)
    expected = fisher_statistics(model, holding.forward, holding.loss, *holding.forget)
    assert all(torch.equal(found.sums[n], expected.sums[n]) for n in expected.sums)


def test_no_more_rows_than_asked_for_and_of_every_class_the_same_number(trained):
    model, holding = trained
    found, _ = asked("fisher", trained, most_samples=10)
    assert (found["forget"].count, found["remain"].count) == (10, 10)
    per_class, _ = asked("classes", trained, most_samples=10)
    assert [per_class[str(place)].count for place in range(3)] == [10, 5, 5]
    again, _ = asked("fisher", trained, most_samples=10)
    assert torch.equal(found["remain"].sums["5.bias"], again["remain"].sums["5.bias"])
    later = model, dataclasses.replace(holding, purpose=(2, 0))
    other, _ = asked("fisher", later, most_samples=10)
    assert not torch.equal(found["remain"].sums["5.bias"], other["remain"].sums["5.bias"])


def test_activations_are_after_normalisation_and_rectifier_in_evaluation_mode(trained):
    model, holding = trained
    found, _ = asked("activations", trained)
    inputs = holding.forget[0]
    net = Small.cnn().eval()
    net.load_state_dict(model)
    with torch.no_grad():
        expected = net[:3](inputs).mean(dim=(2, 3)).sum(dim=0)
    torch.testing.assert_close(found["forget"].sums["0"], expected)
    assert found["remain"].count == 40


def test_class_sums_are_before_normalisation(trained):
    model, holding = trained
    found, outcome = asked("classes", trained)
    net = Small.cnn().eval()
    net.load_state_dict(model)
    inputs, targets = holding.remain
    with torch.no_grad():
        expected = net[0](inputs[targets == 2]).relu().mean(dim=(2, 3)).sum(dim=0)
    torch.testing.assert_close(found["2"].sums["0"], expected)
    assert list(found) == ["0", "1", "2"]
    assert dict(outcome.metrics) == {"0-count": 20, "1-count": 20, "2-count": 20}


def test_contributions_are_gradients_along_the_path_from_nothing(trained):
    """A sum over 20 points of -dloss/dA at (s / 20) A, times A, with the head spelt out."""
    model, holding = trained
    outcome = do(Statistics(**CLASS, kind="gradients"), model, holding)
    found = parted(outcome.arrays)
    assert set(found) == {"forget"}
    assert dict(outcome.metrics) == {"forget-count": 20}
    net = Small.cnn().eval()
    net.load_state_dict(model)
    inputs, targets = holding.forget
    activations = net[:3](inputs).detach()
    expected = torch.zeros(6)
    for step in range(1, 21):
        point = (activations * step / 20).requires_grad_()
        (slope,) = torch.autograd.grad(20 * holding.loss(net[3:](point), targets), point)
        expected -= (activations * slope).sum(dim=(0, 2, 3)) / 20
    torch.testing.assert_close(found["forget"]["0"], expected)


def test_sums_do_not_depend_on_how_rows_are_divided(trained, monkeypatch):
    for kind in ("activations", "gradients"):
        whole = parted(do(Statistics(**CLASS, kind=kind), *trained).arrays)
        monkeypatch.setattr("client.forgetting.statistics.CHUNK", 7)
        parts = parted(do(Statistics(**CLASS, kind=kind), *trained).arrays)
        monkeypatch.undo()
        torch.testing.assert_close(whole["forget"]["0"], parts["forget"]["0"])


@pytest.mark.parametrize("kind", ["fisher", "activations", "gradients", "classes"])
def test_a_client_without_such_rows_sends_nothing_of_them(kind, trained):
    model, holding = trained
    empty = (holding.forget[0][:0], holding.forget[1][:0])
    outcome = do(Statistics(**CLASS, kind=kind), model, dataclasses.replace(holding, forget=empty))
    group = "0" if kind == "classes" else "forget"
    count = "0-count" if kind == "classes" else "forget-count"
    assert outcome.metrics[count] == 0
    assert not any(bool(tensor.any()) for tensor in parted(outcome.arrays)[group].values())


@pytest.mark.parametrize("kind", ["activations", "gradients", "classes"])
def test_channels_need_convolutions(kind):
    model, holding = made(Small(Small.mlp), epochs=1)
    with pytest.raises(MissingNeedError, match="network with convolutions"):
        do(Statistics(**CLASS, kind=kind), model, holding)


def test_classes_need_classes():
    model, holding = made(Regression(), torch.arange(5), epochs=1)
    with pytest.raises(MissingNeedError, match="one integer label a sample"):
        do(Statistics(forget="all", kind="classes"), model, holding)
    found = do(Statistics(forget="all", kind="fisher", most_samples=3), model, holding)
    assert found.metrics["forget-count"] == 3


def test_masks_made_of_them_forget_the_class_and_keep_the_others(trained):
    """From sums to a model, as a server does it."""
    model, holding = trained

    def shares(masks):
        pruned = prune(model, masks)
        with torch.no_grad():
            right = [
                float((holding.forward(pruned, rows[0]).argmax(1) == rows[1]).double().mean())
                for rows in (holding.forget, holding.remain)
            ]
        return right

    found, _ = asked("fisher", trained)
    forget, remain = shares(top_share(fisher_scores(found["forget"], found["remain"]), 0.4))
    assert forget < 0.5 < remain
    structure = structure_for(holding)
    found, _ = asked("activations", trained)
    channels = top_share(activation_scores(found["forget"], found["remain"]), 0.67)
    forget, remain = shares(parameter_masks(model, structure.convolutions, channels))
    assert forget < remain
    per_class, _ = asked("classes", trained)
    specific = top_share(
        tfidf.tfidf_scores([per_class[str(place)] for place in range(3)], 0), 0.34, "tensor"
    )
    masks = parameter_masks(model, structure.convolutions, specific, norm=True, following=True)
    assert set(masks) == {"0.weight", "0.bias", "1.weight", "1.bias", "5.weight"}


def test_a_label_that_is_no_class_is_refused(trained):
    model, holding = trained
    wrong = dataclasses.replace(holding, forget=(holding.forget[0], holding.forget[1] + 9))
    with pytest.raises(ParametersError, match="labels must lie in 0 to 2"):
        do(Statistics(**CLASS, kind="classes"), model, wrong)


@pytest.mark.parametrize("kind", ["fisher", "activations"])
@pytest.mark.parametrize("wanted", ["forget", "remain"])
def test_of_one_set_nothing_else_is_sent(trained, kind, wanted):
    both, _ = asked(kind, trained)
    one, outcome = asked(kind, trained, sets=wanted)
    assert set(outcome.metrics) == {f"{wanted}-count"}
    assert list(one) == [wanted]
    assert one[wanted].count == both[wanted].count
    for name, tensor in both[wanted].sums.items():
        assert torch.equal(one[wanted].sums[name], tensor)


class Wide(Small):
    """Images and weights of double precision."""

    def build_model(self):
        return self.cnn().double()

    def client_data(self, partition, partitions):
        return Split(*[
            TensorDataset(data.tensors[0].double(), data.tensors[1])
            for data in (images(partition, 60), images(partition + 1000, 15))
        ])  # fmt: skip


@pytest.mark.parametrize("task", [Small(), Wide()], ids=["float", "double"])
def test_sums_over_channels_are_of_the_type_that_a_server_expects(task):
    model, holding = made(task, epochs=1)
    expected = channels_of(Network(structure_for(holding).convolutions, (), 3), model)
    assert expected["0"].dtype == model["0.weight"].dtype
    for kind, group in (("activations", "forget"), ("gradients", "forget"), ("classes", "0")):
        found, _ = asked(kind, (model, holding))
        sums.check_statistics(found[group], expected, signed=True)
        assert found[group].sums["0"].dtype == expected["0"].dtype
