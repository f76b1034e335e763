"""Commands that list what exists: methods and detectors."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

commands = typer.Typer(add_completion=False)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@commands.command()
def methods(as_json: Json = False) -> None:
    """List the unlearning methods."""
    from strategies.methods.settings import defaults_of  # noqa: PLC0415  with torch, slow to import
    from unlearning.catalogue import METHODS  # noqa: PLC0415

    rows = [
        {
            "name": name,
            "summary": entry.summary,
            "targets": ", ".join(sorted(entry.targets)),
            "needs": ", ".join(sorted(entry.needs)),
            "guarantee": entry.guarantee,
            "safe_when_target_lies": entry.safe,
            "rounds": entry.rounds,
            "models_stored": entry.stored,
            "chosen_automatically": entry.routed,
            "source": entry.source,
            "section": f"methods {entry.section}",
            "settings": defaults_of(name),
        }
        for name, entry in METHODS.items()
    ]
    if as_json:
        show(rows, as_json, title="Methods")
        return
    console = Console()
    for name, entry in METHODS.items():
        console.print(f"[bold]{name}[/bold]: {entry.summary}", highlight=False)
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_row("  needs", ", ".join(sorted(entry.needs)))
        facts.add_row("  targets", ", ".join(sorted(entry.targets)))
        facts.add_row("  guarantee", entry.guarantee)
        facts.add_row("  safe if the target lies", "yes" if entry.safe else "no")
        if own := ", ".join(f"{key}={value}" for key, value in defaults_of(name).items()):
            facts.add_row("  method-settings", own)
        facts.add_row("  cost", f"rounds: {entry.rounds}; models stored: {entry.stored}")
        facts.add_row("  source", entry.source)
        console.print(facts, "")
    console.print("K clients, R rounds. Guarantees are explained in docs/forgetting.md.")


@commands.command()
def detectors(as_json: Json = False) -> None:
    """List the detectors."""
    from strategies.detectors.catalogue import DETECTORS  # noqa: PLC0415  imports torch

    rows = [
        {
            "name": name,
            "summary": entry.summary,
            "catches": entry.catches,
            "limits": entry.limits,
            "source": entry.source,
        }
        for name, entry in DETECTORS.items()
    ]
    show(rows, as_json, title="Detectors")


def show(
    rows: Sequence[Mapping[str, object]],
    as_json: bool,
    *,
    title: str,
) -> None:
    """Print rows as a table or as one JSON document."""
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    table = Table(title=title, title_justify="left", show_lines=True)
    for key in rows[0]:
        table.add_column(key, overflow="fold", no_wrap=key == "name")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
