"""Hessian and gradient, of the last layer or by the diagonal, for the infinitesimal jackknife."""

import torch

from client.forgetting.holding import classes_of, moving
from client.forgetting.interface import Holding, Outcome
from client.forgetting.statistics import fisher_of
from strategies.actions import Curvature, joined
from unlearning.errors import MissingNeedError
from unlearning.jackknife import (
    gradient_statistics,
    hessian_statistics,
    last_layer,
    slope_statistics,
)
from unlearning.parameters import Parameters
from unlearning.sums import Statistics, added


def curvature(settings: Curvature, model: Parameters, holding: Holding) -> Outcome:
    """Return the Hessian over all rows and the gradient over those to forget (``methods`` 2.14).

    Returns
    -------
    Outcome
        ``joined(hessian={layer: ...}, gradient={layer: ...})``, sums; by the diagonal, of every
        trained tensor; metrics ``hessian-count`` and ``gradient-count``.

    Raises
    ------
    MissingNeedError
        If the holder has no rows; of the last layer also if the model does not end in a linear
        one, it is too large, or part of it is frozen, or the task has no classes.
    """
    if settings.scope == "diag":
        squares = added([fisher_of(model, holding, r) for r in (holding.forget, holding.remain)])
        own, held = moving(model, holding)
        slopes = slope_statistics(own, held.forward, holding.loss, *holding.forget)
        return _outcome(squares, slopes)
    layer = last_layer(model, holding.trained)
    inputs = torch.cat([holding.forget[0], holding.remain[0]])
    if not len(inputs):
        raise MissingNeedError("a Hessian needs at least one row, and there are none")
    classes_of(model, holding)
    hessian = hessian_statistics(model, holding.forward, inputs, layer)
    gradient = gradient_statistics(model, holding.forward, *holding.forget, layer)
    return _outcome(hessian, gradient)


def _outcome(hessian: Statistics, gradient: Statistics) -> Outcome:
    return Outcome(
        joined(hessian=dict(hessian.sums), gradient=dict(gradient.sums)),
        {"hessian-count": hessian.count, "gradient-count": gradient.count},
    )
