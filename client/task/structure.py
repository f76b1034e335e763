"""What channel methods need to know of a network: convolutions, who reads them, and the head.

Nothing is guessed from names or from the order of modules. The network is run on a sample twice.
The first run tells the order of its layers, and which normalisation takes a convolution's output
as it is. In the second every layer's output is replaced by a variable of its own, so that what
reaches another layer's input *directly* shows in the gradients of that input.
"""

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from client.task.protocol import TaskError
from unlearning.channel_masks import Convolution, Head
from unlearning.parameters import Parameters

LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Structure:
    """Of one class of models.

    Attributes
    ----------
    convolutions
        In the order in which they run. One that runs more or less than once is left out. Their
        ``following`` is empty where channels cannot be traced: they are added to others, mixed,
        or leave the network.
    head
        Name of the linear layer that runs last, if there is one.
    """

    convolutions: tuple[Convolution, ...]
    head: str | None


def readout(convolution: Convolution) -> str:
    """Return the layer whose output, once rectified, is the activation after Conv(-BN)-ReLU."""
    return convolution.norm or convolution.layer


def structure_of(network: nn.Module, sample: Tensor) -> Structure:
    """Look at a network by running it.

    Parameters
    ----------
    network
        Neither its parameters nor its mode are changed.
    sample
        Inputs, one row or more; their values do not matter.

    Raises
    ------
    TaskError
        If the network cannot be run on it.
    """
    with _evaluating(network):
        calls = _calls(network, sample[:1])
        order = list(dict.fromkeys(name for name, *_ in calls))
        once = {name for name in order if sum(call[0] == name for call in calls) == 1}
        module = dict(network.named_modules())
        layers = [name for name in order if isinstance(module[name], LAYERS)]
        norms = _norms(calls, once, module)
        readers = _readers(network, sample[:1], layers, norms)
    convolutions = tuple(
        Convolution(name, norms.get(name), readers.get(name, ()))
        for name in layers
        if isinstance(module[name], nn.Conv2d) and name in once
    )
    linear = [name for name, *_ in calls if isinstance(module[name], nn.Linear)]
    return Structure(convolutions, linear[-1] if linear else None)


# ---------------------------------------------------------------- activations


