"""FFMU as a strategy: its arithmetic, what screens it, and certificates against retraining."""

import copy
import itertools
import logging
import math
from dataclasses import dataclass

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.utils.data import TensorDataset

from client.app import build_app, partition_of, round_of, training_settings
from client.task.evaluation import state_of
from client.train import Job
from simulation.engines.inprocess import InProcessGrid
from strategies import messages, rounds
from strategies.actions import Ffmu
from strategies.directory import by_partition
from strategies.ffmu import FFMU
from strategies.loop import run_rounds
from strategies.methods.catalogue import MAKE
from strategies.methods.retraining import Retrain
from strategies.screen import Screen
from strategies.wrapper import Unlearning
from unlearning import ffmu, margins, pcmu
from unlearning.catalogue import Target
from unlearning.errors import (
    ImpossibleRequestError,
    NotCertifiedError,
    ParametersError,
    SecateurError,
)
from unlearning.parameters import weighted_mean
from unlearning.pcmu import Quantiser
from unlearning.routing import Request

NOBODY = {"fraction_evaluate": 0.0, "min_train_nodes": 1, "min_available_nodes": 1}
FULL = Ffmu(local="full")


def strategy_of(rounds_=4, action=FULL, **more):
    return FFMU(rounds=rounds_, action=action, **{"learning_rate": 1.0, **NOBODY, **more})


def wrapped(strategy, **more):
    return Unlearning(strategy, **{"screen": Screen(), "identify": by_partition, "seed": 1, **more})


def play(strategy, grid, model, number=4, **more):
    federation = wrapped(strategy, **more)
    records = []
    final = run_rounds(
        federation, grid, model, rounds=number, on_round=lambda record, _: records.append(record)
    )
    return final, federation, records


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# ------------------------------------------------------------------- steps, with scripted clients

MODEL = {
    "layer.weight": torch.tensor([[0.5, -0.25], [0.0, 1.0]]),
    "norm.running_mean": torch.tensor([1.0, 2.0]),
    "norm.num_batches_tracked": torch.tensor(4),
}


def gradient(partition, number):
    draw = torch.Generator().manual_seed(10 * partition + number)
    return {"layer.weight": torch.randn(2, 2, generator=draw)}


def sending(partition, number, model, claims=True):
    """A client that sends a gradient of its own, and moves its statistics by its number."""
    sent = ffmu.as_model(model, gradient(partition, number))
    sent["norm.running_mean"] = model["norm.running_mean"] + partition
    sent["norm.num_batches_tracked"] = model["norm.num_batches_tracked"] + 3
    told = {"largest-gradient": 9.0, "cancelled": 0, "samples": 1000} if claims else {}
    return messages.train_reply(sent, {"loss": 1.0, **told}, 10 + partition)


@pytest.mark.parametrize("weights", ["uniform", "samples"])
@pytest.mark.parametrize("screen", [Screen(), None])
def test_the_server_steps_along_the_quantised_average(scripted_grid, weights, screen):
    final, _, _ = play(
        strategy_of(weights=weights), scripted_grid(sending, 3), MODEL, screen=screen
    )
    numbers = [10.0, 11.0, 12.0] if weights == "samples" else [1.0] * 3
    model = MODEL
    for number in range(1, 5):
        sent = [gradient(k, number) for k in range(3)]
        rate = ffmu.learning_rate(number, 4, 1.0)  # 1, 1, .1, .01
        stepped = ffmu.server_step(model, sent, rate, Quantiser(alpha=0.05), samples=numbers)
        shift = sum(k * n for k, n in enumerate(numbers)) / sum(numbers)
        stepped["norm.running_mean"] = model["norm.running_mean"] + shift
        stepped["norm.num_batches_tracked"] = model["norm.num_batches_tracked"] + 3
        model = stepped
    assert torch.equal(final["layer.weight"], model["layer.weight"])
    assert torch.allclose(final["norm.running_mean"], model["norm.running_mean"])
    assert final["norm.num_batches_tracked"] == 16
    moved = (final["layer.weight"] - MODEL["layer.weight"]).abs()
    assert float(moved.max()) <= 0.05 * 2.11 + 1e-6


def test_ffmu_n_averages_models_as_fedavg_does(scripted_grid):
    action = Ffmu(models=True)
    final, _, _ = play(strategy_of(action=action), scripted_grid(sending, 3), MODEL, 1)
    plain, _, _ = play(FedAvg(**NOBODY), scripted_grid(sending, 3), MODEL, 1)
    assert same_bits(final, plain)
    sent = [ffmu.as_model(MODEL, gradient(k, 1)) for k in range(3)]
    assert torch.allclose(
        final["layer.weight"], weighted_mean(sent, [10.0, 11.0, 12.0])["layer.weight"]
    )


