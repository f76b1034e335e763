"""Move what is predicted of the rows to forget to what is predicted of unseen ones."""

from client.forgetting.holding import classes_of
from client.forgetting.interface import Holding, Outcome
from strategies.actions import MacForget
from unlearning import macforget
from unlearning.parameters import Parameters


def forget_posterior(settings: MacForget, model: Parameters, holding: Holding) -> Outcome:
    """Take masked steps towards the posterior of the holder's own test rows (``methods`` 2.9).

    Ends once the rows are predicted no more surely than those test rows; without any the aim is
    uniform, and all steps are taken. Without rows to forget the model stays as it is.

    Returns
    -------
    Outcome
        The model; metrics ``steps`` and ``stopped``, 1 if the rule ended it.
    """
    if not len(holding.forget[0]):
        return Outcome(dict(model), {"steps": 0, "stopped": 0})
    unseen = holding.test[0]
    classes = classes_of(model, holding)
    went = macforget.forget(
        model,
        holding.forward,
        holding.forget[0],
        macforget.target_posterior(model, holding.forward, unseen, classes),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        share=settings.share,
        penalty=settings.penalty,
        stop=macforget.as_unsure_as(holding.forward, holding.forget[0], unseen)
        if len(unseen)
        else None,
    )
    metrics = {"steps": len(went.divergences), "stopped": int(went.stopped)}
    return Outcome(went.model, metrics)
