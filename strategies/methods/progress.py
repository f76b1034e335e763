"""How far the holders got with a step, for the record of an unlearning."""

from collections.abc import Sequence

from strategies.actions import Action
from strategies.methods.interface import MOST
from unlearning.parameters import Parameters, difference, norm
from unlearning.plan import Answer


def progress_of(
    kind: type[Action], model: Parameters, answers: Sequence[Answer]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return what the holders' answers say of a step, and a warning where it moved nothing.

    Parameters
    ----------
    model
        What they were sent.
    answers
        Of holders with rows to forget, at least one, each with a model.

    Returns
    -------
    dict
        ``holders_moved``, whose model is not the one sent; ``farthest``, the largest distance from
        it; of every metric of the step the sum, and as ``most_...`` the largest of one holder. All
        but the first two are what holders say.
    tuple
        ``unmoved`` where no holder's model is another.
    """
    distances = [norm(difference(answer.arrays or model, model)) for answer in answers]
    found: dict[str, float] = {
        "holders_moved": sum(distance > 0 for distance in distances),
        "farthest": max(distances),
    }
    for metric in kind.told:
        values = [answer.metrics.get(metric, 0) for answer in answers]
        found |= {metric: sum(values), f"{MOST}{metric}": max(values)}
    if found["holders_moved"]:
        return found, ()
    return found, (
        f"unmoved: none of {len(answers)} holders changed the model: nothing was forgotten but by "
        "what follows",
    )
