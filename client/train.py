"""Local training in plain PyTorch; no Flower here."""

import torch
from torch import Tensor, nn

from client.task.evaluation import batches
from client.task.protocol import Examples, Task
from strategies.messages import LocalTraining
from unlearning.randomness import derive_seed, generator


def train(
    task: Task,
    model: nn.Module,
    examples: Examples,
    settings: LocalTraining,
    *,
    device: torch.device,
    purpose: tuple[str | int, ...],
) -> dict[str, float]:
    """Train ``model`` in place and return the mean loss of the last epoch.

    Parameters
    ----------
    purpose
        Round and client: with the seed they fix the order of the batches and every dropout mask,
        so the same call always gives the same weights on a CPU.
    """
    start = [parameter.detach().clone().to(device) for parameter in model.parameters()]
    model.to(device).train()
    optimizer = _optimizer(model, settings)
    loss_sum, count = 0.0, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "dropout", *purpose))
        for epoch in range(settings.local_epochs):
            order = generator(settings.seed, "shuffle", *purpose, epoch)
            loss_sum, count = 0.0, 0
            for inputs, targets in batches(examples, settings.batch_size, order):
                optimizer.zero_grad()
                loss = task.loss(model(inputs.to(device)), targets.to(device))
                objective = loss + _proximal(model, start, settings.proximal_mu)
                objective.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                loss_sum += float(loss.detach()) * len(targets)
                count += len(targets)
    return {"loss": loss_sum / count} if count else {}


def _optimizer(model: nn.Module, settings: LocalTraining) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _proximal(model: nn.Module, start: list[Tensor], mu: float) -> Tensor | float:
    """Return FedProx's ``mu / 2 ||w - w_global||^2`` (arXiv:1812.06127, eq. 2)."""
    if mu == 0:
        return 0.0
    return (
        mu
        / 2
        * sum(
            (parameter - origin).square().sum()
            for parameter, origin in zip(model.parameters(), start, strict=True)
        )
    )
