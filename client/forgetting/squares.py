"""Squared gradients of single rows, without holding a gradient for every row.

Of a linear layer a row's gradient is ``g a^T``, g being the gradient of its outputs and a its
inputs, so that squares over rows add up to

    sum_i (g_i a_i^T)^2 = (g^2)^T (a^2)

as a product of two matrices. Convolutions, whose gradients are sums over space, are multiplied row
by row, as many rows at once as stay near the processor. It is
``unlearning.fisher.fisher_statistics`` in a tenth of the time; networks with parameters elsewhere,
or layers that run twice, are left to that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from client.task.structure import hooked, outputs_of
from unlearning.distillation import Loss
from unlearning.errors import ParametersError
from unlearning.gradients import check_rows
from unlearning.parameters import Parameters, check_finite, trained_names
from unlearning.sums import Statistics

AT_ONCE = 1 << 24
"""Numbers that layers put out, held at once; slopes and what the layers took come on top."""
MOST_ROWS = 256
NEAR = 1 << 18
"""Numbers of a convolution's patches, or of its rows' gradients, multiplied at once: a megabyte
fits into a core's own cache. Sixteen times as many took up to twice the time."""


def squared_gradients(
    network: nn.Module, model: Parameters, loss: Loss, inputs: Tensor, targets: Tensor
) -> Statistics | None:
    """Return the sum of squared gradients over rows, or ``None`` for networks not known here.

    Parameters
    ----------
    network
        In evaluation mode.
    model, inputs, targets
        On the network's device; n rows each.
    loss
        Of a batch of one row.

    Returns
    -------
    Statistics
        As of ``fisher_statistics``, equal up to rounding.

    Raises
    ------
    ParametersError
        If rows do not match or a gradient is not finite.
    """
    check_rows(inputs, targets)
    names = trained_names(model)
    # Exactly these: a subclass may compute something else.
    known = {name: module for name, module in network.named_modules() if type(module) in SUMS}
    owned = {f"{name}.{key}" if name else key
             for name, module in known.items() for key, _ in module.named_parameters()}  # fmt: skip
    if owned != set(names):
        return None
    size = _rows_at_once(network, known, model, inputs)
    totals = {name: torch.zeros(model[name].shape, dtype=torch.float64) for name in names}
    for rows in torch.split(torch.arange(len(inputs)), size) if len(inputs) else ():
        found = _of_batch(network, known, model, loss, inputs[rows], targets[rows])
        if found is None:
            return None
        for name, tensor in found.items():
            totals[name] += tensor.cpu()
    sums = {
        name: total.to(torch.promote_types(model[name].dtype, torch.float32))
        for name, total in totals.items()
    }
    try:
        check_finite(sums)
    except ParametersError as error:
        raise ParametersError(f"squared gradients: {error}") from error
    return Statistics(sums, len(inputs))


def _rows_at_once(
    network: nn.Module, known: Mapping[str, nn.Module], model: Parameters, inputs: Tensor
) -> int:
    if not len(inputs):
        return MOST_ROWS
    outputs = outputs_of(network, model, inputs[:1], list(known))
    held = sum(output.numel() for output in outputs.values())
    return max(1, min(MOST_ROWS, AT_ONCE // max(1, held)))


@dataclass
class _Pass:
    """What a layer took and put out."""

    taken: Tensor
    out: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)


def _of_batch(
    network: nn.Module,
    known: Mapping[str, nn.Module],
    model: Parameters,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
) -> dict[str, Tensor] | None:
    passes: dict[str, list[_Pass]] = {name: [] for name in known}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, taken: tuple[Tensor, ...], out: Tensor) -> Tensor:
            passes[name].append(_Pass(taken[0].detach(), out, dict(module.named_buffers())))
            return out.clone()  # somebody may rectify it in place

        return hook

    leaves = {name: model[name].detach().requires_grad_() for name in trained_names(model)}
    with torch.enable_grad(), hooked(network, {name: keep(name) for name in known}):
        outputs = functional_call(network, {**model, **leaves}, (inputs,))
        total = _of_rows(loss)(outputs, targets).sum()
    single = {name: made[0] for name, made in passes.items() if len(made) == 1}
    if single.keys() != known.keys() or not all(_fits(known[n], single[n]) for n in single):
        return None
    slopes = torch.autograd.grad(
        total, [made.out for made in single.values()], allow_unused=True, materialize_grads=True
    )
    found = {}
    for (name, made), slope in zip(single.items(), slopes, strict=True):
        for key, tensor in _squares(known[name], made, slope).items():
            found[f"{name}.{key}" if name else key] = tensor
    return found


def _of_rows(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the losses of rows, each as of a batch that holds this row alone."""
    rows: Callable[[Tensor, Tensor], Tensor] = torch.func.vmap(
        lambda output, target: loss(output.unsqueeze(0), target.unsqueeze(0)).mean()
    )
    return rows


# ---------------------------------------------------------------- layer by layer


def _linear(layer: Any, made: _Pass, slope: Tensor) -> dict[str, Tensor]:
    square = slope.square()
    found = {"weight": square.T @ made.taken.square(), "bias": square.sum(dim=0)}
    return found if layer.bias is not None else {"weight": found["weight"]}


def _convolution(layer: Any, made: _Pass, slope: Tensor) -> dict[str, Tensor]:
    weight, patch = layer.weight, layer.weight[0].numel()
    total = slope.new_zeros(len(weight), patch)
    size = max(1, NEAR // max(patch * slope[0, 0].numel(), weight.numel()))
    for taken, steep in zip(
        torch.split(made.taken, size), torch.split(slope.flatten(2), size), strict=True
    ):
        columns = functional.unfold(
            taken, layer.kernel_size, layer.dilation, layer.padding, layer.stride
        ).transpose(1, 2)
        if len(taken) > 1:
            total += torch.bmm(steep, columns).square_().sum(dim=0)
            continue
        block = max(1, NEAR // patch)  # a wide layer's gradient is too large even of one row
        for part, some in zip(torch.split(total, block), torch.split(steep[0], block), strict=True):
            gradient = some @ columns[0]
            part.addcmul_(gradient, gradient)
    found = {"weight": total.reshape(weight.shape)}
    if layer.bias is not None:
        found["bias"] = slope.flatten(2).sum(dim=2).square().sum(dim=0)
    return found


def _normalisation(layer: Any, made: _Pass, slope: Tensor) -> dict[str, Tensor]:
    shape = (1, -1, 1, 1)
    mean, variance = made.buffers["running_mean"], made.buffers["running_var"]
    scaled = (made.taken - mean.reshape(shape)) / (variance.reshape(shape) + layer.eps).sqrt()
    return {
        "weight": (slope * scaled).sum(dim=(2, 3)).square().sum(dim=0),
        "bias": slope.sum(dim=(2, 3)).square().sum(dim=0),
    }


SUMS: dict[type[nn.Module], Callable[[Any, _Pass, Tensor], dict[str, Tensor]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _normalisation,
}


def _squares(layer: nn.Module, made: _Pass, slope: Tensor) -> dict[str, Tensor]:
    found = SUMS[type(layer)](layer, made, slope)
    wanted = {key for key, _ in layer.named_parameters()}
    return {key: tensor for key, tensor in found.items() if key in wanted}


def _fits(layer: nn.Module, made: _Pass) -> bool:
    if isinstance(layer, nn.Linear):
        return made.taken.dim() == 2
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.padding_mode == "zeros"
        return plain and not isinstance(layer.padding, str) and made.taken.dim() == 4
    return made.buffers.get("running_mean") is not None
