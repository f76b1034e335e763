"""PCMU: train by quantised gradients, and ask whether a deletion would have changed a step."""

import time
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
REMEDY = "set uncertified=true to measure the model as it is"


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
    if not settings.uncertified:  # told before training
        _check_certifiable(model, quantiser, settings)
    started = time.perf_counter()
    check = certificates.ExactCheck()
    for number in range(1, settings.rounds + 1):
        rate = ffmu.learning_rate(number, settings.rounds, settings.rate)
        if full:
            slope, masks = _looked_at(model, case, quantiser)
            model = pcmu.step(model, slope, rate, quantiser)
            check = check.after(masks)
        else:
            model = _along(model, case, rate, quantiser, number)
        case.tell("training in quantised steps", number / settings.rounds)
    trained = time.perf_counter()
    told = pcmu.dead_zone(quantiser)
    warnings = () if told is None else (told,)
    guarantee = "exact"
    try:
        _check_certifiable(model, quantiser, settings)
        model = certificates.answer(model, check, settings.rounds)
    except NotCertifiedError as refusal:
        if not settings.uncertified:
            raise NotCertifiedError(f"{refusal}, or {REMEDY}") from refusal
        warnings, guarantee = (*warnings, f"not_certified: {refusal}"), "none"
    return Made(
        (model,),
        (model,),
        {"rounds": settings.rounds, "certified_share": check.share},
        warnings,
        guarantee,
        seconds=time.perf_counter() - trained,
        training_seconds=trained - started,
    )


def _check_certifiable(model: Parameters, quantiser: pcmu.Quantiser, settings: Pcmu) -> None:
    try:
        certificates.check_certifiable(model, quantiser, full=settings.local == "full")
    except NotCertifiedError as refusal:
        raise NotCertifiedError(f"{refusal}; set local=full, or {REMEDY}") from refusal


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
