"""What clients do in a round, as far as doing it for many at once is concerned.

Plain training (``client.train``), or a round of FFMU (``client.forgetting.ffmu``), whose steps are
quantised and which sends the gradients that it met.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from client import train
from client.forgetting import ffmu as client_ffmu
from client.train import Job
from simulation.engines.step import NotBatchableError
from strategies.actions import Ffmu
from strategies.messages import LocalTraining
from unlearning import ffmu, pcmu
from unlearning.parameters import Parameters


class Optimizer(Protocol):
    """Moves tensors along their ``grad``; what it remembers of each has the tensor's shape."""

    state: Any

    def step(self) -> Any:
        """Move all tensors once."""


class Work(Protocol):
    """What clients do; equal where they do the same."""

    @property
    def at_once(self) -> bool:
        """Whether rows of several clients can simply be computed together, by ``together``."""

    def together(
        self, jobs: Sequence[Job], start: Parameters
    ) -> list[tuple[Parameters, dict[str, float]]]:
        """Do it for several clients whose data are alike, where ``at_once`` says so."""

    def check(self, job: Job) -> None:
        """Raise ``NotBatchableError`` if a client does it otherwise than others."""

    def alone(
        self, job: Job, start: Parameters, *, draws: bool
    ) -> tuple[Parameters, dict[str, float]]:
        """Do it as the client itself would."""

    def proximal_mu(self, settings: LocalTraining) -> float:
        """Return how strongly tensors are pulled to where they started."""

    def optimizer(
        self, tensors: Sequence[Tensor], settings: LocalTraining, number: int
    ) -> Optimizer:
        """Return what makes the steps of a round."""

    def made(self, optimizer: Optimizer, tensor: Tensor, steps: int) -> Tensor:
        """Return what has become of a stack after so many steps, in its shape."""

    def sent(self, origin: Parameters, made: Parameters) -> Parameters:
        """Return what clients send, given the stacks that ``made`` returned, in their shapes."""

    def told(self, losses: list[float], sent: Parameters) -> list[float]:
        """Return the losses that clients tell; NaN of one that would raise instead."""


@dataclass(frozen=True)
class PlainTraining:
    """Plain training: models are sent."""

    at_once: ClassVar[bool] = False

    def together(
        self, jobs: Sequence[Job], start: Parameters
    ) -> list[tuple[Parameters, dict[str, float]]]:
        """Not here: steps follow on one another."""
        raise NotImplementedError

    def check(self, job: Job) -> None:
        """Raise if the client logs its batches."""
        if job.log is not None:
            raise NotBatchableError("a batch log looks at every step of each client")

    def alone(
        self, job: Job, start: Parameters, *, draws: bool
    ) -> tuple[Parameters, dict[str, float]]:
        """Train."""
        return train.do(job, start, draws=draws)

    def proximal_mu(self, settings: LocalTraining) -> float:
        """Return FedProx's."""
        return settings.proximal_mu

    def optimizer(
        self, tensors: Sequence[Tensor], settings: LocalTraining, number: int
    ) -> Optimizer:
        """Return that of the settings."""
        return train.optimizer_for(tensors, settings, number)

    def made(self, optimizer: Optimizer, tensor: Tensor, steps: int) -> Tensor:
        """Return the model."""
        del optimizer, steps
        return tensor

    def sent(self, origin: Parameters, made: Parameters) -> Parameters:
        """Return the model."""
        del origin
        return made

    def told(self, losses: list[float], sent: Parameters) -> list[float]:
        """Return the losses."""
        del sent
        return losses


PLAIN = PlainTraining()


@dataclass(frozen=True)
class FfmuRound:
    """A round of FFMU: gradients are sent, or, of FFMU-N, models."""

    asked: Ffmu

    @property
    def at_once(self) -> bool:
        """Whether there are no steps, but one gradient of all rows at the global model."""
        return self.asked.local == "full"

    def together(
        self, jobs: Sequence[Job], start: Parameters
    ) -> list[tuple[Parameters, dict[str, float]]]:
        """Compute the gradients of all clients' rows."""
        return client_ffmu.at_once(jobs, start, self.asked)

    def check(self, job: Job) -> None:
        """Raise if noise is drawn, or losses were computed in another precision than here."""
        if self.asked.mode == "sample":
            raise NotBatchableError("every client draws noise of its own for its steps")
        if job.settings.precision != "float32":
            raise NotBatchableError("FFMU computes in float32 whatever the precision")

    def alone(
        self, job: Job, start: Parameters, *, draws: bool
    ) -> tuple[Parameters, dict[str, float]]:
        """Play the round."""
        return client_ffmu.do(job, start, self.asked, draws=draws)

    def proximal_mu(self, settings: LocalTraining) -> float:
        """Return 0: there is no pull."""
        del settings
        return 0.0

    def optimizer(
        self, tensors: Sequence[Tensor], settings: LocalTraining, number: int
    ) -> Optimizer:
        """Return what makes quantised steps."""
        del settings, number
        return _Quantised(tensors, self.asked)

    def made(self, optimizer: Optimizer, tensor: Tensor, steps: int) -> Tensor:
        """Return the mean of the gradients on the way, or where it led; not finite if they are."""
        total: Tensor = optimizer.state[tensor]["total"]
        if self.asked.models:  # a gradient that is no number moves nothing, and must not pass
            return torch.where(torch.isfinite(total), tensor, math.nan)
        return total / steps

    def sent(self, origin: Parameters, made: Parameters) -> Parameters:
        """Return ``w - Gbar``, or the model."""
        if self.asked.models:
            return made
        return ffmu.as_model(origin, made)

    def told(self, losses: list[float], sent: Parameters) -> list[float]:
        """Return the losses, but NaN where what is sent is not finite."""
        finite = torch.stack([torch.isfinite(t).flatten(1).all(dim=1) for t in sent.values()])
        pairs = zip(losses, finite.all(dim=0).tolist(), strict=True)
        return [loss if whole else math.nan for loss, whole in pairs]


class _Quantised:
    """Steps of ``unlearning.pcmu.step`` for stacks of models, and the sum of their gradients."""

    def __init__(self, tensors: Sequence[Tensor], asked: Ffmu) -> None:
        self._rate, self._quantiser = asked.ffmu_rate, asked.quantiser
        self.state: dict[Tensor, dict[str, Tensor]] = {
            tensor: {"total": torch.zeros_like(tensor)} for tensor in tensors
        }

    def step(self) -> None:
        for tensor, kept in self.state.items():
            if tensor.grad is not None:
                kept["total"] += tensor.grad
                tensor.sub_(self._rate * pcmu.direction(tensor.grad, self._quantiser))
