"""``report.json`` and ``report.md`` of one machine that forgot."""

import json
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from client.central.case import Case, Models
from client.central.figures import figures
from client.central.run import Outcome
from client.central.settings import Tuning
from client.files import write_files
from client.task.protocol import TaskOptions
from strategies.archive import save_model
from strategies.methods.settings import Keys
from unlearning.catalogue import titled

SCHEMA_VERSION = 1
COLUMNS = {
    "retained": "retained",
    "worst": "worst class",
    "forget_train": "forgotten, train",
    "forget_test": "forgotten, test",
    "test": "all",
}
"""Measure -> what it is called."""
OURS = re.compile(r"model(-[0-9]+)?\.safetensors|plots/(classes|curves)\.svg")
"""Files that a report may have and another of the same folder may not."""
POINTS = {
    "before": "before",
    "unlearned": "unlearned",
    "after": "fine-tuned",
    "retrained": "retrained",
}


def report_of(
    name: str,
    options: TaskOptions,
    case: Case,
    settings: Keys,
    tuning: Tuning,
    outcome: Outcome,
    retrained: tuple[dict[str, Any], float] | None,
) -> dict[str, Any]:
    """Return the report as plain JSON values; ``None`` stands for what was not measured."""
    return {
        "schema_version": SCHEMA_VERSION,
        "secateur": metadata.version("secateur"),
        "method": name,
        "task": options.task,
        "model": options.model or "default",
        "seed": case.training.seed,
        "forgotten": {
            "kind": "samples" if case.forget_class is None else "class",
            "class": case.forget_class,
            "rows": len(case.rows),
            "of": case.all_rows,
        },
        "settings": {
            "method": settings.model_dump(by_alias=True),
            "training": case.training.model_dump(by_alias=True),
            "tune": tuning.model_dump(by_alias=True),
        },
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": str(case.holding.device),
        },
        "before": outcome.before,
        "unlearned": outcome.unlearned,
        "tuned": outcome.tuned,
        "after": outcome.after,
        "retrained": None if retrained is None else retrained[0],
        "cost": {
            "training_seconds": outcome.made.training_seconds,
            "seconds": outcome.seconds,
            "tuning_seconds": outcome.tuning_seconds,
            "tuning_epochs": len(outcome.tuned),
            "retraining_seconds": None if retrained is None else retrained[1],
            **outcome.made.notes,
        },
        "models": names_of(outcome.models),
        "guarantee": outcome.made.guarantee,
        "warnings": list(outcome.made.warnings),
    }


def names_of(models: Models) -> list[str]:
    """Return the files of the models, an ensemble's numbered from 1."""
    if len(models) == 1:
        return ["model.safetensors"]
    return [f"model-{number}.safetensors" for number in range(1, len(models) + 1)]


def markdown(report: Mapping[str, Any], drawn: Iterable[str] = ()) -> str:
    """Return the report as a page, with figures from these files."""
    gone = report["forgotten"]
    what = f"class {gone['class']}, {gone['rows']}" if gone["kind"] == "class" else gone["rows"]
    lines = [
        f"# {titled(report['method'])} on {report['task']}",
        "",
        f"Forgotten: {what} of {gone['of']} training rows. Seed {report['seed']}. Accuracies, in "
        "per cent: on test rows of the classes that stay and of the worst of them, on the training "
        "rows to forget, on test rows of a class to forget, and on all test rows.",
        "",
        f"| | {' | '.join(COLUMNS.values())} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for point, title in POINTS.items():
        found = report[point]
        if found is not None and not (point == "after" and not report["tuned"]):
            lines.append(f"| {title} | {' | '.join(percent(found[key]) for key in COLUMNS)} |")
    lines += [f"\n![{Path(name).stem}]({name})" for name in drawn]
    lines += ["", "| cost | |", "|---|---|"]
    lines += [
        f"| {key.replace('_', ' ')} | {_short(value)} |"
        for key, value in report["cost"].items()
        if value is not None
    ]
    lines += ["", f"Guarantee: {report['guarantee']}."]
    lines += [f"\nWarning: {text}" for text in report["warnings"]]
    return "\n".join(lines) + "\n"


def percent(share: float | None) -> str:
    """Return a share in per cent; a dash for what was not measured."""
    return "-" if share is None else f"{100 * share:.1f}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(folder: Path, report: Mapping[str, Any], models: Models) -> None:
    """Write the models, then report and figures; what an earlier report had beyond them is removed.

    Raises
    ------
    SecateurError
        If they cannot be written.
    """
    for name, model in zip(report["models"], models, strict=True):
        save_model(folder / name, model)
    drawn = {f"plots/{name}.svg": text for name, text in figures(report).items()}
    pages = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "report.md": markdown(report, drawn),
    }
    write_files(folder, {name: text.encode() for name, text in {**drawn, **pages}.items()})
    told = {*report["models"], *drawn}
    for path in (*folder.glob("model*"), *folder.glob("plots/*")):
        name = path.relative_to(folder).as_posix()
        if OURS.fullmatch(name) and name not in told:
            path.unlink()
