"""What can be said of a model trained by FFMU, for the report (``methods`` 3.4 and 3.5).

Three statements, in the words of ``unlearning.certificates``. Only the second is about whether a
deletion changes the model; it is made for the smallest request there is.
"""

from typing import Any

import torch

from client.task.evaluation import gather
from client.task.protocol import Task, server_data
from server.federation import lab_for
from strategies.ffmu import FFMU
from unlearning import certificates, pcmu
from unlearning.errors import SecateurError
from unlearning.gradients import gradient
from unlearning.parameters import Parameters
from unlearning.randomness import generator

PAIRS = 64
"""Of samples, that the Lipschitz constant is estimated from."""
SPEED = (
    "unlearning takes no time, but only for requests that are certified; training takes longer "
    "than plain training, in the paper 5 to 6 times; neither plain training nor retraining was "
    "measured here"
)


def ffmu_statements(
    strategy: FFMU, task: Task, network: torch.nn.Module, model: Parameters, seed: int
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
    """
    warning = pcmu.dead_zone(strategy.quantiser)
    close = strategy.course.closeness
    return {
        "threshold": strategy.quantiser.threshold,
        "warnings": [] if warning is None else [warning],
        "paper": _paper(strategy, task, network, model, seed),
        "exact": _exact(strategy),
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
        "speedup_note": SPEED,
    }


def _exact(strategy: FFMU) -> dict[str, Any]:
    """Return statement (b) for one sample of the client that has most."""
    told: dict[str, Any] = {
        "removed": 1,
        "certified": False,
        "share": None,
        "rounds_not_certified": {str(n): why for n, why in strategy.course.reasons.items()},
    }
    samples = strategy.course.samples
    try:
        check = strategy.check({max(samples, key=samples.__getitem__): 1} if samples else {})
    except SecateurError as error:
        return told | {"statement": str(error)}
    return told | {
        "certified": check.complete and check.rounds == strategy.course.number,
        "share": check.share,
        "statement": check.statement,
    }


def _paper(
    strategy: FFMU, task: Task, network: torch.nn.Module, model: Parameters, seed: int
) -> dict[str, Any] | None:
    """Return statement (a) for the last average; ``None`` where the server has no two samples."""
    mean, examples = strategy.course.gradient, server_data(task).validation
    if mean is None or examples is None:
        return None
    inputs, targets = gather(examples)
    order = torch.randperm(len(targets), generator=generator(seed, "lipschitz"))[: 2 * PAIRS]
    forward = lab_for(task, network, None, inputs).forward
    drawn = [
        (inputs[row], gradient(model, forward, task.loss, inputs[row, None], targets[row, None]))
        for row in order.tolist()
    ]
    try:
        found = certificates.paper_certificate(
            mean,
            strategy.quantiser,
            samples=strategy.course.total,
            dimension=inputs[0].numel(),
            lipschitz=certificates.estimated_lipschitz(zip(drawn[::2], drawn[1::2], strict=False)),
            removed=1,
            estimated=True,
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
