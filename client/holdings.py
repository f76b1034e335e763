"""Commands of a data owner: tokens for rows, what is forgotten, stays so, and is marked."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.errors import SecateurError

if TYPE_CHECKING:
    from client.keeping import Keeping
    from client.task.protocol import Examples, TaskOptions

holdings = typer.Typer(help=__doc__, no_args_is_help=True)
commands = typer.Typer(add_completion=False)
commands.add_typer(holdings, name="holdings")

ClientDir = Annotated[
    Path, typer.Option("--client-dir", help="The client's folder, as in its node-config.")
]
Data = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Setting of the run, such as data-dir=/data."),
]
TaskName = Annotated[str, typer.Option("--task", help="Built in, or package.module:object.")]
Partition = Annotated[
    int,
    typer.Option("--partition", min=-1, help="Of a simulated client; -1 for one with own data."),
]
Partitions = Annotated[int, typer.Option("--partitions", min=1, help="Simulated clients.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class HoldingsError(SecateurError):
    """Options that cannot be used."""

    exit_code = 2


@holdings.command()
def issue(
    client_dir: ClientDir,
    rows: Annotated[str, typer.Option("--rows", help="Rows of the training data, such as 3,17.")],
    task: TaskName = "digits",
    settings: Data = [],  # noqa: B006  Typer's way
    partition: Partition = -1,
    partitions: Partitions = 1,
    as_json: Json = False,
) -> None:
    """Print a token for each row; a row that has one keeps it."""
    places = _numbers(rows)
    keeping, examples = _opened(client_dir, task, settings, partition, partitions)
    tokens = keeping.issue(places, examples)
    if as_json:
        pairs = zip(places, tokens, strict=True)
        typer.echo(json.dumps([{"row": row, "token": token} for row, token in pairs], indent=2))
        return
    for row, token in zip(places, tokens, strict=True):
        typer.echo(f"{row}\t{token}")


@holdings.command("list")
def list_forgotten(client_dir: ClientDir, partition: Partition = -1, as_json: Json = False) -> None:
    """Show what is never trained on again, since which round, and for which request."""
    from client.keeping import Keeping  # noqa: PLC0415  with torch, slow to import

    forgotten = Keeping(_there(client_dir, partition)).forgotten()
    if as_json:
        typer.echo(json.dumps(forgotten.model_dump(), indent=2))
        return
    for number, when in forgotten.classes.items():
        typer.echo(f"class {number}\tround {when.round}\t{when.request}")
    for content, when in forgotten.rows.items():
        typer.echo(f"row {content}\tround {when.round}\t{when.request}")
    typer.echo(f"{len(forgotten.classes)} classes and {len(forgotten.rows)} rows are forgotten")


@holdings.command()
def check(
    client_dir: ClientDir,
    task: TaskName = "digits",
    settings: Data = [],  # noqa: B006  Typer's way
    partition: Partition = -1,
    partitions: Partitions = 1,
    as_json: Json = False,
) -> None:
    """Load the data as training does, and count the rows that are forgotten and trained on."""
    from torch.utils.data import TensorDataset  # noqa: PLC0415  slow to import

    from client.task.evaluation import gather  # noqa: PLC0415
    from client.task.protocol import size_of  # noqa: PLC0415

    keeping, examples = _opened(client_dir, task, settings, partition, partitions)
    _there(client_dir, partition)
    trained = keeping.without_forgotten(examples)
    wrong = 0
    if size_of(trained):  # a copy, whose contents nobody has hashed
        copy = TensorDataset(*gather(trained))
        wrong = len(copy) - len(keeping.allowed(copy))
    counts = {
        "rows": size_of(examples),
        "trained": size_of(trained),
        "left_out": size_of(examples) - size_of(trained),
        "forgotten_but_trained": wrong,
    }
    if as_json:
        typer.echo(json.dumps(counts, indent=2))
    else:
        for name, count in counts.items():
            typer.echo(f"{name.replace('_', ' ')}: {count}")
    if wrong:
        raise typer.Exit(1)


@holdings.command()
def marks(
    client_dir: ClientDir,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="FILE", help="Judge this published model instead."),
    ] = None,
    task: TaskName = "digits",
    settings: Data = [],  # noqa: B006  Typer's way
    partition: Partition = -1,
    partitions: Partitions = 1,
    as_json: Json = False,
) -> None:
    """Judge by rows marked before leaving whether they are forgotten; end with 1 if not."""
    from client.keeping import Keeping  # noqa: PLC0415  with torch, slow to import
    from client.marks import KeptMarks  # noqa: PLC0415
    from unlearning.verifi_marks import check  # noqa: PLC0415

    marked = KeptMarks(Keeping(_folder(client_dir, partition))).marked()
    verdict = marked.verdict()
    losses = {f"round {one.round}": one.loss for one in marked.following}
    if model is not None:
        loss = _loss_of(model, client_dir, task, settings, partition, partitions)
        losses, after = {str(model): loss}, marked.after or 0.0
        verdict = check(marked.before, after, [loss], window=1)
    told = {
        "kind": marked.kind,
        "round": marked.round,
        "markers": len(marked.labels),
        "before": marked.before,
        "after": marked.after,
        "losses": losses,
        "rise": verdict.rise,
        "needed": verdict.needed,
        "result": verdict.result,
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        for name, value in told.items():
            if name != "losses":
                typer.echo(
                    f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}"
                )
        for place, loss in losses.items():
            typer.echo(f"loss, {place}: {loss:.4g}")
    if verdict.result == "fail":
        raise typer.Exit(1)


def _loss_of(
    model: Path, client_dir: Path, task: str, settings: list[str], partition: int, partitions: int
) -> float:
    """Return the mean loss on the markers under a model in a file."""
    from client.forgetting.marking import loss_on_markers, own_rows  # noqa: PLC0415
    from client.marks import KeptMarks  # noqa: PLC0415
    from client.model_files import read_model  # noqa: PLC0415
    from client.task.device import choose_device  # noqa: PLC0415
    from client.task.evaluation import state_of  # noqa: PLC0415
    from client.task.protocol import load_task  # noqa: PLC0415

    keeping, examples = _opened(client_dir, task, settings, partition, partitions)
    options = _options(task, settings)
    found = load_task(options)
    own = own_rows(found, examples, keeping, choose_device(options.device))
    sent = read_model(model, state_of(found.build_model()))
    return loss_on_markers(own, sent, KeptMarks(keeping).marked())


def _opened(
    client_dir: Path, task: str, settings: list[str], partition: int, partitions: int
) -> "tuple[Keeping, Examples]":
    """Return a client's folder, and its training data."""
    from client.keeping import Keeping  # noqa: PLC0415  with torch, slow to import
    from client.task.protocol import load_task  # noqa: PLC0415

    if partition >= partitions:
        raise HoldingsError(f"--partition {partition} is none of --partitions {partitions}")
    data = load_task(_options(task, settings)).client_data(max(0, partition), partitions)
    return Keeping(_folder(client_dir, partition)), data.train


