"""Model parameters as a vector space: the arithmetic every method shares.

``Parameters`` maps the names of a model's ``state_dict`` to tensors. Weights are
float32; buffers keep their own dtype. No function here writes to its inputs.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from unlearning.errors import NotFiniteError, ParametersError

Parameters = Mapping[str, Tensor]


def check_alike(*models: Parameters) -> None:
    """Raise ``ParametersError`` unless all models have the same names, shapes and dtypes."""
    first = models[0]
    _check_names(models)
    for name, tensor in first.items():
        for other in models[1:]:
            _check_form(name, tensor, other[name])


def _check_names(models: Sequence[Parameters]) -> None:
    names = models[0].keys()
    for other in models[1:]:
        if names != other.keys():
            differing = sorted(names ^ other.keys())
            raise ParametersError(f"models differ in their tensors: {', '.join(differing)}")


def _check_form(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.shape != other.shape or tensor.dtype != other.dtype:
        raise ParametersError(
            f"tensor {name} is {tuple(tensor.shape)} {tensor.dtype} in one model and "
            f"{tuple(other.shape)} {other.dtype} in another"
        )


def check_finite(model: Parameters) -> None:
    """Raise ``NotFiniteError`` if a floating-point tensor holds NaN or Inf."""
    for name, tensor in model.items():
        if not _is_finite(tensor):
            raise NotFiniteError(f"tensor {name} holds values that are not finite")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    # A sum with NaN or Inf in it is never finite, and takes a tenth of the time of looking at each
    # entry; that the sum is not finite may also be because it overflows.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def weighted_mean(models: Sequence[Parameters], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average models with weights that need not sum to one (``methods`` 0: FedAvg's p_k).

    The order of operations is Flower's FedAvg's (scale, then add, one model after the other), so
    the result is equal to it bit for bit. Integer tensors are averaged and rounded back.

    Parameters
    ----------
    models
        At least one model; all with the same names, shapes and dtypes.
    weights
        One non-negative number a model, not all zero.
    """
    shares = _shares(len(models), weights)
    _check_names(models)
    return {name: _mean_of(name, models, shares) for name in models[0]}


def _shares(models: int, weights: Sequence[float]) -> list[float]:
    if not models or models != len(weights):
        raise ParametersError(f"{models} models cannot be averaged with {len(weights)} weights")
    total = sum(weights)
    if not (math.isfinite(total) and total > 0 and min(weights) >= 0):
        raise ParametersError(f"weights must be non-negative and sum to more than 0, got {weights}")
    return [weight / total for weight in weights]


@torch.no_grad()
def _mean_of(name: str, models: Sequence[Parameters], shares: Sequence[float]) -> Tensor:
    like = _common_form(name, models)
    dtype = like.dtype if like.is_floating_point() else torch.float64
    total = torch.empty(like.numel(), dtype=dtype)
    scratch = torch.empty(min(STRETCH, like.numel()), dtype=dtype)
    for part, pieces in stretches(name, models):
        added, scaled = total[part], scratch[: part.stop - part.start]
        torch.mul(next(pieces).to(dtype), shares[0], out=added)
        for piece, share in zip(pieces, shares[1:], strict=True):
            torch.mul(piece.to(dtype), share, out=scaled)
            added.add_(scaled)
    total = total.view(like.shape)
    return total if like.is_floating_point() else total.round().to(like.dtype)


def _common_form(name: str, models: Sequence[Parameters]) -> Tensor:
    first = form(models[0], name)
    for other in models[1:]:
        _check_form(name, first, form(other, name))
    return first


STRETCH = 1 << 16
"""Entries of a tensor that are computed with at a time: what a processor keeps at hand."""


