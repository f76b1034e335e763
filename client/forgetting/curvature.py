"""The last layer's Hessian and gradient, for the infinitesimal jackknife."""

import torch

from client.forgetting.holding import classes_of
from client.forgetting.interface import Holding, Outcome
from strategies.actions import Curvature, joined
from unlearning.errors import MissingNeedError
from unlearning.jackknife import gradient_statistics, hessian_statistics, last_layer
from unlearning.parameters import Parameters


def curvature(settings: Curvature, model: Parameters, holding: Holding) -> Outcome:
    """Return the Hessian over all rows and the gradient over those to forget (``methods`` 2.14).

    Returns
    -------
    Outcome
        ``joined(hessian={layer: ...}, gradient={layer: ...})``, sums; metrics ``hessian-count``
        and ``gradient-count``.

    Raises
    ------
    MissingNeedError
        If the model does not end in a linear layer, that layer is too large, or the task has no
        classes or the holder no rows.
    """
    del settings
    layer = last_layer(model)
    inputs = torch.cat([holding.forget[0], holding.remain[0]])
    if not len(inputs):
        raise MissingNeedError("a Hessian needs at least one row, and there are none")
    classes_of(model, holding)
    hessian = hessian_statistics(model, holding.forward, inputs, layer)
    gradient = gradient_statistics(model, holding.forward, *holding.forget, layer)
    return Outcome(
        joined(hessian=dict(hessian.sums), gradient=dict(gradient.sums)),
        {"hessian-count": hessian.count, "gradient-count": gradient.count},
    )
