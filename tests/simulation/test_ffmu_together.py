"""FFMU rounds of many clients at once: what each alone would have sent."""

import logging

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from client.app import build_app, honest_job
from client.task.evaluation import state_of
from client.task.protocol import TaskOptions, load_task
from server.federation import initial_model
from simulation.engines import training
from simulation.engines.inprocess import InProcessGrid
from simulation.engines.training import Training, alone
from simulation.engines.work import FfmuRound
from strategies import messages
from strategies.actions import Ffmu
from strategies.messages import LocalTraining
from tests.simulation.test_training import (
    UNEQUAL,
    Scaled,
    Toy,
    convolutions,
    distance,
    jobs_of,
    mlp,
    own,
    partly_frozen,
    same,
    start_of,
    with_dropout,
    with_norm,
)
from unlearning.errors import MissingNeedError, ParametersError

ASKED = {
    "path": Ffmu(),
    "soft": Ffmu(mode="soft"),
    "ffmu-n": Ffmu(mode="soft", models=True),
    "full": Ffmu(local="full"),
    "clipped": Ffmu(local="full", clip=0.05),
}


def run(jobs, start, asked, made=None):
    """Return each job's outcome, in the jobs' order."""
    found = {}
    for outcomes in (made or Training()).run(jobs, start, FfmuRound(asked)):
        found |= {position: own(outcome) for position, outcome in outcomes}
    return [found[position] for position in range(len(jobs))]


def each(jobs, start, asked):
    return [alone(job, start, FfmuRound(asked)) for job in jobs]


@pytest.mark.parametrize("make", [mlp, with_dropout, with_norm, partly_frozen, Scaled])
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_round_together_gives_what_each_alone_gives(asked, make, caplog):
    task = Toy(make)
    start = start_of(task)
    # What plain training would heed and FFMU does not.
    more = {"optimizer": "adam", "weight_decay": 0.1, "proximal_mu": 0.5, "momentum": 0.9}
    jobs = jobs_of(task, UNEQUAL, local_epochs=2, **more)
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start, asked)
    assert not caplog.records
    for outcome, expected in zip(found, each(jobs, start, asked), strict=True):
        assert distance(outcome, expected) < 1e-5
        assert outcome.metrics == pytest.approx(expected.metrics, rel=1e-5)
        assert outcome.tensors.keys() == start.keys()
        assert any(not torch.equal(outcome.tensors[name], start[name]) for name in start)


@pytest.mark.parametrize("asked", [ASKED["path"], ASKED["full"]], ids=["path", "full"])
def test_what_is_sent_may_be_changed_by_the_client(asked):
    def turned(start, model):
        return {name: 2 * start[name] - tensor for name, tensor in model.items()}

    task = Toy(mlp)
    start = start_of(task)
    honest = run(jobs_of(task, UNEQUAL), start, asked)
    for one, other in zip(
        run(jobs_of(task, UNEQUAL, finish=turned), start, asked), honest, strict=True
    ):
        assert all(torch.equal(t, turned(start, other.tensors)[n]) for n, t in one.tensors.items())


@pytest.mark.parametrize("asked", [ASKED["path"], ASKED["full"]], ids=["path", "full"])
def test_the_number_of_threads_changes_no_bit(asked, monkeypatch):
    monkeypatch.setattr(training, "CPU_BUDGET", 2000)  # chunks of a few clients
    monkeypatch.setattr("simulation.engines.batched.CPU_BUDGET", 4000)
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL * 2, local_epochs=2)
    one, two = (run(jobs, start, asked, Training(workers)) for workers in (1, 2))
    assert all(same(left, right) for left, right in zip(one, two, strict=True))
    expected = each(jobs, start, asked)
    assert all(distance(left, right) < 1e-5 for left, right in zip(one, expected, strict=True))


