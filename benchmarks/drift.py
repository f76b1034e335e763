"""Drift subtraction beside FedUP: three data sets, two attacks, two ways to divide the data.

``python -m benchmarks.drift --help``. Every cell is one ``secateur compare`` with three seeds,
whose results are kept, so that a run that was interrupted goes on where it was.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.engines import ROOT, one_line_errors
from unlearning.errors import SecateurError

METHODS = ("drift", "fedup")
MORE = {"Fashion-MNIST, backdoor, IID": ("not", "federaser")}
"""Methods that take part in a cell besides."""
FASHION = ("examples=20000", "batch-size=64", "learning-rate=0.04")
CIFAR = ("task=cifar10", "model=cnn", "examples=8000", "batch-size=32", "learning-rate=0.02")
DATA: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "digits": ({"backdoor": "demo", "label flip": "label-flip"}, ()),
    "Fashion-MNIST": (
        {"backdoor": "fashion-backdoor", "label flip": "fashion-label-flip"},
        FASHION,
    ),
    "CIFAR-10": (
        {"backdoor": "fashion-backdoor", "label flip": "fashion-label-flip"},
        CIFAR,
    ),
}
"""Name -> scenario of each attack, and settings that differ from the scenario's."""
DIVISIONS = {"IID": ("partition=iid",), "Dirichlet 1": ("partition=dirichlet", "alpha=1.0")}
NUMBERS, PAGE = "drift.json", "drift.md"
console = Console(stderr=True)


