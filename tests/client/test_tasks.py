"""Tasks: the protocol, the built-in ones, partitions, and local training."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from client.task import models
from client.task.classification import held_out
from client.task.device import choose_device
from client.task.evaluation import batches, evaluate, gather, load_state, predict, state_of
from client.task.partition import partition_indices
from client.task.protocol import PARTS, ServerData, Split, Task, TaskError, TaskOptions, load_task
from client.task.tables import installed_table
from client.train import train
from strategies.messages import LocalTraining
from unlearning.errors import SecateurError

CPU = torch.device("cpu")


def labels(count=600, classes=6):
    return torch.arange(count) % classes


# ---------------------------------------------------------------- reading data
class Listed(Dataset):
    """Rows of a shape and a dtype of their own, in no tensor; how often they are read."""

    def __init__(self, count):
        self.count, self.read = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.read += 1
        return torch.full((2, 3), float(row), dtype=torch.float64), row


def test_no_rows_of_any_data_set_have_the_shape_and_dtype_of_the_others():
    data = Listed(5)
    for part in (Subset(data, []), Subset(Subset(data, [3, 4]), []), Subset(Subset(data, []), [])):
        inputs, targets = gather(part)
        assert (inputs.shape, inputs.dtype) == ((0, 2, 3), torch.float64)
        assert (targets.shape, targets.dtype) == ((0,), torch.int64)
    assert data.read == 3  # one row each, not all
    for nothing in (Listed(0), Subset(Listed(0), [])):
        assert [tensor.shape for tensor in gather(nothing)] == [(0,), (0,)]
    inputs, targets = gather(Subset(data, [4, 1]))
    assert (inputs[:, 0, 0].tolist(), targets.tolist()) == ([4, 1], [4, 1])


# ---------------------------------------------------------------- finding a task
@pytest.mark.parametrize("name", ["digits", "breast-cancer"])
def test_embedded_tasks_are_complete_and_their_parts_are_disjoint(name):
    task = load_task(TaskOptions(task=name))
    assert isinstance(task, Task)
    rows = []
    for partition in range(5):
        split = task.client_data(partition, 5)
        rows += [split.train.tensors[0], split.test.tensors[0]]
    data = task.server_data()
    rows += [data.validation.tensors[0], data.test.tensors[0]]
    together = torch.cat(rows).flatten(1)
    assert len(together) == {"digits": 1797, "breast-cancer": 569}[name]
    # scikit-learn's digits hold no duplicates, nor does the other: every row appears once.
    assert len(torch.unique(together, dim=0)) == len(together)


def test_the_embedded_tables_are_those_that_scikit_learn_loads():
    from sklearn.datasets import load_breast_cancer, load_digits

    for name, header, load in (
        ("digits.csv.gz", False, load_digits),
        ("breast_cancer.csv", True, load_breast_cancer),
    ):
        table, theirs = installed_table(name, header=header), load()
        assert (table[:, :-1] == theirs.data).all()
        assert (table[:, -1] == theirs.target).all()


def test_a_table_that_is_not_installed_is_told(monkeypatch):
    with pytest.raises(TaskError, match=r"scikit-learn's wine\.csv is not in .*sklearn; install"):
        installed_table("wine.csv", header=True)
    monkeypatch.setattr("client.task.tables.find_spec", lambda name: None)
    with pytest.raises(TaskError, match="is not installed; install scikit-learn again"):
        installed_table("digits.csv.gz", header=False)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nosuch", "there is no task 'nosuch'; built in are digits"),
        ("nosuch:task", "cannot be loaded"),
        ("client.task.models:nosuch", "cannot be loaded"),
        ("client.task.models:MODELS", "is a dict; it must be callable"),
        ("builtins:dict", f"lacks {', '.join(PARTS)}"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_by_name(reference, message):
    with pytest.raises(TaskError, match=message):
        load_task(TaskOptions(task=reference))


class Line(Dataset):
    """y = 2 x, as a data set that is no TensorDataset."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        return torch.tensor([index / 20.0]), torch.tensor([index / 10.0])


class Regression:
    """A task without classes, images or accuracy."""

    def build_model(self):
        return nn.Linear(1, 1)

    def client_data(self, partition, partitions):
        return Split(Line(), Line())

    def server_data(self):
        return ServerData()

    def loss(self, outputs, targets):
        return (outputs - targets).square().mean()

    def metrics(self, outputs, targets):
        return {}