def test_clients_are_asked_with_the_rate_of_the_round(scripted_grid):
    strategy, grid = strategy_of(), scripted_grid(sending, 3)
    config = ConfigRecord({"seed": 5})
    told = []
    for number in (1, 2, 3, 4, 5):
        asked = strategy.configure_train(number, messages.record_from(MODEL), config, grid)
        assert {message.metadata.message_type for message in asked} == {"train.ffmu"}
        assert len(asked) == 3
        record = asked[0].content["config"]
        assert (record["seed"], record["server-round"], record["local"]) == (5, number, "full")
        told.append(record["ffmu-rate"])
    assert told == pytest.approx([1, 1, 0.1, 0.01, 0.01])  # a round beyond has the last rate
    assert dict(config) == {"seed": 5}


def test_a_shallow_copy_asks_for_the_strategy_itself(scripted_grid):
    # as plans do that ask everybody
    strategy, grid = strategy_of(), scripted_grid(sending, 3)
    asking = rounds.everybody(strategy)
    asked = asking.configure_train(1, messages.record_from(MODEL), ConfigRecord(), grid)
    arrays, _ = strategy.aggregate_train(1, grid.send_and_receive(asked))
    assert not torch.equal(messages.parameters_from(arrays)["layer.weight"], MODEL["layer.weight"])
    fresh = copy.deepcopy(strategy_of())
    with pytest.raises(SecateurError, match="round 1 was not begun here"):
        fresh.aggregate_train(1, grid.send_and_receive(asked))


def test_no_reply_makes_no_model(scripted_grid):
    strategy, grid = strategy_of(), scripted_grid(sending, 3)
    strategy.configure_train(1, messages.record_from(MODEL), ConfigRecord(), grid)
    assert strategy.aggregate_train(1, []) == (None, None)


def test_the_screen_sees_gradients_as_updates(scripted_grid):
    def reply(partition, number, model):
        if partition == 4:  # far longer than the others'
            large = {n: 1000 * t for n, t in gradient(partition, number).items()}
            return messages.train_reply(ffmu.as_model(model, large), {"loss": 1.0}, 10)
        if partition == 3:
            return messages.train_reply(
                {**model, "layer.weight": torch.full((2, 2), math.nan)}, {"loss": 1.0}, 10
            )
        return sending(partition, number, model, claims=False)

    final, _, records = play(strategy_of(), scripted_grid(reply, 5), MODEL)
    for record in records[1:]:
        assert set(record.rejected) == {"client-0003", "client-0004"}
        assert "times the round's median" in record.rejected["client-0004"]
        assert "NaN" in record.rejected["client-0003"]
        assert len(record.participants) == 3
    honest, _, _ = play(strategy_of(), scripted_grid(sending, 3), MODEL)
    assert torch.equal(final["layer.weight"], honest["layer.weight"])


def test_a_dead_zone_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="flwr"):
        strategy_of(action=Ffmu(sigma=0.42))
        assert "DeadZone" not in caplog.text
        strategy_of(action=Ffmu(sigma=0.5))
    assert "DeadZone(0.09314)" in caplog.text


@pytest.mark.parametrize("wrong", [{"rounds_": 0}, {"learning_rate": 0.0}, {"alpha": -1.0}])
def test_settings_out_of_range_are_refused_at_once(wrong):
    with pytest.raises(ParametersError):
        strategy_of(**wrong)


# ------------------------------------------------------------------------ with clients that train


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 2, bias=False)
        self.last = nn.Linear(2, 1)

    def forward(self, inputs):
        return self.last(torch.tanh(self.first(inputs)))[:, 0]


@dataclass(frozen=True, eq=False)
class Far:
    """A function far away from where any model starts: all samples pull the same way."""

    def build_model(self):
        return Tanh()

    def loss(self, outputs, targets):
        return ((outputs - targets) ** 2).mean()


TASK = Far()


def shard(draw, count):
    """Samples whose last feature is always 0, as a black pixel is."""
    inputs = torch.randn(count, 3, generator=draw) * 0.2 + torch.tensor([1.0, -1.0, 0.0])
    inputs[:, 2] = 0
    noise = 0.1 * torch.randn(count, generator=draw)
    return TensorDataset(inputs, 6 + inputs[:, 0] - inputs[:, 1] + noise)


def without(data, gone):
    keep = torch.ones(len(data), dtype=torch.bool)
    keep[list(gone)] = False
    return TensorDataset(*(tensor[keep] for tensor in data.tensors))


def training(shards):
    """A Grid of clients that train on these samples."""

    def job(message, context, options):
        number, _ = partition_of(context)
        settings, device = training_settings(message), torch.device("cpu")
        return Job(TASK, shards[number], settings, (round_of(message), number), device)

    return InProcessGrid(build_app({}, job=job), len(shards))


