"""Flower's Ray simulation: the one place that starts it."""

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

# Before Flower is imported: a simulation sends nothing to anybody.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from simulation.engines import cluster


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
    address: str | None = None,
    prepare: Callable[[], None] = lambda: None,
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
        CPUs of a Ray that is started here; all by default.
    address
        Of an existing Ray cluster to use, ``host:port`` or ``auto``; by default a Ray is started
        here for this run alone, whatever else runs on this machine.
    prepare
        Run once on every node of an existing cluster before any client.
    on_interrupt
        Called on Ctrl-C, after which the process ends at once with status 130: Flower's threads
        would otherwise keep it alive, waiting for clients that are gone.
    """
    failures: list[BaseException] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        try:
            play(grid)
        except BaseException as error:  # noqa: BLE001  raised again below, with its own type
            failures.append(error)

    with (
        warnings.catch_warnings(),
        _ends_on_interrupt(on_interrupt),
        contextlib.ExitStack() as stack,
    ):
        warnings.simplefilter("ignore")
        if address is None:
            config = _own(min(cpus or os.cpu_count() or 1, clients), gpu=gpu)
        else:
            nodes = stack.enter_context(cluster.joined(address, gpu=gpu))
            cluster.check_fit(nodes, app, prepare)
            config = {"client_resources": cluster.client_resources(nodes, clients, gpu=gpu)}
        run_simulation(
            server_app=server,
            client_app=app,
            num_supernodes=clients,
            backend_config=config,
        )
    if failures:
        raise failures[0]


def _own(workers: int, *, gpu: bool) -> dict[str, Any]:
    """Return the configuration of a Ray that Flower starts, and stops at the end."""
    return {
        "client_resources": {"num_cpus": 1, "num_gpus": 1 / workers if gpu else 0.0},
        "init_args": {
            # Without it Ray would take RAY_ADDRESS or a cluster that this machine belongs to.
            "address": "local",
            "num_cpus": workers,
            "include_dashboard": False,
            "log_to_driver": False,
            "logging_level": logging.ERROR,
        },
    }
