"""Local training in plain PyTorch; no Flower here."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from client.scratch import scratch_for
from client.task.evaluation import numbered_batches
from client.task.protocol import Examples, Task, size_of
from strategies.messages import LocalTraining
from unlearning.parameters import Parameters
from unlearning.randomness import derive_seed

Observe = Callable[[int, int, Tensor], None]
"""Called after each step with its epoch and batch, from 0, and the rows that were in it."""
Finish = Callable[[Parameters, Parameters], Parameters]
"""Global model and trained model -> the model that is sent."""


Penalty = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Model in training, inputs and targets of a batch -> what is added to its loss."""


class Log(Protocol):
    """Keeps what the steps of a job changed."""

    def recording(self, job: "Job", model: nn.Module) -> contextlib.AbstractContextManager[Observe]:
        """Observe a model from where it is now; what was seen is kept if all goes well."""


@dataclass(frozen=True, eq=False)
class Job:
    """What one client does in one round.

    Whoever runs clients may look at jobs before they are done, and do many at once.
    """

    task: Task
    """Builds the model and defines the loss."""
    examples: Examples
    settings: LocalTraining
    purpose: tuple[int, int]
    """Round and client: with the seed they fix the order of the batches and every dropout mask."""
    device: torch.device
    finish: Finish | None = None
    """Changes the trained model before it is sent."""
    log: Log | None = None
    """Looks at every step; such a job is done by ``do``, one client at a time."""

    @functools.cached_property
    def num_examples(self) -> int:
        """Return how many examples the client trains on."""
        return size_of(self.examples)

    def sent(self, start: Parameters, model: Parameters) -> Parameters:
        """Return what is sent of a trained model."""
        return model if self.finish is None else self.finish(start, model)


def do(job: Job, start: Parameters, *, draws: bool = True) -> tuple[Parameters, dict[str, float]]:
    """Train from ``start``; return the model to send, on the CPU, and the metrics.

    ``draws`` as for ``train``.
    """
    scratch = scratch_for(job.task, job.device)
    scratch.load(start)
    watched = job.log and job.log.recording(job, scratch.model)
    with watched or contextlib.nullcontext() as observe:
        metrics = train(
            job.task,
            scratch.model,
            job.examples,
            job.settings,
            device=job.device,
            purpose=job.purpose,
            draws=draws,
            observe=observe,
        )
    return job.sent(start, scratch.state()), metrics


def train(
    task: Task,
    model: nn.Module,
    examples: Examples,
    settings: LocalTraining,
    *,
    device: torch.device,
    purpose: tuple[int, int],
    draws: bool = True,
    observe: Observe | None = None,
    penalty: Penalty | None = None,
) -> dict[str, float]:
    """Train ``model``, which is on ``device``, in place; return the mean loss of the last epoch.

    The same call always gives the same weights on a CPU. Without ``draws`` torch's own generator,
    which all threads share, is left alone: for models that draw nothing at random. ``observe`` must
    leave the model as it is. ``penalty`` may change its mode; the loss that is returned is without.
    """
    if not model.training:
        model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start = [p.detach().clone() for p in trainable] if settings.proximal_mu else []
    optimizer = optimizer_for(trainable, settings, purpose[0])
    loss_sum, count = 0.0, 0
    with torch.random.fork_rng(devices=[], enabled=draws):
        if draws:
            seed_dropout(device, derive_seed(settings.seed, "dropout", *purpose))
        for epoch in range(settings.local_epochs):
            order = torch.Generator().manual_seed(order_seed(settings, purpose, epoch))
            loss_sum, count = 0.0, 0
            numbered = numbered_batches(examples, settings.batch_size, order)
            for batch, (rows, inputs, targets) in enumerate(numbered):
                with precision(settings, device):
                    loss = task.loss(model(inputs.to(device)), targets.to(device))
                objective = loss
                if start:
                    objective = loss + proximal(trainable, start, settings.proximal_mu)
                if penalty is not None:
                    objective = objective + penalty(model, inputs, targets)
                    model.train()
                # Half the time of zero_grad and backward, which add to gradients that are there.
                gradients = torch.autograd.grad(objective, trainable, allow_unused=True)
                for parameter, gradient in zip(trainable, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                if observe is not None:
                    observe(epoch, batch, rows)
                size = targets.shape[0]
                loss_sum += loss.item() * size
                count += size
    return {"loss": loss_sum / count} if count else {}


def order_seed(settings: LocalTraining, purpose: tuple[int, int], epoch: int) -> int:
    """Return the seed of the order of a client's examples in one epoch."""
    return derive_seed(settings.seed, "shuffle", *purpose, epoch)


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the generator that dropout on ``device`` draws from.

    ``torch.manual_seed`` would take note of the call for every kind of accelerator, for ever.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


FLOAT32 = contextlib.nullcontext()


def precision(
    settings: LocalTraining, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """Return the context in which losses are computed."""
    if settings.precision == "float32":
        return FLOAT32
    return torch.autocast(device.type, dtype=torch.bfloat16)


def learning_rate(settings: LocalTraining, number: int) -> float:
    """Return the step size of round ``number``."""
    passed = sum(number > milestone for milestone in settings.milestones)
    return settings.learning_rate * settings.learning_rate_factor**passed


def optimizer_for(
    parameters: Sequence[Tensor], settings: LocalTraining, number: int
) -> torch.optim.Optimizer:
    """Return a fresh optimizer for round ``number``."""
    shared: dict[str, Any] = {
        "lr": learning_rate(settings, number),
        "weight_decay": settings.weight_decay,
        # Said outright on a CPU, where torch would look at every tensor in every step to decide.
        "foreach": False if all(p.device.type == "cpu" for p in parameters) else None,
    }
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, **shared)
    return torch.optim.SGD(parameters, momentum=settings.momentum, **shared)


def proximal(parameters: Sequence[Tensor], start: Sequence[Tensor], mu: float) -> Tensor:
    """Return FedProx's ``mu / 2 ||w - w_global||^2`` (arXiv:1812.06127, eq. 2)."""
    pairs = zip(parameters, start, strict=True)
    return mu / 2 * torch.stack([(p - origin).square().sum() for p, origin in pairs]).sum()