def test_a_task_of_ones_own_needs_neither_images_nor_classes():
    task, settings = Regression(), LocalTraining(local_epochs=60, batch_size=5, learning_rate=0.5)
    model = task.build_model()
    metrics = train(task, model, Line(), settings, device=CPU, purpose=(1, 0))
    assert metrics["loss"] < 1e-3
    assert float(model.weight) == pytest.approx(2, abs=0.1)
    assert evaluate(task, model, Line(), device=CPU).keys() == {"loss"}


class Rated(Regression):
    def __init__(self, accuracy):
        self.accuracy = accuracy

    def server_data(self):
        return ServerData(None, Line())

    def metrics(self, outputs, targets):
        return {"accuracy": self.accuracy}


def test_measures_are_the_tasks_own_and_a_task_without_accuracy_has_none():
    from simulation.probes import build_probes

    def measured(task):
        model = task.build_model()
        probes = build_probes(task, None, 3, model, "cpu")
        return probes.measure(1, state_of(model)), probes.hits(state_of(model))

    measures, hits = measured(Rated(0.25))
    assert measures["test_accuracy"] == 0.25
    assert measures["validation_accuracy"] is None
    assert hits == {}
    with pytest.raises(TaskError, match="'accuracy' is 85; it must lie in"):
        measured(Rated(85.0))

    class Silent(Rated):
        def metrics(self, outputs, targets):
            return {"rmse": 3.0}

    class Nothing(Rated):
        def server_data(self):
            return None

    assert measured(Silent(0))[0]["test_accuracy"] is None
    assert set(measured(Nothing(0))[0].values()) == {None}


# ---------------------------------------------------------------- partitions
@pytest.mark.parametrize(("scheme", "alpha"), [("iid", 1.0), ("dirichlet", 0.3)])
def test_partitions_hold_every_row_once_and_follow_the_seed(scheme, alpha):
    def parts(seed):
        return partition_indices(labels(), 5, scheme=scheme, alpha=alpha, seed=seed)

    first = parts(1)
    assert torch.equal(torch.cat(first).sort().values, torch.arange(600))
    assert all(torch.equal(a, b) for a, b in zip(first, parts(1), strict=True))
    assert not all(
        len(a) == len(b) and torch.equal(a, b) for a, b in zip(first, parts(2), strict=True)
    )


def test_a_small_alpha_makes_clients_differ():
    def largest_share(alpha):
        parts = partition_indices(labels(), 5, scheme="dirichlet", alpha=alpha, seed=3)
        shares = [labels()[part].bincount(minlength=6).max() / len(part) for part in parts]
        return max(float(share) for share in shares)

    assert largest_share(0.1) > 0.5 > largest_share(1000.0)


def test_iid_parts_are_alike_in_size_and_classes():
    for part in partition_indices(labels(), 5, scheme="iid", alpha=1.0, seed=0):
        assert len(part) == 120
        assert labels()[part].bincount(minlength=6).min() > 8  # 20 expected of each class


@pytest.mark.parametrize(
    ("rows", "partitions"), [(600, 5), (601, 7), (29, 3), (1000, 500), (57, 1), (23, 11)]
)
def test_iid_parts_are_those_of_flwr_datasets(rows, partitions):
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    # One part is all rows in their shuffled order, which the partitioner then cuts.
    (order,) = partition_indices(labels(rows), 1, scheme="iid", alpha=1.0, seed=4)
    partitioner = IidPartitioner(num_partitions=partitions)
    partitioner.dataset = Dataset.from_dict({"row": order.tolist()})
    theirs = [list(partitioner.load_partition(number)["row"]) for number in range(partitions)]
    ours = partition_indices(labels(rows), partitions, scheme="iid", alpha=1.0, seed=4)
    assert [part.tolist() for part in ours] == theirs
    assert all(part.dtype == torch.int64 for part in ours)


def test_ten_thousand_clients_share_a_small_data_set():
    parts = partition_indices(labels(57_000, 10), 10_000, scheme="iid", alpha=1.0, seed=0)
    assert {len(part) for part in parts} == {5, 6}
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(57_000))


