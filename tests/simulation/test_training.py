"""Many clients at once: what each alone would have made, and what happens when that cannot be."""

import itertools
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from client.task.protocol import ServerData
from client.train import Job
from simulation.engines import batched, step
from simulation.engines.training import Training, Update, alone, in_order
from strategies.messages import LocalTraining

CPU = torch.device("cpu")


class Toy:
    """Three classes of points; ``make`` builds the model."""

    def __init__(self, make, loss=functional.cross_entropy):
        self.make, self.loss_of = make, loss

    def build_model(self):
        return self.make()

    def loss(self, outputs, targets):
        return self.loss_of(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": 0.0}

    def client_data(self, partition, partitions):
        raise NotImplementedError

    def server_data(self):
        return ServerData()


def points(size, client, shape=(6,)):
    draw = torch.Generator().manual_seed(1000 + client)
    inputs = torch.randn(size, *shape, generator=draw)
    return TensorDataset(inputs, torch.randint(0, 3, (size,), generator=draw))


def jobs_of(task, sizes, *, shape=(6,), round_=1, finish=None, **settings):
    settings = LocalTraining(**{"batch_size": 4, "learning_rate": 0.1, **settings})
    return [
        Job(task, points(size, client, shape), settings, (round_, client), CPU, finish)
        for client, size in enumerate(sizes)
    ]


def start_of(task):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = task.build_model()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def run(jobs, start, training=None):
    """Return each job's outcome, in the jobs' order, models by name."""
    found = {}
    for outcomes in (training or Training()).run(jobs, start):
        for position, outcome in outcomes:
            assert position not in found
            found[position] = own(outcome)
    return [found[position] for position in range(len(jobs))]


def own(outcome):
    if isinstance(outcome, Exception) or outcome.row is None:
        return outcome
    tensors = {name: tensor[outcome.row] for name, tensor in outcome.tensors.items()}
    return Update(tensors, None, outcome.metrics)


def distance(one, other):
    """Return the largest difference of a tensor, as a share of its norm."""
    assert one.tensors.keys() == other.tensors.keys()
    return max(
        float((one.tensors[n] - other.tensors[n]).double().norm())
        / (1e-12 + float(other.tensors[n].double().norm()))
        for n in one.tensors
    )


def same(one, other):
    """Say whether two outcomes are equal bit for bit; BatchNorm cannot train on one example."""
    if isinstance(other, Exception):
        return type(one) is type(other)
    return distance(one, other) == 0


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def with_dropout():
    return nn.Sequential(
        nn.Linear(6, 8), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.0),
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2)), nn.Linear(8, 3),
    )  # fmt: skip


def with_norm():
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


def partly_frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


