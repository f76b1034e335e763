"""From a task to numbers: train, forget, fine-tune, measure."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.central.case import Case, Graded, Made, Models, Tell, graded, rows_named, untold
from client.central.log import Log
from client.central.methods import Method
from client.central.settings import Training, Tuning
from client.central.training import Watch, fit, training_rate, tuning_rate
from client.files import prepare_folder
from client.forgetting.holding import classes_of, holding_of, rows_of_class
from client.model_files import read_model
from client.task.device import choose_device
from client.task.evaluation import gather, state_of
from client.task.protocol import Task, TaskOptions, load_task
from strategies.archive import save_model
from strategies.methods.settings import Keys
from unlearning.errors import MissingNeedError, NotFiniteError, ParametersError
from unlearning.parameters import Parameters, check_finite
from unlearning.randomness import derive_seed


@dataclass(frozen=True)
class Target:
    """What is to be forgotten: a class, or rows of the training data by number."""

    forget_class: int | None = None
    rows: tuple[int, ...] = ()

    @classmethod
    def named(cls, forget_class: int | None, rows: str | None) -> "Target":
        """Return what a command line names."""
        return cls(forget_class, () if rows is None else rows_named(rows))


def prepared(
    options: TaskOptions,
    training: Training,
    target: Target,
    *,
    start: Path | None = None,
    work: Path | None = None,
    logs: bool = False,
    tell: Tell = untold,
) -> tuple[Case, Graded]:
    """Return a case, with its model trained, and what measures models of it.

    Parameters
    ----------
    start
        File of the trained model; without, it is trained here.
    work
        Folder where trained models are kept, and found again. A training that is to be logged
        is done again.
    logs
        Whether batches with rows to forget are logged. There is no log of a model from a file.

    Raises
    ------
    SecateurError
        If the task, the file or the target cannot be used, or training diverges.
    """
    task, device = load_task(options), choose_device(options.device)
    data = task.client_data(0, 1)
    inputs, targets = gather(data.train)
    initial = initial_model(task, training.seed)

    def holding(rows: Tensor) -> Any:
        return holding_of(task, data, rows, training=training, purpose=(0, 0), device=device)

    rows = torch.tensor(target.rows, dtype=torch.long)
    if target.forget_class is not None:
        classes = classes_of(initial, holding(rows[:0]))
        rows = rows_of_class(targets, target.forget_class, classes)
        if not len(rows):
            raise MissingNeedError(
                f"no training row is of class {target.forget_class}, so there is nothing to "
                "forget; take more examples or another class"
            )
    numbers = tuple(rows.tolist())
    held = holding(rows)  # so that a row that is not there is told before training
    staying = sorted(set(range(len(inputs))) - set(numbers))

    def train(
        begin: Parameters,
        chosen: Sequence[int] | None,
        epochs: int | None,
        purpose: tuple[int, int],
        *,
        watch: Watch | None = None,
        stage: str | None = "training without the rows",
    ) -> dict[str, Tensor]:
        places = torch.tensor(staying if chosen is None else list(chosen), dtype=torch.long)
        count = training.local_epochs if epochs is None else epochs

        def told(epoch: int, _: Parameters) -> None:
            if stage is not None:
                tell(stage, epoch / count)

        # Only a training with these rows can keep them together.
        together = numbers if chosen is not None and len(places) == len(inputs) else ()
        return fit(
            task, begin, (inputs[places], targets[places]), training, epochs=count,
            rate=training_rate(training), purpose=purpose, device=device, concentrated=together,
            watch=watch, each=told,
        )  # fmt: skip

    log = Log(frozenset(numbers)) if logs and start is None else None
    kept = None
    if work is not None:
        kept = work / f"trained-{_name(options, training, target)}.safetensors"
        prepare_folder(work, (kept.name,), "--work")
    if start is not None:
        model = read_model(start, initial)
    elif kept is not None and kept.exists() and log is None:
        model = read_model(kept, initial)
    else:
        model = train(initial, range(len(inputs)), None, (0, 0), watch=log, stage="training")
        if kept is not None:
            save_model(kept, model)
    case = Case(
        task, held, initial, model, training, numbers, target.forget_class, train, log, tell
    )  # fmt: skip
    return case, graded(case, data)


def initial_model(task: Task, seed: int) -> dict[str, Tensor]:
    """Return the model before training; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initial model"))
        return state_of(task.build_model())