def start(seed):
    torch.manual_seed(seed)
    return state_of(TASK.build_model())


def node(federation, number):
    return federation.directory.node(f"client-{number:04d}")


def test_a_federation_of_one_is_pcmu():
    draw = torch.Generator().manual_seed(7)
    data, model = shard(draw, 60), start(7)
    final, _, _ = play(strategy_of(12), training([data]), model, 12)
    network = TASK.build_model()

    def forward(parameters, inputs):
        return torch.func.functional_call(network, dict(parameters), (inputs,))

    for number in range(1, 13):
        found = margins.bounded_gradient(model, forward, TASK.loss, *data.tensors)
        rate = ffmu.learning_rate(number, 12, 1.0)
        model = pcmu.step(model, found.gradient, rate, Quantiser(alpha=0.05))
    assert same_bits(final, model)


@pytest.mark.parametrize(
    ("sizes", "removed"),
    [((300,), (1,)), ((200, 300, 100), (1, 2, 0)), ((200, 300, 100), (30, 60, 20))],
)
def test_certified_deletions_leave_every_bit_as_retraining_does(sizes, removed):
    exact, open_, differing, number = 0, 0, 0, 6
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        shards, model = [shard(draw, size) for size in sizes], start(seed)
        strategy = strategy_of(number, alpha=0.2)
        final, federation, _ = play(strategy, training(shards), model, number)
        left = [
            without(data, torch.randperm(len(data), generator=draw)[:gone].tolist())
            for data, gone in zip(shards, removed, strict=True)
        ]
        retrained, _, _ = play(strategy_of(number, alpha=0.2), training(left), model, number)
        asked = {node(federation, k): gone for k, gone in enumerate(removed)}
        check = strategy.check(asked)
        assert (check.rounds, check.pairs) == (number, number * 9)
        if check.complete:
            answered = strategy.answer(final, asked)
            assert same_bits(answered, retrained)
            assert same_bits(answered, final)
            assert "Our exact one-round check: 54 of 54" in check.statement
            exact += 1
        else:
            with pytest.raises(NotCertifiedError, match="not all: nothing is shown"):
                strategy.answer(final, asked)
            open_ += 1
            differing += not same_bits(final, retrained)
    if max(removed) < 10:
        assert exact >= 2
    else:
        assert open_ >= 3


def test_the_worst_samples_of_a_certified_training_can_go():
    number, exact = 6, 0
    for seed in range(4):
        draw = torch.Generator().manual_seed(50 + seed)
        shards, model = [shard(draw, size) for size in (150, 250)], start(seed)
        strategy = strategy_of(number, alpha=0.2)
        final, federation, _ = play(strategy, training(shards), model, number)
        if not strategy.check({node(federation, 0): 1, node(federation, 1): 1}).complete:
            continue
        exact += 1
        order = shards[0].tensors[1].argsort()
        for gone, other in itertools.product((order[0], order[-1]), (0, 7)):
            left = [without(shards[0], [int(gone)]), without(shards[1], [other])]
            retrained, _, _ = play(strategy_of(number, alpha=0.2), training(left), model, number)
            assert same_bits(final, retrained)
    assert exact >= 2


def test_without_a_screen_nodes_are_known_too():
    shards, model = [shard(torch.Generator().manual_seed(1), 200)] * 2, start(1)
    strategy = strategy_of(6)
    _, federation, _ = play(strategy, training(shards), model, 6, screen=None)
    assert strategy.course.samples == {node(federation, 0): 200, node(federation, 1): 200}


def test_clipped_gradients_are_certified_by_their_bound():
    shards, model = [shard(torch.Generator().manual_seed(1), 200)] * 2, start(1)
    lowest = []
    for clip in (0.0, 0.5):
        strategy = strategy_of(3, Ffmu(local="full", clip=clip))
        play(strategy, training(shards), model, 3)
        lowest.append(strategy.course.margins.lowest)
    # all samples pull the same way: clipped, their mean is nearly the bound
    assert lowest[1] > 2 * lowest[0] > 0


def failing(strategy, grid, number=3):
    """Train, and return what a request for one sample of the first client is answered with."""
    final, federation, _ = play(strategy, grid, MODEL, number, quorum=0.3)
    with pytest.raises(NotCertifiedError) as raised:
        strategy.answer(final, {node(federation, 0): 1})
    return str(raised.value)


PLAIN = {"layer.weight": MODEL["layer.weight"]}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"action": Ffmu()}, "one gradient of all their samples"),
        ({"action": Ffmu(models=True)}, "one gradient of all their samples"),
        ({"action": Ffmu(local="full", mode="soft")}, "mode must be hard"),
        ({"weights": "samples"}, "clients must count the same"),
        ({}, "are statistics that see the data directly"),
    ],
)
def test_trainings_that_cannot_be_certified_say_why(scripted_grid, more, message):
    assert message in failing(strategy_of(3, **more), scripted_grid(sending, 3))


