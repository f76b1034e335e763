"""What a federation knows of its models, and what its recovery is judged by."""

import copy
import dataclasses
import logging

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.data import TensorDataset

from client.task.evaluation import predict, state_of
from client.task.models import trained_tensors
from client.task.protocol import ServerData, load_task, server_data
from server.federation import (
    TEST,
    build_federation,
    build_methods,
    central_measure,
    initial_model,
    network_of,
    staying,
)
from server.settings import Settings, read_settings
from strategies.averaging import is_plain_mean
from strategies.methods.interface import UNKNOWN, Network
from strategies.methods.masks import MASKS
from strategies.methods.settings import MethodSettingsError
from strategies.recovery import VALIDATION
from tests.client.forgetting.small import Regression, Small
from unlearning.ascent import DRAWN
from unlearning.catalogue import Need, Target
from unlearning.channel_masks import Convolution
from unlearning.errors import NoBatchLogError
from unlearning.routing import Request


def digits(model, **more):
    settings = read_settings({"task": "digits", "model": model, "examples": 200, **more})
    return settings, load_task(settings.task_options())


def test_of_a_network_with_convolutions_all_is_known():
    _, task = digits("cnn")
    model = initial_model(task, 0).train()
    before = copy.deepcopy(model.state_dict())
    found = network_of(task, model)
    # Two convolutions, each read by one layer behind it; then two linear layers, the last the head.
    weights = {n.removesuffix(".weight"): t.dim() for n, t in before.items() if "weight" in n}
    first, second, hidden, head = weights
    assert [*weights.values()] == [4, 4, 2, 2]
    assert found.convolutions == (
        Convolution(first, None, (second,)), Convolution(second, None, (hidden,)))  # fmt: skip
    assert found.head == (f"{head}.weight", f"{head}.bias")
    assert found.classes == 10
    assert found.needs() == {Need.CONVOLUTIONS, Need.CLASSES}
    assert model.training  # the caller's model is as it was
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_network_without_convolutions_has_classes_all_the_same():
    _, task = digits("mlp")
    found = network_of(task, initial_model(task, 0))
    assert found.convolutions == ()
    assert found.needs() == {Need.CLASSES}
    assert len(found.head) == 2


class Holding(Small):
    """A task whose server has what a test says."""

    def __init__(self, data, make_model=None):
        super().__init__(make_model)
        self.data = data

    def server_data(self):
        return self.data


EMPTY = TensorDataset(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64))
SOME = TensorDataset(torch.rand(3, 1, 6, 6), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "data", [ServerData(), ServerData(test=EMPTY), ServerData(unlabelled=SOME)]
)
def test_without_data_of_the_servers_nothing_is_known(data):
    task = Holding(data)
    assert network_of(task, task.build_model()) == UNKNOWN
    assert not UNKNOWN.needs()


def test_an_empty_set_hides_no_other():
    task = Holding(ServerData(validation=EMPTY, test=SOME))
    assert network_of(task, task.build_model()).classes == 3


@pytest.mark.parametrize("part", ["validation", "test", "root"])
def test_any_row_of_the_servers_will_do(part):
    task = Holding(dataclasses.replace(ServerData(), **{part: SOME}))
    found = network_of(task, task.build_model())
    assert (found.classes, found.head, len(found.convolutions)) == (3, ("5.weight", "5.bias"), 1)
    assert found.convolutions[0].norm == "1"


def test_numbers_to_predict_are_no_classes():
    class Numbers(Regression):
        def server_data(self):
            return ServerData(test=self.client_data(0, 1).test)

    task = Numbers()
    found = network_of(task, task.build_model())
    assert found.classes == 0
    assert found.needs() == frozenset()


def test_a_head_without_bias_has_a_weight_only():
    task = Holding(ServerData(test=SOME),
                   lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3, bias=False)))  # fmt: skip
    assert network_of(task, task.build_model()).head == ("1.weight",)


@pytest.mark.parametrize("log", ["off", "random"])
@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_a_federation_offers_what_its_task_and_clients_have(model, log, tmp_path):
    settings, task = digits(model, **{"batch-log": log, "client-dir": str(tmp_path)})
    model_ = initial_model(task, 0)
    made = build_federation(settings, model_, task)
    expected = {Need.CLASSES}
    expected |= {Need.CONVOLUTIONS} if model == "cnn" else set()
    expected |= {Need.BATCH_LOG} if log == "random" else set()
    assert made.forgetting.offers == expected
    assert made.forgetting.classes == 10
    for name in (*MASKS, "tfidf", "fisher-noise"):
        assert made.forgetting.methods[name].network == dataclasses.replace(
            network_of(task, model_), trained=trained_tensors(model_)
        )
        assert made.forgetting.methods[name].name == name


