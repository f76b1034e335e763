"""What a scenario measures of a model, knowing who attacks and how. No decision ever reads it."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from client.rows import rows_of_class, subset
from client.task.device import choose_device
from client.task.evaluation import accuracy_of, gather, load_state, predict
from client.task.protocol import Examples, Task, server_data, size_of
from server.federation import TEST
from simulation.attacks.client import PoisonedData
from simulation.attacks.poison import stamp
from strategies.recovery import VALIDATION
from unlearning.parameters import Parameters

FORGET, BACKDOOR, FLIP = "forget_accuracy", "backdoor_success", "flip_success"
RETAINED = "retained_accuracy"
ACCURACIES = (TEST, VALIDATION, FORGET, RETAINED)
MEASURES = (*ACCURACIES, BACKDOOR, FLIP)


@dataclass(frozen=True)
class Probe:
    """Inputs, and for each the class whose prediction counts as a hit."""

    examples: Examples
    wanted: Tensor | None = None
    """Shape (n,); the examples' own targets where ``None``."""


@dataclass
class Probes:
    """All measures of one scenario.

    ``test_accuracy`` and ``validation_accuracy`` are the server's; ``forget_accuracy`` is the
    accuracy on what is to be forgotten: clients' training data, with the labels that they trained
    on, the samples themselves, and of a class its test examples; ``retained_accuracy`` is that on
    the test examples of the other classes, where a class is to be forgotten;
    ``backdoor_success`` is the share of triggered test images of other classes predicted as the
    target; ``flip_success`` is the share of flipped training examples predicted as the flipped
    label (``methods`` 8).
    """

    task: Task
    model: nn.Module
    """A scratch pad."""
    device: str
    probes: Mapping[str, Probe] = field(default_factory=dict)

    def hits(self, parameters: Parameters) -> dict[str, Tensor]:
        """Return, per measure, which examples the model hits; bool, shape (n,).

        Measures of a task that does not classify have no hits.
        """
        return {
            name: outputs.argmax(dim=1) == wanted
            for name, outputs, wanted in self._predictions(parameters)
            if outputs.dim() == 2 and not wanted.is_floating_point()
        }

    def measure(
        self, number: int, parameters: Parameters, *, without: Collection[int] = ()
    ) -> dict[str, float | None]:
        """Return every measure; ``None`` where the scenario has no examples for it.

        Accuracies are the task's own, whatever it calls accurate.

        Parameters
        ----------
        without
            Classes that were forgotten. Recovery is judged by validation accuracy, and must not
            wait for them to come back.
        """
        del number
        found: dict[str, float | None] = dict.fromkeys(MEASURES)
        for name, outputs, wanted in self._predictions(parameters):
            if name == VALIDATION and without:
                stays = ~torch.isin(wanted, torch.tensor(sorted(without)))
                outputs, wanted = outputs[stays], wanted[stays]  # noqa: PLW2901
                if not len(wanted):
                    continue
            if name in ACCURACIES:
                found[name] = accuracy_of(self.task.metrics(outputs, wanted))
            elif len(wanted):
                found[name] = float((outputs.argmax(dim=1) == wanted).double().mean())
        return found

    def _predictions(self, parameters: Parameters) -> Iterator[tuple[str, Tensor, Tensor]]:
        load_state(self.model, parameters)
        device = choose_device(self.device)
        for name, probe in self.probes.items():
            outputs, targets = predict(self.model, probe.examples, device=device)
            yield name, outputs, targets if probe.wanted is None else probe.wanted


def build_probes(
    task: Task,
    poisoned: PoisonedData | None,
    clients: int,
    model: nn.Module,
    device: str,
    *,
    forgotten: Sequence[int] | None = None,
    classes: Collection[int] = (),
    samples: Mapping[int, Sequence[int]] | None = None,
) -> Probes:
    """Return the measures for a task and an attack on it, if there is one.

    Parameters
    ----------
    forgotten
        Partitions whose training data belong to the forget set: the attackers' unless told
        otherwise.
    classes
        Whose test examples belong to it.
    samples
        Partition -> rows of its training data that belong to it.
    """
    data = server_data(task)
    probes: dict[str, Probe] = {}
    if data.test is not None:
        probes[TEST] = Probe(data.test)
    if data.validation is not None:
        probes[VALIDATION] = Probe(data.validation)
    if poisoned is not None and poisoned.attackers:
        probes |= _attack_probes(poisoned, clients, data.test)
    culprits = poisoned.attackers if poisoned is not None else ()
    pairs = _trained_on(task, poisoned, clients, culprits if forgotten is None else forgotten)
    for partition, rows in (samples or {}).items():
        pairs.append(gather(subset(task.client_data(partition, clients).train, rows)))
    if classes and data.test is not None:
        gone, kept = _by_class(data.test, classes)
        pairs.append(gather(gone))
        probes[RETAINED] = Probe(kept)
    if pairs := [pair for pair in pairs if len(pair[1])]:
        inputs, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        probes[FORGET] = Probe(TensorDataset(inputs, targets))
    return Probes(task, model, device, probes)


def _by_class(examples: Examples, classes: Collection[int]) -> tuple[Examples, Examples]:
    """Return the examples of some classes, and those of the others."""
    gone = sorted(row for number in set(classes) for row in rows_of_class(examples, number))
    kept = sorted(set(range(size_of(examples))) - set(gone))
    return subset(examples, gone), subset(examples, kept)


def _trained_on(
    task: Task, poisoned: PoisonedData | None, clients: int, partitions: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """Return what some clients train on, poisoned where they attack."""
    found = []
    for partition in partitions:
        if poisoned is not None and partition in poisoned.attackers:
            part = poisoned.poisoned(partition, clients)
            found.append((part.inputs, part.targets))
        else:
            found.append(gather(task.client_data(partition, clients).train))
    return found


def _attack_probes(poisoned: PoisonedData, clients: int, test: Examples | None) -> dict[str, Probe]:
    if poisoned.attack.kind == "label-flip":
        parts = [poisoned.poisoned(partition, clients) for partition in poisoned.attackers]
        inputs = torch.cat([part.inputs[part.rows] for part in parts])
        targets = torch.cat([part.targets[part.rows] for part in parts])
        return {FLIP: Probe(TensorDataset(inputs, targets))}
    if test is None:
        return {}
    images, labels = gather(test)
    target = poisoned.attack.target
    sources = labels != target
    wanted = torch.full((int(sources.sum()),), target)
    return {BACKDOOR: Probe(TensorDataset(stamp(images[sources]), labels[sources]), wanted)}
