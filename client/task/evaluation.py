"""Predictions and measures of a model, and its parameters in and out."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset

from client.task.protocol import Examples, Task, TaskError, size_of
from unlearning.distillation import Forward
from unlearning.gradients import Learn
from unlearning.parameters import Parameters

EVALUATION_BATCH = 128
"""Rows at a time on a CPU, whose caches hold so many: convolutions take a third of the time that
they take with a thousand. Accelerators get more."""
ACCELERATED_BATCH = 1024


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, examples: Examples, *, device: torch.device
) -> dict[str, float]:
    """Return the loss and the task's metrics, each a mean over ``examples``."""
    outputs, targets = predict(model, examples, device=device)
    if not len(targets):
        return {}
    metrics: Mapping[str, float] = task.metrics(outputs, targets)
    return {"loss": float(task.loss(outputs, targets)), **metrics}


def accuracy_of(metrics: Mapping[str, float]) -> float | None:
    """Return a task's accuracy; ``None`` where it has none.

    Raises
    ------
    TaskError
        If it is no share: recovery is judged by it, and reports promise one.
    """
    accuracy = metrics.get("accuracy")
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise TaskError(
            f"the task's metric 'accuracy' is {accuracy:g}; it must lie in [0, 1] (a share, not "
            "percent)"
        )
    return accuracy


@torch.no_grad()
def predict(model: nn.Module, examples: Examples, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the model's outputs for all examples, and their targets, on the CPU."""
    model.to(device).eval()
    outputs, targets = [], []
    size = EVALUATION_BATCH if device.type == "cpu" else ACCELERATED_BATCH
    for batch, batch_targets in batches(examples, size, None):
        outputs.append(_output(model, batch.to(device)).cpu())
        targets.append(batch_targets)
    if not outputs:
        return torch.empty(0), torch.empty(0)
    return torch.cat(outputs), torch.cat(targets)


def _output(model: nn.Module, batch: Tensor) -> Tensor:
    try:
        output: Tensor = model(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model is the user's own code
        raise TaskError(
            f"the task's model fails on inputs of shape {tuple(batch.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return output


def forward_of(network: nn.Module, device: torch.device) -> Forward:
    """Return a network as a function of parameters and inputs, in evaluation mode.

    Parameters
    ----------
    network
        On ``device``. What it holds is not used: buffers, too, are those of the parameters.
    device
        Where to compute. Parameters, inputs and outputs are on the CPU, and gradients pass.
    """

    def forward(parameters: Parameters, inputs: Tensor) -> Tensor:
        if network.training:
            network.eval()
        here = {name: tensor.to(device) for name, tensor in parameters.items()}
        # Where nothing is differentiated, many rows at once are only memory.
        size = max(1, len(inputs)) if torch.is_grad_enabled() else EVALUATION_BATCH
        outputs = [
            functional_call(network, here, (rows.to(device),)).cpu()
            for rows in torch.split(inputs, size)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return forward


def learn_of(network: nn.Module, device: torch.device) -> Learn:
    """Return the model as a function of its tensors, in training mode.

    Returns
    -------
    Learn
        Model and inputs -> outputs, and the buffers after them; buffers that come in stay as they
        are. Dropout draws from torch's own generator.
    """
    buffers = {name for name, _ in network.named_buffers()}

    def learn(parameters: Parameters, inputs: Tensor) -> tuple[Tensor, Parameters]:
        if not network.training:
            network.train()
        here = {
            name: tensor.to(device, copy=True) if name in buffers else tensor.to(device)
            for name, tensor in parameters.items()
        }
        outputs = functional_call(network, here, (inputs.to(device),)).cpu()
        return outputs, {name: here[name].detach().cpu() for name in here if name in buffers}

    return learn


def batches(
    examples: Examples, size: int, order: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in a random order, or in the given one if ``order`` is ``None``."""
    for _, inputs, targets in numbered_batches(examples, size, order):
        yield inputs, targets


def numbered_batches(
    examples: Examples, size: int, order: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the batches of ``batches``, and before each its rows: their places in ``examples``."""
    count = size_of(examples)
    if isinstance(examples, TensorDataset):
        # Slicing tensors takes a tenth of the time of collating single examples.
        rows = torch.arange(count) if order is None else torch.randperm(count, generator=order)
        inputs, targets = examples.tensors
        for chosen in torch.split(rows, size):
            yield chosen, inputs.index_select(0, chosen), targets.index_select(0, chosen)
        return
    if not count:
        return
    places = list(range(count) if order is None else RandomSampler(examples, generator=order))  # type: ignore[arg-type]
    loader = DataLoader(examples, batch_size=size, sampler=places)
    for chosen, (inputs, targets) in zip(
        torch.split(torch.tensor(places), size), loader, strict=True
    ):
        yield chosen, inputs, targets


def gather(examples: Examples) -> tuple[Tensor, Tensor]:
    """Return all examples as two tensors.

    Of none, tensors without rows, in the shapes and dtypes of the data of which they are a part;
    of data without a row, which have neither, ``torch.empty(0)`` both.
    """
    if isinstance(examples, TensorDataset):
        inputs, targets = examples.tensors
        return inputs, targets
    if count := size_of(examples):
        ((inputs, targets),) = batches(examples, count, None)
        return inputs, targets
    while isinstance(examples, Subset) and not size_of(examples):
        examples = examples.dataset
    if not size_of(examples):
        return torch.empty(0), torch.empty(0)
    inputs, targets = gather(Subset(examples, [0]))
    return inputs[:0], targets[:0]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's parameters and buffers on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def load_state(model: nn.Module, parameters: Parameters) -> None:
    """Set the model's parameters and buffers; names and shapes must match."""
    slots = model.state_dict(keep_vars=True)
    if slots.keys() != parameters.keys() or any(
        slots[name].shape != tensor.shape for name, tensor in parameters.items()
    ):
        model.load_state_dict(dict(parameters), strict=True)  # says what does not match
        return
    for name, tensor in parameters.items():  # a quarter of the time of load_state_dict
        slots[name].copy_(tensor)
