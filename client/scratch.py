"""One model object for client after client: building one takes longer than a small client trains.

Everything that a model keeps in parameters and buffers is set for every client. What a module of
your own keeps elsewhere, in attributes, is shared by the clients that one process runs.
"""

import threading

import torch
from torch import nn

from client.task.evaluation import load_state
from client.task.protocol import Task
from unlearning.parameters import Parameters

MOST = 4
"""Models kept per thread; a simulation knows two tasks at most, the honest and the poisoned."""


class Scratch:
    """A task's model, to be set and trained again and again."""

    def __init__(self, task: Task, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            self.model: nn.Module = task.build_model().to(device)
        state = self.model.state_dict()
        self._constants = {
            name: buffer.clone() for name, buffer in self.model.named_buffers() if name not in state
        }

    def load(self, parameters: Parameters) -> None:
        """Make the model as if it had just been built with these parameters."""
        load_state(self.model, parameters)
        for name, value in self._constants.items():
            self.model.get_buffer(name).copy_(value)


_kept = threading.local()


def scratch_for(task: Task, device: torch.device) -> Scratch:
    """Return this thread's scratch model of a task."""
    found: list[tuple[Task, torch.device, Scratch]] = _kept.__dict__.setdefault("found", [])
    for kept_task, kept_device, scratch in found:
        if kept_task is task and kept_device == device:
            return scratch
    scratch = Scratch(task, device)
    found.append((task, device, scratch))
    del found[:-MOST]
    return scratch
