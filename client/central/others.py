"""The other methods: exact, certified, and those to compare with (``methods`` 2, 3, 6.5)."""

import dataclasses
import time
from typing import Literal

from pydantic import Field

from client.central.case import Case, Made, selected, sums_of
from client.central.training import fit, training_rate
from client.forgetting.interface import Holding
from client.forgetting.rounds import noisy_settings, unsure
from client.forgetting.steps import do
from strategies import actions
from strategies.methods.settings import Keys
from unlearning import jackknife, noisy_descent, sisa
from unlearning.parameters import Parameters, byte_size, copied, trained_part
from unlearning.randomness import generator


class Sisa(Keys):
    """Shards and slices (6.5)."""

    shards: int = Field(4, ge=1)
    slices: int = Field(3, ge=1)


class Rapid(Keys):
    """Rapid retraining (2.8)."""

    begin: Literal["scratch", "current"] = "scratch"
    """From the initial model, for exact forgetting; or from the trained one."""
    epochs: int | None = Field(None, ge=1)
    """Passes; the training's number unless given."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    damping: float = Field(1e-2, gt=0)
    block: int = Field(3, ge=1)
    rate: float = Field(1e-3, gt=0)
    fisher: Literal["batch", "per_sample"] = "batch"


class Noisy(Keys):
    """Noisy descent (2.15)."""

    steps: int = Field(100, ge=1)
    """Of training; a fifth as many follow without the rows."""
    rate: float = Field(0.1, gt=0)
    decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0)
    noise: float = Field(1e-3, ge=0)


class Jackknife(Keys):
    """The infinitesimal jackknife (2.14)."""

    scope: Literal["last", "diag"] = "last"
    """The last layer, exactly; or all layers, by the diagonal of the Fisher information."""
    ridge: float = Field(jackknife.RIDGE, gt=0)
    damping: float = Field(jackknife.DAMPING, gt=0)


class Rcad(Keys):
    """RCAD (2.13)."""

    strength: float = Field(0.2, ge=0)
    radius: float = Field(1.0, ge=0)
    source: Literal["remain", "forget"] = "remain"
    """Which rows are perturbed."""
    epochs: int | None = Field(None, ge=1)
    """Passes; the training's number unless given."""


class MacForget(Keys):
    """MacForget, approximate (2.9)."""

    steps: int = Field(20, ge=1)
    learning_rate: float = Field(0.01, ge=0)
    share: float = Field(0.1, ge=0, le=1)
    penalty: float = Field(1e-4, ge=0)


def shards(settings: Sisa, case: Case) -> Made:
    """Train in shards and slices, then retrain what saw a row; exact for the ensemble."""
    seed = case.training.seed
    # As many steps as training needs: a row of the first slice is seen in every one.
    epochs = max(1, round(2 * case.training.local_epochs / (settings.slices + 1)))

    draw = generator(seed, "sisa")
    division = sisa.divided(range(case.all_rows), settings.shards, settings.slices, draw)
    first = sisa.touched(division, case.rows)
    concerned = sum(settings.slices - place for place in first.values())

    def trainer(stage: str, slices: int) -> sisa.Train:
        done = 0

        def train(model: Parameters, rows: tuple[int, ...], purpose: tuple[int, int]) -> Parameters:
            nonlocal done
            made = case.train(model, rows, epochs, (2 + purpose[0], purpose[1]), stage=None)
            done += 1
            case.tell(stage, done / slices)
            return made

        return train

    started = time.perf_counter()
    every = settings.shards * settings.slices
    checkpoints = sisa.trained(case.start, division, trainer("training the shards", every))
    trained = time.perf_counter()
    again_of = trainer("training shards again", concerned)
    rest, again = sisa.unlearned(case.start, division, checkpoints, case.rows, again_of)
    return Made(
        tuple(sisa.members(rest, again).values()),
        tuple(sisa.members(division, checkpoints).values()),
        {
            "shards_retrained": len(first),
            "slices_retrained": concerned,
            "slices": every,
            "checkpoint_bytes": byte_size(model for shard in checkpoints for model in shard),
        },
        guarantee="exact",
        seconds=time.perf_counter() - trained,
        training_seconds=trained - started,
    )


