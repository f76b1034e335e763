"""What a person sees while methods are compared, and at the end. All progress goes to stderr."""

import logging
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from server.federation import TEST
from simulation.compare_report import (
    Column,
    Document,
    accuracy_in,
    costs,
    forgetting_of,
    remarks,
    results,
)
from simulation.comparison import RETRAINED, TRAINING, Comparison, Trial, Watcher
from simulation.probes import BACKDOOR, FLIP, FORGET, RETAINED
from simulation.progress import Notes, asking
from strategies.records import RoundRecord
from unlearning.plan import Ask

SHORT = {
    TEST: "accuracy",
    RETAINED: "other classes",
    BACKDOOR: "backdoor",
    FLIP: "flipped",
    FORGET: "forget accuracy",
}


class CompareProgress(Watcher):
    """One bar for everything, and a line for every method that is done."""

    def __init__(self, comparisons: Sequence[Comparison]) -> None:
        first = comparisons[0]
        self._first = first
        self._seeds = len(comparisons)
        rounds = first.scenario.settings.rounds
        self._per_seed = 2 * rounds + (len(first.methods) - 1) * first.rounds
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,  # a bar in a file is noise
        )
        self._task = self._bar.add_task("", total=self._seeds * self._per_seed, state="")
        self._stage_end = 0
        """Rounds planned until the end of what is going on; recovery may take more, and methods
        that are refused take none."""
        self._notes = Notes(self._console)
        self._propagate = True

    def __enter__(self) -> Self:
        """Start showing."""
        self._console.print(
            f"[bold]{escape(self._first.scenario.name)}[/]: {len(self._first.methods)} methods, "
            f"{self._seeds} seed{'' if self._seeds == 1 else 's'} from {self._first.seed}",
            highlight=False,
            soft_wrap=True,
        )
        self._bar.start()
        notes = logging.getLogger("secateur")
        self._propagate, notes.propagate = notes.propagate, False
        notes.addHandler(self._notes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop showing."""
        notes = logging.getLogger("secateur")
        notes.removeHandler(self._notes)
        notes.propagate = self._propagate
        self._bar.stop()

    def kept(self, seed: int) -> None:
        """Tell that a seed was finished before."""
        self._console.print(
            f"seed {seed}  finished before, taken as it is", highlight=False, soft_wrap=True
        )
        self._stage_end += self._per_seed
        self._bar.update(self._task, completed=self._stage_end)

    def begin(self, seed: int, what: str, rounds: int) -> None:
        """Show what is going on."""
        self._stage_end += rounds
        self._bar.update(self._task, description=f"seed {seed}  {what}", state="")
        if what in (TRAINING, RETRAINED):
            self._console.print(
                f"seed {seed}  {what}: {rounds} rounds", highlight=False, soft_wrap=True
            )

    def round(self, record: RoundRecord) -> None:
        """Show a finished round."""
        done = self._bar.tasks[0].completed + (record.number > 0)
        accuracy = record.measures.get(TEST)
        told = f"round {record.number}" + ("" if accuracy is None else f"  {accuracy:.1%}")
        self._bar.update(self._task, completed=min(done, self._stage_end), state=told)

    def ask(self, ask: Ask) -> None:
        """Show that a method asks clients."""
        self._bar.update(self._task, state=asking(ask))

    def end(self, trial: Trial) -> None:
        """Tell what a method came to."""
        self._bar.update(self._task, completed=self._stage_end)
        self._console.print(f"seed {trial.seed}  {line(trial)}", highlight=False, soft_wrap=True)


def line(trial: Trial) -> str:
    """Return the main numbers of a trial; texts are escaped for rich."""
    name = f"{trial.method:<18}"
    if trial.refused is not None:
        return f"{name}  [yellow]refused: {escape(trial.refused)}[/]"
    taken = {text: trial.after.get(measure) for measure, text in SHORT.items()}
    shown = [f"{text} {share:.1%}" for text, share in taken.items() if share is not None]
    return f"{name}  {'  '.join([*shown, *_cost(trial)])}"


def _cost(trial: Trial) -> list[str]:
    rounds = (trial.rounds_asked or 0) + (trial.recovery_rounds or 0)
    spent = [f"{rounds} round{'' if rounds == 1 else 's'}"]
    if trial.seconds is not None:
        spent.append(f"{trial.seconds:.1f} s")
    return spent


def summary(document: Document, folder: Path) -> None:
    """Print the table, and where the rest is."""
    console = Console()
    table = Table(title=f"{document['scenario']}: methods compared", title_justify="left")
    columns = [column for column in (*results(document), *costs()) if _main(column, document)]
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column.name, justify="right")
    for row in document["table"]:
        table.add_row(row["method"], *(column.show(row) for column in columns))
    console.print(table)
    for row in document["table"]:
        for note in remarks(row, document):
            console.print(f"{row['method']}: {escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"report: {folder / 'compare.html'}")


def _main(column: Column, document: Document) -> bool:
    """Say whether a column is among the few that a terminal is wide enough for."""
    return column.key in {
        f"after_{accuracy_in(document)}",
        f"after_{forgetting_of(document)}",
        "rounds_asked",
        "recovery_rounds",
        "seconds",
        "bytes_sent",
    }