def compare(
    scenario: str,
    settings: tuple[str, ...],
    folder: Path,
    *,
    methods: tuple[str, ...],
    seeds: int,
    data_dir: str,
) -> dict[str, Any]:
    """Run one comparison in a process of its own and return its result."""
    command = [
        sys.executable, "-m", "server", "compare", scenario, "--methods", ",".join(methods),
        "--seeds", str(seeds), "--out", str(folder), "--json",
        *(part for pair in settings for part in ("--set", pair)),
    ]  # fmt: skip
    if data_dir:
        command += ["--data-dir", data_dir]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SecateurError(f"the comparison in {folder} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def outcome(found: dict[str, Any]) -> dict[str, Any]:
    """Return what is told of a comparison: means over its seeds."""
    rows = {row["method"]: row for row in found["table"] if row["served"] == len(found["seeds"])}
    if lacking := sorted({*METHODS, "natural", "retrain"} - rows.keys()):
        raise SecateurError(f"{', '.join(lacking)} did not serve every seed; see the comparison")
    flipped = rows["fedup"]["before_backdoor_success"] is None
    attack = "flip_success" if flipped else "backdoor_success"
    return {
        "before": {"accuracy": rows["fedup"]["before_test_accuracy"],
                   "attack": rows["fedup"][f"before_{attack}"]},
        "methods": {
            name: {
                "recovery_rounds": row["recovery_rounds"],
                "accuracy": row["after_test_accuracy"],
                "attack": row[f"after_{attack}"],
                "accuracy_at_end": row["end_test_accuracy"],
                "attack_at_end": row[f"end_{attack}"],
                "capped": row["capped"],
                "rounds_needed": row["rounds_needed"],
                "rounds_asked": row["rounds_asked"],
                "memory_bytes": row["memory_bytes"],
            }
            for name, row in rows.items()
        },
        "seeds": found["seeds"],
        "settings": found["settings"],
    }  # fmt: skip


def page(cells: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "# Drift subtraction and FedUP side by side",
        "",
        "Means over the seeds; `python -m benchmarks.drift` makes this page, with a",
        "`secateur compare` for every row. Accuracy / success of the attack, in per cent, before;",
        "once validation accuracy was back, the number of recovery rounds in brackets; and ten",
        "rounds after the request. Retraining: at its end, and the rounds it took to come back to",
        "the accuracy before. A star: in some seed the accuracy was not back after 20 rounds.",
        "",
        "| data, attack, division | seeds | before | drift | FedUP | natural | retrained "
        "| drift, 10 rounds | FedUP, 10 rounds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        methods = cell["methods"]
        told = [
            f"{_pair(methods[m], 'accuracy', 'attack')} ({_recovery(methods[m])})"
            for m in ("drift", "fedup", "natural")
        ]
        retrained = methods["retrain"]
        told.append(
            f"{_pair(retrained, 'accuracy_at_end', 'attack_at_end')} "
            f"({_rounds(retrained['rounds_needed'])})"
        )
        told += [_pair(methods[m], "accuracy_at_end", "attack_at_end") for m in METHODS]
        before = _pair(cell["before"], "accuracy", "attack")
        lines.append(f"| {name} | {len(cell['seeds'])} | {before} | {' | '.join(told)} |")
    fewer = [c for c in cells.values() if _rounds_of(c, "drift") < _rounds_of(c, "fedup")]
    equal = [c for c in cells.values() if _rounds_of(c, "drift") == _rounds_of(c, "fedup")]
    better = [c for c in cells.values() if _attack_of(c, "drift") <= _attack_of(c, "fedup")]
    both = [c for c in cells.values() if c in better and c in (*fewer, *equal)]
    lines += [
        "",
        f"Of {len(cells)} cells, drift subtraction needs fewer recovery rounds in {len(fewer)} and "
        f"as many in {len(equal)};",
        f"its attack is no more successful than FedUP's after recovery in {len(better)}; both hold "
        f"in {len(both)}.",
        "",
    ]
    for name in (name for name in MORE if name in cells):
        lines += [f"## {name}: FedUP beside others", "", *_beside(cells[name]), ""]
    return "\n".join(lines)


def _beside(cell: dict[str, Any]) -> list[str]:
    """Return a table of what methods cost and leave."""
    lines = [
        "| method | after recovery | rounds of its own | of recovery | megabytes stored |",
        "|---|---|---|---|---|",
    ]
    for method, row in cell["methods"].items():
        if method == "retrain":
            continue
        lines.append(
            f"| {method} | {_pair(row, 'accuracy', 'attack')} | {_rounds(row['rounds_asked'])} | "
            f"{_recovery(row)} | {row['memory_bytes'] / 1e6:.2f} |"
        )
    return lines


def _rounds_of(cell: dict[str, Any], method: str) -> float:
    return float(cell["methods"][method]["recovery_rounds"])


def _attack_of(cell: dict[str, Any], method: str) -> float:
    return float(cell["methods"][method]["attack"])


def _pair(row: dict[str, Any], accuracy: str, attack: str) -> str:
    return f"{100 * row[accuracy]:.1f} / {100 * row[attack]:.1f}"


def _recovery(row: dict[str, Any]) -> str:
    return _rounds(row["recovery_rounds"]) + ("*" if row["capped"] else "")


def _rounds(number: float | None) -> str:
    return "-" if number is None else f"{number:.1f}"


def main(
    *,
    only: Annotated[list[str] | None, typer.Option(help="A data set.")] = None,
    data_dir: Annotated[str, typer.Option(help="Folder of Fashion-MNIST and CIFAR-10.")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; docs/results by default.")
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Folder of finished seeds; they are not run again.")
    ] = ROOT / "runs" / "drift",
) -> None:
    """Compare drift subtraction with FedUP and write a table."""
    output = output or ROOT / "docs/results"
    with one_line_errors():
        path = output / NUMBERS
        cells = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for data, (scenarios, own) in DATA.items():
            if only and data not in only:
                continue
            for attack, scenario in scenarios.items():
                for division, parts in DIVISIONS.items():
                    name = f"{data}, {attack}, {division}"
                    folder = work / name.replace(", ", "-").replace(" ", "-").lower()
                    with console.status(name):
                        found = compare(
                            scenario,
                            (*own, *parts),
                            folder,
                            methods=(*METHODS, *MORE.get(name, ())),
                            seeds=seeds,
                            data_dir=data_dir,
                        )
                    cells[name] = outcome(found)
                    path.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
                    (output / PAGE).write_text(page(cells), encoding="utf-8")
                    console.print(name, "done", highlight=False)


if __name__ == "__main__":
    typer.run(main)
