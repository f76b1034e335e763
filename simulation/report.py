"""``report.json``: everything a run showed, in the shape that ``docs/report.md`` promises.

Shares are in [0, 1]; ``null`` stands for what was not measured, never for a guess.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from client.task.device import choose_device
from server.federation import TEST
from simulation.experiment import Outcome, Point
from simulation.probes import BACKDOOR, FLIP, FORGET, MEASURES, RETAINED
from simulation.scenario import Scenario
from strategies.records import MarkCheck, Phase, RoundRecord, UnlearningRecord
from unlearning.verdict import NOT_MEASURED, Verdict, equivalence

SCHEMA_VERSION = 1
UTILITY_TOLERANCE = 0.02
FORGETTING_TOLERANCE = 0.03
QUESTIONS = ("utility", "forgetting", "privacy", "hidden_knowledge")


def report_of(outcome: Outcome, engine: str, *, batched: bool = False) -> dict[str, Any]:
    """Return the report as plain JSON values; ``batched`` says how clients were trained."""
    scenario = outcome.scenario
    points = outcome.points
    return {
        "schema_version": SCHEMA_VERSION,
        "secateur": metadata.version("secateur"),
        "scenario": scenario.name,
        "summary": scenario.summary,
        "engine": engine,
        "seed": scenario.settings.seed,
        "settings": {
            **settings_of(scenario),
            "requests": [
                asked.model_dump(mode="json", by_alias=True, exclude_defaults=True)
                for asked in scenario.requests
            ],
            "may-be-refused": scenario.may_be_refused,
            "baselines": scenario.baselines.model_dump(),
        },
        "environment": {**environment(scenario.settings.device), "batched": batched},
        "clients": {
            "total": scenario.clients.total,
            "malicious": list(outcome.malicious),
            "forgotten": list(outcome.forgotten),
            "left_out_of_baselines": sorted({*outcome.forgotten, *outcome.malicious}),
            "roster": dict(outcome.roster),
        },
        "rounds": [_round(r) for r in [*outcome.rounds, *outcome.retrain_rounds]],
        "natural_rounds": [_round(record) for record in outcome.natural_rounds],
        "detections": _detections(outcome.rounds),
        "ever_flagged": sorted(
            {client for r in outcome.rounds if r.finding for client in r.finding.flagged}
        ),
        "unlearnings": [_unlearning(record, left) for record, left in outcome.unlearnings],
        **{
            name: _point(points.get(name))
            for name in ("before", "unlearned", "after", "retrained", "natural", "final")
        },
        "ffmu": outcome.ffmu,
        "retrain_rounds_needed": outcome.retrain_rounds_needed,
        "speedup": _speedup(outcome),
        "verdict": {
            question: {"measure": measure, **_plain(verdict)}
            for question, (measure, verdict) in _verdicts(outcome).items()
        },
    }


def without_times(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the report without what differs between runs of the same seed: times and place."""
    kept = {k: v for k, v in report.items() if k not in {"environment", "engine"}}
    return _drop_seconds(kept)  # type: ignore[no-any-return]


TIMES = ("seconds", "speedup_vs_retrain")


def _drop_seconds(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _drop_seconds(v) for k, v in value.items() if k not in TIMES}
    return [_drop_seconds(item) for item in value] if isinstance(value, list) else value


def settings_of(scenario: Scenario) -> dict[str, Any]:
    """Return settings, clients and attack of a scenario as plain values."""
    return {
        **scenario.settings.model_dump(by_alias=True),
        "clients": scenario.clients.model_dump(),
        "attack": scenario.attack.model_dump(mode="json") if scenario.attack else None,
    }


def environment(device: str) -> dict[str, str]:
    """Return versions, and the device that a setting chooses."""
    return {
        "python": platform.python_version(),
        "flwr": metadata.version("flwr"),
        "torch": metadata.version("torch"),
        "device": str(choose_device(device)),
    }


def _measures(measures: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: measures.get(name) for name in MEASURES}


