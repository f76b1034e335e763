"""Put together what a step computes with, from a task and its data."""

import dataclasses

import torch
from torch import Tensor

from client.forgetting.interface import Holding, Rows
from client.scratch import scratch_for
from client.task.evaluation import forward_of, gather, learn_of
from client.task.models import trained_tensors
from client.task.protocol import Split, Task
from strategies.messages import LocalTraining
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.label_flip import check_classes
from unlearning.parameters import Parameters, trained_names, trained_part


def holding_of(
    task: Task,
    data: Split,
    forget: Tensor,
    *,
    training: LocalTraining,
    purpose: tuple[int, int],
    device: torch.device,
) -> Holding:
    """Return what one data holder computes with.

    Parameters
    ----------
    data
        What the holder has; nothing of ``test`` is ever trained on.
    forget
        Numbers of the rows of ``data.train`` to forget, each once; the others remain.
    training
        How the holder trains, with the seed.
    purpose
        Round and client.

    Raises
    ------
    ParametersError
        If there is no such row, or one is named twice.
    """
    inputs, targets = gather(data.train)
    chosen = torch.zeros(len(inputs), dtype=torch.bool)
    outside = [row for row in forget.tolist() if not 0 <= row < len(inputs)]
    if outside:
        raise ParametersError(
            f"rows are numbered from 0 to {len(inputs) - 1}, and there is no row {outside[0]}"
        )
    chosen[forget] = True
    if int(chosen.sum()) < len(forget):
        raise ParametersError("a row can be forgotten once only, and one is named twice")
    return holding_with(
        task,
        (inputs[chosen], targets[chosen]),
        (inputs[~chosen], targets[~chosen]),
        gather(data.test),
        training=training,
        purpose=purpose,
        device=device,
    )


def holding_with(
    task: Task,
    forget: Rows,
    remain: Rows,
    test: Rows,
    *,
    training: LocalTraining,
    purpose: tuple[int, int],
    device: torch.device,
) -> Holding:
    """Return the same of rows that are apart already."""
    network = scratch_for(task, device).model
    forward, learn = forward_of(network, device), learn_of(network, device)
    return Holding(
        task, forward, learn, task.loss, forget, remain, test, training, purpose, device,
        trained_tensors(network),
    )  # fmt: skip


def moving(model: Parameters, holding: Holding) -> tuple[Parameters, Holding]:
    """Return what training moves of a model, and a holding that computes with the rest as it is.

    The model itself where names tell what that is. Otherwise it holds frozen parameters, or
    floating-point buffers of the user's own, and no step may change these.
    """
    moved, names = trained_part(model, holding.trained), trained_names(model)
    if len(moved) == len(names):
        return model, holding
    fixed = {name: model[name] for name in names if name not in moved}
    found = {name: tensor for name, tensor in model.items() if name not in fixed}

    def forward(parameters: Parameters, inputs: Tensor) -> Tensor:
        return holding.forward({**fixed, **parameters}, inputs)

    def learn(parameters: Parameters, inputs: Tensor) -> tuple[Tensor, Parameters]:
        outputs, buffers = holding.learn({**fixed, **parameters}, inputs)
        return outputs, {name: buffers[name] for name in buffers if name in parameters}

    return found, dataclasses.replace(holding, forward=forward, learn=learn)


def classes_of(model: Parameters, holding: Holding) -> int:
    """Return the number C of classes, which is the model's number of outputs.

    Raises
    ------
    MissingNeedError
        If the task has no classes, or there is no row to tell by.
    ParametersError
        If a label is none of them.
    """
    for inputs, targets in (holding.forget, holding.remain, holding.test):
        if len(inputs):
            outputs = predicted(model, holding, (inputs[:1], targets[:1]))
            classes = outputs.shape[1] if outputs.dim() == 2 else 1
            check_classes(targets, classes)
            return classes
    raise MissingNeedError("a class method needs rows to tell the classes by, and there are none")


def rows_of_class(targets: Tensor, number: int, classes: int) -> Tensor:
    """Return the numbers of the rows of one class.

    Raises
    ------
    MissingNeedError
        If the targets are no classes.
    ParametersError
        If there is no such class.
    """
    check_classes(targets, classes)
    if not 0 <= number < classes:
        raise ParametersError(f"classes are numbered from 0 to {classes - 1}, got {number}")
    return torch.nonzero(targets == number).reshape(-1)


@torch.no_grad()
def predicted(model: Parameters, holding: Holding, rows: Rows) -> Tensor:
    """Return a model's outputs for some rows."""
    return holding.forward(model, rows[0])
