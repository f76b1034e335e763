"""Malicious clients: the ordinary client with poisoned data and, if asked for, a boosted update."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from client.app import partition_of, train_reply
from client.task.evaluation import batches
from client.task.protocol import (
    Examples,
    ServerData,
    Split,
    Task,
    TaskOptions,
    load_task,
    server_data,
    size_of,
)
from simulation.attacks.poison import CORNERS, AttackError, Poisoned, backdoor, boost, label_flip
from simulation.attacks.settings import DEFAULT_PAIRS, Attack
from strategies import messages
from unlearning.randomness import generator


@dataclass(frozen=True)
class PoisonedTask:
    """A task whose training data are poisoned; everything else is the task's own."""

    task: Task
    options: TaskOptions
    attack: Attack
    attackers: tuple[int, ...]
    """Partitions of the malicious clients."""

    def build_model(self) -> nn.Module:
        """Return the task's model."""
        return self.task.build_model()

    def client_data(self, partition: int, partitions: int) -> Split:
        """Return the client's data with the training examples poisoned."""
        split = self.task.client_data(partition, partitions)
        poisoned = self.poisoned(partition, partitions)
        return Split(TensorDataset(poisoned.inputs, poisoned.targets), split.test)

    def server_data(self) -> ServerData:
        """Return the task's server data."""
        return self.task.server_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the task's loss."""
        return self.task.loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return the task's metrics."""
        return self.task.metrics(outputs, targets)

    def poisoned(self, partition: int, partitions: int) -> Poisoned:
        """Return one attacker's training data, and which of them are poisoned."""
        inputs, targets = gather(self.task.client_data(partition, partitions).train)
        if targets.is_floating_point() or targets.dim() != 1:
            raise AttackError(f"{self.attack.kind} needs class labels; this task has none")
        own = 0 if self.attack.colluding else self.attackers.index(partition)
        draw = generator(self.options.seed, "poison", partition)
        if self.attack.kind == "backdoor":
            self._check({self.attack.target})
            return backdoor(
                inputs,
                targets,
                share=self.attack.share,
                target=(self.attack.target + own) % self.classes(),
                generator=draw,
                corner=CORNERS[own % len(CORNERS)],
            )
        pairs = self.attack.pairs or DEFAULT_PAIRS.get(self.options.task, ())
        if not pairs:
            raise AttackError(f"task {self.options.task!r} has no default pairs; set attack.pairs")
        self._check({label for pair in pairs for label in pair})
        mine = pairs if self.attack.colluding else (pairs[own % len(pairs)],)
        flipped, rows = label_flip(targets, share=self.attack.share, pairs=mine, generator=draw)
        return Poisoned(inputs, flipped, rows)

    def classes(self) -> int:
        """Return the number of classes, judged by the server's test labels."""
        test = server_data(self.task).test
        if test is None:
            raise AttackError("an attack needs the server's test data to know the classes")
        return int(gather(test)[1].max()) + 1

    def _check(self, labels: set[int]) -> None:
        unknown = sorted(label for label in labels if not 0 <= label < self.classes())
        if unknown:
            raise AttackError(
                f"class {unknown[0]} is to be attacked, and the task's classes are 0 to "
                f"{self.classes() - 1}"
            )


@functools.lru_cache(maxsize=4)
def load_poisoned(options: TaskOptions, attack: Attack, attackers: tuple[int, ...]) -> PoisonedTask:
    """Return the poisoned version of the task that ``options`` names."""
    return PoisonedTask(load_task(options), options, attack, attackers)


@dataclass(frozen=True)
class AttackMod:
    """Flower mod: in rounds in which it is active, an attacker trains on poisoned data."""

    attack: Attack
    attackers: tuple[int, ...]
    config: Mapping[str, Any]
    """Run configuration of the client."""

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer in the attacker's stead, or let the honest client answer."""
        partition, _ = partition_of(context)
        if message.metadata.message_type != messages.TRAIN or partition not in self.attackers:
            return call_next(message, context)
        record = message.content.config_records[messages.CONFIG]
        number = int(record[messages.SERVER_ROUND])  # type: ignore[arg-type]
        if not self.attack.active(self.attackers.index(partition), number):
            return call_next(message, context)
        options = TaskOptions.model_validate(self.config)
        reply = train_reply(
            message,
            context,
            options,
            lambda chosen: load_poisoned(chosen, self.attack, self.attackers),
        )
        return self._boosted(reply, message)

    def _boosted(self, reply: Message, message: Message) -> Message:
        if self.attack.boost == 1:
            return reply
        start = messages.parameters_from(message.content.array_records[messages.ARRAYS])
        model = messages.parameters_from(reply.content.array_records[messages.ARRAYS])
        reply.content[messages.ARRAYS] = messages.record_from(
            boost(model, start, self.attack.boost)
        )
        return reply


def gather(examples: Examples) -> tuple[Tensor, Tensor]:
    """Return all examples as two tensors."""
    if isinstance(examples, TensorDataset):
        inputs, targets = examples.tensors
        return inputs, targets
    parts = list(batches(examples, max(1, size_of(examples)), None))
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])
