"""Models for the built-in tasks. Inputs are in [0, 1]; each model standardises them itself."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from client.task.protocol import TaskError


class Standardise(nn.Module):
    """Subtract a mean and divide by a deviation per channel; constants, so not in the state."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        shape = (1, -1, *[1] * 2) if len(mean) <= 3 else (1, -1)
        self.register_buffer("mean", torch.tensor(mean).reshape(shape), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).reshape(shape), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs with mean 0 and deviation 1 over the training data."""
        return (inputs - self.mean) / self.deviation


def mlp(shape: Sequence[int], classes: int, hidden: Sequence[int] = (32,)) -> nn.Sequential:
    """Return a multilayer perceptron with hidden layers of the given widths."""
    widths = [math.prod(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def small_cnn(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return a CNN with two convolutions for images of about 8 x 8 pixels."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 2) * (width // 2), 64), nn.ReLU(),
        nn.Linear(64, classes),
    )  # fmt: skip


def lenet(shape: Sequence[int], classes: int) -> nn.Sequential:
    """Return a LeNet-like CNN for images of 28 x 28 or 32 x 32 pixels."""
    channels, height, width = shape
    features = nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip
    with torch.no_grad():
        flattened = features(torch.zeros(1, channels, height, width)).shape[1]
    return nn.Sequential(
        *features,
        nn.Linear(flattened, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


def resnet(shape: Sequence[int], classes: int) -> nn.Module:
    """Return torchvision's ResNet-18 with a 3 x 3 stem and no first pooling, for small images.

    The usual 7 x 7 stem and pooling would shrink 32 x 32 pixels to 8 x 8 before the first block.
    """
    # Imported here because it takes seconds, and no other model needs it.
    from torchvision.models import resnet18  # noqa: PLC0415

    network = resnet18(num_classes=classes)
    network.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network  # type: ignore[no-any-return]


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": small_cnn,
    "lenet": lenet,
    "resnet18": resnet,
}


def build(
    name: str,
    shape: Sequence[int],
    classes: int,
    *,
    mean: Sequence[float],
    deviation: Sequence[float],
) -> nn.Module:
    """Return the model ``name`` for inputs of ``shape``, behind a standardising layer.

    ``mlp-128-64`` is a multilayer perceptron with hidden layers of these widths.
    """
    kind, *widths = name.split("-")
    if kind not in MODELS or (widths and not (kind == "mlp" and all(map(_is_width, widths)))):
        raise TaskError(
            f"there is no model {name!r}; known are {', '.join(MODELS)}, and mlp-128-64 and the "
            "like"
        )
    if kind != "mlp" and len(shape) != 3:
        raise TaskError(f"model {name!r} needs images, and the inputs have shape {tuple(shape)}")
    network = (
        mlp(shape, classes, [int(w) for w in widths]) if widths else MODELS[kind](shape, classes)
    )
    return nn.Sequential(Standardise(mean, deviation), network)


def _is_width(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def trained_tensors(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that training moves: those that require gradients."""
    # Under each of its names where a parameter is shared.
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if parameter.requires_grad)


def prunable_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the weights of linear and convolutional layers, in definition order.

    Frozen ones are left out: no training could recover from what is done to them.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return tuple(
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.weight.requires_grad
    )