class Scaled(nn.Module):
    """Has a buffer that training does not change, but the server may."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, inputs):
        return self.layer(inputs) * self.scale


UNEQUAL = [9, 17, 4, 1, 12, 8, 3]
SETTINGS = [
    {},
    {"local_epochs": 3},
    {"local_epochs": 2, "momentum": 0.9, "weight_decay": 0.01},
    {"optimizer": "adam", "learning_rate": 0.01, "local_epochs": 2, "weight_decay": 0.01},
    {"proximal_mu": 0.5, "local_epochs": 2},
    {"learning_rate_milestones": "1,3", "learning_rate_factor": 0.5, "round_": 4},
    {"batch_size": 64},
]


@pytest.mark.parametrize("make", ["mlp", "with_dropout", "with_norm", "partly_frozen", "Scaled",
                                  "Unused", "Writing", "all_dropped", "Tempered"])  # fmt: skip
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_together_gives_what_each_alone_gives(make, settings, caplog):
    task = Toy(globals()[make])
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL, **settings)
    with caplog.at_level(logging.INFO, logger="secateur"):
        together = run(jobs, start)
    assert not caplog.records  # no word of another way
    for job, outcome in zip(jobs, together, strict=True):
        expected = alone(job, start)
        assert distance(outcome, expected) < 1e-5
        assert outcome.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)
        assert all(t.dtype == start[n].dtype for n, t in outcome.tensors.items())
    for client, (job, size) in enumerate(zip(jobs, UNEQUAL, strict=True)):
        for tensor, before in zip(job.examples.tensors, points(size, client).tensors, strict=True):
            assert torch.equal(tensor, before)  # nobody writes to a client's data


def test_clients_move_and_differ():
    # The test above would pass if nothing were trained.
    task = Toy(mlp)
    start = start_of(task)
    together = run(jobs_of(task, UNEQUAL), start)
    for one, other in itertools.combinations(together, 2):
        assert distance(one, other) > 1e-3
    assert all(distance(one, Update(start, None, {})) > 1e-3 for one in together)


def test_a_milestone_changes_the_step_from_the_round_after_it():
    task = Toy(mlp)
    start = start_of(task)

    def moved(round_):
        (only,) = run(jobs_of(task, [4], round_=round_, learning_rate_milestones="3"), start)
        return float((only.tensors["2.bias"] - start["2.bias"]).norm())

    # One step on four examples, in any order: a tenth of the step goes a tenth of the way.
    assert moved(3) == pytest.approx(moved(1), rel=1e-4)
    assert moved(4) == pytest.approx(moved(3) / 10, rel=1e-4)


@pytest.mark.parametrize("change", [{"local_epochs": 3}, {"local_epochs": 1}, {"batch_size": 2}])
def test_settings_may_change_from_round_to_round(change):
    task = Toy(mlp)
    start, training = start_of(task), Training()
    before = jobs_of(task, UNEQUAL, local_epochs=2)
    run(before, start, training)  # on the same examples, which are kept at hand
    now = [replace(job, settings=job.settings.model_copy(update=change)) for job in before]
    for jobs in (now, before):
        for job, outcome in zip(jobs, run(jobs, start, training), strict=True):
            assert distance(outcome, alone(job, start)) < 1e-5


def test_chunks_change_nothing_but_rounding(monkeypatch):
    task = Toy(with_dropout)
    start = start_of(task)
    jobs = jobs_of(task, [5] * 9 + UNEQUAL, local_epochs=2, momentum=0.9)
    whole = run(jobs, start)
    monkeypatch.setattr(batched, "MOST_CLIENTS", 3)
    for workers in (1, 2):
        parts = run(jobs, start, Training(workers))
        assert max(distance(a, b) for a, b in zip(parts, whole, strict=True)) < 1e-5


def test_how_many_threads_there_are_changes_nothing(monkeypatch):
    monkeypatch.setattr(batched, "MOST_CLIENTS", 2)
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL, local_epochs=2)
    one, three = run(jobs, start, Training(1)), run(jobs, start, Training(3))
    assert all(distance(a, b) == 0 for a, b in zip(one, three, strict=True))


@pytest.mark.parametrize("make", ["with_dropout", "Scaled", "partly_frozen", "Numbered"])
@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"optimizer": "adam"}, {"proximal_mu": 0.5},
                                      {"precision": "bfloat16"}], ids=str)  # fmt: skip
def test_recorded_steps_are_the_same_and_follow_the_servers_model(make, settings, monkeypatch):
    task = Toy(globals()[make])
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL, local_epochs=2, **settings)
    later = {n: t * 1.5 if t.is_floating_point() else t + 1 for n, t in start.items()}
    plain = [run(jobs, model, Training(1)) for model in (start, later)]
    monkeypatch.setattr(step, "TRACE_AFTER", 1)
    recording = Training(1)
    recorded = [run(jobs, model, recording) for model in (start, later, start)]
    (used,) = recording._batched.values()
    assert used._step._traced
    for found, expected in zip(recorded, [*plain, plain[0]], strict=True):
        for one, other in zip(found, expected, strict=True):
            assert distance(one, other) < 1e-6


def test_a_batch_is_no_larger_than_the_largest_client():
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, [5, 3], batch_size=10**9)
    for job, outcome in zip(jobs, run(jobs, start), strict=True):
        assert distance(outcome, alone(job, start)) < 1e-5


def test_what_is_sent_may_be_changed_by_the_client():
    task = Toy(mlp)
    start = start_of(task)

    def doubled(before, after):
        return {name: before[name] + 2 * (after[name] - before[name]) for name in after}

    plain, changed = (run(jobs_of(task, [8, 8], finish=f), start) for f in (None, doubled))
    for one, other in zip(plain, changed, strict=True):
        expected = doubled(start, one.tensors)
        assert distance(other, Update(expected, None, {})) < 1e-6


def test_mixed_precision_is_close_and_really_mixed():
    task = Toy(mlp)
    start = start_of(task)
    exact, together = (
        run(jobs_of(task, UNEQUAL, precision=p), start) for p in ("float32", "bfloat16")
    )
    one_by_one = [alone(job, start) for job in jobs_of(task, UNEQUAL, precision="bfloat16")]
    for full, half, single in zip(exact, together, one_by_one, strict=True):
        assert 1e-5 < distance(half, full) < 0.05
        assert distance(half, single) < 0.05
        assert all(tensor.dtype == torch.float32 for tensor in half.tensors.values())


# ---------------------------------------------------------------- not in batches
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight
        self.last = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.last(self.other(self.one(inputs)))


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        return functional.dropout(self.layer(inputs), 0.5, self.training)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, inputs):
        return self.drop(self.layer(self.drop(inputs)))


class Centred(nn.Module):
    """Subtracts the batch's mean: no layer's name says that examples influence one another."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.layer(inputs - inputs.mean(dim=0))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        outputs = self.layer(inputs)
        return outputs if float(outputs.detach().sum()) > 0 else 2 * outputs


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, inputs):
        self.steps += 1
        return self.layer(inputs)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.last = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, inputs):
        return self.last(self.cell(inputs.reshape(-1, 3, 2))[0][:, -1])


