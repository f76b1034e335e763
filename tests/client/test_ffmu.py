"""A client's round of FFMU, against ``unlearning.ffmu`` and by hand."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from pydantic import ValidationError
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from client.app import build_app
from client.forgetting import ffmu as round_of_ffmu
from client.task.evaluation import state_of
from client.train import Job, order_seed
from simulation.attacks.poison import boost
from strategies import flower, messages
from strategies.actions import CANCELLED, LARGEST, SAMPLES, Ffmu
from strategies.messages import LocalTraining
from unlearning import ffmu, pcmu
from unlearning.errors import MissingNeedError, ParametersError

CPU = torch.device("cpu")
SETTINGS = LocalTraining(seed=4, local_epochs=2, batch_size=8)


class Tied(nn.Module):
    """Two layers that share their weight, a frozen scale, and statistics."""

    def __init__(self, norm=True, dropout=0.0):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.full((1,), 2.0), requires_grad=False)

    def forward(self, inputs):
        hidden = self.drop(torch.tanh(self.norm(self.first(inputs))))
        return self.second(hidden) * self.scale


@dataclass(frozen=True, eq=False)
class TinyTask:
    make: type | object = Tied
    more: dict = field(default_factory=dict)

    def build_model(self):
        return self.make(**self.more)

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)


def rows(count=20, seed=1):
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, generator=draw)
    return TensorDataset(inputs, torch.randint(0, 4, (count,), generator=draw))


def job(task, examples=None, **more):
    return Job(task, rows() if examples is None else examples, SETTINGS, (3, 5), CPU, **more)


def started(task):
    torch.manual_seed(0)
    return state_of(task.build_model())


def by_hand(task, start, examples, rate, quantiser):
    """The round with torch's own modules: v, the mean gradient, and the state at the end."""
    network = task.build_model()
    network.load_state_dict(start)
    network.train()
    learned = [p for p in network.parameters() if p.requires_grad]
    total, count = [torch.zeros_like(p) for p in learned], 0
    inputs, targets = examples.tensors
    for epoch in range(SETTINGS.local_epochs):
        draw = torch.Generator().manual_seed(order_seed(SETTINGS, (3, 5), epoch))
        for chosen in torch.randperm(len(targets), generator=draw).split(SETTINGS.batch_size):
            loss = functional.cross_entropy(network(inputs[chosen]), targets[chosen])
            grads = torch.autograd.grad(loss, learned)
            count += 1
            with torch.no_grad():
                for p, g, s in zip(learned, grads, total, strict=True):
                    s.add_(g)
                    p.sub_(rate * pcmu.direction(g, quantiser))
    names = {id(p): n for n, p in network.named_parameters()}
    return network.state_dict(), {
        names[id(p)]: s / count for p, s in zip(learned, total, strict=True)
    }


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_a_round_along_a_path_is_that_of_torchs_own_modules(mode):
    task, asked = TinyTask(), Ffmu(mode=mode, ffmu_rate=0.5, alpha_local=0.1)
    start = started(task)
    state, mean = by_hand(task, start, rows(), 0.5, asked.quantiser)
    sent, metrics = round_of_ffmu.do(job(task), start, asked)
    assert sent.keys() == start.keys()
    read = ffmu.as_gradient(start, sent)
    for name, tensor in mean.items():
        assert torch.allclose(read[name], tensor, atol=1e-6), name
    assert torch.equal(read["second.weight"], read["first.weight"])  # one tensor, two names
    assert not read["scale"].any()  # frozen
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(sent[name], state[name])  # as the client left them
        assert not torch.equal(sent[name], start[name])
    assert 0 < metrics["loss"] < 10
    assert metrics.keys() == {"loss"}


def test_ffmu_n_sends_the_local_model():
    task, asked = TinyTask(), Ffmu(models=True, ffmu_rate=0.5, alpha_local=0.1)
    start = started(task)
    state, _ = by_hand(task, start, rows(), 0.5, asked.quantiser)
    sent, _ = round_of_ffmu.do(job(task), start, asked)
    for name, tensor in state.items():
        assert torch.allclose(sent[name], tensor, atol=1e-6), name
    moved = (sent["first.weight"] - start["first.weight"]).abs()
    assert float(moved.max()) <= 0.5 * 0.1 * 6 + 1e-6  # 2 epochs of 3 batches


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_full_sends_the_gradient_of_all_rows_where_the_round_started(clip):
    task = TinyTask(more={"norm": False, "dropout": 0.5})
    start, asked = started(task), Ffmu(local="full", clip=clip, ffmu_rate=0.5)
    sent, metrics = round_of_ffmu.do(job(task), start, asked)
    network = task.build_model().eval()
    network.load_state_dict(start)
    learned = [p for p in network.parameters() if p.requires_grad]
    single = [
        torch.autograd.grad(functional.cross_entropy(network(x[None]), y[None]), learned)
        for x, y in rows()
    ]
    bound = clip or math.inf
    for (name, parameter), column in zip(
        ((n, p) for n, p in network.named_parameters() if p.requires_grad),
        zip(*single, strict=True),
        strict=True,
    ):
        mean = torch.stack(column).clamp(-bound, bound).mean(dim=0)
        assert parameter.shape == mean.shape
        assert torch.allclose(ffmu.as_gradient(start, sent)[name], mean, atol=1e-6)
    largest = max(float(g.abs().max()) for grads in single for g in grads)
    assert metrics[LARGEST] == pytest.approx(clip or largest, rel=1e-5)
    assert (metrics[SAMPLES], metrics[CANCELLED]) == (20, 0)
    whole = functional.cross_entropy(network(rows().tensors[0]), rows().tensors[1])
    assert metrics["loss"] == pytest.approx(whole.item(), rel=1e-5)


