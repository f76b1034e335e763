"""Every contender does the same work: data, initial weights, model, and the first round."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import contenders, plain
from benchmarks.workloads import WORKLOADS, export
from client.task import models
from client.task.protocol import load_task
from server.federation import initial_model
from strategies.directory import by_partition
from strategies.loop import run_rounds
from strategies.wrapper import Unlearning
from unlearning.randomness import generator

ROOT = Path(__file__).resolve().parents[2]


def exported(name, folder):
    export(WORKLOADS[name], folder / "work.npz")
    settings = WORKLOADS[name].settings()
    return plain.read(folder / "work.npz"), settings, load_task(settings.task_options())


@pytest.mark.parametrize("name", ["digits-10", "clients-30"])
def test_the_file_holds_what_secateurs_clients_and_server_get(name, tmp_path):
    work, _, task = exported(name, tmp_path)
    count = WORKLOADS[name].clients
    assert len(work.clients) == count
    for number, examples in enumerate(work.clients):
        theirs = task.client_data(number, count).train.tensors
        assert all(map(torch.equal, examples, theirs))
    data = task.server_data()
    assert all(map(torch.equal, work.validation, data.validation.tensors))
    assert all(map(torch.equal, work.test, data.test.tensors))


def test_the_rebuilt_model_is_secateurs(tmp_path):
    work, settings, task = exported("digits-10", tmp_path)
    theirs, ours = initial_model(task, settings.seed), plain.build_model(work)
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    assert torch.equal(ours(work.test[0]), theirs(work.test[0]))


@pytest.mark.parametrize(
    ("name", "shape"), [("lenet", (1, 28, 28)), ("lenet", (3, 32, 32)), ("resnet18", (3, 32, 32))]
)
def test_rebuilt_image_models_are_secateurs(name, shape):
    mean, deviation = [0.5] * shape[0], [0.25] * shape[0]
    theirs = models.build(name, shape, 10, mean=mean, deviation=deviation).eval()
    constants = {"mean": theirs[0].mean.tolist(), "deviation": theirs[0].deviation.tolist()}
    meta = {"model": name, "shape": shape, "classes": 10, **constants}
    nothing = (torch.empty(0), torch.empty(0))
    work = plain.Work(meta, [], nothing, nothing, theirs.state_dict())
    inputs = torch.rand(2, *shape)
    assert torch.equal(plain.build_model(work).eval()(inputs), theirs(inputs))


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_the_plain_loops_round_is_secateurs_round(tmp_path, engine):
    work, settings, _ = exported("digits-10", tmp_path)
    count = len(work.clients)
    # The streams that Secateur's clients shuffle with, in the first epoch of the first round.
    orders = [generator(settings.seed, "shuffle", 1, number, 0) for number in range(count)]
    plain_model = plain.federated_round(plain.build_model(work), work.weights, work, orders)

    federation = Unlearning(contenders.FedAvg(fraction_evaluate=0.0), identify=by_partition, seed=0)
    grid = contenders.make_grid(engine, contenders.client_app(settings), count, settings)
    model = run_rounds(
        federation, grid, dict(work.weights), rounds=1, train_config=settings.to_record()
    )
    for name, tensor in model.items():
        torch.testing.assert_close(plain_model[name], tensor)


def test_places_on_the_axis_of_model_size_are_numbers_of_parameters():
    for name, workload in WORKLOADS.items():
        if workload.family == "size":
            widths = [int(width) for width in re.findall(r"\d+", name)]
            network = models.mlp((1, 8, 8), 10, widths)
            assert workload.at == sum(p.numel() for p in network.parameters())


def test_pfl_research_runs_on_the_same_libraries():
    def pins(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if "==" in line)

    theirs = pins(ROOT / "benchmarks/pfl_research/requirements.txt")
    ours = pins(ROOT / "constraints.txt")
    for package in ("torch", "torchvision", "numpy"):
        assert theirs[package] == ours[package]