class Reassigning(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, inputs):
        self.seen = 0.9 * self.seen + 1
        return self.layer(inputs)


class Transposed(nn.Module):
    """Torch draws dropout's mask in the order of memory, which is not that of the entries here."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)

    def forward(self, inputs):
        hidden = self.layer(inputs.reshape(-1, 3, 2)).transpose(1, 2)
        return self.last(self.drop(hidden).flatten(1))


class Tempered(nn.Module):
    """Has a parameter and a buffer without dimensions."""

    def __init__(self):
        super().__init__()
        self.layer, self.heat = nn.Linear(6, 3), nn.Parameter(torch.tensor(1.0))
        self.register_buffer("base", torch.tensor(0.5))

    def forward(self, inputs):
        return self.layer(inputs) * self.heat + self.base


class Unused(nn.Module):
    """Has a layer that nothing goes through: no optimizer touches it, not even to decay it."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, inputs):
        return self.layer(inputs)


class Writing(nn.Module):
    """Writes to its inputs, which are then no longer the client's own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, inputs):
        inputs -= 0.5
        return self.layer(inputs)


class Numbered(Scaled):
    """Reads a buffer as a number, which a recorded step would not look at again."""

    def forward(self, inputs):
        return self.layer(inputs) * float(self.scale)


def all_dropped():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(1.0), nn.Linear(8, 3))


def weighted(outputs, targets):
    return functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 9.0]))


def small(outputs, targets):
    return 1e-3 * functional.cross_entropy(outputs, targets)


def normalised():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def total(outputs, targets):
    return functional.cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (Toy(normalised), "BatchNorm1d 1 couples a batch's examples"),
        (Toy(Tied), "parameters are shared"),
        (Toy(Drawing), "cannot be vectorised"),
        (Toy(Twice), "a dropout layer is used more or less than once"),
        (Toy(Centred), "influence one another"),
        (Toy(Branching), "cannot be vectorised"),
        (Toy(Counting), "in-place"),
        (Toy(Reassigning), "training changes its buffer"),
        (Toy(Transposed), "not contiguous"),
        (Toy(mlp, weighted), "no mean over examples"),
        (Toy(Centred, small), "influence one another"),
        (Toy(mlp, total), "no mean over examples"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.make.__name__,
)
def test_a_model_that_cannot_be_batched_is_trained_alone_and_it_is_said_once(task, reason, caplog):
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL, local_epochs=2)
    training = Training()
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start, training)
        run(jobs, start, training)
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 1
    assert reason in told[0]
    for job, outcome in zip(jobs, found, strict=True):
        assert same(outcome, alone(job, start))


class Listed(Dataset):
    def __init__(self, size):
        self.data = points(size, size)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, item):
        return self.data[item]


def test_data_that_are_no_tensors_are_trained_on_one_client_at_a_time(caplog):
    task = Toy(mlp)
    start = start_of(task)
    plain = jobs_of(task, [8, 8, 8])
    jobs = [plain[0], Job(task, Listed(8), plain[1].settings, (1, 1), CPU), plain[2]]
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start)
    assert "not two tensors in memory" in caplog.text
    for job, outcome in zip(jobs, found, strict=True):
        assert distance(outcome, alone(job, start)) < 1e-5


# ---------------------------------------------------------------- threads
def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def convolutions_with_dropout():
    return nn.Sequential(convolutions(), nn.Dropout(0.5))


@pytest.mark.parametrize("make", [convolutions, convolutions_with_dropout])
def test_convolutions_run_in_threads_bit_for_bit_as_alone(make, caplog):
    task = Toy(make)
    start = start_of(task)
    jobs = jobs_of(task, [8, 5, 9, 1, 8, 7], shape=(1, 4, 4), local_epochs=2)
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start, Training(3))
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(caplog.records) == 1
    for job, outcome in zip(jobs, found, strict=True):
        assert same(outcome, alone(job, start))


def test_only_what_draws_nothing_at_random_runs_in_threads():
    training = Training(2)
    for make, allowed in ((convolutions, True), (convolutions_with_dropout, False), (mlp, False)):
        shape = (6,) if make is mlp else (1, 4, 4)
        task = Toy(make)
        (job,) = jobs_of(task, [8], shape=shape)
        assert training._may_use_threads(job, start_of(task)) is allowed
        assert Training(1)._may_use_threads(job, start_of(task)) is False


def test_results_come_in_order_and_no_more_are_made_than_are_waited_for():
    from concurrent.futures import ThreadPoolExecutor

    started = []

    def work(item):
        started.append(item)
        return item * item

    with ThreadPoolExecutor(2) as pool:
        made = in_order(pool, work, range(20), 3)
        assert next(made) == 0
        assert len(started) <= 4
        assert list(made) == [item * item for item in range(1, 20)]


# ---------------------------------------------------------------- bad input
def test_a_client_without_data_sends_back_what_it_got():
    task = Toy(mlp)
    start = start_of(task)
    found = run(jobs_of(task, [4, 0, 6]), start)
    assert found[1].metrics == {}
    assert distance(found[1], Update(start, None, {})) == 0
    assert distance(found[0], Update(start, None, {})) > 0


def test_only_the_client_whose_loss_is_not_finite_is_spoilt():
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, [8, 8, 8], local_epochs=2)
    jobs[1].examples.tensors[0][3] = float("inf")
    found = run(jobs, start)
    assert found[1].metrics["loss"] != found[1].metrics["loss"]  # NaN
    assert not torch.isfinite(found[1].tensors["0.weight"]).all()
    for position in (0, 2):
        assert distance(found[position], alone(jobs[position], start)) < 1e-5


def test_data_that_break_the_step_fail_their_own_client_only(caplog):
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, [8, 8, 8])
    jobs[2].examples.tensors[1][0] = 7  # there are three classes
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start)
    assert "3 clients are trained one by one" in caplog.text
    assert isinstance(found[2], IndexError)
    for position in (0, 1):
        assert distance(found[position], alone(jobs[position], start)) == 0


def test_data_of_another_shape_are_a_batch_of_their_own():
    task = Toy(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3)))
    start = start_of(task)
    jobs = jobs_of(task, [8, 8, 8])
    other = jobs_of(task, [8, 8], shape=(2, 3))
    wrong = jobs_of(task, [8], shape=(5,))
    found = run([*jobs, *other, *wrong], start)
    for job, outcome in zip([*jobs, *other], found, strict=False):
        assert distance(outcome, alone(job, start)) < 1e-5
    assert isinstance(found[-1], RuntimeError)


def test_whoever_breaks_the_step_is_kept_apart_from_then_on(caplog):
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, [8, 8, 8])
    jobs[2].examples.tensors[1][-1] = 7
    training = Training()
    run(jobs, start, training)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="secateur"):
        again = run(jobs, start, training)
    assert not caplog.records
    assert isinstance(again[2], IndexError)
    assert distance(again[0], alone(jobs[0], start)) < 1e-5


def test_a_loss_that_is_finite_for_a_batch_alone_counts():
    # An example that is to be ignored has no mean loss of its own: 0 / 0.
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, [9, 8, 8])
    jobs[1].examples.tensors[1][::2] = -100
    found = run(jobs, start)
    assert distance(found[1], alone(jobs[1], start)) == 0
    assert torch.isfinite(found[1].tensors["0.weight"]).all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_recurrent_layers_are_recorded_as_they_are_trained(monkeypatch, caplog):
    monkeypatch.setattr(step, "TRACE_AFTER", 1)
    task = Toy(Recurrent)
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL)
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start)
    assert not caplog.records
    for job, outcome in zip(jobs, found, strict=True):
        assert distance(outcome, alone(job, start)) < 1e-5


def test_out_of_memory_halves_the_chunk_and_goes_on(monkeypatch, caplog):
    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, [8] * 7)
    sizes = []
    train = batched.BatchedTraining.train

    def tight(self, chunk, model, work):
        sizes.append(len(chunk))
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("no room")
        return train(self, chunk, model, work)

    monkeypatch.setattr(batched.BatchedTraining, "train", tight)
    training = Training()
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start, training)
    assert "out of memory with 7 clients at once: going on with 3" in caplog.text
    assert all(distance(o, alone(j, start)) < 1e-5 for o, j in zip(found, jobs, strict=True))
    sizes.clear()
    run(jobs, start, training)
    assert max(sizes) <= 2  # it has learned


def test_a_client_too_large_for_the_memory_is_an_error_of_its_own(monkeypatch):
    def full(self, chunk, model, work):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(batched.BatchedTraining, "train", full)
    task = Toy(mlp)
    found = run(jobs_of(task, [8, 8]), start_of(task))
    assert all(isinstance(outcome, torch.OutOfMemoryError) for outcome in found)


def test_steps_that_cannot_be_recorded_are_computed_in_one_thread(monkeypatch, caplog):
    def fails(function):
        raise RuntimeError("no recording of this")

    task = Toy(mlp)
    start = start_of(task)
    jobs = jobs_of(task, UNEQUAL)
    expected = run(jobs, start)
    monkeypatch.setattr(step, "make_fx", fails)
    monkeypatch.setattr(batched, "MOST_CLIENTS", 2)
    monkeypatch.setattr(Training, "_threads", lambda self: pytest.fail("threads"))
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start, Training(4))
    assert [r.getMessage() for r in caplog.records] == [
        "training steps are not recorded: no recording of this"
    ]
    assert all(distance(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_grows_with_the_chunk_and_not_with_the_clients(workers, monkeypatch):
    monkeypatch.setattr(batched, "MOST_CLIENTS", 2)
    task = Toy(mlp)
    start = start_of(task)
    alive = weakref.WeakSet()
    train = batched.BatchedTraining.train

    class Held:
        """Stands for a chunk's models: it lives as long as they do."""

    def watched(self, chunk, model, work):
        trained = train(self, chunk, model, work)
        trained.stack["0.weight"].held = held = Held()
        alive.add(held)
        return trained

    monkeypatch.setattr(batched.BatchedTraining, "train", watched)
    most = seen = 0
    for outcomes in Training(workers).run(jobs_of(task, [4] * 40), start):
        seen += len(outcomes)
        del outcomes
        most = max(most, len(alive))
    assert seen == 40
    # Of 20 chunks: what each worker makes or has made, and the one at hand.
    assert 1 <= most <= workers + 2


