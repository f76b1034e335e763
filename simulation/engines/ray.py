"""Flower's Ray simulation: the one place that starts it."""

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator

# Before Flower is imported: a simulation sends nothing to anybody.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation


@contextlib.contextmanager
def _ends_on_interrupt(last_words: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def leave(number: int, frame: object) -> None:
        del number, frame
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        last_words()
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(
    play: Callable[[Grid], None],
    app: ClientApp,
    clients: int,
    *,
    gpu: bool = False,
    cpus: int | None = None,
    on_interrupt: Callable[[], None] = lambda: None,
) -> None:
    """Run ``play`` as the ServerApp of a simulation with ``clients`` clients.

    Parameters
    ----------
    play
        Receives the Grid; an exception in it ends the simulation and is raised here.
    app
        Run for every message in one of as many processes as there are CPUs.
    gpu
        Whether the processes share a GPU.
    cpus
        CPUs to use; all by default.
    on_interrupt
        Called on Ctrl-C, after which the process ends at once with status 130: Flower's threads
        would otherwise keep it alive, waiting for clients that are gone.
    """
    cpus = cpus or os.cpu_count() or 1
    failures: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        try:
            play(grid)
        except BaseException as error:  # noqa: BLE001  raised again below, with its own type
            failures.append(error)

    workers = min(cpus, clients)
    config = {
        "client_resources": {"num_cpus": 1, "num_gpus": 1 / workers if gpu else 0.0},
        "init_args": {
            "num_cpus": workers,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        },
    }
    with warnings.catch_warnings(), _ends_on_interrupt(on_interrupt):
        warnings.simplefilter("ignore")
        run_simulation(
            server_app=server,
            client_app=app,
            num_supernodes=clients,
            backend_config=config,  # type: ignore[arg-type]
        )
    if failures:
        raise failures[0]
