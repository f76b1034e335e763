"""The one round loop, used by every engine.

Flower's own ``start`` has a fixed number of rounds and no step between them. This loop goes on
while clients wait to be forgotten or the model recovers, and commits every round before the next.
"""

import functools
import time
from collections.abc import Callable, Mapping

from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from strategies import messages
from strategies.directory import QuorumError
from strategies.records import RoundRecord
from strategies.recovery import VALIDATION
from strategies.wrapper import Unlearning
from unlearning.parameters import Parameters
from unlearning.plan import Ask

MOST_VOID = 20
"""Rounds in a row without a new model, after which unfinished forgetting is given up."""

Measure = Callable[[int, Parameters], Mapping[str, float | None]]
"""Round number and model -> measures of the model, such as ``validation_accuracy``."""


def run_rounds(
    federation: Unlearning,
    grid: Grid,
    start: Parameters,
    *,
    rounds: int,
    played: int = 0,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    measure: Measure = lambda number, model: {},
    on_round: Callable[[RoundRecord, Parameters], None] = lambda record, model: None,
    on_ask: Callable[[Ask], None] = lambda ask: None,
    result: Result | None = None,
) -> Parameters:
    """Play ``rounds`` rounds, and more while forgetting is unfinished; return the last model.

    Parameters
    ----------
    federation
        The wrapper; holds all state between rounds.
    start
        Model to go on from.
    rounds
        Number of the last round to train in. Recovery, and waiting for the rate limit, may go
        beyond.
    played
        Rounds that ``federation`` has played already.
    train_config, evaluate_config
        Sent to clients in every round; never written to.
    measure
        Called with round 0 and after every round.
    on_round
        Called with every finished round and its model, once the store has it.
    on_ask
        Called before every ask of a method that asks clients, of which there may be many within one
        round.
    result
        Collects what Flower's ``start`` returns.
    """
    train_config = train_config if train_config is not None else ConfigRecord()
    evaluate_config = evaluate_config if evaluate_config is not None else ConfigRecord()
    result = result if result is not None else Result()
    model = start
    if not played:
        federation.initial(model, measure(0, model))
        on_round(federation.record, model)
    number, void = played, 0
    while number < rounds or federation.busy:
        number += 1
        if number > rounds and void >= MOST_VOID:
            raise QuorumError(
                f"forgetting is unfinished and the last {void} rounds made no model: "
                f"{federation.record.note}"
            )
        started = time.perf_counter()
        before, classes = model, set(federation.forgotten_classes)
        model = _train(federation, grid, number, model, train_config, result)
        pruned = federation.unlearn_if_due(model, grid, train_config, on_ask)
        model = model if pruned is None else pruned
        federation.settle_marks(model, grid, train_config)
        measured = functools.partial(
            _measured, measure, federation, grid, number, config=evaluate_config, result=result
        )
        if federation.forgotten_classes != classes:  # measures leave these out from now on
            federation.recovery.measured_anew(measured(before).get(VALIDATION))
        measures = measured(model)
        record = federation.record
        void = void + 1 if record.note else 0
        record.measures = measures
        federation.after_measures()
        record.seconds = time.perf_counter() - started
        federation.store.commit(record, model, federation.roster)
        on_round(record, model)
    return model


def _train(
    federation: Unlearning,
    grid: Grid,
    number: int,
    model: Parameters,
    config: ConfigRecord,
    result: Result,
) -> Parameters:
    try:
        outgoing = federation.configure_train(
            number, messages.record_from(model), ConfigRecord(dict(config)), grid
        )
    except QuorumError as error:
        federation.void_round(number, error)
        return model
    replies = grid.send_and_receive(outgoing, timeout=federation.deadline_s)
    arrays, metrics = federation.aggregate_train(number, replies)
    if metrics is not None:
        result.train_metrics_clientapp[number] = metrics
        federation.record.metrics = {
            name: float(value) for name, value in metrics.items() if not isinstance(value, list)
        }
    return model if arrays is None else messages.parameters_from(arrays)


def _measured(
    measure: Measure,
    federation: Unlearning,
    grid: Grid,
    number: int,
    model: Parameters,
    *,
    config: ConfigRecord,
    result: Result,
) -> dict[str, float | None]:
    """Measure a model; validation is the clients' own where the server has none."""
    found = dict(measure(number, model))
    asked = _ask_clients(federation, grid, number, model, config, result)
    if found.get(VALIDATION) is None and asked is not None:
        found[VALIDATION] = asked
    return found


def _ask_clients(
    federation: Unlearning,
    grid: Grid,
    number: int,
    model: Parameters,
    config: ConfigRecord,
    result: Result,
) -> float | None:
    """Return the clients' median accuracy on data of their own, if the strategy evaluates."""
    try:
        outgoing = federation.configure_evaluate(
            number, messages.record_from(model), ConfigRecord(dict(config)), grid
        )
    except QuorumError:
        return None
    if not outgoing:
        return None
    replies = grid.send_and_receive(outgoing, timeout=federation.deadline_s)
    metrics = federation.aggregate_evaluate(number, replies)
    if metrics is None:
        return None
    result.evaluate_metrics_clientapp[number] = metrics
    return federation.clients_accuracy
