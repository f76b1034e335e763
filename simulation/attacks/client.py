"""Malicious clients: the ordinary client with poisoned data and, if asked for, a boosted update.

They too leave out what they were asked to forget: a scenario can mix requests and attacks.
"""

import functools
from dataclasses import dataclass, field, replace

from flwr.app import Context, Message
from torch.utils.data import TensorDataset

from client.app import honest_job
from client.contexts import partition_of, round_of
from client.keeping import Keeping, keeping_of, own_options
from client.rows import subset
from client.task.evaluation import gather
from client.task.protocol import (
    Examples,
    Task,
    TaskOptions,
    load_task,
    server_data,
    size_of,
)
from client.train import Job
from simulation.attacks.poison import CORNERS, AttackError, Poisoned, backdoor, boost, label_flip
from simulation.attacks.settings import DEFAULT_PAIRS, Attack
from unlearning.parameters import Parameters
from unlearning.randomness import generator


@dataclass(frozen=True)
class PoisonedData:
    """What the attackers of one run train on instead of their own data."""

    task: Task
    options: TaskOptions
    attack: Attack
    attackers: tuple[int, ...]
    """Partitions of the malicious clients."""
    _made: dict[tuple[int, int], tuple[Poisoned, TensorDataset]] = field(
        default_factory=dict, init=False, compare=False
    )
    _left: dict[tuple[int, int], tuple[Examples, Examples]] = field(
        default_factory=dict, init=False, compare=False
    )
    """Partition -> what an honest client would train on now, and the attacker's twin of it."""

    def examples(self, partition: int, partitions: int) -> TensorDataset:
        """Return one attacker's training data, the same object every time."""
        return self._both(partition, partitions)[1]

    def allowed(
        self, partition: int, partitions: int, honest: Examples, keeping: Keeping | None
    ) -> Examples:
        """Return one attacker's training data without the rows that it forgot, by their places.

        Forgotten is what the owner of the data knows as a row, not what poisoning makes of it.

        Parameters
        ----------
        honest
            What the honest client would train on. As long as it is the same object, so is the
            result.
        keeping
            What the client keeps, and knows what it forgot by; without, it forgot nothing.
        """
        whole = self.examples(partition, partitions)
        own = self.task.client_data(partition, partitions).train
        if keeping is None or honest is own:
            return whole
        known = self._left.get((partition, partitions))
        if known is None or known[0] is not honest:
            places = keeping.allowed(own)
            left = whole if len(places) == size_of(own) else subset(whole, places)
            known = self._left[partition, partitions] = honest, left
        return known[1]

    def poisoned(self, partition: int, partitions: int) -> Poisoned:
        """Return one attacker's training data, and which of them are poisoned."""
        return self._both(partition, partitions)[0]

    def _both(self, partition: int, partitions: int) -> tuple[Poisoned, TensorDataset]:
        if (partition, partitions) not in self._made:
            made = self._poison(partition, partitions)
            self._made[partition, partitions] = made, TensorDataset(made.inputs, made.targets)
        return self._made[partition, partitions]

    def _poison(self, partition: int, partitions: int) -> Poisoned:
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
def load_poisoned(options: TaskOptions, attack: Attack, attackers: tuple[int, ...]) -> PoisonedData:
    """Return the poisoned data of the task that ``options`` names."""
    return PoisonedData(load_task(options), options, attack, attackers)


@dataclass(frozen=True)
class AttackedJobs:
    """Jobs of a federation in which some clients, in some rounds, train on poisoned data."""

    attack: Attack
    attackers: tuple[int, ...]

    def __call__(self, message: Message, context: Context, options: TaskOptions) -> Job:
        """Return an attacker's job, or the honest one."""
        job = honest_job(message, context, options)
        partition, partitions = partition_of(context)
        if partition not in self.attackers:
            return job
        if not self.attack.active(self.attackers.index(partition), round_of(message)):
            return job
        poisoned = load_poisoned(options, self.attack, self.attackers)
        keeping = keeping_of(own_options(options, context), context)
        examples = poisoned.allowed(partition, partitions, job.examples, keeping)
        return replace(job, examples=examples, finish=self._boosted)

    def _boosted(self, start: Parameters, model: Parameters) -> Parameters:
        return boost(model, start, self.attack.boost)