# ---------------------------------------------------------------- one client's fault is its own
def test_one_clients_odd_data_do_not_decide_for_all(caplog):
    task = Toy(Centred)
    start = start_of(task)
    jobs = jobs_of(task, [9, 8, 7])
    jobs[0].examples.tensors[0][0] = float("inf")
    found = run(jobs, start)
    for position in (1, 2):
        assert distance(found[position], alone(jobs[position], start)) == 0
    task = Toy(mlp)
    jobs = jobs_of(task, [9, 8, 7])
    jobs[0].examples.tensors[1][0] = 7  # no such class: the trial goes on with another client
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="secateur"):
        found = run(jobs, start_of(task))
    assert "not trained in batches" not in caplog.text
    assert isinstance(found[0], IndexError)
    assert [isinstance(outcome, Update) for outcome in found] == [False, True, True]


def test_a_trial_with_one_example_is_repeated_when_there_are_more():
    task = Toy(Centred)
    start = start_of(task)
    training = Training()
    run(jobs_of(task, [1, 1]), start, training)
    jobs = jobs_of(task, [9, 8, 7])
    for job, outcome in zip(jobs, run(jobs, start, training), strict=True):
        assert distance(outcome, alone(job, start)) == 0


def test_a_first_client_that_fails_does_not_end_the_others_in_threads():
    def normalised_images():
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3))

    task = Toy(normalised_images)
    start = start_of(task)
    jobs = jobs_of(task, [1, 8, 8], shape=(1, 4, 4))
    found = run(jobs, start, Training(2))
    assert isinstance(found[0], ValueError)
    for position in (1, 2):
        assert distance(found[position], alone(jobs[position], start)) == 0