def certifiable(partition, number, model):
    """A client that moves everything a lot in one direction."""
    sent = ffmu.as_model(model, {name: torch.ones_like(t) for name, t in model.items()})
    told = {"largest-gradient": 1.0, "cancelled": 0, "samples": 1000}
    return messages.train_reply(sent, {"loss": 1.0, **told}, 1000)


def changed(**changes):
    """The same, saying something else in round 2."""

    def reply(partition, number, model):
        found = certifiable(partition, number, model)
        if number == 2:
            if changes.get("absent") == partition:
                raise RuntimeError("not here")
            record = found[messages.METRICS]
            for key, value in changes.items():
                if value is None:
                    del record[key]
                elif key != "absent":
                    record[key] = value
        return found

    return reply


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"absent": 1}, "1 of 3 clients have no part in it"),
        ({"samples": None}, "clients do not tell samples"),
        ({"largest-gradient": None, "cancelled": None}, "tell largest-gradient, cancelled"),
        ({"largest-gradient": 0.5}, "larger than what it says"),
        ({"largest-gradient": -1.0}, "as one number"),
        ({"samples": 0}, "at least one sample"),
    ],
)
def test_one_round_that_is_not_certified_is_enough_to_refuse(scripted_grid, changes, reason):
    strategy, grid = strategy_of(3), scripted_grid(changed(**changes), 3)
    final, federation, records = play(strategy, grid, PLAIN, 3, quorum=0.3)
    assert not any(record.note for record in records)  # the training goes on
    assert list(strategy.course.reasons) == [2]
    assert reason in strategy.course.reasons[2]
    check = strategy.check({node(federation, 0): 1})
    assert (check.certified, check.pairs, check.rounds) == (8, 12, 3)
    with pytest.raises(NotCertifiedError, match="8 of 12"):
        strategy.answer(final, {node(federation, 0): 1})


def test_requests_are_answered_by_load(scripted_grid):
    strategy = strategy_of(3)
    final, federation, _ = play(strategy, scripted_grid(certifiable, 3), PLAIN, 3)
    # |G| = c = 1 on 3 devices: the load must stay below 3/2, n_f / (1000 - n_f) of one below it
    # for n_f < 600
    first = node(federation, 0)
    assert same_bits(strategy.answer(final, {first: 598}), final)
    for removed in ({first: 602}, {first: 400, node(federation, 1): 500}):
        assert not strategy.check(removed).complete
    with pytest.raises(NotCertifiedError, match="cannot lose all of its 1000"):
        strategy.check({first: 1000})
    with pytest.raises(NotCertifiedError, match="node 77 sent no gradient"):
        strategy.check({77: 1})


def test_rounds_that_were_not_seen_are_not_certified(scripted_grid):
    # as when another method has changed the model, and the strategy begins anew
    strategy = strategy_of(6)
    federation = wrapped(strategy)
    final = run_rounds(federation, scripted_grid(certifiable, 3), PLAIN, rounds=6, played=2)
    with pytest.raises(NotCertifiedError, match=r"needs all 6 rounds .* and 4 were looked at"):
        strategy.answer(final, {node(federation, 0): 1})


# ---------------------------------------------------------------- methods with a step of their own
@pytest.mark.parametrize("name", ["rapid-retraining", "noisy-gd", "rcad"])
def test_models_of_another_step_are_not_taken_for_gradients(name):
    ready = [MAKE[name](), Retrain()]
    promise = "exact" if name == "rapid-retraining" else "approximate"
    request = Request(Target.SAMPLES, (), "privacy", tokens=("0" * 32,), method=name,
                      guarantee=promise)  # fmt: skip
    models = Ffmu(models=True)
    for strategy, served in (
        (FFMU(rounds=4), False), (FFMU(rounds=4, action=models), True), (FedAvg(), True),
    ):  # fmt: skip
        federation = Unlearning(strategy, screen=Screen(), others=ready)
        federation.initial({"weight": torch.zeros(2)}, {})
        if served:
            assert federation.route(request).method == name
            Unlearning(strategy, screen=Screen(), method=ready[0])
            continue
        with pytest.raises(ImpossibleRequestError, match=f"{name} plays rounds .*; retrain would"):
            federation.route(request)
        # Nor may it be what a detector's findings are forgotten by, which nobody routes.
        with pytest.raises(SecateurError, match=f"{name} plays rounds of models, and FFMU takes"):
            Unlearning(strategy, screen=Screen(), method=ready[0])
