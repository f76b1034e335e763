"""Commands that run experiments. Everything heavy is imported only when a command runs."""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click
import typer

from client.files import prepare_folder, write_files
from server.catalogue import Json, show

if TYPE_CHECKING:
    from simulation.engines.inprocess import InProcessGrid
    from simulation.experiment import Experiment
    from simulation.scenario import Scenario

commands = typer.Typer(add_completion=False)


FILES = ("report.json", "report.html")

Engine = Literal["inprocess", "ray"]
Device = Literal["auto", "cpu", "cuda", "mps"]

Seed = Annotated[int | None, typer.Option(min=0, help="Seed of everything random.")]
Scene = Annotated[str, typer.Argument(metavar="SCENARIO", help="Name, or path of a TOML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated."),
]
DataDir = Annotated[Path | None, typer.Option(help="Folder with the data set.")]
Where = Annotated[Device | None, typer.Option(help="Where to compute.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the report. [default: runs/NAME-seedN]")]


@commands.command()
def demo(seed: Seed = None, out: Out = None, as_json: Json = False) -> None:
    """Catch three poisoners among ten clients and forget them, on Ray."""
    execute("demo", engine="ray", overrides=_given(seed=seed), out=out, as_json=as_json)


@commands.command()
def run(
    scenario: Scene,
    engine: Annotated[Engine, typer.Option(help="How clients are run.")] = "inprocess",
    batch: Annotated[
        bool | None,
        typer.Option(
            "--batch/--no-batch",
            help="In process, train many clients in one step where the model allows (default), or "
            "one after another, bit for bit as on Ray.",
        ),
    ] = None,
    seed: Seed = None,
    set_: Set = None,
    data_dir: DataDir = None,
    device: Where = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Existing Ray cluster to run on, or 'auto'."),
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Run one scenario and write report.json, report.html, plots and model.safetensors."""
    if ray_address is not None and engine != "ray":
        raise click.UsageError(
            f"--ray-address {ray_address} is for --engine ray, and the engine is {engine}; leave "
            "one of them out"
        )
    if batch is not None and engine == "ray":
        raise click.UsageError(
            f"--{'' if batch else 'no-'}batch is for --engine inprocess, and the engine is ray, "
            "which trains one client at a time in every process; leave one of them out"
        )
    execute(
        scenario,
        engine=engine,
        batch=batch is not False,
        overrides=overrides_of(set_, seed=seed, device=device, data_dir=data_dir),
        out=out,
        as_json=as_json,
        ray_address=ray_address,
    )


@commands.command()
def scenarios(as_json: Json = False) -> None:
    """List the scenarios that come with Secateur."""
    from simulation.scenario import built_in  # noqa: PLC0415

    rows = [{"name": name, "summary": summary} for name, summary in built_in()]
    show(rows, as_json, title="Scenarios")


@commands.command()
def attacks(as_json: Json = False) -> None:
    """List the attacks that scenarios can simulate."""
    from simulation.attacks.settings import ATTACKS  # noqa: PLC0415

    show(
        [{"name": name, "summary": text} for name, text in ATTACKS.items()],
        as_json,
        title="Attacks",
    )


def overrides_of(
    pairs: list[str] | None, *, seed: int | None, device: Device | None, data_dir: Path | None
) -> dict[str, Any]:
    """Return what a command line changes in a scenario."""
    from server.settings import parse_overrides  # noqa: PLC0415

    overrides = parse_overrides(pairs or []) | _given(seed=seed, device=device)
    if data_dir is not None:
        overrides["data-dir"] = str(data_dir.resolve())
    return overrides


def execute(
    name: str,
    *,
    engine: Engine,
    overrides: dict[str, Any],
    out: Path | None,
    as_json: bool,
    batch: bool = True,
    ray_address: str | None = None,
) -> None:
    """Run one scenario from its name to its report."""
    from simulation.progress import Progress, summary  # noqa: PLC0415
    from simulation.scenario import load_scenario  # noqa: PLC0415

    scenario = load_scenario(name, overrides)
    batched = batch and engine == "inprocess"
    folder = out or default_folder(scenario, overrides, one_by_one=not batch)
    created = prepare_folder(folder, FILES)

    def clean_up() -> None:
        for path in created:
            shutil.rmtree(path, ignore_errors=True)

    def interrupted() -> None:
        clean_up()
        sys.stderr.write("\nsecateur: interrupted\n")

    try:
        with Progress(scenario, engine) as progress:
            experiment = play(
                scenario, engine, progress, interrupted, batch=batch, ray_address=ray_address
            )
        report = write(experiment, engine, folder, batched=batched)
    except BaseException:
        clean_up()
        raise
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        summary(report, folder)


def default_folder(
    scenario: "Scenario", overrides: Mapping[str, Any], *, one_by_one: bool = False
) -> Path:
    """Return where a report goes unless told otherwise: a run with changed settings has its own."""
    name = f"{scenario.name}-seed{scenario.settings.seed}"
    from simulation.scenario import UNTOLD  # noqa: PLC0415

    changes = {key: value for key, value in overrides.items() if key not in UNTOLD}
    if changes:
        text = json.dumps(changes, sort_keys=True, default=str)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    return Path("runs") / (f"{name}-no-batch" if one_by_one else name)


def play(
    scenario: "Scenario",
    engine: Engine,
    progress: Any,
    interrupted: Callable[[], None],
    *,
    batch: bool = True,
    ray_address: str | None = None,
) -> "Experiment":
    """Run a scenario on an engine."""
    from simulation.experiment import with_folder  # noqa: PLC0415

    with with_folder(scenario) as ready:

        def leave() -> None:
            if ready.settings.client_dir and not scenario.settings.client_dir:
                shutil.rmtree(ready.settings.client_dir, ignore_errors=True)
            interrupted()

        experiment = _play(ready, engine, progress, leave, batch=batch, ray_address=ray_address)
    experiment.outcome.scenario = scenario  # as it was told: a folder made here is gone
    return experiment


def _play(
    scenario: "Scenario",
    engine: Engine,
    progress: Any,
    interrupted: Callable[[], None],
    *,
    batch: bool,
    ray_address: str | None,
) -> "Experiment":
    from simulation.experiment import Experiment, client_app  # noqa: PLC0415

    gpu = check_ready(scenario)
    experiment = Experiment(scenario, progress.round, progress.ask)
    if engine == "ray":
        from simulation.engines import ray  # noqa: PLC0415

        logging.getLogger("flwr").setLevel(logging.ERROR)
        ray.run(
            experiment.play,
            client_app(scenario),
            scenario.clients.total,
            gpu=gpu,
            address=ray_address,
            prepare=lambda: load_data(scenario),
            on_interrupt=interrupted,
        )
    else:
        from simulation.engines.inprocess import collect_rarely  # noqa: PLC0415

        grid = grid_of(scenario, batch=batch)
        collect_rarely()
        experiment.play(grid)
    return experiment


def check_ready(scenario: "Scenario") -> bool:
    """Tell of a missing data set or device before anything is started; return whether it is a GPU.

    Progress tells what happens from here on, and Flower says no more than errors.
    """
    from client.task.device import choose_device  # noqa: PLC0415

    load_data(scenario)
    device = choose_device(scenario.settings.device)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    return device.type == "cuda"


def load_data(scenario: "Scenario") -> None:
    """Load the scenario's data set in this process."""
    from client.task.protocol import load_task  # noqa: PLC0415

    load_task(scenario.settings.task_options()).server_data()


def grid_of(scenario: "Scenario", *, batch: bool = True) -> "InProcessGrid":
    """Return a Grid of the scenario's clients in this process."""
    from simulation.engines.inprocess import InProcessGrid  # noqa: PLC0415
    from simulation.experiment import client_app, client_jobs  # noqa: PLC0415

    options, jobs = scenario.settings.task_options(), client_jobs(scenario)
    job_of = (lambda message, context: jobs(message, context, options)) if batch else None
    return InProcessGrid(client_app(scenario), scenario.clients.total, job_of=job_of)


def write(
    experiment: "Experiment", engine: str, folder: Path, *, batched: bool = False
) -> dict[str, Any]:
    """Write all files; each appears complete or not at all."""
    from safetensors.torch import save  # noqa: PLC0415

    from simulation.page import render  # noqa: PLC0415
    from simulation.plots import figures  # noqa: PLC0415
    from simulation.report import report_of  # noqa: PLC0415

    report = report_of(experiment.outcome, engine, batched=batched)
    model = experiment.outcome.points["final"].model
    files = {
        "report.json": (json.dumps(report, indent=2) + "\n").encode(),
        "report.html": render(report).encode(),
        "model.safetensors": save({k: v.contiguous() for k, v in model.items()}),
        **{f"plots/{name}.svg": svg.encode() for name, svg in figures(report).items()},
    }
    write_files(folder, files)
    return report


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