def _name(options: TaskOptions, training: Training, target: Target) -> str:
    told = {
        "task": options.model_dump(exclude={"device"}),
        "training": training.model_dump(),
        "rows": [target.forget_class, target.rows] if training.concentration else None,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- forgetting


@dataclass(frozen=True)
class Outcome:
    """What a method did, measured.

    Attributes
    ----------
    before, unlearned, tuned
        Measures of the models before, right after forgetting, and after each epoch of fine-tuning.
    seconds, tuning_seconds
        Of forgetting and fine-tuning; measuring is not in them.
    """

    made: Made
    before: dict[str, Any]
    unlearned: dict[str, Any]
    tuned: list[dict[str, Any]] = field(default_factory=list)
    models: Models = ()
    seconds: float = 0.0
    tuning_seconds: float = 0.0

    @property
    def after(self) -> dict[str, Any]:
        """Return the measures at the end."""
        return self.tuned[-1] if self.tuned else self.unlearned


def forgotten(
    case: Case,
    grade: Graded,
    method: Method,
    settings: Keys,
    tuning: Tuning,
    *,
    tell: Tell = untold,
) -> Outcome:
    """Forget, fine-tune where the method or the settings say so, and measure.

    Raises
    ------
    SecateurError
        If the method cannot serve this case, or diverges.
    """
    tell("forgetting", 0.0)
    started = time.perf_counter()
    try:
        made = method.run(settings, case)
        for model in made.models:
            check_finite(model)
    except NotFiniteError as error:
        raise ParametersError(
            f"the method diverged: {error}; lower its rate or the number of its steps with --set"
        ) from error
    seconds = time.perf_counter() - started if made.seconds is None else made.seconds
    tell("measuring", 0.0)
    before = grade(made.before or (case.model,))
    unlearned = grade(made.models)
    epochs = method.tuned if tuning.epochs is None else tuning.epochs
    # An ensemble is no model to train on with, and without rows there is nothing to train on.
    reason = (
        f"{len(made.models)} models make one prediction" if len(made.models) != 1
        else "no rows remain" if not len(case.holding.remain[0])
        else ""
    )  # fmt: skip
    if reason and epochs:
        warning = f"not_tuned: {reason}, so that there is nothing to fine-tune"
        made = dataclasses.replace(made, warnings=(*made.warnings, warning))
    if reason or not epochs:
        return Outcome(made, before, unlearned, models=made.models, seconds=seconds)
    tuned: list[dict[str, Any]] = []
    spent = 0.0

    def measure(epoch: int, model: Parameters) -> None:
        nonlocal spent, started
        spent += time.perf_counter() - started
        tuned.append(grade((model,)))
        tell("fine-tuning", epoch / epochs)
        started = time.perf_counter()

    started = time.perf_counter()
    model = fit(
        case.task, made.models[0], case.holding.remain, case.training, epochs=epochs,
        rate=tuning_rate(case.training, tuning, epochs), purpose=(1, 0),
        device=case.holding.device, each=measure,
    )  # fmt: skip
    return Outcome(made, before, unlearned, tuned, (model,), seconds, spent)


def retraining(case: Case, grade: Graded) -> tuple[dict[str, Any], float]:
    """Return the measures of the model trained without the rows, and the seconds it took."""
    started = time.perf_counter()
    model = case.train(case.start, None, None, (0, 0))
    seconds = time.perf_counter() - started
    return grade((model,)), seconds