def _options(task: str, settings: list[str]) -> "TaskOptions":
    from pydantic import ValidationError  # noqa: PLC0415

    from client.task.protocol import TaskOptions  # noqa: PLC0415  with torch, slow to import

    faulty = [text for text in settings if "=" not in text]
    if faulty:
        raise HoldingsError(f"--set takes KEY=VALUE, got {faulty[0]!r}")
    pairs = {key.strip(): value for key, _, value in (text.partition("=") for text in settings)}
    try:
        return TaskOptions.model_validate({**pairs, "task": task})
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
        raise HoldingsError(f"settings: {faults}") from error


def _folder(client_dir: Path, partition: int) -> Path:
    return client_dir if partition < 0 else client_dir / str(partition)


def _there(client_dir: Path, partition: int) -> Path:
    """Return a folder that a client keeps something in; of a wrong one nothing could be said."""
    folder = _folder(client_dir, partition)
    if not any((folder / name).exists() for name in ("forgotten.json", "tokens.json")):
        raise HoldingsError(
            f"{folder} holds no list of what is forgotten and no tokens; give the folder of a "
            "client as --client-dir, and for a simulated one --partition"
        )
    return folder


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise HoldingsError(f"--rows takes numbers, such as 3,17, got {text!r}")
    return [int(part) for part in parts]
