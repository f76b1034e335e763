"""Training on the server: fine-tuning, and distilling an old model into an unlearned one.

Knowledge distillation gives back what a subtraction took with it (``methods`` 2.7):

    C. Wu, S. Zhu, P. Mitra. "Federated unlearning with knowledge distillation."
    arXiv:2201.09441, 2022.

No model class is known here: a *forward* function turns parameters and inputs into logits, such as
``lambda model, inputs: torch.func.functional_call(network, dict(model), (inputs,))`` with a network
in evaluation mode. It must not write to the parameters. Buffers are constants.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from unlearning.errors import MissingNeedError, SecateurError
from unlearning.history import History, without_updates
from unlearning.parameters import Parameters, check_finite, trained_names

Forward = Callable[[Parameters, Tensor], Tensor]
"""Model, inputs of shape (n, ...) -> logits of shape (n, C)."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits of shape (n, C), targets of n rows -> mean loss, without dimensions."""


def fine_tune(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the model after plain stochastic gradient descent on its trained tensors.

    Parameters
    ----------
    inputs, targets
        n rows each, at least one.
    epochs
        Passes over the data, each in a new order; 0 returns a copy.
    generator
        Draws the orders.

    Raises
    ------
    MissingNeedError
        If there are no data.
    ParametersError
        If the result is not finite, as with too high a learning rate.
    """
    if not len(inputs):
        raise MissingNeedError("training needs at least one row of data, and there are none")
    tuned = {name: tensor.detach().clone() for name, tensor in model.items()}
    leaves = [tuned[name].requires_grad_() for name in trained_names(model)]
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for batch in torch.split(order, batch_size):
            with torch.enable_grad():
                value = loss(forward(tuned, inputs[batch]), targets[batch])
            gradients = torch.autograd.grad(
                value, leaves, allow_unused=True, materialize_grads=True
            )
            with torch.no_grad():
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    leaf.sub_(gradient, alpha=learning_rate)
    result = {name: tensor.detach() for name, tensor in tuned.items()}
    check_finite(result)
    return result


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, the mean over rows.

    T^2 keeps the size of the gradient independent of the temperature T (``methods`` 2.7).

    Parameters
    ----------
    logits, teacher_logits
        Shape (n, C).
    temperature
        Over 0; the higher, the more the teacher's small probabilities count.
    """
    divergence = functional.kl_div(
        functional.log_softmax(logits / temperature, dim=1),
        functional.softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
    )
    return temperature**2 * divergence


def distil(
    student: Parameters,
    teacher: Parameters,
    forward: Forward,
    inputs: Tensor,
    *,
    temperature: float = 3.0,
    epochs: int = 10,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    generator: torch.Generator,
    keep: Callable[[Parameters], bool] = lambda model: True,
) -> dict[str, Tensor]:
    """Return the student after learning the teacher's soft labels; labels are not needed.

    Parameters
    ----------
    inputs
        Unlabelled and clean: what they trigger in the teacher, the student learns.
    keep
        Asked after every epoch whether its model may be kept; at the first no, training ends with
        the model of the epoch before.

    Raises
    ------
    MissingNeedError, ParametersError
        As :func:`fine_tune`.
    """
    if not temperature > 0:
        raise SecateurError(f"the temperature must be over 0, got {temperature}")
    with torch.no_grad():
        taught = torch.cat([forward(teacher, batch) for batch in torch.split(inputs, batch_size)])
    kept = dict(student)
    for _ in range(epochs):
        candidate = fine_tune(
            kept,
            forward,
            lambda logits, target: distillation_loss(logits, target, temperature),
            inputs,
            taught,
            epochs=1,
            learning_rate=learning_rate,
            batch_size=batch_size,
            generator=generator,
        )
        if not keep(candidate):
            break
        kept = candidate
    return kept


def kd_unlearn(
    model: Parameters,
    history: History,
    forgotten: frozenset[str],
    forward: Forward,
    inputs: Tensor,
    *,
    temperature: float = 3.0,
    epochs: int = 10,
    learning_rate: float = 0.01,
    batch_size: int = 32,
    generator: torch.Generator,
    probe: Callable[[Parameters], float] = lambda model: 0.0,
    margin: float = 0.03,
) -> dict[str, Tensor]:
    """Subtract every update the forgotten clients sent, then distil the old model back.

    The teacher still knows what is to be forgotten, so distillation ends before an epoch that
    would lift ``probe`` more than ``margin`` above its level after the subtraction.

    Parameters
    ----------
    model
        The model of today, and the teacher.
    inputs
        See :func:`distil`, which all other parameters are passed to.
    probe
        Model -> how much of what is to be forgotten it knows, such as the success of a backdoor,
        in [0, 1].
    """
    student = without_updates(model, history, forgotten)
    most = probe(student) + margin
    return distil(
        student,
        model,
        forward,
        inputs,
        temperature=temperature,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        generator=generator,
        keep=lambda candidate: probe(candidate) <= most,
    )