def stretches(name: str, models: Sequence[Parameters]) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Yield one tensor of several models piece by piece, flattened.

    Yields
    ------
    tuple
        Which entries, and them in model after model, to be read in this order. A piece holds until
        the next is read: models in files share memory for it, which is faster to fill than new
        memory is to get.
    """
    like = form(models[0], name)
    scratch = torch.empty(min(STRETCH, like.numel()) * like.element_size(), dtype=torch.uint8)
    for start in range(0, like.numel(), STRETCH):
        part = slice(start, min(start + STRETCH, like.numel()))
        yield part, (_stretch(model, name, part, scratch) for model in models)


def form(model: Parameters, name: str) -> Tensor:
    """Return a tensor of a model, or one without content that has its shape and dtype."""
    found: Tensor = model.form(name) if hasattr(model, "form") else model[name]
    return found


def _stretch(model: Parameters, name: str, part: slice, scratch: Tensor) -> Tensor:
    if hasattr(model, "stretch"):
        found: Tensor = model.stretch(name, part.start, part.stop, scratch)
        return found
    return model[name].reshape(-1)[part]


def mean(models: Sequence[Parameters]) -> dict[str, Tensor]:
    """Average models with equal weights."""
    return weighted_mean(models, [1.0] * len(models))


def mean_tensor(name: str, models: Sequence[Parameters]) -> Tensor:
    """Return one tensor of ``mean``, without looking at the others."""
    return _mean_of(name, models, _shares(len(models), [1.0] * len(models)))


def difference(model: Parameters, start: Parameters) -> dict[str, Tensor]:
    """Return ``model - start`` over the floating-point tensors: a client's update D_k."""
    return {
        name: tensor - start[name] for name, tensor in model.items() if tensor.is_floating_point()
    }


def copied(model: Parameters) -> dict[str, Tensor]:
    """Return a copy in memory."""
    return {name: tensor.clone() for name, tensor in model.items()}


def flat(model: Parameters) -> Tensor:
    """Return all floating-point tensors as one vector, shape (P,), in the model's order."""
    return torch.cat([t.reshape(-1) for t in model.values() if t.is_floating_point()])


def norm(model: Parameters) -> float:
    """Return the Euclidean norm over all floating-point tensors, summed in float64."""
    squares = [float(t.double().square().sum()) for t in model.values() if t.is_floating_point()]
    return math.sqrt(sum(squares))


def byte_size(models: Iterable[Parameters]) -> int:
    """Return the number of bytes that the tensors of ``models`` hold."""
    return sum(t.element_size() * t.nelement() for model in models for t in model.values())


def prunable_names(model: Parameters) -> tuple[str, ...]:
    """Return the weights of linear and convolutional layers, judged by name and shape alone.

    Without a model class these are the floating-point tensors named ``*.weight`` with two or more
    dimensions, in the model's order. Where the class is known its own layers are the better source.
    """
    return tuple(
        name
        for name, tensor in model.items()
        if name.split(".")[-1] == "weight" and tensor.dim() >= 2 and tensor.is_floating_point()
    )


BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Last parts of the names of normalisation layers' statistics."""


def trained_names(model: Parameters) -> tuple[str, ...]:
    """Return the tensors that training moves, judged by name and dtype alone; buffers are not."""
    return tuple(
        name
        for name, tensor in model.items()
        if tensor.is_floating_point() and name.split(".")[-1] not in BUFFERS
    )


def trained_part(model: Parameters, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors that training moves: of ``trained_names`` those named, or all.

    Names and dtypes do not tell frozen weights, or buffers of one's own, from others: where the
    module is known, ``names`` says which of its parameters require gradients.
    """
    return {n: model[n] for n in trained_names(model) if names is None or n in names}


def top_count(size: int, fraction: float) -> int:
    """Return how many of ``size`` entries a fraction in [0, 1] selects (``methods`` 0).

    ``ceil(f n - 1e-9)``: every layer in scope is touched at least once, and a product that is an
    integer up to rounding error is not pushed over it.
    """
    if not 0 <= fraction <= 1:
        raise ParametersError(f"a fraction must lie in [0, 1], got {fraction}")
    return min(size, max(0, math.ceil(fraction * size - 1e-9)))


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Select the ``count`` highest scores; ties go to the lower row-major index (``methods`` 0).

    Parameters
    ----------
    scores
        Any shape, finite.
    count
        From 0 to the number of entries.

    Returns
    -------
    Tensor
        Bool, the shape of ``scores``, exactly ``count`` entries true.
    """
    if not _is_finite(scores):
        raise ParametersError("scores hold values that are not finite")
    values = scores.reshape(-1)
    mask = torch.zeros(values.shape, dtype=torch.bool)
    if count > 0:
        # Selecting by threshold costs O(n) where sorting costs O(n log n), and NumPy's selection
        # a tenth of torch.kthvalue's. It knows no bfloat16, which float32 holds exactly.
        known = values.float() if values.dtype == torch.bfloat16 else values
        place = values.numel() - count
        threshold = np.partition(known.numpy(), place)[place].item()
        mask |= values > threshold
        ties = torch.nonzero(values == threshold).reshape(-1)
        mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(scores.shape)
