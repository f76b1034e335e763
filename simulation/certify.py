"""What can be said of a model trained by FFMU, for the report (``methods`` 3.4 and 3.5).

Three statements, in the words of ``unlearning.certificates``. Only the second is about whether a
deletion changes the model; it is made for the smallest request there is, unless settings ask for
more samples.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from client.task.evaluation import gather
from client.task.protocol import Task, server_data
from server.federation import lab_for
from server.settings import Settings
from strategies.ffmu import FFMU
from strategies.records import Phase, RoundRecord
from unlearning import certificates, pcmu
from unlearning.errors import SecateurError
from unlearning.gradients import gradient
from unlearning.parameters import Parameters
from unlearning.randomness import generator

PAIRS = 64
"""Of samples, that the Lipschitz constant is estimated from."""
SPEED = (
    "unlearning takes no time, but only for requests that are certified; training takes longer "
    "than plain training, in the paper 5 to 6 times, and plain training was not measured here; "
)
UNMEASURED = SPEED + "nor was retraining"
MEASURED = SPEED + (
    "the speed is that of one request: seconds of training and of retraining, both by FFMU's "
    "rounds, over those of training alone; it counts only if the request is certified"
)


def ffmu_statements(
    strategy: FFMU,
    task: Task,
    network: torch.nn.Module,
    model: Parameters,
    settings: Settings,
) -> dict[str, Any]:
    """Return labels and numbers of the three statements, and the warnings, as plain JSON values.

    Parameters
    ----------
    strategy
        After the training.
    network
        Of the model's class; not written to.
    model
        What the training gave.
    settings
        Of the training: the seed, L if it is known, and how many samples a request names.
    """
    warning = pcmu.dead_zone(strategy.quantiser)
    close = strategy.course.closeness
    return {
        "threshold": strategy.quantiser.threshold,
        "warnings": [] if warning is None else [warning],
        "paper": _paper(strategy, task, network, model, settings),
        "exact": _exact(strategy, settings.certify_samples),
        "closeness": None
        if close is None
        else {
            "statement": close.statement,
            "bound": close.bound,
            "vacuous": close.vacuous,
            "constant": close.constant,
            "distance": close.distance,
            "devices": close.devices,
        },
        "speedup_vs_retrain": None,
        "speedup_note": UNMEASURED,
    }


def speed(
    training: Sequence[RoundRecord], retraining: Sequence[RoundRecord], rounds: int
) -> dict[str, Any]:
    """Return ``speedup_vs_retrain`` of one request, and what it is: (T + R) / T.

    Parameters
    ----------
    training
        Rounds of the run; T is the mean seconds of those that only trained, times ``rounds``.
    retraining
        Rounds of training again without what was forgotten; R is their seconds. Without any,
        nothing was measured.
    """
    plain = [r.seconds for r in training if r.phase is Phase.TRAIN and r.number > 0]
    if not retraining or not plain:
        return {"speedup_vs_retrain": None, "speedup_note": UNMEASURED}
    whole = rounds * fmean(plain)
    again = sum(record.seconds for record in retraining)
    return {"speedup_vs_retrain": (whole + again) / whole, "speedup_note": MEASURED}


def _exact(strategy: FFMU, removed: int) -> dict[str, Any]:
    """Return statement (b) for some samples of the client that has most."""
    told: dict[str, Any] = {
        "removed": removed,
        "certified": False,
        "share": None,
        "rounds_not_certified": {str(n): why for n, why in strategy.course.reasons.items()},
    }
    samples = strategy.course.samples
    try:
        check = strategy.check({max(samples, key=samples.__getitem__): removed} if samples else {})
    except SecateurError as error:
        return told | {"statement": str(error)}
    return told | {
        "certified": check.complete and check.rounds == strategy.course.number,
        "share": check.share,
        "statement": check.statement,
    }


def _paper(
    strategy: FFMU,
    task: Task,
    network: torch.nn.Module,
    model: Parameters,
    settings: Settings,
) -> dict[str, Any] | None:
    """Return statement (a) for the last average; ``None`` where the server has no two samples."""
    mean, examples = strategy.course.gradient, server_data(task).validation
    if mean is None or examples is None:
        return None
    inputs, targets = gather(examples)

    def estimate() -> float:
        draw = generator(settings.seed, "lipschitz")
        order = torch.randperm(len(targets), generator=draw)[: 2 * PAIRS]
        forward = lab_for(task, network, None, inputs).forward
        drawn = [
            (x, gradient(model, forward, task.loss, x[None], targets[row, None]))
            for row in order.tolist()
            for x in [inputs[row]]
        ]
        return certificates.estimated_lipschitz(zip(drawn[::2], drawn[1::2], strict=False))

    try:
        found = certificates.paper_certificate(
            mean,
            strategy.quantiser,
            samples=strategy.course.total,
            dimension=inputs[0].numel(),
            lipschitz=settings.lipschitz or estimate(),
            removed=settings.certify_samples,
            estimated=not settings.lipschitz,
        )
    except SecateurError as error:
        return {"statement": f"{certificates.PAPER}: {error}"}
    return {
        "statement": found.statement,
        "gradient_radius": list(found.gradient_radius),
        "data_radius": list(found.data_radius),
        "budget": list(found.budget),
        "removed": found.removed,
        "share": found.share,
        "lipschitz": found.lipschitz,
        "estimated": found.estimated,
    }
