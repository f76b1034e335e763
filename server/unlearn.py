"""The command that unlearns models in files: ``secateur unlearn``."""

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from server.catalogue import Json
from unlearning.errors import MissingNeedError, ParametersError, SecateurError

if TYPE_CHECKING:
    from torch import Tensor

    from server.offline import Case
    from server.offline_settings import Method
    from strategies.archive import SavedModel
    from strategies.methods.interface import ServerLab, Unlearned

commands = typer.Typer(add_completion=False)


@commands.callback()
def group() -> None:
    """Unlearn models in files."""


@commands.command()
def unlearn(
    method: Annotated[str, typer.Argument(help="See 'secateur methods'.")],
    before: Annotated[
        Path, typer.Option(metavar="FILE", help="Global model that the last round started from.")
    ],
    locals_: Annotated[
        Path,
        typer.Option(
            "--locals",
            metavar="DIR",
            help="CLIENT.safetensors of each client: its model after that round; its weight is the "
            "file's metadata num_examples, or 1.",
        ),
    ],
    forget: Annotated[
        list[str], typer.Option(metavar="ID[,ID]", help="Clients to forget; may be repeated.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the model.")],
    history: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="round-0001/global.safetensors, round-0001/CLIENT.safetensors and so on.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where clients are asked and answer, by files."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Data of the server: tensors inputs and targets."),
    ] = None,
    task: Annotated[
        str, typer.Option(metavar="NAME", help="Task whose model the files are of, for --data.")
    ] = "",
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Model of the task; its default if left out.")
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file --out.")] = False,
    as_json: Json = False,
) -> None:
    """Take clients out of a saved model, on the server alone; no federation is needed."""
    from server.answers import AnswerFiles  # noqa: PLC0415  torch
    from server.offline import read_case, warnings_about  # noqa: PLC0415
    from server.offline_methods import choose  # noqa: PLC0415
    from server.settings import parse_overrides  # noqa: PLC0415
    from strategies.archive import TOTAL, WEIGHT, save_model  # noqa: PLC0415
    from unlearning.catalogue import METHODS, Need  # noqa: PLC0415
    from unlearning.fedup import check_majority  # noqa: PLC0415
    from unlearning.routing import NEED_MAJORITY  # noqa: PLC0415

    started = time.perf_counter()
    chosen = choose(method, parse_overrides(set_ or []))
    check_out(out, force, inputs=(before, data), folders=(locals_, history, answers))
    names = [name.strip() for part in forget for name in part.split(",") if name.strip()]
    lab = None
    if data is not None and task:
        lab = lab_of(data, task, model, labelled=Need.ROOT in chosen.needs(method))
    check_needs(method, chosen, history, lab, answers)
    with progress(as_json) as tell, prepared(None if lab else 1):
        case = read_case(before, locals_, names, history=history, lab=lab, tell=tell)
        if method in NEED_MAJORITY:
            check_majority(len(case.forgotten), len(case.locals_))
        carrier = AnswerFiles(answers, chosen.enough, case.before.schema)
        unlearned = run(chosen, case, carrier)
        tell("writing")
        # As ``before`` is: an order of layers that it does not tell is a guess, and stays one.
        told = {k: v for k, v in case.before.metadata.items() if k not in (WEIGHT, TOTAL)}
        save_model(out, unlearned.model, metadata=told)
        zeroed = {name: int(mask.count_nonzero()) for name, mask in unlearned.masks.items()}
    entry = METHODS[method]
    report = {
        "method": method,
        "forgotten": list(case.forgotten),
        "retained": list(case.others),
        "zeroed": zeroed,
        "settings": dict(unlearned.settings),
        "seconds": time.perf_counter() - started,
        "guarantee": entry.guarantee,
        "safe_when_target_lies": entry.safe,
        "conflict_percentiles": dict(unlearned.percentiles),
        "warnings": [*warnings_about(case, chosen.gap), *carrier.warnings, *unlearned.warnings],
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        summary(report, sum(mask.numel() for mask in unlearned.masks.values()), out)


def run(method: "Method", case: "Case", carrier: Callable[..., Any]) -> "Unlearned":
    """Carry a method out, check what it made, and return it in the precision of the files.

    Raises
    ------
    ParametersError
        If the result is not finite or not like the models given; with the file to blame, if there
        is one.
    """
    from server.offline import find_fault  # noqa: PLC0415
    from strategies.archive import narrowed  # noqa: PLC0415
    from unlearning.parameters import check_alike, check_finite  # noqa: PLC0415
    from unlearning.plan import carry_out  # noqa: PLC0415

    try:
        unlearned = carry_out(method.plan(case), carrier)
        model = narrowed(unlearned.model, case.before.schema)
        check_alike(case.before.schema, model)
        check_finite(model)
    except ParametersError:
        case.tell("looking for the fault")
        find_fault(case)
        raise
    return replace(unlearned, model=model)


def check_out(
    out: Path,
    force: bool,
    inputs: tuple[Path | None, ...],
    folders: tuple[Path, Path | None, Path | None],
) -> None:
    """Raise ``SecateurError`` unless the result may be written where it is to go.

    Parameters
    ----------
    inputs
        Files that are read.
    folders
        Locals, history and answers.
    """
    try:
        place = out.resolve()
        out.exists()
    except OSError as error:
        raise SecateurError(f"--out {out} cannot be written: {error.strerror}") from error
    locals_, *rounds = (folder.resolve() if folder is not None else None for folder in folders)
    if not place.parent.is_dir() or (place.exists() and not place.is_file()):
        why = "is a folder" if place.is_dir() else "is no file"
        if not place.parent.is_dir():
            why = f"cannot be written: no folder {out.parent}"
        raise SecateurError(f"--out {out} {why}; give a file in a folder that is there")
    if place in [path.resolve() for path in inputs if path is not None]:
        raise SecateurError(f"--out {out} is an input, and inputs are never written to")
    if place.parent == locals_ or place.parent.parent in [path for path in rounds if path]:
        raise SecateurError(
            f"--out {out} lies among the clients' models and would be taken for one of them; give "
            "another folder"
        )
    if place.exists() and not force:
        raise SecateurError(f"--out {out} is there already; give --force to replace it")


def check_needs(
    name: str,
    method: "Method",
    history: Path | None,
    lab: "Callable[..., ServerLab] | None",
    answers: Path | None,
) -> None:
    """Raise ``MissingNeedError`` with all that has to be given for a method and is not."""
    from server.offline_settings import OPTIONS, Asking  # noqa: PLC0415

    lacking = {OPTIONS[need] for need in method.needs(name)}
    if history is not None:
        lacking.discard("--history DIR")
    if lab is not None:
        lacking = {option for option in lacking if not option.startswith("--data")}
    if lacking:
        if isinstance(method, Asking) and answers is None:
            lacking.add("--answers DIR")
        options = " and ".join(sorted(lacking, reverse=True))
        raise MissingNeedError(f"{name} needs more than the last round: give {options}")


def lab_of(
    data: Path, task: str, model: str, *, labelled: bool
) -> "Callable[[SavedModel], ServerLab]":
    """Return what makes a laboratory of data, a task, and the model that it is to fit.

    Raises
    ------
    TaskError, ParametersError
        There, if there is no such task or the data or the task's model do not fit.
    """
    from client.task.protocol import TaskOptions, load_task  # noqa: PLC0415
    from server.federation import lab_for  # noqa: PLC0415  with Flower, slow to import
    from strategies.archive import SavedModel  # noqa: PLC0415
    from unlearning.parameters import check_alike, check_finite  # noqa: PLC0415

    def make(before: SavedModel) -> "ServerLab":
        found = load_task(TaskOptions(task=task, model=model))
        with _users_code(f"task {task} cannot build its model"):
            network = found.build_model()
            state = network.state_dict()
        try:
            check_alike(before.schema, state)
        except ParametersError as error:
            raise ParametersError(
                f"the model of task {task} does not fit {before.path}: {error}; choose another "
                "with --model"
            ) from error
        tensors = SavedModel(data, wide=True)
        if "inputs" not in tensors or not _rows(tensors["inputs"]):
            raise ParametersError(f"{data} holds no examples; they are its tensor 'inputs'")
        try:
            check_finite(tensors)
        except ParametersError as error:
            raise ParametersError(f"{data}: {error}") from error
        if labelled and "targets" not in tensors:
            raise ParametersError(f"{data} holds no labels; they are its tensor 'targets'")
        inputs, root = tensors["inputs"], None
        if "targets" in tensors:
            root = inputs, tensors["targets"]
            if _rows(root[1]) != len(inputs):
                raise ParametersError(
                    f"{data} holds {len(inputs)} inputs and {_rows(root[1])} targets; it must hold "
                    "as many of each"
                )
        lab = lab_for(found, network, root, inputs)
        with _users_code(f"task {task} fails on the examples of {data}"):
            outputs = lab.forward(before, inputs[:1])
            if root is not None:
                lab.loss(outputs, root[1][:1])
            if labelled:
                lab.accuracy(before)
        return lab

    return make


def _rows(tensor: "Tensor") -> int:
    return len(tensor) if tensor.dim() else 0


@contextmanager
def _users_code(fails: str) -> Iterator[None]:
    """Make any error of a task, which is the user's own code, one line."""
    from client.task.protocol import TaskError  # noqa: PLC0415

    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        raise TaskError(f"{fails}: {type(error).__name__}: {error}") from error


@contextmanager
def prepared(number: int | None) -> Iterator[None]:
    """Compute with so many threads, and leave what was imported out of garbage collection.

    Sums over whole models are bound by memory, not by arithmetic, and with one thread the result
    does not depend on the machine; training is another matter. Looking through all that PyTorch
    consists of for garbage takes a tenth of a second, as long as reading twenty models.
    """
    import torch  # noqa: PLC0415

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, on a terminal, and yield what tells it."""
    console = Console(stderr=True)
    columns = (BarColumn(bar_width=24), TextColumn("{task.description}"), TimeElapsedColumn())
    shown = console.is_terminal and not quiet
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda text: bar.update(task, description=escape(text))


def summary(report: Mapping[str, Any], size: int, out: Path) -> None:
    """Print a result for a person."""
    exact = report["guarantee"] == "exact"
    console = Console(emoji=False)  # names of clients are nobody's to change
    console.print(
        f"[bold]{report['method']} forgot {escape(', '.join(report['forgotten']))}[/]; "
        f"{len(report['retained'])} of the last round stay",
        highlight=False,
    )
    if report["zeroed"]:
        count = sum(report["zeroed"].values())
        console.print(f"{count} of {size} weights zeroed ({count / size:.1%})", highlight=False)
    told = [f"{key} {_short(value)}" for key, value in report["settings"].items() if value != []]
    console.print(escape(f"settings: {', '.join(told) or 'none'}"), highlight=False)
    console.print(
        "guarantee: exact, as if they had never taken part"
        if exact
        else "guarantee: none; measure what is left, and train a few rounds among the others"
    )
    for warning in report["warnings"]:
        console.print(f"[yellow]{escape(warning)}[/]", highlight=False)
    console.print(escape(f"model: {out}"), highlight=False, soft_wrap=True)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
