"""The command that runs methods side by side. Everything heavy is imported only when it runs."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.files import prepare_folder, write_files
from server.catalogue import Json
from simulation.commands import (
    DataDir,
    Scene,
    Seed,
    Set,
    Where,
    check_ready,
    grid_of,
    overrides_of,
)
from unlearning.errors import SecateurError

if TYPE_CHECKING:
    from simulation.compare_progress import CompareProgress
    from simulation.comparison import Comparison, Trial

commands = typer.Typer(add_completion=False)

FILES = ("compare.json", "compare.csv", "compare.md", "compare.html")
TRIALS = "trials"
"""Folder of the finished seeds, in the output folder."""


@commands.callback()
def _group() -> None:
    """Make a group of this app, which Typer does not do for one command."""


@commands.command()
def compare(
    scenario: Scene,
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas, see secateur methods; natural, random and retrain are always "
            "compared too."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="How many, one after another.")] = 1,
    seed: Seed = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds to follow every method for, from the request on.")
    ] = 10,
    forget: Annotated[
        str,
        typer.Option(
            help="Partitions to forget, with commas. [default: what the scenario asks for, or else "
            "the attackers]"
        ),
    ] = "",
    set_: Set = None,
    data_dir: DataDir = None,
    device: Where = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results. [default: runs/compare-NAME-...]")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the trials of another comparison in --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let methods forget the same in copies of one federation, and compare them.

    Seeds that were finished before are not run again.
    """
    comparisons = _plan(
        scenario,
        [name for part in methods.split(",") if (name := part.strip())],
        overrides=overrides_of(set_, seed=seed, device=device, data_dir=data_dir),
        clients=_partitions(forget),
        seeds=seeds,
        rounds=rounds,
    )
    execute(comparisons, out=out, force=force, as_json=as_json)


def execute(
    comparisons: Sequence["Comparison"],
    *,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run what is not finished yet, and write the results."""
    from simulation.compare_progress import CompareProgress, summary  # noqa: PLC0415
    from simulation.compare_report import describe, document  # noqa: PLC0415
    from simulation.engines.inprocess import collect_rarely  # noqa: PLC0415

    described = describe(comparisons[0])
    folder = out or default_folder(described)
    check_ready(comparisons[0].scenario)
    collect_rarely()
    with _folder(folder):
        kept = Kept(folder / TRIALS, described, force=force)
        with CompareProgress(comparisons) as progress, kept.told():
            trials = [
                trial for comparison in comparisons for trial in _trials(comparison, kept, progress)
            ]
        result = document(described, comparisons, trials)
        write_files(folder, _files(result))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        summary(result, folder)


def default_folder(described: Mapping[str, Any]) -> Path:
    """Return where results go unless told otherwise: every comparison has its own folder."""
    text = json.dumps(described, sort_keys=True)
    return Path("runs") / (
        f"compare-{described['scenario']}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    )


class Kept:
    """The trials of finished seeds, a file each, so that a long comparison can be interrupted.

    Parameters
    ----------
    folder
        Made when it is first written to.
    described
        What all seeds have in common; of another comparison nothing is used.
    force
        Whether to delete what is there of another comparison, instead of refusing to go on.

    Raises
    ------
    SecateurError
        If the folder holds trials of another comparison, or none that can be read.
    """

    def __init__(self, folder: Path, described: Mapping[str, Any], *, force: bool) -> None:
        self.folder = folder
        self.described = json.loads(json.dumps(described))
        for path in sorted(folder.glob("seed-*.json")):
            why = _difference(path, self.described)
            if why and force:
                path.unlink()
            elif why:
                raise SecateurError(
                    f"{path} {why}; give another folder with --out, or --force to replace it"
                )

    def load(self, seed: int) -> list["Trial"] | None:
        """Return the trials of a finished seed."""
        from simulation.comparison import Trial  # noqa: PLC0415

        path = self.folder / _name(seed)
        if not path.exists():
            return None
        return [Trial(**trial) for trial in json.loads(path.read_text("utf-8"))["trials"]]

    def save(self, seed: int, trials: Sequence["Trial"]) -> None:
        """Write the trials of a seed at once."""
        from simulation.comparison import as_json  # noqa: PLC0415

        content = {"comparison": self.described, "trials": [as_json(trial) for trial in trials]}
        text = json.dumps(content, indent=1) + "\n"
        self.folder.mkdir(exist_ok=True)
        write_files(self.folder, {_name(seed): text.encode()})

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Say where finished seeds are if something goes wrong."""
        try:
            yield
        except BaseException:
            if any(self.folder.glob("seed-*.json")):
                where = self.folder
                sys.stderr.write(f"\nfinished seeds are in {where}; the same command goes on\n")
            raise


def _plan(
    name: str,
    methods: Sequence[str],
    *,
    overrides: dict[str, Any],
    clients: Sequence[int],
    seeds: int,
    rounds: int,
) -> list["Comparison"]:
    """Return one comparison per seed; whatever is wrong is told here, before anything runs."""
    from simulation.comparison import Comparison  # noqa: PLC0415
    from simulation.scenario import load_scenario  # noqa: PLC0415

    scenario = load_scenario(name, overrides)
    first = scenario.settings.seed
    return [
        Comparison(scenario, methods, seed=seed, clients=clients, rounds=rounds)
        for seed in range(first, first + seeds)
    ]


def _partitions(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r}: give numbers of partitions with commas, such as 1,4",
            param_hint="--forget",
        ) from error


def _trials(comparison: "Comparison", kept: Kept, progress: "CompareProgress") -> list["Trial"]:
    finished = kept.load(comparison.seed)
    if finished is not None:
        progress.kept(comparison.seed)
        return finished
    with comparison.in_folder() as ready:
        trials = ready.play(grid_of(ready.scenario), progress)
    kept.save(comparison.seed, trials)
    return trials


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder that results can be written to; on failure remove it if nothing is in it."""
    created = prepare_folder(folder, FILES)
    try:
        yield
    except BaseException:
        for path in created:
            with contextlib.suppress(OSError):  # it holds the trials of finished seeds
                path.rmdir()
        raise


def _files(result: Mapping[str, Any]) -> dict[str, bytes]:
    from simulation.compare_page import render  # noqa: PLC0415
    from simulation.compare_plots import figures  # noqa: PLC0415
    from simulation.compare_report import as_csv, as_markdown  # noqa: PLC0415

    drawn = figures(result)
    texts = {
        "compare.json": json.dumps(result, indent=1) + "\n",
        "compare.csv": as_csv(result),
        "compare.md": as_markdown(result, drawn),
        "compare.html": render(result),
        **{f"plots/{name}.svg": svg for name, svg in drawn.items()},
    }
    return {name: text.encode() for name, text in texts.items()}


def _name(seed: int) -> str:
    return f"seed-{seed}.json"


def _difference(path: Path, wanted: Mapping[str, Any]) -> str:
    """Say why a file's trials are not of this comparison; empty where they are."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["comparison"]
    except (OSError, ValueError, LookupError, TypeError):
        return "holds no trials that can be read"
    if found == wanted:
        return ""
    ours, theirs = dict(_flat(wanted)), dict(_flat(found))
    # Texts that follow from the settings say nothing that these do not.
    told_by_others = {"summary", "ready-methods"}
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    keys = [key for key in keys if key not in told_by_others] or keys
    told = ", ".join(f"{key} = {theirs.get(key)} instead of {ours.get(key)}" for key in keys[:3])
    return f"is of another comparison: {told}{' and more' if len(keys) > 3 else ''}"


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value