def _round(record: RoundRecord) -> dict[str, Any]:
    finding = record.finding
    return {
        "round": record.number,
        "phase": str(record.phase),
        "participants": list(record.participants),
        "rejected": dict(record.rejected),
        "quarantined": dict(record.quarantined),
        "capped": dict(record.capped),
        "note": record.note,
        **_measures(record.measures),
        "train_loss": record.metrics.get("loss"),
        "scores": dict(sorted(finding.scores.items())) if finding else {},
        "flagged": sorted(finding.flagged) if finding else [],
        "flags_count": record.flags_count,
        "evidence": dict(finding.evidence) if finding else {},
        "threshold": finding.threshold if finding else None,
        "decided_by": finding.decided_by if finding else "",
        "finding": finding.note if finding else "",
        "seconds": record.seconds,
    }


def _detections(rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    return [
        {
            "round": record.number,
            "client": client,
            "detector": record.detector,
            "score": record.finding.scores.get(client),
            "threshold": record.finding.threshold,
            "decided_by": record.finding.decided_by,
            "evidence": record.finding.evidence.get(record.finding.decided_by),
        }
        for record in rounds
        if record.finding is not None
        for client in sorted(record.finding.flagged)
    ]


def _unlearning(record: UnlearningRecord, left: Sequence[str]) -> dict[str, Any]:
    return {
        "round": record.number,
        "method": record.method,
        "cause": record.cause,
        "targets": list(record.targets),
        "clients": list(left),
        "holders": [client for client in record.clients if client not in left],
        "guarantee": record.guarantee,
        "rounds_asked": record.rounds_asked,
        "bytes_sent": record.bytes_sent,
        "settings": dict(record.settings),
        "progress": dict(record.progress),
        "zeroed": sum(record.zeroed.values()),
        "zeroed_by_layer": {
            name: {"zeroed": count, "of": record.sizes[name]}
            for name, count in record.zeroed.items()
        },
        "seconds": record.seconds,
        "memory_bytes": record.memory_bytes,
        "recovery_rounds": record.recovery_rounds,
        "recovery_ended_by": record.recovery_ended_by,
        "recovery_bound": record.recovery_bound,
        "recovery_target": record.recovery_target,
        "conflict_percentiles": dict(record.percentiles),
        "warnings": list(record.warnings),
        "refused": record.refused,
        "marks": [_marks(found) for found in record.marks],
    }


def _marks(found: MarkCheck) -> dict[str, Any]:
    losses = [{"round": number, "loss": loss} for number, loss in found.losses.items()]
    return {**asdict(found), "losses": losses, "word_of": found.client}


def _point(point: Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    return {**_measures(point.measures), "round": point.number}


def _speedup(outcome: Outcome) -> dict[str, float | None]:
    """Return retraining over unlearning and recovery, in rounds and in seconds."""
    needed = outcome.retrain_rounds_needed
    served = [r.unlearning for r in outcome.rounds if r.unlearning and not r.unlearning.refused]
    recovery = sum(record.recovery_rounds or 0 for record in served)
    if needed is None or not recovery:
        return {"rounds": None, "seconds": None}
    spent = sum(record.seconds for record in served) + sum(
        record.seconds for record in outcome.rounds if record.phase is Phase.RECOVER
    )
    retraining = sum(record.seconds for record in outcome.retrain_rounds[:needed])
    return {"rounds": needed / recovery, "seconds": retraining / spent}


def _plain(verdict: Verdict) -> dict[str, Any]:
    interval = None if verdict.interval is None else list(verdict.interval)
    return {**asdict(verdict), "interval": interval}


def _verdicts(outcome: Outcome) -> dict[str, tuple[str | None, Verdict]]:
    """Return the measure and the answer of the four questions.

    Privacy and hidden knowledge are not measured here.
    """
    verdicts: dict[str, tuple[str | None, Verdict]] = dict.fromkeys(QUESTIONS, (None, NOT_MEASURED))
    after, retrained = outcome.hits.get("after", {}), outcome.hits.get("retrained", {})
    for question, measures, tolerance in (
        ("utility", (RETAINED, TEST), UTILITY_TOLERANCE),
        ("forgetting", (BACKDOOR, FLIP, FORGET), FORGETTING_TOLERANCE),
    ):
        taken = [name for name in measures if name in after and name in retrained]
        if taken:
            verdict = equivalence(after[taken[0]], retrained[taken[0]], tolerance)
            verdicts[question] = (taken[0], verdict)
    return verdicts
