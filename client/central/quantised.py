"""PCMU: train by quantised gradients, and ask whether a deletion would have changed a step."""

from typing import Literal

import torch
from pydantic import Field

from client.central.case import Case, Made
from client.forgetting.holding import classes_of
from strategies.methods.settings import Keys
from unlearning import certificates, ffmu, pcmu
from unlearning.errors import NotCertifiedError
from unlearning.gradients import chunked_gradient, gradient, per_sample_gradients
from unlearning.parameters import Parameters
from unlearning.randomness import generator

CHUNK = 64


class Pcmu(Keys):
    """PCMU, which is FFMU with one device (``methods`` 3)."""

    rounds: int = Field(20, ge=1)
    local: Literal["path", "full"] = "path"
    """A step for every batch; or one a round on all rows, as the certificate wants."""
    sigma: float = Field(pcmu.SIGMA, gt=0)
    lam_factor: float = Field(pcmu.LAM_FACTOR, ge=0)
    alpha: float = Field(pcmu.ALPHA, gt=0)
    rate: float = Field(ffmu.LEARNING_RATE, gt=0)
    uncertified: bool = False
    """Whether to measure the model although nothing shows that the rows are forgotten."""


def prompt(settings: Pcmu, case: Case) -> Made:
    """Train by quantised gradients; the model stays as it is if no step can have changed.

    Raises
    ------
    NotCertifiedError
        If that is not shown, unless the settings ask for its measures all the same.
    """
    classes_of(case.model, case.holding)
    quantiser = pcmu.Quantiser(
        sigma=settings.sigma, lam_factor=settings.lam_factor, alpha=settings.alpha
    )
    full = settings.local == "full"
    model: Parameters = case.start
    check = certificates.ExactCheck()
    for number in range(1, settings.rounds + 1):
        rate = ffmu.learning_rate(number, settings.rounds, settings.rate)
        if full:
            slope, masks = _looked_at(model, case, quantiser)
            model = pcmu.step(model, slope, rate, quantiser)
            check = check.after(masks)
        else:
            model = _along(model, case, rate, quantiser, number)
    told = pcmu.dead_zone(quantiser)
    warnings = () if told is None else (told,)
    notes = {"certified_share": check.share}
    try:
        if full:
            certificates.check_certifiable(model, quantiser, full=full)
        kept = certificates.answer(model, check, settings.rounds)
    except NotCertifiedError as refusal:
        if not settings.uncertified:
            raise NotCertifiedError(
                f"{refusal}, or set uncertified=true to measure the model as it is"
            ) from refusal
        return Made((model,), (model,), notes, (*warnings, f"not_certified: {refusal}"))
    return Made((kept,), (model,), notes, warnings, guarantee="exact")


def _along(
    model: Parameters, case: Case, rate: float, quantiser: pcmu.Quantiser, number: int
) -> Parameters:
    holding = case.holding
    inputs, targets = case.everything
    draw = generator(case.training.seed, "pcmu", number)
    for rows in torch.split(torch.randperm(len(inputs), generator=draw), case.training.batch_size):
        slope = gradient(model, holding.forward, holding.loss, inputs[rows], targets[rows])
        model = pcmu.step(model, slope, rate, quantiser)
    return model


def _looked_at(
    model: Parameters, case: Case, quantiser: pcmu.Quantiser
) -> tuple[Parameters, Parameters]:
    """Return the gradient of all rows, and where its step is the same without some."""
    holding = case.holding
    inputs, targets = case.everything
    slope = chunked_gradient(model, holding.forward, holding.loss, inputs, targets)
    largest = {name: torch.zeros_like(tensor) for name, tensor in slope.items()}
    for rows in torch.split(torch.arange(len(inputs)), CHUNK):
        singles = per_sample_gradients(
            model, holding.forward, holding.loss, inputs[rows], targets[rows]
        )
        for name, tensor in singles.items():
            largest[name] = torch.maximum(largest[name], tensor.abs().amax(dim=0))
    device = certificates.Device(
        gradient=slope, samples=len(inputs), removed=len(case.rows), largest=largest
    )
    return slope, certificates.certified([device], quantiser)