@pytest.mark.parametrize("workers", [1, 4])
def test_chunks_that_fail_are_mended_in_one_thread(workers, monkeypatch):
    monkeypatch.setattr(batched, "MOST_CLIENTS", 2)
    task = Toy(with_dropout)
    start = start_of(task)
    jobs = jobs_of(task, [8] * 12, local_epochs=2)
    for bad in (1, 4, 7, 8):
        jobs[bad].examples.tensors[1][-1] = 7
    before = torch.random.get_rng_state()
    found = run(jobs, start, Training(workers))
    assert torch.equal(before, torch.random.get_rng_state())
    for position, (job, outcome) in enumerate(zip(jobs, found, strict=True)):
        if position in (1, 4, 7, 8):
            assert isinstance(outcome, IndexError)
        else:
            assert distance(outcome, alone(job, start)) < 1e-5


def test_a_failed_attempt_is_gone_before_the_next(monkeypatch):
    alive = weakref.WeakSet()
    seen = []
    train = batched.BatchedTraining.train

    class Made:
        """Stands for what an attempt had in memory."""

    def tight(self, chunk, model, work):
        seen.append(len(alive))
        made = Made()
        alive.add(made)
        if len(chunk) > 1:
            raise torch.OutOfMemoryError("no room")
        return train(self, chunk, model, work)

    monkeypatch.setattr(batched.BatchedTraining, "train", tight)
    task = Toy(mlp)
    found = run(jobs_of(task, [8] * 4), start_of(task))
    assert seen == [0] * 7  # 4, 2, 1, 1, 2, 1, 1 clients
    assert all(isinstance(outcome, Update) for outcome in found)


def test_a_new_learning_rate_needs_no_new_model_and_old_ones_are_dropped():
    task = Toy(mlp)
    start = start_of(task)
    training = Training()
    for number in range(1, 7):
        jobs = jobs_of(task, [8, 8], learning_rate=0.1 / number, round_=number)
        for job, outcome in zip(jobs, run(jobs, start, training), strict=True):
            assert distance(outcome, alone(job, start)) < 1e-5
    (kept,) = training._batched.values()
    assert len(kept._data) + len(kept._data_before) <= 2  # this round's and the last one's
    for _ in range(6):
        run(jobs_of(Toy(mlp), [4, 4]), start, training)
    assert len(training._batched) <= 4
