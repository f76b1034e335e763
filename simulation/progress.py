"""What a person sees while a scenario runs, and at its end. All progress goes to stderr."""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from server.federation import TEST
from simulation.probes import BACKDOOR, FLIP
from simulation.scenario import Scenario
from strategies.records import RoundRecord
from unlearning.catalogue import titled
from unlearning.plan import Ask

MOST_TOLD = 10
"""Rejected clients that are told of by name in a round; the report holds all."""
STAGES = {
    "federation": "federation",
    "natural": "for comparison: attackers gone, nothing pruned",
    "retrain": "for comparison: retraining without them",
}


class Progress:
    """A bar per stage, and a line for everything that a person should know."""

    def __init__(self, scenario: Scenario, engine: str) -> None:
        self._scenario = scenario
        self._engine = engine
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,  # a bar in a file is noise
        )
        self._tasks: dict[str, Any] = {}
        self._handler = Notes(self._console)
        self._before = logging.NOTSET, True

    def __enter__(self) -> Self:
        """Start showing."""
        scenario = self._scenario
        self._console.print(
            f"[bold]{escape(scenario.name)}[/]: {escape(scenario.summary)}\n"
            f"{scenario.clients.total} clients, {scenario.clients.malicious} malicious, "
            f"seed {scenario.settings.seed}, engine {self._engine}"
        )
        self._bar.start()
        self._task("federation", scenario.settings.rounds)
        notes = logging.getLogger("secateur")
        self._before = notes.level, notes.propagate
        notes.addHandler(self._handler)
        notes.setLevel(logging.INFO)
        notes.propagate = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop showing."""
        notes = logging.getLogger("secateur")
        notes.removeHandler(self._handler)
        level, notes.propagate = self._before
        notes.setLevel(level)
        self._bar.stop()

    def round(self, stage: str, record: RoundRecord) -> None:
        """Show a finished round."""
        total = self._scenario.settings.rounds if stage != "natural" else None
        task = self._task(stage, total)
        completed = self._bar.tasks[task].completed + (record.number > 0)
        known = self._bar.tasks[task].total
        total = None if known is None else max(known, completed)
        self._bar.update(task, completed=completed, total=total, state=state(record))
        for line in events(record):
            self._console.print(f"round {record.number:3d}  {line}", highlight=False)
        if not self._console.is_terminal and stage == "federation":
            self._console.print(f"round {record.number:3d}  {state(record)}", highlight=False)

    def ask(self, ask: Ask) -> None:
        """Show that a method asks clients, as it may for many rounds within one."""
        self._bar.update(self._task("federation", None), state=asking(ask))

    def _task(self, stage: str, total: int | None) -> Any:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(STAGES[stage], total=total, state="starting")
        return self._tasks[stage]


class Notes(logging.Handler):
    """Shows what the engine has to say about how it runs."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        colour = "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(f"[{colour}]{escape(record.getMessage())}[/]", highlight=False)


def asking(ask: Ask) -> str:
    """Return what a method is about: rounds that are played again have numbers."""
    number = ask.config.get("round")
    told = "" if number is None else f", round {number} again"
    return f"unlearning: {len(ask.to)} clients asked{told}"


def state(record: RoundRecord) -> str:
    """Return phase, accuracy and attack success of a round."""
    parts = [str(record.phase)]
    for measure, title in ((TEST, "accuracy"), (BACKDOOR, "backdoor"), (FLIP, "flipped")):
        value = record.measures.get(measure)
        if value is not None:
            parts.append(f"{title} {value:.1%}")
    return "  ".join(parts)


def events(record: RoundRecord) -> list[str]:
    """Return a line for everything out of the ordinary; texts from clients are escaped."""
    rejected = list(record.rejected.items())
    lines = [
        f"[yellow]{client} rejected: {escape(reason)}[/]" for client, reason in rejected[:MOST_TOLD]
    ]
    if len(rejected) > MOST_TOLD:
        lines.append(f"[yellow]and {len(rejected) - MOST_TOLD} more rejected[/]")
    lines += [
        f"[red]{client} quarantined: {escape(reason)}[/]"
        for client, reason in record.quarantined.items()
    ]
    if record.note:
        lines.append(f"[yellow]{escape(record.note)}[/]")
    unlearning = record.unlearning
    if unlearning is not None and unlearning.refused is not None:
        lines.append(f"[red]unlearning refused: {escape(unlearning.refused)}[/]")
    elif unlearning is not None:
        zeroed, size = sum(unlearning.zeroed.values()), sum(unlearning.sizes.values())
        share = f", {zeroed} of {size} weights zeroed" if size else ""
        what = ", ".join(unlearning.targets or unlearning.clients)
        lines.append(f"[bold]{titled(unlearning.method)} forgot {escape(what)}[/]{share}")
        lines += [f"[yellow]{escape(warning)}[/]" for warning in unlearning.warnings]
    return lines


def summary(report: dict[str, Any], folder: Path) -> None:
    """Print the result."""
    from simulation.page import marks_told  # noqa: PLC0415  with figures, slow to import

    console = Console()
    table = Table(title=f"{report['scenario']}, seed {report['seed']}", title_justify="left")
    attack = next(
        (name for name in (BACKDOOR, FLIP) if (report["final"] or {}).get(name) is not None), None
    )
    table.add_column("model")
    table.add_column("round", justify="right")
    table.add_column("test accuracy", justify="right")
    if attack is not None:
        table.add_column(attack.replace("_", " "), justify="right")
    for name in ("before", "unlearned", "after", "natural", "retrained", "final"):
        point = report[name]
        if point is not None:
            values = [point[TEST], *([point[attack]] if attack is not None else [])]
            table.add_row(name, str(point["round"]), *(_percent(value) for value in values))
    console.print(table)
    for unlearning in report["unlearnings"]:
        if unlearning["refused"] is None and unlearning["recovery_rounds"] is not None:
            bound = unlearning["recovery_bound"]
            console.print(
                f"{unlearning['method']} in round {unlearning['round']}: recovery took "
                f"{_rounds(unlearning['recovery_rounds'])} ({unlearning['recovery_ended_by']}"
                + (f", bound {bound})" if bound is not None else ")")
            )
        elif unlearning["refused"] is None:
            console.print(f"{unlearning['method']} in round {unlearning['round']}: exactly")
    for text in marks_told(report):
        console.print(escape(text))
    needed = report["retrain_rounds_needed"]
    if needed is not None:
        console.print(f"retraining needed {needed} rounds to reach the accuracy before")
    if not report["unlearnings"]:
        flagged = report["ever_flagged"]
        console.print(
            "nobody was forgotten"
            + (f"; flagged at some time: {', '.join(flagged)}" if flagged else "")
        )
    for question, verdict in report["verdict"].items():
        console.print(f"{question.replace('_', ' ')}: {_verdict(verdict)}")
    console.print(f"report: {folder / 'report.html'}")


def _rounds(count: int) -> str:
    return "1 round" if count == 1 else f"{count} rounds"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}"


def _verdict(verdict: dict[str, Any]) -> str:
    if verdict["value"] is None:
        return f"{verdict['result']} (not measured)"
    low, high = verdict["interval"]
    return (
        f"{verdict['result']}: {verdict['value']:.1%} against {verdict['baseline']:.1%} retrained, "
        f"difference within [{low:+.1%}, {high:+.1%}], tolerance {verdict['tolerance']:.0%}"
    )
