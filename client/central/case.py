"""What a method on one machine is told and returns, and how a model is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from client.central.log import Log
from client.central.settings import SettingsError, Training
from client.forgetting.holding import classes_of
from client.forgetting.interface import Holding, Rows
from client.forgetting.steps import do
from client.task.evaluation import accuracy_of, gather
from client.task.protocol import Split, Task, server_data, size_of
from strategies.actions import Selection, parted
from unlearning.errors import MissingNeedError
from unlearning.metrics import accuracy
from unlearning.parameters import Parameters
from unlearning.sums import Statistics

Tell = Callable[[str, float], None]
"""Told of a stage, and of the share of it that is done."""


def untold(stage: str, done: float) -> None:
    """Tell nobody."""
    del stage, done


MOST_ROWS = 100_000_000
"""Of a training set on one machine; a list of their numbers still fits into memory."""

Models = tuple[Parameters, ...]
"""One model, or several whose probabilities are averaged."""


@dataclass(frozen=True, eq=False)
class Case:
    """One request to forget, on one machine.

    Attributes
    ----------
    holding
        Rows to forget and the others, and how it trains; nobody trains on its test rows.
    start
        Model before training.
    model
        The trained one.
    training
        How it was trained.
    rows
        Numbers, among the training rows, of those to forget.
    forget_class
        Where they are a whole class: which.
    log
        What the batches with those rows changed, where it was recorded.
    train
        Trains a model on the training rows with these numbers, as the original was: from a start,
        for so many epochs (the training's where ``None``), under a purpose.
    tell
        Told of what takes long.
    """

    task: Task
    holding: Holding
    start: Parameters
    model: Parameters
    training: Training
    rows: tuple[int, ...]
    forget_class: int | None
    train: "Trainer"
    log: Log | None = None
    tell: Tell = untold

    @property
    def selection(self) -> dict[str, Any]:
        """Return the request, as actions carry it; rows were chosen before."""
        if self.forget_class is None:
            return {"forget": "all"}
        return {"forget": "class", "forget_class": self.forget_class}

    @property
    def everything(self) -> Rows:
        """Return all training rows, those to forget first."""
        pairs = zip(self.holding.forget, self.holding.remain, strict=True)
        inputs, targets = (torch.cat(pair) for pair in pairs)
        return inputs, targets

    @property
    def in_order(self) -> Rows:
        """Return all training rows in the order of their numbers."""
        gone = set(self.rows)
        staying = (number for number in range(self.all_rows) if number not in gone)
        places = torch.tensor([*self.rows, *staying], dtype=torch.long).argsort()
        inputs, targets = self.everything
        return inputs[places], targets[places]

    @property
    def all_rows(self) -> int:
        """Return the number of training rows."""
        return len(self.holding.forget[0]) + len(self.holding.remain[0])


class Trainer(Protocol):
    """Trains as the original was trained."""

    def __call__(
        self,
        begin: Parameters,
        chosen: Sequence[int] | None,
        epochs: int | None,
        purpose: tuple[int, int],
        *,
        stage: str | None = "training without the rows",
    ) -> dict[str, Tensor]:
        """Return a model.

        Parameters
        ----------
        chosen
            Numbers of rows; ``None`` for those that remain.
        epochs
            ``None`` for the training's.
        stage
            What is told of each epoch, if anything.
        """


@dataclass(frozen=True)
class Made:
    """What a method made.

    Attributes
    ----------
    models
        The model, or several.
    before
        The same before forgetting, for methods that train in a way of their own.
    notes
        Numbers to report.
    guarantee
        ``exact``, ``none``, or a statement with its conditions.
    seconds, training_seconds
        Of methods that train in a way of their own: of forgetting alone, and of that training.
    """

    models: Models
    before: Models = ()
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    guarantee: str = "none"
    seconds: float | None = None
    training_seconds: float | None = None


def selected(settings: dict[str, Any], kind: type[Selection], case: Case) -> Any:
    """Return the settings of an action about the case's rows."""
    return kind.model_validate({**settings, **case.selection})


def sums_of(kind: type[Selection], settings: dict[str, Any], case: Case) -> dict[str, Statistics]:
    """Return a holder's sums by group, as a federation's server would get them."""
    outcome = do(selected(settings, kind, case), case.model, case.holding)
    return {
        group: Statistics(sums, int(outcome.metrics[f"{group}-count"]))
        for group, sums in parted(outcome.arrays).items()
    }


# ---------------------------------------------------------------- measures


@dataclass(frozen=True, eq=False)
class Graded:
    """Measures models on rows that nobody decides anything by.

    Attributes
    ----------
    test
        Rows that nobody trains on.
    """

    case: Case
    test: Rows
    classes: int | None

    def __call__(self, models: Models) -> dict[str, Any]:
        """Return accuracies in [0, 1], ``None`` where there is nothing to measure.

        ``test`` is over all test rows, ``retained`` over those of classes that stay, ``worst`` the
        lowest of such a class; ``forget_train`` and ``forget_test`` over rows to forget.
        """
        outputs = self.predicted(models, self.test[0])
        found: dict[str, Any] = {
            "test": accuracy_of(self.case.task.metrics(outputs, self.test[1])),
            "retained": None, "worst": None, "worst_class": None,
            "forget_train": self._forget(models), "forget_test": None, "classes": None,
        }  # fmt: skip
        if self.classes is None:
            return found
        right = outputs.argmax(dim=1) == self.test[1]
        gone = self.case.forget_class
        per_class = [
            accuracy(right[mine].long(), torch.ones(int(mine.sum()), dtype=torch.long))
            for number in range(self.classes)
            for mine in [self.test[1] == number]
        ]
        staying = {n: share for n, share in enumerate(per_class) if n != gone and share is not None}
        kept = self.test[1] != (-1 if gone is None else gone)
        worst = min(staying, key=lambda number: staying[number], default=None)
        return found | {
            "retained": accuracy(right[kept].long(), torch.ones(int(kept.sum()), dtype=torch.long)),
            "worst": None if worst is None else staying[worst],
            "worst_class": worst,
            "forget_test": None if gone is None else per_class[gone],
            "classes": per_class,
        }

    @torch.no_grad()
    def predicted(self, models: Models, inputs: Tensor) -> Tensor:
        """Return outputs of a model; of several, the logarithm of their mean probabilities."""
        outputs = [self.case.holding.forward(model, inputs) for model in models]
        if len(outputs) == 1:
            return outputs[0]
        if self.classes is None:
            return torch.stack(outputs).mean(dim=0)
        return torch.stack([output.softmax(dim=1) for output in outputs]).mean(dim=0).log()

    def _forget(self, models: Models) -> float | None:
        inputs, targets = self.case.holding.forget
        if not len(inputs):
            return None
        return accuracy_of(self.case.task.metrics(self.predicted(models, inputs), targets))


def graded(case: Case, data: Split) -> Graded:
    """Return what measures models of a case, on the task's test data or the holder's own."""
    test = server_data(case.task).test
    rows = gather(test if test is not None and size_of(test) else data.test)
    try:
        classes: int | None = classes_of(case.model, case.holding)
    except MissingNeedError:
        classes = None
    return Graded(case, rows, classes)


def rows_named(text: str) -> tuple[int, ...]:
    """Return row numbers of a text such as ``1,5,7-20``, sorted.

    Raises
    ------
    SettingsError
        If it names none, one twice, or more than a training set may have.
    """
    rows: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise SettingsError(f"{text!r} names no rows; give numbers, such as 1,5,7-20")
        named = range(int(first), int(last or first) + 1)
        if not named:
            raise SettingsError(f"{part} runs backwards; give the smaller number first")
        if named[-1] >= MOST_ROWS:
            raise SettingsError(f"{part} names a row from {MOST_ROWS:,} on; no training has those")
        rows += named
    if len(set(rows)) < len(rows):
        raise SettingsError(f"{text!r} names a row twice; give each once")
    return tuple(sorted(rows))
