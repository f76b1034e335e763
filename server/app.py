"""The Flower ServerApp: reads the run's configuration, assembles the federation, plays it."""

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from client.task.evaluation import state_of
from client.task.protocol import load_task
from server.federation import build_federation, central_measure, initial_model
from server.settings import read_settings
from strategies.loop import run_rounds
from strategies.records import RoundRecord
from unlearning.parameters import Parameters

log = logging.getLogger("flwr")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation."""
    settings = read_settings(context.run_config)
    task = load_task(settings.task_options())
    model = initial_model(task, settings.seed)
    federation = build_federation(settings, model, task)
    federation.summary()
    run_rounds(
        federation,
        grid,
        state_of(model),
        rounds=settings.rounds,
        train_config=settings.to_record(),
        measure=central_measure(task, model, settings, lambda: federation.forgotten_classes),
        on_round=log_round,
    )


def log_round(record: RoundRecord, model: Parameters) -> None:
    """Log one line per round."""
    del model
    measures = "  ".join(
        f"{name} {value:.4f}" for name, value in record.measures.items() if value is not None
    )
    log.info(
        "round %d %s  %d of %d clients  %s",
        record.number,
        record.phase,
        len(record.participants),
        len(record.asked),
        measures,
    )