@pytest.mark.parametrize(("scheme", "least"), [("iid", 2), ("dirichlet", 10)])
def test_too_many_clients_for_the_data_are_refused(scheme, least):
    too_many = 600 // least + 1
    fault = f"600 training examples are too few for {too_many} clients: each needs {least}"
    with pytest.raises(TaskError, match=fault):
        partition_indices(labels(), too_many, scheme=scheme, alpha=1.0, seed=0)
    if scheme == "iid":
        assert len(partition_indices(labels(), 300, scheme=scheme, alpha=1.0, seed=0)) == 300


def test_a_client_with_few_examples_can_still_train_and_test():
    task = load_task(TaskOptions(task="digits", examples=20))
    splits = [task.client_data(partition, 10) for partition in range(10)]
    assert {(len(split.train), len(split.test)) for split in splits} == {(1, 1)}
    usual = load_task(TaskOptions(task="digits", examples=300)).client_data(0, 10)
    assert (len(usual.train), len(usual.test)) == (27, 3)


def test_held_out_data_do_not_depend_on_the_seed_and_are_balanced():
    inputs = torch.randn(600, 2)
    kept, out = held_out(inputs, labels(), share=0.2, purpose="test")
    assert labels()[out].bincount().tolist() == [20] * 6
    assert torch.equal(torch.cat([kept, out]).sort().values, torch.arange(600))
    again = held_out(inputs, labels(), share=0.2, purpose="test")
    assert torch.equal(out, again[1])


# ---------------------------------------------------------------- models
@pytest.mark.parametrize(
    ("name", "shape"),
    [("mlp", (1, 8, 8)), ("cnn", (1, 8, 8)), ("lenet", (1, 28, 28)), ("lenet", (3, 32, 32)),
     ("resnet18", (3, 32, 32)), ("mlp", (30,)), ("mlp-128-64", (1, 8, 8))],
)  # fmt: skip
def test_models_give_one_output_per_class_and_keep_constants_out_of_their_state(name, shape):
    model = models.build(name, shape, 7, mean=[0.5] * shape[0], deviation=[2.0] * shape[0])
    assert model.eval()(torch.rand(2, *shape)).shape == (2, 7)
    assert not [key for key in model.state_dict() if key.startswith("0.")]


def test_resnet_has_a_stem_for_small_images():
    model = models.resnet((3, 32, 32), 10)
    assert model.conv1.kernel_size == (3, 3)
    assert model.conv1.stride == (1, 1)
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


def test_a_multilayer_perceptron_has_the_widths_in_its_name():
    model = models.build("mlp-128-64", (1, 8, 8), 10, mean=[0.0], deviation=[1.0])
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert shapes == [(128, 64), (64, 128), (10, 64)]


@pytest.mark.parametrize("name", ["vgg", "cnn-3", "mlp-0", "mlp-many", "mlp-"])
def test_an_unknown_model_is_refused(name):
    with pytest.raises(TaskError, match=f"there is no model '{name}'"):
        models.build(name, (1, 8, 8), 10, mean=[0], deviation=[1])


def test_a_model_for_images_needs_images():
    with pytest.raises(TaskError, match="needs images"):
        models.build("cnn", (30,), 2, mean=[0.0] * 30, deviation=[1.0] * 30)


def test_prunable_layers_are_linear_and_convolutional():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Embedding(3, 4), nn.Linear(4, 2),
        nn.ConvTranspose2d(2, 1, 3),
    )  # fmt: skip
    assert models.prunable_layers(model) == ("0.weight", "3.weight", "4.weight")


# ---------------------------------------------------------------- training
def toy():
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 4, generator=draw)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


class Toy(Regression):
    def build_model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)


def trained(purpose=(1, 2), **settings):
    model = Toy().build_model()
    train(
        Toy(), model, toy(), LocalTraining(local_epochs=2, **settings), device=CPU, purpose=purpose
    )
    return state_of(model)


def test_training_follows_seed_round_and_client_bit_for_bit():
    torch.manual_seed(123)
    first = trained()
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), trained().values(), strict=True))
    for other in ({"purpose": (2, 2)}, {"purpose": (1, 3)}, {"seed": 1}):
        assert not torch.equal(first["0.weight"], trained(**other)["0.weight"])


def test_the_proximal_term_pulls_towards_the_global_model():
    start = state_of(Toy().build_model())

    def moved(mu):
        after = trained(proximal_mu=mu, learning_rate=0.1)
        return sum(float((after[key] - start[key]).square().sum()) for key in start)

    assert moved(5.0) < moved(0.0) / 2