def outputs_of(
    network: nn.Module, model: Parameters, inputs: Tensor, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Return what some layers put out, without gradients.

    Parameters
    ----------
    network
        Run in evaluation mode with the parameters of ``model``, on their device.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            found[name] = output.detach().clone()  # before anybody rectifies it in place

        return hook

    with _evaluating(network), torch.no_grad(), hooked(network, {n: keep(n) for n in layers}):
        functional_call(network, dict(model), (inputs,))
    return found


def behind(network: nn.Module, model: Parameters, inputs: Tensor, layer: str) -> Head:
    """Return the rest of the network behind a layer, as a function of that layer's output.

    Whatever does not pass through the layer is as for ``inputs``.
    """

    def head(activations: Tensor) -> Tensor:
        def instead(_: nn.Module, __: Any, ___: Tensor) -> Tensor:
            return activations.clone()  # so that it may be rectified in place

        with _evaluating(network), hooked(network, {layer: instead}):
            outputs: Tensor = functional_call(network, dict(model), (inputs,))
        return outputs

    return head


_numbering = threading.Lock()


@contextmanager
def hooked(network: nn.Module, hooks: Mapping[str, Any]) -> Iterator[None]:
    """Watch modules, by name, for as long as the context lasts."""
    with ExitStack() as stack:
        for name, hook in hooks.items():
            with _numbering:  # torch counts the hooks of all threads without one
                handle = network.get_submodule(name).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


# ---------------------------------------------------------------- looking

_Call = tuple[str, Any, Any]
"""Module, its first input and its output."""


def _calls(network: nn.Module, sample: Tensor) -> list[_Call]:
    calls: list[_Call] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append((name, inputs[0] if inputs else None, output))

        return hook

    kinds = (*LAYERS, nn.BatchNorm2d)
    hooks = {n: note(n) for n, module in network.named_modules() if isinstance(module, kinds)}
    _run(network, sample, hooks)
    return calls


def _run(network: nn.Module, sample: Tensor, hooks: Mapping[str, Any]) -> Any:
    try:
        with hooked(network, hooks):
            return network(sample)
    except Exception as error:  # the model is the user's own code
        raise TaskError(
            f"the task's model fails on a sample of shape {tuple(sample.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _norms(
    calls: Sequence[_Call], once: set[str], module: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Return, per convolution, the normalisation that takes its output as it is."""
    made = {id(out): name for name, _, out in calls if isinstance(module[name], nn.Conv2d)}
    found: dict[str, str] = {}
    for name, taken, _ in calls:
        convolution = made.get(id(taken))
        if isinstance(module[name], nn.BatchNorm2d) and {name, convolution} <= once:
            found.setdefault(str(convolution), name)
    return found


def _readers(
    network: nn.Module, sample: Tensor, layers: Sequence[str], norms: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """Return, per convolution, the layers that read its channels, if all of them are known."""
    module = dict(network.named_modules())
    variables: dict[str, Tensor] = {}
    taken: dict[str, list[Tensor]] = {name: [] for name in layers}

    draw = torch.Generator().manual_seed(0)

    def variable(like: Tensor) -> Tensor:
        # Positive: gradients are to pass every rectifier.
        drawn = torch.rand(like.shape, generator=draw, dtype=like.dtype)
        return (drawn + 0.5).to(like.device).requires_grad_()

    def replace(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in taken:
                taken[name].append(inputs[0])
            variables[name] = variable(output.detach())
            return variables[name].clone()

        return hook

    variables[""] = variable(sample)
    with torch.enable_grad():
        replaced = {name: replace(name) for name in (*layers, *norms.values())}
        outputs = _run(network, variables[""].clone(), replaced)
    inputs = [
        (name, tensor, _sources(tensor, variables)) for name in layers for tensor in taken[name]
    ]
    # The output is nobody's input, and so whoever reaches it has an unknown reader.
    ends = [_sources(tensor, variables) for tensor in _tensors(outputs)]
    found: dict[str, tuple[str, ...]] = {}
    for name in layers:
        if len(taken[name]) != 1 or variables[name].dim() != 4:
            continue
        place = norms.get(name, name)
        reading = [(reader, part) for reader, part, sources in inputs if place in sources]
        apart = all(
            len(taken[reader]) == 1 and _keeps_apart(module[reader], part, variables[place])
            for reader, part in reading
        )
        alone = all(sources == {place} for _, _, sources in inputs if place in sources)
        # Past its normalisation, nobody may get at what a convolution puts out.
        aside = place != name and any(name in sources for _, _, sources in inputs)
        ended = any(place in sources or name in sources for sources in ends)
        if apart and alone and not aside and not ended:
            found[name] = tuple(reader for reader, _ in reading)
    return found


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [tensor for part in parts for tensor in _tensors(part)]


def _sources(tensor: Tensor, variables: Mapping[str, Tensor]) -> set[str]:
    """Return the variables that a tensor is computed from."""
    if not tensor.requires_grad:
        return set()
    slopes = torch.autograd.grad(
        tensor.sum(), list(variables.values()), retain_graph=True, allow_unused=True
    )
    return {name for name, slope in zip(variables, slopes, strict=True) if slope is not None}


def _keeps_apart(reader: nn.Module, taken: Tensor, channels: Tensor) -> bool:
    """Return whether a layer reads channel after channel, each from inputs of its own.

    Two channels have numbers that differ in some bit. So it is enough to ask, for each bit, whether
    inputs of channels where it is set depend on channels where it is not, and the other way round.
    """
    count = channels.shape[1]
    if isinstance(reader, nn.Conv2d):
        fits = reader.groups == 1 and taken.dim() == 4 and taken.shape[1] == count
    else:
        fits = taken.dim() == 2 and taken.shape[1] % count == 0
    if not fits:
        return False
    blocks = taken.reshape(len(taken), count, -1)
    numbers = torch.arange(count, device=taken.device)
    for bit, value in itertools.product(range(max(1, (count - 1).bit_length())), (0, 1)):
        chosen = (numbers >> bit) & 1 == value
        (slope,) = torch.autograd.grad(blocks[:, chosen].sum(), channels, retain_graph=True)
        if bool(slope[:, ~chosen].any()):
            return False
    return True


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
