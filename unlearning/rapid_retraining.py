"""Rapid retraining: train without the forgotten data, with steps scaled by curvature.

    Y. Liu, L. Xu, X. Yuan, C. Wang, B. Li. "The Right to be Forgotten in Federated Learning: An
    Efficient Realization with Rapid Retraining." INFOCOM 2022, arXiv:2203.07320.

Per step (``methods`` 2.8), with gradient g and the diagonal F of the empirical Fisher information:

    h = F averaged over blocks of b neighbours of the flattened tensor
    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) h^2
    w <- w - eta m' / (sqrt(v') + eps),    m' = m / (1 - beta1^t),  v' = v / (1 - beta2^t)

Forgetting is exact where it starts from the initial model, and approximate from today's. The
damping is not the 1e-8 of AdaHessian's public code: h is a square of gradients, all but 0 near a
minimum, and steps would explode.
"""

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

from unlearning.distillation import Forward, Loss
from unlearning.errors import ParametersError
from unlearning.fisher import fisher_statistics
from unlearning.gradients import Learn, batches, check_rows, gradient, learning_gradient
from unlearning.parameters import Parameters, check_alike, check_finite, copied, trained_names
from unlearning.sums import means

Fisher = Literal["batch", "per_sample"]
"""F as the square of the batch's gradient, which costs nothing, or as the mean of the squares of
its rows' gradients, which is what the word means."""


@dataclass(frozen=True)
class Settings:
    """Numbers of the method.

    Attributes
    ----------
    learning_rate
        Step eta, at least 0.
    beta1, beta2
        How much of m and v a step keeps, in [0, 1).
    damping
        eps, over 0.
    block
        Neighbours b whose curvatures are averaged, at least 1; 1 is the plain diagonal.
    fisher
        How F is estimated.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    damping: float = 1e-2
    block: int = 3
    fisher: Fisher = "batch"

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ParametersError(
                f"averages keep a share in [0, 1) of the past, got {self.beta1} and {self.beta2}"
            )
        if not (self.learning_rate >= 0 and self.damping > 0 and self.block >= 1):
            raise ParametersError(
                "the learning rate must be at least 0, the damping over 0 and a block at least "
                f"1, got {self.learning_rate}, {self.damping} and {self.block}"
            )


DEFAULT = Settings()


@dataclass(frozen=True, eq=False)
class State:
    """What a step remembers of those before it.

    Attributes
    ----------
    first, second
        m and v over the trained tensors.
    steps
        Number t of steps so far.
    """

    first: Parameters
    second: Parameters
    steps: int


def initial(model: Parameters) -> State:
    """Return the state before the first step."""
    zeros = {name: torch.zeros_like(model[name]) for name in trained_names(model)}
    return State(zeros, zeros, 0)


def block_mean(values: Tensor, block: int) -> Tensor:
    """Return every entry's mean over its block of ``block`` neighbours, in row-major order.

    Parameters
    ----------
    values
        Any shape. A last block that is shorter is averaged over what it has.
    block
        At least 1.
    """
    size = values.numel()
    if block == 1 or not size:
        return values.clone()
    count = -(-size // block)
    padded = torch.zeros(count * block, dtype=values.dtype, device=values.device)
    padded[:size] = values.reshape(-1)
    lengths = torch.full((count,), float(block), dtype=values.dtype, device=values.device)
    lengths[-1] = size - (count - 1) * block
    averages = padded.reshape(count, block).sum(dim=1) / lengths
    return averages.repeat_interleave(block)[:size].reshape(values.shape)


def step(
    model: Parameters,
    state: State,
    slope: Parameters,
    fisher: Parameters,
    settings: Settings = DEFAULT,
) -> tuple[dict[str, Tensor], State]:
    """Return the model and the state after one step; both inputs stay as they are.

    Parameters
    ----------
    model
        Buffers are copied.
    slope, fisher
        Gradient g and diagonal F over the trained tensors, before blocks are averaged.

    Raises
    ------
    ParametersError
        If something differs in form or the result is not finite.
    """
    check_alike({name: model[name] for name in trained_names(model)}, state.first, slope, fisher)
    moved, number = copied(model), state.steps + 1
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, tensor in slope.items():
        curvature = block_mean(fisher[name], settings.block)
        first[name] = settings.beta1 * state.first[name] + (1 - settings.beta1) * tensor
        second[name] = (
            settings.beta2 * state.second[name] + (1 - settings.beta2) * curvature.square()
        )
        direction = first[name] / (1 - settings.beta1**number)
        scale = (second[name] / (1 - settings.beta2**number)).sqrt() + settings.damping
        moved[name] = model[name] - settings.learning_rate * direction / scale
    check_finite(moved)
    return moved, State(first, second, number)


def train(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
    settings: Settings = DEFAULT,
    state: State | None = None,
    learn: Learn | None = None,
) -> tuple[dict[str, Tensor], State]:
    """Return the model and the state after some epochs.

    Parameters
    ----------
    model
        The initial model, for exact forgetting, or today's.
    forward
        Of a network in evaluation mode.
    inputs, targets
        Remaining data, n rows each; without rows nothing changes.
    generator
        Draws the orders.
    state
        Of an earlier call, to go on; ``None`` begins anew.
    learn
        The network in training mode, for models that keep statistics of their data: without, these
        stay as they are. The Fisher information of single rows is of ``forward`` all the same.

    Raises
    ------
    ParametersError
        If rows or forms differ, or the result is not finite.
    """
    check_rows(inputs, targets)
    current, memory = copied(model), initial(model) if state is None else state
    for _ in range(epochs if len(inputs) else 0):
        for rows, wanted in batches(inputs, targets, batch_size, generator):
            if learn is None:
                slope = gradient(current, forward, loss, rows, wanted)
            else:
                slope, buffers = learning_gradient(current, learn, loss, rows, wanted)
                current |= buffers
            fisher = diagonal(settings.fisher, current, forward, loss, rows, wanted, slope)
            current, memory = step(current, memory, slope, fisher, settings)
    return current, memory


def diagonal(
    kind: Fisher,
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    slope: Parameters,
) -> dict[str, Tensor]:
    """Return the diagonal F on a batch whose gradient is ``slope``."""
    match kind:
        case "batch":
            return {name: tensor.square() for name, tensor in slope.items()}
        case "per_sample":
            return means(fisher_statistics(model, forward, loss, inputs, targets))
        case _:
            assert_never(kind)
