"""Masks of whole channels: ActivationMask and GradMask.

Paper 001 (``methods`` 5.2, 5.3). A channel is what one filter of a convolution produces; zeroing
the filter silences it. Channels are scored by how they answer to the data to forget:

- ActivationMask: their activation on data to forget less that on the rest, per layer in units of
  its mean activation, so that layers compare;
- GradMask: how much they contribute to recognising the data to forget, by integrated gradients
  (Sundararajan et al., ICML 2017, arXiv:1703.01365).

Activations are tensors here, layer by layer; whoever knows the network collects them, and says by
``Convolution`` which tensors belong to a channel.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.distillation import Loss
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import Parameters, check_alike, check_finite
from unlearning.sums import Statistics, means

STEPS = 20
"""Points on the path of integrated gradients (``methods`` 5.3)."""

Head = Callable[[Tensor], Tensor]
"""Activations of one layer, shape (n, ch, ...) -> outputs of the network, n rows."""


# ---------------------------------------------------------------- activations


def channel_means(activations: Tensor) -> Tensor:
    """Return the mean over space, shape (n, ch), of activations of shape (n, ch, ...).

    Raises
    ------
    MissingNeedError
        If there are no dimensions of space: no convolution produced them.
    """
    if activations.dim() < 3:
        raise MissingNeedError(
            "a channel method needs activations of a convolution, of shape (n, channels, ...), "
            f"got {tuple(activations.shape)}"
        )
    return activations.flatten(2).mean(dim=2)


def check_layers(activations: Mapping[str, Tensor]) -> int:
    """Return the number of samples n, the same in all layers.

    Raises
    ------
    MissingNeedError
        If there are no layers: the network has no convolutions.
    ParametersError
        If layers differ in their number of samples.
    """
    if not activations:
        raise MissingNeedError("a channel method needs a network with convolutions")
    sizes = {len(tensor) for tensor in activations.values()}
    if len(sizes) > 1:
        raise ParametersError(f"layers have activations of {sorted(sizes)} samples")
    return sizes.pop()


def activation_statistics(activations: Mapping[str, Tensor]) -> Statistics:
    """Return the sums of every channel's mean activation over samples (5.2, 5.7).

    Parameters
    ----------
    activations
        Layer -> shape (n, ch, ...), after the ReLU.

    Raises
    ------
    MissingNeedError, ParametersError
        As ``check_layers`` and ``channel_means``; also if an activation is negative, or not
        finite.
    """
    samples = check_layers(activations)
    sums = {layer: channel_means(tensor).sum(dim=0) for layer, tensor in activations.items()}
    check_finite(sums)
    for layer, tensor in activations.items():
        if bool((tensor < 0).any()):
            raise ParametersError(f"activations of {layer} are negative: take them after the ReLU")
    return Statistics(sums, samples)


def activation_scores(forget: Statistics, remain: Statistics | None) -> dict[str, Tensor]:
    """Return ActivationMask's score of every channel, shape (ch,) per layer (5.2).

    Parameters
    ----------
    forget, remain
        Sums of activations on both sets. Without remaining data, the mean on the data to forget.

    Returns
    -------
    dict
        ``(A_f - A_r) / a``, a being the layer's mean activation over all channels and all samples
        of both sets. 0 in a layer that is silent.

    Raises
    ------
    MissingNeedError
        If a set has no samples.
    ParametersError
        If the two differ in layers or channels.
    """
    ours = means(forget)
    theirs = None if remain is None else means(remain)
    if theirs is not None:
        check_alike(ours, theirs)
    scores = {}
    for layer, mean in ours.items():
        total, samples = forget.sums[layer], forget.count
        if theirs is not None and remain is not None:
            total, samples = total + remain.sums[layer], samples + remain.count
        usual = (total / samples).mean()
        excess = mean if theirs is None else mean - theirs[layer]
        scores[layer] = excess / usual if float(usual) > 0 else torch.zeros_like(excess)
    return scores


# ---------------------------------------------------------------- integrated gradients


def integrated_gradients(
    activations: Tensor, head: Head, loss: Loss, targets: Tensor, steps: int = STEPS
) -> Tensor:
    """Return what every channel contributes to recognising each sample (5.3).

        B_ij = A_ij mean_{s = 1..m} d(-loss) / dA_ij at (s / m) A

    All channels of the layer grow together from 0. A_ij stands for a whole map: its product with
    the gradient is summed over space. So, for many steps, contributions add up to
    ``loss(head(0)) - loss(head(A))``. The sign is that of the log likelihood: a channel without
    which the loss is higher counts as positive.

    Parameters
    ----------
    activations
        Shape (n, ch, ...), of one layer.
    head
        The rest of the network, in evaluation mode.
    loss
        Of outputs and targets: per row, or their mean.
    targets
        n rows.
    steps
        Number m of points, at least 1.

    Returns
    -------
    Tensor
        Shape (n, ch).

    Raises
    ------
    MissingNeedError
        If activations have no dimensions of space.
    ParametersError
        If rows do not match or the number of steps is out of range.
    """
    channel_means(activations[:0])
    if steps < 1 or len(activations) != len(targets):
        raise ParametersError(
            f"a path of {steps} steps for {len(activations)} rows and {len(targets)} targets: "
            "there must be a step, and as many targets as rows"
        )
    total = torch.zeros_like(activations)
    if not len(activations):
        return channel_means(total)
    for step in range(1, steps + 1):
        point = (activations.detach() * (step / steps)).requires_grad_()
        with torch.enable_grad():
            value = loss(head(point), targets).mean() * len(activations)
        (slope,) = torch.autograd.grad(value, point, allow_unused=True, materialize_grads=True)
        total -= slope
    return (activations.detach() * total / steps).flatten(2).sum(dim=2)


def gradient_statistics(
    activations: Mapping[str, Tensor],
    heads: Mapping[str, Head],
    loss: Loss,
    targets: Tensor,
    steps: int = STEPS,
) -> Statistics:
    """Return the sums of contributions over samples; GradMask's scores are their ``means``.

    Parameters
    ----------
    activations, heads
        Layer -> its activations and the rest of the network behind it; one path a layer.
    loss, targets, steps
        See ``integrated_gradients``. The samples are those to forget.

    Raises
    ------
    MissingNeedError, ParametersError
        As ``check_layers`` and ``integrated_gradients``; also if heads are of other layers or a
        contribution is not finite.
    """
    samples = check_layers(activations)
    if activations.keys() != heads.keys():
        differing = ", ".join(sorted(activations.keys() ^ heads.keys()))
        raise ParametersError(f"activations and heads differ in their layers: {differing}")
    sums = {
        layer: integrated_gradients(tensor, heads[layer], loss, targets, steps).sum(dim=0)
        for layer, tensor in activations.items()
    }
    check_finite(sums)
    return Statistics(sums, samples)


# ---------------------------------------------------------------- from channels to parameters


@dataclass(frozen=True)
class Convolution:
    """Where a convolution's channels live among the parameters.

    Attributes
    ----------
    layer
        Its name: ``<layer>.weight`` has shape (ch, ...), filters first, so it is not transposed.
    norm
        Name of the normalisation layer right behind it, if any.
    following
        Names of the layers that read its channels and nothing else: convolutions without groups,
        or linear layers behind a flattening or pooling.
    """

    layer: str
    norm: str | None = None
    following: tuple[str, ...] = ()


def parameter_masks(
    model: Parameters,
    convolutions: Sequence[Convolution],
    channels: Mapping[str, Tensor],
    *,
    bias: bool = True,
    norm: bool = False,
    following: bool = False,
) -> dict[str, Tensor]:
    """Return what to zero in a model to silence channels.

    Parameters
    ----------
    convolutions
        Those of ``channels``; others are passed over.
    channels
        Layer -> bool, shape (ch,), true where a channel is silenced.
    bias, norm, following
        What is zeroed besides the filter: its bias; the channel's weight and bias in the
        normalisation, without which a constant is left; the weights that read the channel.

    Returns
    -------
    dict
        Bool tensors, true where to zero, for the tensors concerned.

    Raises
    ------
    MissingNeedError
        If a layer is no convolution.
    ParametersError
        If a layer is unknown, or a tensor does not have the number of channels.
    """
    known = {convolution.layer: convolution for convolution in convolutions}
    unknown = sorted(channels.keys() - known.keys())
    if unknown:
        raise ParametersError(f"nothing is known of the layers {', '.join(unknown)}")
    masks: dict[str, Tensor] = {}

    def mark(name: str, places: Tensor) -> None:
        masks[name] = masks[name] | places if name in masks else places

    for layer, silenced in channels.items():
        weight = _weight(model, layer)
        if weight.dim() < 3:
            raise MissingNeedError(f"a channel method needs convolutions, and {layer} is none")
        _check_channels(f"{layer}.weight", weight, silenced)
        mark(f"{layer}.weight", _along(silenced, weight, 0))
        vectors = [f"{layer}.bias"] if bias and f"{layer}.bias" in model else []
        normalisation = known[layer].norm
        if norm and normalisation is not None:
            vectors += [f"{normalisation}.weight", f"{normalisation}.bias"]
        for name in vectors:
            if name not in model:
                raise ParametersError(f"the model has no tensor {name}")
            _check_channels(name, model[name], silenced)
            mark(name, silenced.clone())
        for reader in known[layer].following if following else ():
            mark(f"{reader}.weight", _read(reader, _weight(model, reader), silenced))
    return masks


def _weight(model: Parameters, layer: str) -> Tensor:
    if f"{layer}.weight" not in model:
        raise ParametersError(f"the model has no tensor {layer}.weight")
    return model[f"{layer}.weight"]


def _check_channels(name: str, tensor: Tensor, silenced: Tensor) -> None:
    if silenced.dim() != 1 or silenced.dtype != torch.bool or len(tensor) != len(silenced):
        raise ParametersError(
            f"tensor {name} has {len(tensor)} channels, and a mask is {silenced.dtype} of shape "
            f"{tuple(silenced.shape)}"
        )


def _along(places: Tensor, tensor: Tensor, dimension: int) -> Tensor:
    shape = [1] * tensor.dim()
    shape[dimension] = len(places)
    return places.reshape(shape).expand(tensor.shape).clone()


def _read(reader: str, weight: Tensor, silenced: Tensor) -> Tensor:
    # Behind a flattening, a linear layer reads one column a pixel, channel after channel.
    inputs = weight.shape[1] if weight.dim() > 1 else 0
    pixels, rest = divmod(inputs, max(len(silenced), 1))
    if rest or not pixels or (weight.dim() > 2 and pixels != 1):
        raise ParametersError(
            f"layer {reader} reads {inputs} inputs, not those of {len(silenced)} channels"
        )
    return _along(silenced.repeat_interleave(pixels), weight, 1)