def rapid(settings: Rapid, case: Case) -> Made:
    """Retrain on the rows that remain, with steps scaled by curvature."""
    asked = actions.Rapid(
        **settings.model_dump(exclude={"begin", "epochs", "rate"}), rapid_rate=settings.rate
    )
    scratch = settings.begin == "scratch"
    holding = _for(case, settings.epochs)
    made = do(asked, case.start if scratch else case.model, holding)
    return Made((made.arrays,), guarantee="exact" if scratch else "none")


def _for(case: Case, epochs: int | None) -> Holding:
    """Return the holding with another number of epochs."""
    if epochs is None:
        return case.holding
    training = case.training.model_copy(update={"local_epochs": epochs})
    return dataclasses.replace(case.holding, training=training)


def noisy(settings: Noisy, case: Case) -> Made:
    """Train by noisy descent on all rows, then go on without those to forget.

    The guarantee is that of the accounting, in words, or none.
    """
    holding = case.holding
    numbers = {"noisy_rate": settings.rate, **settings.model_dump(exclude={"rate", "steps"})}
    asked = actions.Noisy(**numbers)
    everything = dataclasses.replace(holding, remain=case.everything)
    more = noisy_descent.unlearning_rounds(settings.steps)

    def steps(model: Parameters, held: Holding, first: int, count: int, stage: str) -> Parameters:
        # One after the other, as the rounds of a federation are.
        for number in range(count):
            now = dataclasses.replace(held, purpose=(first + number, held.purpose[1]))
            model = do(asked, model, now).arrays
            case.tell(stage, (number + 1) / count)
        return model

    started = time.perf_counter()
    before = steps(case.start, everything, 0, settings.steps, "training with noise")
    trained = time.perf_counter()
    after = steps(before, holding, settings.steps, more, "going on without the rows")
    seconds = time.perf_counter() - trained
    bound = None
    if case.rows:
        bound = noisy_descent.guarantee(
            noisy_settings(asked),
            rows=case.all_rows,
            forgotten=len(case.rows),
            steps=settings.steps,
        )
    return Made(
        (after,),
        (before,),
        {"steps": settings.steps, "unlearning_steps": more},
        guarantee=noisy_descent.statement(bound),
        seconds=seconds,
        training_seconds=trained - started,
    )


def influence(settings: Jackknife, case: Case) -> Made:
    """Correct the model linearly, once, for the rows that go."""
    told = jackknife.warning(len(case.rows), case.all_rows)
    warnings = () if told is None else (told,)
    found = sums_of(actions.Curvature, {"scope": settings.scope}, case)
    hessian, gradient = found["hessian"], found["gradient"]
    if settings.scope == "diag":
        own = trained_part(case.model, case.holding.trained)
        moved = jackknife.corrected_diagonally(own, gradient, hessian, settings.damping)
        return Made((copied(case.model) | moved,), warnings=warnings)
    layer = jackknife.last_layer(case.model, case.holding.trained)
    model = jackknife.corrected(case.model, layer, hessian, gradient, settings.ridge)
    return Made((model,), warnings=warnings)


def regularised(settings: Rcad, case: Case) -> Made:
    """Fine-tune on the rows that remain as in training, unsure of perturbed ones."""
    asked = actions.Rcad(**settings.model_dump(exclude={"epochs"}))
    made = fit(
        case.task,
        case.model,
        case.holding.remain,
        case.training,
        epochs=settings.epochs or case.training.local_epochs,
        rate=training_rate(case.training),
        purpose=(1, 0),
        device=case.holding.device,
        penalty=unsure(asked, case.holding),
    )
    return Made((made,))


def posterior(settings: MacForget, case: Case) -> Made:
    """Move the posterior of the rows to that of unseen ones."""
    asked = selected(settings.model_dump(), actions.MacForget, case)
    outcome = do(asked, case.model, case.holding)
    unmoved = "unmoved: the rows are predicted no more surely than unseen ones already, so no step"
    warnings = () if outcome.metrics["steps"] else (f"{unmoved} was taken",)
    return Made((outcome.arrays,), notes=dict(outcome.metrics), warnings=warnings)
