"""Amnesiac unlearning, ascent and label flipping, whole or in parts of layers (``methods`` 6)."""

from typing import Literal

from pydantic import Field

from client.central.case import Case, Made, selected
from client.central.log import kept_bytes, pruned
from client.forgetting.holding import classes_of
from client.forgetting.steps import do
from strategies import actions
from strategies.methods.settings import Keys
from unlearning import ascent as rules
from unlearning import label_flip
from unlearning.amnesiac import amnesiac
from unlearning.ascent import accuracy_at_most
from unlearning.errors import MissingNeedError
from unlearning.partial_updates import FEW, MANY, Pattern, shares_by_depth


class Whole(Keys):
    """Amnesiac unlearning (6.1)."""

    stop: Literal["all", "target"] = "all"
    """Take back all batches, which is what forgetting means; or, from the latest epoch on, until
    the rows are no longer recognised, as in paper 002's figures."""
    forgotten: float = Field(rules.FORGOTTEN, ge=0, le=1)
    """Accuracy on the rows to forget at which ``target`` stops."""


class PartialLog(Whole):
    """Amnesiac unlearning from a partial log (6.2)."""

    dropping: Literal["random", "magnitude", "global"] = "random"
    first: float = Field(MANY, ge=0, le=1)
    """Share of the first layer's entries that the log does not keep."""
    last: float = Field(FEW, ge=0, le=1)
    """Share of the last layer's."""


class Steps(Keys):
    """Ascent and label flipping in parts of layers (6.3, 6.4)."""

    partial: bool = True
    pattern: Pattern = "comb"
    epochs: int = Field(label_flip.EPOCHS, ge=1)
    batch_size: int = Field(label_flip.BATCH_SIZE, ge=1)
    forgotten: float = Field(rules.FORGOTTEN, ge=0, le=1)


class Ascent(Steps):
    """Gradient ascent (6.4)."""

    first: float = Field(FEW, ge=0, le=1)
    last: float = Field(MANY, ge=0, le=1)
    learning_rate: float = Field(rules.PARTIAL_RATE, ge=0)
    longest: float = Field(rules.LONGEST, gt=0)


class LabelFlip(Steps):
    """Label flipping (6.3)."""

    first: float = Field(MANY, ge=0, le=1)
    last: float = Field(FEW, ge=0, le=1)
    learning_rate: float = Field(label_flip.LEARNING_RATE, ge=0)


def taken_back(settings: Whole, case: Case) -> Made:
    """Subtract what every batch with a row to forget has changed, or what the log kept of it.

    Raises
    ------
    MissingNeedError
        If there is no log.
    """
    if case.log is None:
        raise MissingNeedError(
            "an amnesiac method needs the batch log of the training: leave --start out, and the "
            "model is trained with one"
        )
    entries, nbytes = case.log.entries, case.log.nbytes
    if isinstance(settings, PartialLog):
        shares = shares_by_depth(case.model, settings.first, settings.last)
        entries = list(pruned(entries, shares, settings.dropping, case.training.seed))
        nbytes = kept_bytes(case.log, shares, settings.dropping)
    stop = None
    if settings.stop == "target" and len(case.holding.forget[0]):
        classes = classes_of(case.model, case.holding)
        stop = accuracy_at_most(
            case.holding.forward, *case.holding.forget, classes, settings.forgotten
        )
    model, removed = amnesiac(case.model, entries, case.rows, stop=stop)
    notes = {
        "batches": len(entries),
        "batches_subtracted": len(removed.batches),
        "log_bytes": nbytes,
    }
    return Made((model,), notes=notes)


def ascent(settings: Ascent, case: Case) -> Made:
    """Climb the loss of the rows to forget."""
    asked = selected(settings.model_dump(), actions.Ascent, case)
    return Made((do(asked, case.model, case.holding).arrays,))


def flip(settings: LabelFlip, case: Case) -> Made:
    """Train on the rows to forget with wrong labels."""
    asked = selected(settings.model_dump(), actions.LabelFlip, case)
    return Made((do(asked, case.model, case.holding).arrays,))
