"""PCMU: train by quantised gradients, and ask whether a deletion would have changed a step.

It is FFMU with one device (``methods`` 3.3): the device's rounds and the server's steps are those
of a federation with one client, bit for bit.
"""

import time
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch.utils.data import TensorDataset

from client.central.case import Case, Made
from client.forgetting import ffmu as device
from client.forgetting.holding import classes_of
from client.train import Job
from strategies.actions import CANCELLED, LARGEST, Ffmu
from strategies.methods.settings import Keys
from unlearning import certificates, ffmu, margins, pcmu
from unlearning.errors import NotCertifiedError
from unlearning.parameters import Parameters, trained_names

REMEDY = "set uncertified=true to measure the model as it is"


class Pcmu(Keys):
    """PCMU, which is FFMU with one device (``methods`` 3)."""

    rounds: int = Field(60, ge=1)
    local: Literal["path", "full"] = "path"
    """The mean gradient along local training; or one gradient of all rows, as the certificate
    wants."""
    local_epochs: int = Field(2, ge=1)
    """Of ``path``: passes over the rows in a round."""
    sigma: float = Field(pcmu.SIGMA, gt=0)
    lam_factor: float = Field(pcmu.LAM_FACTOR, ge=0)
    alpha_local: float = Field(pcmu.ALPHA, gt=0)
    alpha_server: float = Field(ffmu.ALPHA_SERVER, gt=0)
    clip: float = Field(0.0, ge=0)
    """Of ``full``: bound on every entry of a row's gradient; 0 for none."""
    rate: float = Field(ffmu.LEARNING_RATE, gt=0)
    uncertified: bool = False
    """Whether to measure the model although nothing shows that the rows are forgotten."""

    @property
    def action(self) -> Ffmu:
        """Return what a client would be told."""
        told = self.model_dump(include={"sigma", "lam_factor", "alpha_local", "local", "clip"})
        return Ffmu(**told)

    @property
    def quantiser(self) -> pcmu.Quantiser:
        """Return the server's quantiser."""
        return replace(self.action.quantiser, alpha=self.alpha_server)


def prompt(settings: Pcmu, case: Case) -> Made:
    """Train by quantised gradients; the model stays as it is if no step can have changed.

    Raises
    ------
    NotCertifiedError
        If that is not shown, unless the settings ask for its measures all the same; or if all
        rows are to go.
    ParametersError
        If none is to go.
    """
    classes_of(case.model, case.holding)
    asked = margins.load([(len(case.rows), case.all_rows)])
    if not settings.uncertified:  # told before training
        _check_certifiable(case.start, settings)
    started = time.perf_counter()
    model, found = trained(settings, case)
    took = time.perf_counter() - started
    started = time.perf_counter()
    check = found.check(asked)
    warning = pcmu.dead_zone(settings.quantiser)
    warnings = () if warning is None else (warning,)
    guarantee = "exact"
    try:
        _check_certifiable(model, settings)
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
        seconds=time.perf_counter() - started,
        training_seconds=took,
    )


def trained(settings: Pcmu, case: Case) -> tuple[Parameters, margins.Margins]:
    """Return the model after all rounds, and how far its steps were from others.

    Of ``path`` there are no margins: gradients on the way are not those of one model.
    """
    told = case.training.model_copy(update={"local_epochs": settings.local_epochs})
    rows, quantiser = TensorDataset(*case.in_order), settings.quantiser
    model, found = case.start, margins.Margins()
    for number in range(1, settings.rounds + 1):
        rate = ffmu.learning_rate(number, settings.rounds, settings.rate)
        job = Job(case.task, rows, told, (number, 0), case.holding.device)
        asked = settings.action.model_copy(update={"ffmu_rate": rate})
        sent, metrics = device.do(job, model, asked)
        slope = ffmu.as_gradient(model, sent)
        if settings.local == "full":
            one = certificates.Device(
                gradient=slope, samples=case.all_rows, largest=metrics[LARGEST]
            )
            cancelled = bool(metrics[CANCELLED])
            found = found.after(margins.reach(model, [one], quantiser, cancelled=cancelled))
        buffers = {name: sent[name] for name in set(sent) - set(trained_names(sent))}
        model = ffmu.server_step(model, [slope], rate, quantiser) | buffers
        case.tell("training in quantised steps", number / settings.rounds)
    return model, found


def _check_certifiable(model: Parameters, settings: Pcmu) -> None:
    try:
        certificates.check_certifiable(model, settings.quantiser, full=settings.local == "full")
    except NotCertifiedError as refusal:
        raise NotCertifiedError(f"{refusal}; set local=full, or {REMEDY}") from refusal
