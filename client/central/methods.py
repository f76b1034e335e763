"""Every method that runs on one machine, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from client.central import masks, others, partial, quantised
from client.central.case import Case, Made
from strategies.methods import settings
from strategies.methods.settings import Keys
from unlearning.masking import TUNED


class Nothing(Keys):
    """Of methods without settings."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes
    ----------
    settings
        Its keys.
    run
        Forgets.
    tuned
        Epochs of fine-tuning that belong to it.
    logs
        Whether it needs the batch log of the training.
    """

    settings: type[Keys]
    run: Callable[[Any, Case], Made]
    tuned: int = 0
    logs: bool = False


def unchanged(settings: Nothing, case: Case) -> Made:
    """Leave the model to fine-tuning on the rows that remain (2.2)."""
    del settings
    return Made((case.model,))


def retrained(settings: Nothing, case: Case) -> Made:
    """Train again from the start, without the rows (2.1)."""
    del settings
    return Made((case.train(case.start, None, None, (0, 0)),), guarantee="exact")


METHODS: dict[str, Method] = {
    "fisher-mask": Method(settings.Fisher, masks.fisher_mask, TUNED),
    "activation-mask": Method(settings.Channels, masks.activation_mask, TUNED),
    "grad-mask": Method(settings.Channels, masks.grad_mask, TUNED),
    "random-mask": Method(settings.Share, masks.random_masking, TUNED),
    "fisher-noise": Method(settings.Blur, masks.noise, TUNED),
    "tfidf": Method(settings.TfIdf, masks.pruning, TUNED),
    "ascent": Method(partial.Ascent, partial.ascent),
    "label-flip": Method(partial.LabelFlip, partial.flip),
    "amnesiac": Method(partial.Whole, partial.taken_back, logs=True),
    "partial-amnesiac": Method(partial.PartialLog, partial.taken_back, logs=True),
    "macforget": Method(others.MacForget, others.posterior),
    "ij": Method(others.Jackknife, others.influence),
    "rcad": Method(others.Rcad, others.regularised),
    "rapid-retraining": Method(others.Rapid, others.rapid),
    "noisy-gd": Method(others.Noisy, others.noisy),
    "sisa": Method(others.Sisa, others.shards),
    "pcmu": Method(quantised.Pcmu, quantised.prompt),
    "finetune": Method(Nothing, unchanged, TUNED),
    "retrain": Method(Nothing, retrained),
}