@pytest.mark.parametrize(
    "strategy", ["fedavg", "fedprox", "fedmedian", "fedadam", "ffmu", "ffmu-n"]
)
def test_a_batch_log_counts_only_where_clients_have_shares_of_the_model(strategy, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="flwr")
    settings, task = digits("mlp", **{"batch-log": "random", "client-dir": str(tmp_path),
                                      "strategy": strategy, "ready-methods": "amnesiac"})  # fmt: skip
    made = build_federation(settings, initial_model(task, 0), task)
    averages = strategy in ("fedavg", "fedprox")
    assert (Need.BATCH_LOG in made.forgetting.offers) == averages
    assert ("batch logs are of no use" in caplog.text) == (not averages)
    asked = Request(Target.SAMPLES, (), "privacy", tokens=("0" * 32,), guarantee="approximate",
                    method="amnesiac")  # fmt: skip
    if averages:
        assert made.route(asked).method == "amnesiac"
        return
    with pytest.raises(NoBatchLogError, match="or not of plain averages"):
        made.route(asked)
    assert made.route(dataclasses.replace(asked, method=None)).method == "fisher-mask"


def test_a_mean_by_weights_of_ones_own_is_no_plain_one():
    assert is_plain_mean(FedAvg())
    assert not is_plain_mean(FedAvg(weighted_by_key="loss"))


def test_holders_weigh_under_the_federations_own_cap():
    settings, task = digits("mlp", **{"weight-cap": 3.5})
    made = build_methods(settings, initial_model(task, 0))
    assert {made[name].weight_cap for name in ("ascent", "label-flip", "macforget")} == {3.5}


def test_without_the_task_no_method_knows_channels():
    settings, task = digits("cnn")
    assert build_methods(settings, initial_model(task, 0))["tfidf"].network == Network()
    assert not build_federation(settings, initial_model(task, 0)).forgetting.offers


# ---------------------------------------------------------------- freshly initialised models
def test_pga_measures_by_ten_models_that_are_neither_round_0s_nor_each_others():
    settings, task = digits("mlp")
    start = initial_model(task, settings.seed)
    ball = build_federation(settings, start, task).forgetting.methods["pga"]
    drawn = list(ball.drawn())
    assert len(drawn) == DRAWN == 10
    found = [state_of(start), *drawn]
    heads = {tuple(model["1.1.weight"].flatten().tolist()) for model in found}
    assert len(heads) == len(found)
    for model, again in zip(drawn, ball.drawn(), strict=True):  # the seed's, as often as asked
        assert all(torch.equal(model[name], again[name]) for name in model)
    other = build_federation(settings.model_copy(update={"seed": 1}), start, task)
    first = next(iter(other.forgetting.methods["pga"].drawn()))
    assert not torch.equal(first["1.1.weight"], drawn[0]["1.1.weight"])
    assert not list(build_methods(settings, start)["pga"].drawn())


def test_settings_of_methods_reach_the_methods_of_a_federation():
    task = load_task(read_settings({}).task_options())
    text = "fisher-mask.rate=0.02,ascent.epochs=3"
    built = build_methods(read_settings({"method-settings": text}), initial_model(task, 0))
    usual = build_methods(read_settings({}), initial_model(task, 0))
    assert built["fisher-mask"].rate == 0.02
    assert built["ascent"].settings == {**usual["ascent"].settings, "epochs": 3}
    changed = {name for name in built if built[name] != usual[name]}
    assert changed == {"fisher-mask", "ascent"}
    with pytest.raises(MethodSettingsError, match="no method 'mask' has settings"):
        build_methods(Settings.model_construct(method_settings="mask.rate=1"), task.build_model())


# ---------------------------------------------------------------- recovery without a class
def test_rows_of_other_classes_stay():
    targets = torch.tensor([3, 0, 3, 7, 1])
    outputs = torch.arange(10.0).reshape(5, 2)
    found = staying(outputs, targets, {3, 7})
    assert found[1].tolist() == [0, 1]
    assert found[0].tolist() == [[2, 3], [8, 9]]
    assert staying(outputs, targets, ())[1] is targets
    assert len(staying(outputs, targets, {0, 1, 3, 7})[1]) == 0


def test_recovery_is_judged_without_forgotten_classes_and_results_are_not():
    settings, task = digits("mlp")
    model = initial_model(task, 0)
    gone = set()
    measure = central_measure(task, copy.deepcopy(model), settings, lambda: gone)
    state = state_of(model)
    data = server_data(task)

    def share(examples, without=()):
        outputs, targets = predict(model, examples, device=torch.device("cpu"))
        right = [
            (int(o.argmax()) == int(t)) for o, t in zip(outputs, targets, strict=True)
            if int(t) not in without
        ]  # fmt: skip
        return sum(right) / len(right)

    before = measure(1, state)
    assert before == pytest.approx({VALIDATION: share(data.validation), TEST: share(data.test)})
    values = set()
    for number in range(10):
        gone.clear()
        gone.add(number)  # told by the federation, while it runs
        found = measure(2, state)
        assert found[VALIDATION] == pytest.approx(share(data.validation, {number}))
        assert found[TEST] == before[TEST]
        values.add(found[VALIDATION])
    assert len(values) > 1
    gone.update(range(10))
    assert measure(3, state) == {VALIDATION: None, TEST: before[TEST]}
