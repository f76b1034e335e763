"""A task small enough to check steps by hand: three classes of points, or of images."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from client.forgetting.holding import holding_of
from client.task.evaluation import state_of
from client.task.protocol import ServerData, Split
from strategies.messages import LocalTraining
from unlearning.metrics import accuracy

CPU = torch.device("cpu")
CLASSES = 3


class Small:
    """Images of 1 x 6 x 6 pixels; a class lights up two rows of its own."""

    def __init__(self, make_model=None):
        self._make = make_model or self.cnn

    @staticmethod
    def cnn():
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(54, CLASSES),
        )  # fmt: skip

    @staticmethod
    def mlp():
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, CLASSES))

    def build_model(self):
        return self._make()

    def client_data(self, partition, partitions):
        return Split(images(partition, 60), images(partition + 1000, 15))

    def server_data(self):
        return ServerData(test=images(77, 30))

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": accuracy(outputs.argmax(dim=1), targets) or 0.0}


class Regression(Small):
    """Numbers to predict: no classes, no accuracy."""

    def client_data(self, partition, partitions):
        drawn = images(partition, 20)
        return Split(*[TensorDataset(drawn.tensors[0], drawn.tensors[0].sum(dim=(2, 3)))] * 2)

    def build_model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 1))

    def loss(self, outputs, targets):
        return functional.mse_loss(outputs, targets)

    def metrics(self, outputs, targets):
        return {}


def images(seed, count):
    draw = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    inputs = 0.3 * torch.randn(count, 1, 6, 6, generator=draw)
    for row, target in enumerate(targets.tolist()):
        inputs[row, 0, 2 * target : 2 * target + 2] += 1
    return TensorDataset(inputs, targets)


def made(task, forget=None, *, epochs=8, seed=0):
    """A trained model of the task, and the holding with class 0, or given rows, to forget."""
    from client.train import Job, do

    data = task.client_data(0, 1)
    if forget is None:
        forget = torch.nonzero(data.train.tensors[1] == 0).reshape(-1)
    training = LocalTraining(seed=seed, local_epochs=epochs, batch_size=10, learning_rate=0.1)
    holding = holding_of(task, data, forget, training=training, purpose=(1, 0), device=CPU)
    torch.manual_seed(4)
    start = state_of(task.build_model())
    return do(Job(task, data.train, training, (1, 0), CPU), start)[0], holding


def share(model, holding, rows):
    """Accuracy on rows."""
    with torch.no_grad():
        return float((holding.forward(model, rows[0]).argmax(dim=1) == rows[1]).double().mean())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