def test_full_leaves_statistics_alone():
    task = TinyTask()
    start = started(task)
    sent, _ = round_of_ffmu.do(job(task), start, Ffmu(local="full"))
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(sent[name], start[name])


@pytest.mark.parametrize("asked", [Ffmu(), Ffmu(mode="sample"), Ffmu(local="full")])
def test_the_same_round_gives_the_same_bits_and_draws_from_nobody_else(asked):
    task = TinyTask(more={"norm": False, "dropout": 0.5})
    start = started(task)
    before = torch.random.get_rng_state()
    one, _ = round_of_ffmu.do(job(task), start, asked)
    other, _ = round_of_ffmu.do(job(task), start, asked)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)  # what others draw makes no difference either
    again, _ = round_of_ffmu.do(job(task), start, asked)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name])
        assert torch.equal(tensor, again[name])
    later, _ = round_of_ffmu.do(replace(job(task), purpose=(4, 5)), start, asked)
    same = all(torch.equal(one[name], later[name]) for name in one)
    assert same == (asked.local == "full")  # which draws nothing and has no order


def test_what_is_sent_goes_through_the_jobs_finish():
    task = TinyTask(more={"norm": False})
    start = started(task)
    honest, _ = round_of_ffmu.do(job(task), start, Ffmu())
    finish = lambda old, new: boost(new, old, 3.0)  # noqa: E731
    boosted, _ = round_of_ffmu.do(job(task, finish=finish), start, Ffmu())
    gradient, larger = (ffmu.as_gradient(start, sent) for sent in (honest, boosted))
    assert all(torch.allclose(larger[n], 3 * gradient[n], atol=1e-5) for n in gradient)


@pytest.mark.parametrize("local", ["path", "full"])
def test_a_client_without_rows_has_nothing_to_send(local):
    task = TinyTask(more={"norm": False})
    with pytest.raises(MissingNeedError, match="without rows has no gradient to send"):
        round_of_ffmu.do(job(task, rows(0)), started(task), Ffmu(local=local))


def test_rows_that_lead_nowhere_are_refused():
    task, bad = TinyTask(more={"norm": False}), rows()
    bad.tensors[0][3] = math.nan
    for local in ("path", "full"):
        with pytest.raises(ParametersError, match="not finite"):
            round_of_ffmu.do(job(task, bad), started(task), Ffmu(local=local))


# -------------------------------------------------------------------------------------- messages


def test_the_app_answers_train_ffmu():
    task = TinyTask(more={"norm": False})
    start = started(task)
    app = build_app({}, job=lambda message, context, options: job(task))
    config = {"server-round": 3, **Ffmu(local="full", ffmu_rate=0.25).config()}
    content = RecordDict(
        {messages.ARRAYS: messages.record_from(start), messages.CONFIG: ConfigRecord(config)}
    )
    message = Message(content=content, dst_node_id=1001, message_type=Ffmu.action)
    assert Ffmu.action == "train.ffmu"
    reply = app(message, flower.client_context(1, 1001, 0, 1))
    assert not reply.has_error()
    told = dict(reply.content[messages.METRICS])
    assert told["num-examples"] == told[SAMPLES] == 20
    direct, _ = round_of_ffmu.do(job(task), start, Ffmu(local="full"))
    found = messages.shared_parameters(reply.content[messages.ARRAYS])
    assert all(torch.equal(found[name], direct[name]) for name in direct)


def test_settings_travel_and_are_checked_on_arrival():
    asked = Ffmu(sigma=0.2, lam_factor=2, mode="soft", clip=0.5, local="full", ffmu_rate=0.01)
    assert round_of_ffmu.settings_of({**asked.config(), "server-round": 1, "seed": 2}) == asked
    for wrong in ({"sigma": 0}, {"mode": "loud"}, {"clip": -1}, {"models": True, "local": "full"}):
        with pytest.raises(ValidationError):
            round_of_ffmu.settings_of({**Ffmu().config(), **wrong})
