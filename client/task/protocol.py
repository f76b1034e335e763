"""What a task is, and how one is found by name.

A task says what is learned: it builds the model, loads data, and defines loss and metrics. Nothing
else in Secateur knows what the model or the data look like. To bring your own, name a callable as
``package.module:object``; it is called with ``TaskOptions`` and returns the task.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from strategies.actions import SELECTIONS, named
from unlearning.errors import SecateurError

Examples = Dataset[Any]
"""Pairs of input and target tensors; it must know its length."""


class TaskError(SecateurError):
    """A task cannot be found, is incomplete, or has no data."""


EVERYTHING = "all"
"""Refuses whatever the server may ask of a client besides training and evaluation."""
REFUSABLE = frozenset({EVERYTHING, *SELECTIONS, *named().values()})


def refused(text: str) -> frozenset[str]:
    """Return what the setting ``refuse`` names."""
    return frozenset(part.strip() for part in text.split(",") if part.strip())


class TaskOptions(BaseModel):
    """What every task and client is told; anything it has no use for it ignores."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    task: str = Field("digits", min_length=1)
    """Name of a built-in task, or ``package.module:object``."""
    model: str = ""
    """Name of a model that the task knows; empty for its default."""
    data_dir: str = ""
    """Folder with the data set; empty to let torchvision download to its cache."""
    examples: int = Field(0, ge=0)
    """Largest number of training examples in the whole federation; 0 for all."""
    server_examples: int = Field(0, ge=0)
    """Training examples that a built-in task gives to the server instead of to any client."""
    partition: Literal["iid", "dirichlet"] = "iid"
    """How a built-in data set is divided among simulated clients."""
    alpha: float = Field(1.0, gt=0)
    """Concentration of the Dirichlet partition: smaller is less alike."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the run: partitions, initial weights, batches, sampling and detection."""
    device: str = Field("auto", min_length=1)
    """``auto`` (CUDA, else MPS, else CPU) or the name of a device."""

    client_dir: str = ""
    """Folder for what a client keeps on its own disk, in which simulated clients have one each;
    empty for nothing. This and what follows a SuperNode's own ``node-config`` may say better."""
    refuse: str = ""
    """What a client does not let itself be asked, with commas: actions such as ``ascend``,
    selections (``class``, ``samples``), or ``all`` forgetting."""
    batch_log: Literal["off", "random", "magnitude", "global", "full"] = "off"
    """What a client logs of each batch's update, for amnesiac unlearning: all of it, or all but
    entries that are drawn, or that are the smallest of their tensor or of all."""
    batch_log_precision: Literal["float16", "float32"] = "float16"
    """Of the log; sums are in the model's own."""
    batch_log_limit: int = Field(4096, ge=0)
    """Megabytes that the logs of one client may take, of all its runs; 0 for no limit. Other runs'
    logs go first, then the oldest rounds, and requests that would need them are refused."""

    @field_validator("refuse")
    @classmethod
    def _check_refuse(cls, text: str) -> str:
        unknown = sorted(refused(text) - REFUSABLE)
        if unknown:
            raise ValueError(
                f"there is no {', '.join(unknown)} to refuse; choose of "
                f"{', '.join(sorted(REFUSABLE))}"
            )
        return text


@dataclass(frozen=True)
class Split:
    """One party's data."""

    train: Examples
    test: Examples


@dataclass(frozen=True)
class ServerData:
    """What the server may measure on, and compute on; ``None`` where it has no data."""

    validation: Examples | None = None
    """Recovery is judged by it."""
    test: Examples | None = None
    """Results are graded on it; nothing is ever decided by it."""
    root: Examples | None = None
    """Few labelled examples that no client holds, for methods that repair a model on the server."""
    unlabelled: Tensor | None = None
    """Inputs alone, shape (n, ...), for methods that distil on the server; those of ``root`` where
    not given."""


@runtime_checkable
class Task(Protocol):
    """What is learned."""

    def build_model(self) -> nn.Module:
        """Return a model with fresh weights, drawn from torch's global generator."""

    def client_data(self, partition: int, partitions: int) -> Split:
        """Return the data of client ``partition`` of ``partitions``.

        A real client ignores both numbers and loads what it has.
        """

    def server_data(self) -> ServerData:
        """Return what the server may measure on."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Return means over a batch; ``accuracy``, in [0, 1], is what recovery is judged by."""


PARTS = ("build_model", "client_data", "server_data", "loss", "metrics")

BUILT_IN = {
    "digits": "client.task.digits:digits",
    "breast-cancer": "client.task.breast_cancer:breast_cancer",
    "mnist": "client.task.images:mnist",
    "fashion-mnist": "client.task.images:fashion_mnist",
    "cifar10": "client.task.images:cifar10",
}
"""Name -> reference, in the same form as a user's own."""


@functools.lru_cache(maxsize=8)
def load_task(options: TaskOptions) -> Task:
    """Return the task that ``options`` names; the same options give the same object.

    Raises
    ------
    TaskError
        If there is no such task, or it lacks a part.
    """
    reference = BUILT_IN.get(options.task, options.task)
    factory = _find(options.task, reference)
    try:
        task: Task = factory(options)
    except SecateurError:
        raise
    except Exception as error:  # the factory is the user's own code
        raise TaskError(f"task {options.task!r} cannot be made: {_named(error)}") from error
    missing = [part for part in PARTS if not callable(getattr(task, part, None))]
    if missing:
        raise TaskError(
            f"task {options.task!r} lacks {', '.join(missing)}; a task must have "
            f"{', '.join(PARTS)} (see client/task/protocol.py)"
        )
    return task


def _find(name: str, reference: str) -> Callable[[TaskOptions], Any]:
    module_name, separator, attribute = reference.partition(":")
    if not separator or not module_name or not attribute:
        raise TaskError(
            f"there is no task {name!r}; built in are {', '.join(BUILT_IN)}, or name your own as "
            "package.module:object"
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # importing a module runs the user's own code
        raise TaskError(f"task {name!r} cannot be loaded: {_named(error)}") from error
    if not callable(found):
        raise TaskError(
            f"task {name!r} is a {type(found).__name__}; it must be callable with TaskOptions and "
            "return a task"
        )
    return found  # type: ignore[no-any-return]


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def server_data(task: Task) -> ServerData:
    """Return what the server may measure on; a task may say ``None`` for nothing."""
    return task.server_data() or ServerData()


def size_of(examples: Examples) -> int:
    """Return how many examples there are."""
    if not isinstance(examples, Sized):
        raise TaskError("a task's data must know its length: define __len__")
    return len(examples)
