"""One model object for client after client: building one takes longer than a small client trains.

Everything that a model keeps in parameters and buffers is set for every client. What a module of
your own keeps elsewhere, in attributes, is shared by the clients that one process runs.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from client.task.evaluation import load_state, state_of
from client.task.protocol import Task
from unlearning.parameters import Parameters

MOST = 4
"""Models kept per thread."""


class Scratch:
    """A task's model, to be set and trained again and again."""

    def __init__(self, task: Task, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            self.model: nn.Module = task.build_model().to(device).train()
        state = self.model.state_dict().keys()
        # Where tensors are, not which: a module may put a new one in the place of a buffer.
        places = dict(_places(self.model))
        self._state = {name: place for name, place in places.items() if name in state}
        self._constants = [
            (place, _at(place).clone()) for name, place in places.items() if name not in state
        ]
        self._plain = self._state.keys() == state

    @torch.no_grad()
    def load(self, parameters: Parameters) -> None:
        """Make the model as if it had just been built with these parameters."""
        same = self._plain and self._state.keys() == parameters.keys()
        if same and all(_at(p).shape == parameters[n].shape for n, p in self._state.items()):
            for name, place in self._state.items():
                _at(place).copy_(parameters[name])
        else:
            load_state(self.model, parameters)
        for place, value in self._constants:
            _at(place).copy_(value)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the model's parameters and buffers on the CPU."""
        if not self._plain:
            return state_of(self.model)
        return {name: _at(place).detach().cpu().clone() for name, place in self._state.items()}


_Place = tuple[dict[str, Tensor | None], str]


def _places(model: nn.Module) -> Iterator[tuple[str, _Place]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    yield f"{prefix}.{key}" if prefix else key, (held, key)


def _at(place: _Place) -> Tensor:
    held, key = place
    return held[key]  # type: ignore[return-value]


_kept = threading.local()
_building = threading.Lock()


def scratch_for(task: Task, device: torch.device) -> Scratch:
    """Return this thread's scratch model of a task."""
    found: list[tuple[Task, torch.device, Scratch]] = _kept.__dict__.setdefault("found", [])
    for kept_task, kept_device, scratch in found:
        if kept_task is task and kept_device == device:
            return scratch
    with _building:  # building draws from torch's own generator, which all threads share
        scratch = Scratch(task, device)
    found.append((task, device, scratch))
    del found[:-MOST]
    return scratch
