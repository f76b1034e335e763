"""``report.json`` and ``report.md`` of one machine that forgot."""

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from client.central.case import Case
from client.central.run import Outcome
from client.central.settings import Tuning
from client.task.protocol import TaskOptions
from strategies.archive import save_model
from strategies.methods.settings import Keys
from unlearning.errors import SecateurError

SCHEMA_VERSION = 1
COLUMNS = {
    "retained": "retained",
    "worst": "worst class",
    "forget_train": "forgotten, train",
    "forget_test": "forgotten, test",
    "test": "all",
}
"""Measure -> what it is called."""
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
            "seconds": outcome.seconds,
            "tuning_seconds": outcome.tuning_seconds,
            "tuning_epochs": len(outcome.tuned),
            "retraining_seconds": None if retrained is None else retrained[1],
            **outcome.made.notes,
        },
        "guarantee": outcome.made.guarantee,
        "warnings": list(outcome.made.warnings),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a page."""
    gone = report["forgotten"]
    what = f"class {gone['class']}, {gone['rows']}" if gone["kind"] == "class" else gone["rows"]
    lines = [
        f"# {report['method']} on {report['task']}",
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


def write(folder: Path, report: Mapping[str, Any], outcome: Outcome) -> None:
    """Write the report, and the model where it is one; each file appears whole or not at all.

    Raises
    ------
    SecateurError
        If they cannot be written.
    """
    files = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "report.md": markdown(report),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as staging:
            for name, text in files.items():
                (Path(staging) / name).write_text(text, encoding="utf-8")
            for name in files:
                os.replace(Path(staging) / name, folder / name)
    except OSError as error:
        raise SecateurError(
            f"the report cannot be written to {folder}: {error.strerror}; choose another folder "
            "with --out"
        ) from error
    if len(outcome.models) == 1:
        save_model(folder / "model.safetensors", outcome.models[0])