def test_convolutions_take_quantised_steps_in_threads_bit_for_bit_as_alone():
    task = Toy(convolutions)
    start = start_of(task)
    jobs = jobs_of(task, [8, 5, 9, 1, 8, 7], shape=(1, 4, 4), local_epochs=2)
    before = torch.random.get_rng_state()
    found = run(jobs, start, Ffmu(), made := Training(3))
    assert made.used_threads
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(same(o, e) for o, e in zip(found, each(jobs, start, Ffmu()), strict=True))


@pytest.mark.parametrize(
    ("asked", "settings", "why"),
    [
        (Ffmu(mode="sample"), {}, "draws noise of its own"),
        (Ffmu(), {"precision": "bfloat16"}, "computes in float32"),
    ],
)
def test_rounds_that_are_played_one_by_one_say_why(asked, settings, why, caplog):
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL, **settings)
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start, asked)
    assert [why in record.getMessage() for record in caplog.records] == [True]
    assert all(same(o, e) for o, e in zip(found, each(jobs, start, asked), strict=True))


class Rooted(nn.Module):
    """Where an input begins with 0, the loss is a number and its gradient is none."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        first = self.layer.weight[0, 0] * inputs[:, :1]
        return self.layer(inputs) + first.abs().sqrt() * torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_client_that_goes_astray_is_its_own_error_and_nobody_elses(asked):
    task = Toy(Rooted)
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL)
    jobs[4].examples.tensors[0][3, 0] = 0
    jobs.append(jobs_of(task, [0])[0])  # and one without rows
    found = run(jobs, start, asked)
    assert isinstance(found[4], ParametersError)
    assert isinstance(found[7], MissingNeedError)
    assert str(found[4]) == str(alone(jobs[4], start, FfmuRound(asked)))
    for place in (0, 1, 2, 3, 5, 6):
        assert distance(found[place], alone(jobs[place], start, FfmuRound(asked))) < 1e-5


# ---------------------------------------------------------------- on the Grid
def grid_for(*, batch, clients=6, **changes):
    options = TaskOptions.model_validate({"task": "digits", "model": "mlp", **changes})
    app = build_app(options.model_dump(by_alias=True))
    job_of = (lambda message, context: honest_job(message, context, options)) if batch else None
    return InProcessGrid(app, clients, job_of=job_of), options


def ask(made, **config):
    grid, options = made
    start = state_of(initial_model(load_task(options), 0))
    told = {**LocalTraining(batch_size=15).to_record(), messages.SERVER_ROUND: 1, **config}
    content = RecordDict({
        messages.ARRAYS: messages.record_from(start), messages.CONFIG: ConfigRecord(told),
    })  # fmt: skip
    sent = [Message(content, node, Ffmu.action) for node in grid.get_node_ids()]
    return sorted(grid.send_and_receive(sent), key=lambda reply: reply.metadata.src_node_id)


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_a_grid_answers_together_as_one_by_one(asked):
    for one, other in zip(
        *(ask(grid_for(batch=b), **asked.config()) for b in (True, False)), strict=True
    ):
        assert not one.has_error()
        found, expected = (
            messages.parameters_from(reply.content[messages.ARRAYS]) for reply in (one, other)
        )
        for name, tensor in expected.items():
            assert float((found[name] - tensor).norm()) <= 1e-5 * float(tensor.norm())
        told, wanted = (dict(reply.content[messages.METRICS]) for reply in (one, other))
        assert told == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("batch", [True, False])
def test_an_owner_may_refuse_it_on_either_way(batch):
    replies = ask(grid_for(batch=batch, refuse="ffmu"), **Ffmu().config())
    assert len(replies) == 6
    assert all(messages.is_refusal(reply) for reply in replies)


@pytest.mark.parametrize("batch", [True, False])
def test_settings_that_cannot_be_are_everybodys_error(batch):
    replies = ask(grid_for(batch=batch), sigma=-1.0)
    assert all("sigma" in reply.error.reason for reply in replies)
