"""Commands of a data owner: tokens for rows, what is forgotten, and whether it stays so."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unlearning.errors import SecateurError

if TYPE_CHECKING:
    from client.keeping import Keeping
    from client.task.protocol import Examples

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

    forgotten = Keeping(_folder(client_dir, partition)).forgotten()
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


def _opened(
    client_dir: Path, task: str, settings: list[str], partition: int, partitions: int
) -> "tuple[Keeping, Examples]":
    """Return a client's folder, and its training data."""
    from pydantic import ValidationError  # noqa: PLC0415

    from client.keeping import Keeping  # noqa: PLC0415  with torch, slow to import
    from client.task.protocol import TaskOptions, load_task  # noqa: PLC0415

    if partition >= partitions:
        raise HoldingsError(f"--partition {partition} is none of --partitions {partitions}")
    faulty = [text for text in settings if "=" not in text]
    if faulty:
        raise HoldingsError(f"--set takes KEY=VALUE, got {faulty[0]!r}")
    pairs = {key.strip(): value for key, _, value in (text.partition("=") for text in settings)}
    try:
        options = TaskOptions.model_validate({**pairs, "task": task})
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
        raise HoldingsError(f"settings: {faults}") from error
    data = load_task(options).client_data(max(0, partition), partitions)
    return Keeping(_folder(client_dir, partition)), data.train


def _folder(client_dir: Path, partition: int) -> Path:
    return client_dir if partition < 0 else client_dir / str(partition)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise HoldingsError(f"--rows takes numbers, such as 3,17, got {text!r}")
    return [int(part) for part in parts]
