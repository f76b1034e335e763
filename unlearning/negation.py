"""NoT: negate the first layer, which knocks the model out of its basin, then recover.

    Y. H. Khalil, L. Brunswic, S. Lamghari, X. Li, M. Beitollahi, X. Chen. "NoT: Federated
    Unlearning via Weight Negation." arXiv:2503.05657, CVPR 2025.

Recovery rounds without the forgotten clients relearn what the others' data support, and nothing
teaches the rest again. Nothing has to be recorded for it (``methods`` 2.3).
"""

from collections.abc import Collection, Sequence

from torch import Tensor

from unlearning.errors import ParametersError
from unlearning.parameters import Parameters


def first_layer(model: Parameters, prunable: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the first layer's weight and, where it has one, its bias.

    Both are negated, so that what the layer puts out is exactly negated; implementations that
    leave the bias alone shift it as well.

    Parameters
    ----------
    prunable
        Weights of the linear and convolutional layers, in forward order.

    Raises
    ------
    ParametersError
        If there is no such layer.
    """
    if not prunable:
        raise ParametersError("the model has no linear or convolutional layer to negate")
    weight = prunable[0]
    bias = weight.removesuffix("weight") + "bias"
    return (weight, bias) if bias in model else (weight,)


def negate(model: Parameters, names: Collection[str]) -> dict[str, Tensor]:
    """Return ``model`` with the named tensors negated; every other tensor is a copy.

    Raises
    ------
    ParametersError
        If the model has no tensor of such a name, or it is no weight: counters and masks are not.
    """
    if unknown := sorted(set(names) - model.keys()):
        raise ParametersError(f"the model has no tensor {', '.join(unknown)}")
    if others := sorted(name for name in set(names) if not model[name].is_floating_point()):
        raise ParametersError(
            f"{others[0]} is {model[others[0]].dtype}; only floating-point tensors can be negated"
        )
    return {
        name: tensor.neg() if name in names else tensor.clone() for name, tensor in model.items()
    }
