"""The command for one machine with all the data: ``secateur local``."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from client.files import prepare_folder

commands = typer.Typer(add_completion=False)


@commands.callback()
def group() -> None:
    """Forget on one machine."""


@commands.command()
def local(
    method: Annotated[
        str, typer.Argument(help="Such as fisher-mask; docs/local.md, or a wrong one, lists all.")
    ],
    task: Annotated[str, typer.Option(help="Task, or package.module:object.")] = "digits",
    model: Annotated[str, typer.Option(help="Model of the task; its default if left out.")] = "",
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the data set.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Most training examples; 0 for all.")] = 0,
    forget_class: Annotated[
        int | None, typer.Option(metavar="N", help="Forget the rows of this class.")
    ] = None,
    forget_rows: Annotated[
        str | None,
        typer.Option(metavar="ROWS", help="Forget training rows by number, such as 1,5,7-20."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Trained model; without, it is trained first."),
    ] = None,
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Where trained models are kept.")
    ] = Path("runs/local"),
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train again without the rows, to compare.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting of the method, or training.KEY or tune.KEY; may be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For the report. [default: runs/local/METHOD-classN-seedN; a run with other "
            "settings has its own]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Forget a class or rows on one machine that has all the data, and measure what is left."""
    if (forget_class is None) == (forget_rows is None):
        raise click.UsageError("give one of --forget-class and --forget-rows")
    from client.central import report as reports  # noqa: PLC0415  with torch, slow to import
    from client.central.methods import METHODS  # noqa: PLC0415
    from client.central.run import Target, forgotten, prepared, retraining  # noqa: PLC0415
    from client.central.settings import SettingsError, Training, Tuning, read, tables  # noqa: PLC0415
    from client.task.protocol import TaskOptions  # noqa: PLC0415

    if method not in METHODS:
        raise SettingsError(f"there is no method {method!r}; choose one of {', '.join(METHODS)}")
    chosen, given = METHODS[method], tables(set_ or [])
    if "seed" in given["training"]:
        raise SettingsError("training.seed is one seed for everything; give it with --seed")
    settings = read(chosen.settings, given[""])
    training = read(Training, {"seed": seed, **given["training"]}, "training")
    tuning = read(Tuning, given["tune"], "tune")
    folder = "" if data_dir is None else str(data_dir.resolve())
    options = read(
        TaskOptions,
        {"task": task, "model": model, "data_dir": folder, "examples": examples, "seed": seed,
         "device": device},
    )  # fmt: skip
    target = Target.named(forget_class, forget_rows)
    what = "rows" if forget_class is None else f"class{forget_class}"
    told = options.model_dump(exclude={"seed", "device"})
    usual = told == TaskOptions().model_dump(exclude={"seed", "device"})
    changes = [told, forget_rows, str(start), set_]
    own = not usual or forget_rows or start or set_
    place = out or work / f"{method}-{what}-seed{seed}{digest(changes) if own else ''}"
    with ready(place, ("report.json", "report.md")):
        with progress(as_json) as tell, one_thread():
            case, grade = prepared(
                options, training, target, start=start, work=work, logs=chosen.logs, tell=tell
            )
            outcome = forgotten(case, grade, chosen, settings, tuning, tell=tell)
            again = retraining(case, grade) if retrain else None
        report = reports.report_of(method, options, case, settings, tuning, outcome, again)
        reports.write(place, report, outcome.models)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        summary(report, place)


def digest(changes: object) -> str:
    """Return a few letters that tell runs with other settings apart."""
    text = json.dumps(changes, sort_keys=True)
    return f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


@contextmanager
def ready(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Make a folder before the work, and leave none behind that was made in vain."""
    created = prepare_folder(folder, names)
    try:
        yield
    except BaseException:
        for path in created:
            with suppress(OSError):  # something else was written there meanwhile
                path.rmdir()
        raise


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, so that the result does not depend on the machine."""
    import torch  # noqa: PLC0415

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Show a bar for each stage on stderr, on a terminal, and yield what moves it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    shown = console.is_terminal and not quiet
    with Progress(*columns, console=console, disable=not shown) as bar:
        stages: dict[str, Any] = {}

        def tell(stage: str, done: float) -> None:
            if stage not in stages:
                for earlier in stages.values():
                    bar.update(earlier, total=1.0, completed=1.0)
                # Without a total the bar moves to and fro: what takes long need not tell how far
                # it is.
                stages[stage] = bar.add_task(escape(stage), total=None)
            if done:
                bar.update(stages[stage], total=1.0, completed=done)

        yield tell
        for stage in stages.values():
            bar.update(stage, total=1.0, completed=1.0)


def summary(report: dict[str, Any], folder: Path) -> None:
    """Print a result for a person."""
    from rich.table import Table  # noqa: PLC0415

    from client.central.report import COLUMNS, POINTS, percent  # noqa: PLC0415
    from unlearning.catalogue import titled  # noqa: PLC0415

    console = Console(emoji=False)
    title = f"{titled(report['method'])} on {report['task']}, per cent"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for point, title in POINTS.items():
        found = report[point]
        if found is not None and not (point == "after" and not report["tuned"]):
            table.add_row(title, *(percent(found[key]) for key in COLUMNS))
    console.print(table)
    cost = report["cost"]
    spent = [f"{cost['seconds']:.2f} s to forget"]
    if report["tuned"]:
        spent.append(f"{cost['tuning_seconds']:.2f} s to fine-tune")
    for key, what in (("training_seconds", "training"), ("retraining_seconds", "retraining")):
        if cost[key] is not None:
            spent.append(f"{what} took {cost[key]:.2f} s")
    console.print(f"{', '.join(spent)}; guarantee: {escape(report['guarantee'])}", highlight=False)
    for warning in report["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]", highlight=False)
    console.print(escape(f"report: {folder}"), highlight=False, soft_wrap=True)
