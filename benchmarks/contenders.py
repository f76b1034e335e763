"""Secateur's own contenders, each run in a process of its own.

Run as ``python -m benchmarks.contenders ENGINE FILE ROUNDS STARTED``.
"""

import logging
import sys
import time

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from benchmarks import plain
from client.app import build_app, honest_job
from client.task.evaluation import state_of
from client.task.protocol import load_task
from client.train import Job
from server.federation import (
    TEST,
    build_detector,
    build_strategy,
    central_measure,
    initial_model,
)
from server.settings import Settings
from simulation.engines import ray
from simulation.engines.inprocess import InProcessGrid, collect_rarely
from strategies.directory import by_partition, wait_for_nodes
from strategies.loop import run_rounds
from strategies.records import RoundRecord
from strategies.screen import Screen
from strategies.wrapper import Unlearning
from unlearning.errors import SecateurError
from unlearning.parameters import Parameters


def make_grid(engine: str, app: ClientApp, clients: int, settings: Settings) -> Grid:
    """Return the grid of an in-process engine, made ready as ``secateur run`` does."""
    options = settings.task_options()
    load_task(options)
    collect_rarely()

    def job_of(message: Message, context: Context) -> Job:
        return honest_job(message, context, options)

    return InProcessGrid(app, clients, job_of=job_of if engine == "batched" else None)


def client_app(settings: Settings) -> ClientApp:
    """Return the ordinary ClientApp."""
    return build_app(settings.task_options().model_dump(by_alias=True))


def strategy_of(settings: Settings) -> Strategy:
    """Return the strategy of a workload; nobody evaluates but the server."""
    if settings.strategy == "fedavg":
        return FedAvg(fraction_evaluate=0.0)
    return build_strategy(settings.model_copy(update={"fraction_evaluate": 0.0}))


class Run:
    """The rounds of one federation, on any grid."""

    def __init__(self, settings: Settings, *, screened: bool = False) -> None:
        self.settings = settings
        self.screened = screened
        self.ends: list[float] = []
        self.accuracy = 0.0
        self.peak_mb = 0.0

    def play(self, grid: Grid, clients: int, rounds: int) -> None:
        """Train for ``rounds`` rounds."""
        settings = self.settings
        wait_for_nodes(grid, clients, patience_s=settings.round_deadline)
        task = load_task(settings.task_options())
        model = initial_model(task, settings.seed)
        federation = Unlearning(
            strategy_of(settings),
            screen=Screen() if self.screened else None,
            detector=build_detector(settings) if self.screened else None,
            identify=by_partition,
            seed=settings.seed,
        )
        run_rounds(
            federation,
            grid,
            state_of(model),
            rounds=rounds,
            train_config=settings.to_record(),
            measure=central_measure(task, model, settings),
            on_round=self._note,
        )
        self.peak_mb = plain.peak_mb()

    def _note(self, record: RoundRecord, model: Parameters) -> None:
        del model
        if record.note or record.rejected:
            raise SecateurError(f"round {record.number} is not whole: {record.note or 'rejected'}")
        self.accuracy = record.measures[TEST] or 0.0
        self.ends.append(time.monotonic())


def main(engine: str, path: str, rounds: str, started: str) -> None:
    """Run one engine and report."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # as secateur run does
    meta = plain.read_meta(path)
    settings, clients = Settings.model_validate(meta["settings"]), int(meta["clients"])
    kind, _, screened = engine.partition("-")
    run = Run(settings, screened=bool(screened))
    app = client_app(settings)
    if kind == "ray":
        ray.run(lambda grid: run.play(grid, clients, int(rounds)), app, clients)
    else:
        run.play(make_grid(kind, app, clients, settings), clients, int(rounds))
    plain.report(float(started), run.ends, run.accuracy, "flwr", "ray", peak=run.peak_mb)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SecateurError as error:
        sys.exit(str(error))
