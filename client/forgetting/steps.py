"""Every step that a data holder can be asked to do, by its settings."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from client.forgetting.ascend import ascend, ascent
from client.forgetting.curvature import curvature
from client.forgetting.flip import flip
from client.forgetting.holding import moving, predicted
from client.forgetting.interface import Holding, Outcome
from client.forgetting.posterior import forget_posterior
from client.forgetting.rounds import noisy, rapid, regularised
from client.forgetting.statistics import statistics
from strategies.actions import (
    Action,
    Ascend,
    Ascent,
    Curvature,
    LabelFlip,
    MacForget,
    Noisy,
    Rapid,
    Rcad,
    Statistics,
    joined,
    parted,
)
from unlearning.errors import NotFiniteError, ParametersError
from unlearning.parameters import Parameters, check_finite

Step = Callable[[Any, Parameters, Holding], Outcome]
"""Settings, what came with them, and what there is to compute with -> what came of it."""

REMEDY = "lower its learning rate or the number of its epochs"

STEPS: dict[type[Action], Step] = {
    Ascend: ascend,
    Ascent: ascent,
    LabelFlip: flip,
    MacForget: forget_posterior,
    Statistics: statistics,
    Curvature: curvature,
    Rapid: rapid,
    Noisy: noisy,
    Rcad: regularised,
}
LEARNING = frozenset({Rapid, Rcad})
"""Those that run the network in training mode, and seed what it draws by torch's one generator."""


def do(settings: Action, model: Parameters, holding: Holding) -> Outcome:
    """Do one step and check what it made; nothing that is handed in is changed.

    Nor is what training does not move, frozen parameters and buffers, changed in what it made.

    Parameters
    ----------
    model
        The global model, or what the action says comes with it.

    Raises
    ------
    ParametersError
        If there is no such step, or what it made is not finite, or its loss no number: then there
        is no result, and the model is what it was.
    """
    step = STEPS.get(type(settings))
    if step is None:
        known = ", ".join(sorted(kind.action for kind in STEPS))
        raise ParametersError(f"there is no step {settings.action}; known are {known}")
    try:
        outcome = _stepped(step, settings, model, holding)
        check_finite(outcome.arrays)
    except NotFiniteError as error:
        raise ParametersError(f"{settings.action} diverged: {error}; {REMEDY}") from error
    if settings.action.startswith("train."):
        _check_loss(settings, outcome.arrays, holding)
    return outcome


def _stepped(step: Step, settings: Action, model: Parameters, holding: Holding) -> Outcome:
    """Do one step on what training moves; a question is asked of the whole model."""
    if not settings.action.startswith("train.") or isinstance(settings, Rcad):
        return step(settings, model, holding)  # RCAD trains the network itself, as ever
    if isinstance(settings, Ascend):
        parts = parted(model)
        whole: Parameters = parts.get("reference", {})
        own, held = moving(whole, holding)
        sent: Parameters = joined(
            **{part: {n: t for n, t in of.items() if n in own} for part, of in parts.items()}
        )
    else:
        whole = model
        own, held = moving(whole, holding)
        sent = own
    if own is whole:
        return step(settings, model, holding)
    made = step(settings, sent, held)
    arrays = {name: made.arrays.get(name, tensor) for name, tensor in whole.items()}
    return dataclasses.replace(made, arrays=arrays)


@torch.no_grad()
def _check_loss(settings: Action, model: Parameters, holding: Holding) -> None:
    for rows in (holding.forget, holding.test):
        if len(rows[0]):
            loss: Tensor = holding.loss(predicted(model, holding, rows), rows[1]).mean()
            if not bool(torch.isfinite(loss)):
                raise ParametersError(
                    f"{settings.action} diverged: the loss is {float(loss)}; {REMEDY}"
                )