def test_two_proximal_sgd_steps_by_hand():
    # As in the next test, with mu = 2, from w = b = 0. Step 1: the pull is 0, gradient -6, both
    # become .6. Step 2: gradient 2 (1.2 - 3) + mu .6 = -3.6 + 1.2 = -2.4, both become .84.
    model = nn.Linear(1, 1)
    load_state(model, {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
    data = TensorDataset(torch.ones(1, 1), torch.full((1, 1), 3.0))
    settings = LocalTraining(local_epochs=2, batch_size=1, learning_rate=0.1, proximal_mu=2.0)
    train(Regression(), model, data, settings, device=CPU, purpose=(1, 0))
    assert float(model.weight) == pytest.approx(0.84)
    assert float(model.bias) == pytest.approx(0.84)


def test_one_sgd_step_by_hand():
    # One example x = 1, y = 3 on y = w x + b from w = b = 0: loss (w + b - 3)^2, gradient -6 in
    # both. With a step of .1 both become .6.
    model = nn.Linear(1, 1)
    load_state(model, {"weight": torch.zeros(1, 1), "bias": torch.zeros(1)})
    data = TensorDataset(torch.ones(1, 1), torch.full((1, 1), 3.0))
    settings = LocalTraining(local_epochs=1, batch_size=1, learning_rate=0.1)
    train(Regression(), model, data, settings, device=CPU, purpose=(1, 0))
    assert float(model.weight) == pytest.approx(0.6)
    assert float(model.bias) == pytest.approx(0.6)


def test_batches_hold_every_example_once_in_a_seeded_order():
    data = TensorDataset(torch.arange(10.0).unsqueeze(1), torch.arange(10))

    def order(seed):
        parts = batches(data, 4, torch.Generator().manual_seed(seed))
        return torch.cat([targets for _, targets in parts]).tolist()

    assert sorted(order(1)) == list(range(10))
    assert order(1) == order(1) != order(2)
    assert [len(t) for _, t in batches(data, 4, None)] == [4, 4, 2]


def test_every_epoch_has_an_order_of_its_own():
    seen = []

    class Watching(Toy):
        def loss(self, outputs, targets):
            seen.append(targets.tolist())
            return super().loss(outputs, targets % 2)

    data = TensorDataset(toy().tensors[0], torch.arange(60))
    settings = LocalTraining(local_epochs=2, batch_size=60)
    train(Watching(), Toy().build_model(), data, settings, device=CPU, purpose=(1, 0))
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(60))
    assert seen[0] != seen[1]


def test_a_model_that_does_not_fit_its_data_is_told_in_one_line():
    model, data = nn.Linear(5, 2), TensorDataset(torch.zeros(3, 4), torch.zeros(3).long())
    with pytest.raises(TaskError, match=r"model fails on inputs of shape \(3, 4\): RuntimeError"):
        predict(model, data, device=torch.device("cpu"))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SecateurError, match="device 'cuda:99' is not available here"):
        choose_device("cuda:99")
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in {"cpu", "cuda", "mps"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_training_on_a_gpu_is_close_to_the_cpu():
    model = Toy().build_model().to("cuda")
    settings = LocalTraining(local_epochs=2)
    train(Toy(), model, toy(), settings, device=torch.device("cuda"), purpose=(1, 2))
    assert all(tensor.device.type == "cpu" for tensor in state_of(model).values())


def test_the_servers_own_examples_are_nobody_elses():
    plain = load_task(TaskOptions(task="digits"))
    given = load_task(TaskOptions(task="digits", server_examples=100))
    root = given.server_data().root
    assert plain.server_data().root is None
    assert len(root) == 100
    held = [given.client_data(k, 5) for k in range(5)]
    images = torch.cat([part.tensors[0] for split in held for part in (split.train, split.test)])
    assert len(images) + 100 == len(plain.targets)
    everything = torch.cat([images, root.tensors[0]]).flatten(1)
    assert torch.equal(
        everything.sum(dim=0), plain.inputs.flatten(1).sum(dim=0)
    )  # pixels are multiples of 1/16, so sums are exact in any order
    assert not set(given.server_data().test.tensors) & set(root.tensors)
    with pytest.raises(TaskError, match="server-examples = 5000, and there are 1"):
        load_task(TaskOptions(task="digits", server_examples=5000)).server_data()
