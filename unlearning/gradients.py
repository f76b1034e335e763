"""Gradients of a loss with respect to a model's trained tensors.

No model class is known here; forward and loss are functions, as in ``unlearning.distillation``. A
loss gives the mean over rows, or one number a row: its mean is what counts.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unlearning.distillation import Forward, Loss
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import Parameters, check_finite, norm, trained_names

Learn = Callable[[Parameters, Tensor], tuple[Tensor, Parameters]]
"""Model, inputs of shape (n, ...) -> outputs, and the buffers after them, of a network in training
mode: it normalises by the batch's own statistics, which the running ones take in."""


def check_rows(inputs: Tensor, targets: Tensor) -> None:
    """Raise ``ParametersError`` unless there are as many targets as inputs."""
    if len(inputs) != len(targets):
        raise ParametersError(f"{len(inputs)} inputs cannot go with {len(targets)} targets")


def gradient(
    model: Parameters, forward: Forward, loss: Loss, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return the gradient of the mean loss, one tensor per trained tensor.

    Parameters
    ----------
    inputs, targets
        n rows each, at least one.

    Returns
    -------
    dict
        Name -> gradient of the tensor's shape; zero where the loss does not depend on it.

    Raises
    ------
    ParametersError
        If rows do not match.
    """
    check_rows(inputs, targets)
    leaves = {name: model[name].detach().requires_grad_() for name in trained_names(model)}
    with torch.enable_grad():
        value = loss(forward({**model, **leaves}, inputs), targets).mean()
    found = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def learning_gradient(
    model: Parameters, learn: Learn, loss: Loss, inputs: Tensor, targets: Tensor
) -> tuple[dict[str, Tensor], Parameters]:
    """Return ``gradient`` of a network in training mode, and the buffers that its pass left."""
    buffers: Parameters = {}

    def forward(parameters: Parameters, rows: Tensor) -> Tensor:
        nonlocal buffers
        outputs, buffers = learn(parameters, rows)
        return outputs

    slope = gradient(model, forward, loss, inputs, targets)
    return slope, buffers


def chunked_gradient(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    chunk: int = 256,
) -> dict[str, Tensor]:
    """Return ``gradient`` of rows that need not fit into memory at once.

    Parameters
    ----------
    forward
        Of a network in evaluation mode: batch statistics would tell how rows are divided.
    inputs, targets
        n rows each; without rows the gradient is zero.
    chunk
        Rows at once, at least 1.

    Raises
    ------
    ParametersError
        If rows do not match or the chunk is out of range.
    """
    check_rows(inputs, targets)
    if chunk < 1:
        raise ParametersError(f"a chunk holds at least one row, got {chunk}")
    total = {name: torch.zeros_like(model[name]) for name in trained_names(model)}
    for rows, wanted in zip(torch.split(inputs, chunk), torch.split(targets, chunk), strict=True):
        if len(rows):
            part = gradient(model, forward, loss, rows, wanted)
            for name in total:
                total[name] += part[name] * (len(rows) / len(inputs))
    return total


def row_losses(
    model: Parameters, forward: Forward, loss: Loss, inputs: Tensor, targets: Tensor
) -> Tensor:
    """Return the loss of every row, shape (n,), each as of a batch that holds this row alone.

    Raises
    ------
    ParametersError
        If rows do not match.
    """
    check_rows(inputs, targets)
    if not len(inputs):
        return torch.zeros(0)

    def of_row(output: Tensor, target: Tensor) -> Tensor:
        return loss(output.unsqueeze(0), target.unsqueeze(0)).mean()

    with torch.no_grad():
        found: Tensor = torch.func.vmap(of_row)(forward(model, inputs), targets)
    return found


def clipped(step: Parameters, longest: float) -> dict[str, Tensor]:
    """Return the step, scaled down to the norm ``longest`` (over 0) if it is longer.

    Raises
    ------
    ParametersError
        If the bound is not over 0 or the step holds NaN or Inf.
    """
    if not longest > 0:
        raise ParametersError(f"the bound on a step's norm must be over 0, got {longest}")
    check_finite(step)
    length = norm(step)
    if length <= longest:
        return dict(step)
    return {name: tensor * (longest / length) for name, tensor in step.items()}


def per_sample_gradients(
    model: Parameters, forward: Forward, loss: Loss, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return one gradient a row, each as of a batch that holds this row alone.

    The square of a batch's gradient is not the mean of squares: for that, rows must be apart.

    Parameters
    ----------
    forward
        Of a network in evaluation mode: batch statistics would tie rows together.
    inputs, targets
        n rows each, at least one.

    Returns
    -------
    dict
        Name -> tensor of shape (n, ...), dots being the trained tensor's shape.

    Raises
    ------
    ParametersError
        If rows do not match.
    """
    check_rows(inputs, targets)
    trained = {name: model[name].detach() for name in trained_names(model)}

    def loss_of_row(leaves: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        outputs = forward({**model, **leaves}, row.unsqueeze(0))
        return loss(outputs, target.unsqueeze(0)).mean()

    gradients = torch.func.vmap(torch.func.grad(loss_of_row), in_dims=(None, 0, 0))
    found: dict[str, Tensor] = gradients(trained, inputs, targets)
    return found


def batches(
    inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every row once, ``size`` at a time, in an order drawn from ``generator``.

    Raises
    ------
    ParametersError
        If rows do not match or the size is under 1.
    MissingNeedError
        If there are no rows.
    """
    check_rows(inputs, targets)
    if size < 1:
        raise ParametersError(f"a batch holds at least one row, got a size of {size}")
    if not len(inputs):
        raise MissingNeedError("gradients need at least one row of data, and there are none")
    for rows in torch.split(torch.randperm(len(inputs), generator=generator), size):
        yield inputs[rows], targets[rows]
