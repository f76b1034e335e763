"""``report.html``: one page that tells a run to someone who has never heard of unlearning.

It holds everything it shows and loads nothing. Names and reasons may come from hostile clients:
the template escapes every value, and so do the figures.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from simulation.plots import (
    ATTACKS,
    Report,
    attack_measure,
    clients_of,
    federation,
    figures,
    spans,
)
from strategies.detectors.catalogue import DETECTORS
from unlearning.catalogue import titled

DASH, MINUS, SPACE, TIMES = "\u2013", "\u2212", "\u00a0", "\u00d7"
WORDS = (
    *("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve"),
)
MOST_CLIENTS = 20
"""Of more clients, the table leaves out those about whom there is nothing to tell."""
EFFECTS = {
    "backdoor_success": "the backdoor worked on {} of the marked inputs",
    "flip_success": "the model repeated {} of the swapped labels",
}
"""Measure of an attack -> what its share means."""
MEASURED = {
    "test_accuracy": "Test accuracy",
    "retained_accuracy": "Accuracy on the other classes",
    "forget_accuracy": "Forget accuracy",
    **ATTACKS,
}
"""Measure behind a verdict -> its name."""
POINTS = (
    ("before", "Before", "The model just before anything was forgotten."),
    ("unlearned", "Unlearned", "The same model right after the last unlearning, not yet repaired."),
    ("after", "After recovery", "Repaired by ordinary training with the clients that stay."),
    (
        "natural",
        "Only left out",
        "Comparison: the same rounds without these clients or data, nothing else changed. What "
        "time alone forgets.",
    ),
    (
        "retrained",
        "Retrained",
        "Comparison: trained from the start without them. The model to aim for.",
    ),
    ("final", "End of the run", "The model after the last round."),
)
"""Key in the report, name and meaning of every model that was measured."""
QUESTIONS = (
    ("utility", "Utility", "Is the model as accurate as one retrained without these clients?"),
    (
        "forgetting",
        "Forgetting",
        "Is what they taught as weak as in a model that never learned it?",
    ),
    ("privacy", "Privacy", "Could someone tell from the model that their data had been used?"),
    (
        "hidden_knowledge",
        "Hidden knowledge",
        "Would the model relearn it faster than one that never knew it?",
    ),
)
RESULTS = {
    "pass": "The whole interval lies inside the tolerance.",
    "fail": "The whole interval lies outside the tolerance.",
    "inconclusive": "The interval crosses the edge of the tolerance: this run cannot decide.",
}
STATUSES = {"active": "active", "quarantined": "in quarantine", "banned": "forgotten, excluded"}
FIGURES = {
    "curves": (
        "Round by round",
        "Test accuracy is the share of unseen inputs classified correctly.",
    ),
    "detection": (
        "Who looked suspicious",
        "Each row is a client, each column a round; the detector sees updates only, never who "
        "attacks.",
    ),
    "pruning": (
        "What was cut out",
        "Share of the weights of each layer that unlearning set to zero. Recovery rounds train "
        "them again without the forgotten clients.",
    ),
}
"""Name of a figure -> its heading and how to read it."""


def render(report: Report) -> str:
    """Return the page as one HTML document that needs no other file."""
    environment = Environment(
        loader=PackageLoader("simulation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"percent": percent, "points": points, "duration": duration}
    facts = Facts.of(report)
    clients = [_client(name, facts) for name in clients_of(report)]
    models, measures = _models(facts), _measures(facts)
    told = [c for c in clients if c["remarkable"] or len(clients) <= MOST_CLIENTS]
    return environment.get_template("report.html.jinja").render(
        report=report,
        facts=facts,
        story=list(_story(facts)),
        alerts=list(_alerts(facts)),
        tiles=list(_tiles(facts)),
        models=models,
        measures=measures,
        dashes=any(m["point"] is None or None in map(m["point"].get, measures) for m in models),
        unlearnings=[_unlearning(u, facts) for u in report["unlearnings"]],
        speedup=_speedup(facts),
        verdicts=[_verdict(facts, *question) for question in QUESTIONS],
        figures=_figures(facts),
        detector=DETECTORS.get(report["settings"].get("detector", "none")),
        detection=list(_detection(facts)),
        clients=told,
        uneventful=[c for c in clients if c not in told],
        notes=[(r["round"], r["note"]) for r in facts.rounds if r["note"]],
        findings=[(r["round"], r["finding"]) for r in facts.rounds if r["finding"]],
        settings=list(flat(report["settings"])),
        statuses=STATUSES,
    )


# ---------------------------------------------------------------- what happened
@dataclass(frozen=True)
class Facts:
    """What the story, the alerts and the tables are told from."""

    report: Report
    rounds: Sequence[Mapping[str, Any]]
    """The federation's."""
    attack: str | None
    """Measure of the attack, if one was taken."""
    malicious: frozenset[str]
    forgotten: frozenset[str]
    quarantined: frozenset[str]
    """Ever excluded, forgotten since or not."""
    mistaken: frozenset[str]
    """Honest, and yet forgotten as malicious."""
    served: Sequence[Mapping[str, Any]]
    """Unlearnings that were carried out."""
    refused: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, report: Report) -> "Facts":
        """Read a report."""
        rounds = federation(report)
        malicious = frozenset(report["clients"]["malicious"])
        served = [u for u in report["unlearnings"] if u["refused"] is None]
        blamed = {c for u in served if u["cause"] == "malicious" for c in u["clients"]}
        return cls(
            report,
            rounds,
            attack_measure(report),
            malicious,
            frozenset(report["clients"]["forgotten"]),
            frozenset(client for record in rounds for client in record["quarantined"]),
            frozenset(blamed - malicious),
            served,
            [u for u in report["unlearnings"] if u["refused"] is not None],
        )

    @property
    def last_round(self) -> int:
        """Return the number of the federation's last round."""
        return max((int(record["round"]) for record in self.rounds), default=0)

    @property
    def waiting(self) -> frozenset[str]:
        """Return who is excluded, but was not forgotten."""
        roster = self.report["clients"]["roster"]
        return frozenset(client for client, status in roster.items() if status == "quarantined")

    @property
    def barred(self) -> frozenset[str]:
        """Return who is excluded without having attacked or asked for it."""
        asked = {
            client
            for unlearning in self.report["unlearnings"]
            if unlearning["cause"] != "malicious"
            for client in unlearning["clients"]
        }
        return self.waiting - self.malicious - asked

    @property
    def asked(self) -> bool:
        """Say whether the scenario asked for forgetting."""
        return bool(self.report["settings"].get("requests"))

    @property
    def detecting(self) -> bool:
        """Say whether a detector was on."""
        return bool(self.report["settings"].get("detector", "none") != "none")

    def share(self, point: str, measure: str | None) -> float | None:
        """Return a measure at a named point, if it was taken."""
        found = self.report[point]
        return found[measure] if found is not None and measure is not None else None


def _story(facts: Facts) -> Iterator[str]:
    yield _opening(facts)
    before, after = (facts.share(point, facts.attack) for point in ("before", "after"))
    if before is not None:
        yield f"Before anything was forgotten, {_effect(facts, before)}."
    if not facts.served:
        yield from _nothing_forgotten(facts)
        return
    for unlearning in facts.served[:3]:
        if unlearning["holders"]:
            yield (
                f"In round {unlearning['round']}, the federation forgot {_what(unlearning)} on "
                f"request; {counted(len(unlearning['holders']), 'client')} dropped what they held."
            )
            continue
        how = "forgotten on request"
        if unlearning["cause"] == "malicious":
            how = "judged malicious and forgotten"
            if facts.malicious.issuperset(unlearning["clients"]):
                how = "caught and forgotten"
        verb = "was" if len(unlearning["clients"]) == 1 else "were"
        yield f"In round {unlearning['round']}, {listed(unlearning['clients'])} {verb} {how}."
    if len(facts.served) > 3:
        yield f"{counted(len(facts.served) - 3, 'more unlearning').capitalize()} followed."
    recovery = facts.served[-1]["recovery_rounds"]
    later = (
        f"{counted(recovery, 'recovery round').capitalize()} later" if recovery else "Afterwards"
    )
    retrained = facts.share("retrained", facts.attack)
    natural = facts.share("natural", facts.attack)
    if after is not None:
        text = f"{later} it was {percent(after)}" if before is not None else ""
        text = text or f"{later}, {_effect(facts, after)}"
        if retrained is not None:
            text += f"; in a model retrained from the start without {_whom(facts)}, "
            text += percent(retrained)
        if natural is not None:
            text += f"; had they only been left out, {percent(natural)}"
        yield text + "."
    yield from marks_told(facts.report)
    yield from _accuracy(facts)


def marks_told(report: Mapping[str, Any]) -> Iterator[str]:
    """Say what clients that marked rows say of their marks."""
    for unlearning in report["unlearnings"]:
        for marks in unlearning["marks"]:
            why = f" ({marks['reason']})" if marks["reason"] else ""
            yield (
                f"{marks['client']} checked whether the marks that it left are gone, which is its "
                f"word alone: {marks['result']}{why}."
            )


def _opening(facts: Facts) -> str:
    total, malicious = facts.report["clients"]["total"], sorted(facts.malicious)
    text = (
        f"{counted(total, 'client').capitalize()} trained one model together for "
        f"{counted(facts.last_round, 'round')}, each on its own data; "
    )
    if not malicious:
        return f"{text}none of them attacked it."
    who = f"{number_word(len(malicious))} of them"
    attack = facts.report["settings"].get("attack") or {}
    if attack.get("kind") == "label-flip":
        deed = "taught it wrong answers by swapping the labels of easily confused classes"
    elif attack.get("kind") == "backdoor":
        target = attack["target"]
        deed = f"taught it a backdoor: to read any input with a hidden mark as class {target}"
    else:
        deed = "attacked it"
    return f"{text}{who} ({listed(malicious)}) {deed}."


def _nothing_forgotten(facts: Facts) -> Iterator[str]:
    flags = sum(len(record["flagged"]) for record in facts.rounds)
    if facts.waiting:
        verb = "was" if len(facts.waiting) == 1 else "were"
        yield f"{listed(sorted(facts.waiting))} {verb} excluded, but nobody was forgotten."
    elif not facts.detecting:
        yield "No detector was on, and nobody was forgotten."
    elif facts.malicious:
        yield "The detector caught none of them, and nobody was forgotten."
    elif flags:
        yield (
            f"The detector raised {counted(flags, 'flag')}, all of them false; none led to an "
            "exclusion, and nobody was forgotten."
        )
    else:
        yield "The detector accused nobody, and nobody was forgotten."
    accuracy = facts.share("final", "test_accuracy")
    effect = facts.share("final", facts.attack)
    if accuracy is not None:
        yield f"At the end, the model classified {percent(accuracy)} of the test inputs correctly."
    if effect is not None:
        yield f"At the end, {_effect(facts, effect)}."


def _accuracy(facts: Facts) -> Iterator[str]:
    shown = ["test_accuracy"]
    if any(unlearning["holders"] for unlearning in facts.served):
        shown = ["forget_accuracy", "retained_accuracy", "test_accuracy"]
    for measure in shown:
        before, after = (facts.share(point, measure) for point in ("before", "after"))
        if before is None or after is None:
            continue
        text = f"{MEASURED[measure]} went from {percent(before)} before to {percent(after)} after"
        retrained = facts.share("retrained", measure)
        if retrained is not None:
            text += f"; retrained, it is {percent(retrained)}"
        yield f"{text}."
    after = facts.share("after", "test_accuracy")
    if after is None:
        return
    final, end = facts.report["final"], facts.share("final", "test_accuracy")
    if end is not None and final["round"] != facts.report["after"]["round"]:
        yield f"At the end of the run, in round {final['round']}, it was {percent(end)}."


def _warming(settings: Mapping[str, Any]) -> str:
    rounds = settings["warm-up"]
    return f"; rounds up to round {rounds} do not count" if rounds else ""


def _alerts(facts: Facts) -> Iterator[str]:
    """Yield what went wrong, plainly."""
    if facts.detecting:
        played = [r for r in facts.rounds if r["round"] > 0]
        if played and not any(r["scores"] for r in played):
            why = next((r["finding"] for r in played if r["finding"]), "it saw no updates")
            yield f"The detector could not judge a single round: {why}."
        elif played and facts.report["settings"]["warm-up"] >= played[-1]["round"]:
            yield "The warm-up lasted as long as the run: no flag could count."
    if facts.mistaken:
        was = "was" if len(facts.mistaken) == 1 else "were"
        yield f"{listed(sorted(facts.mistaken))} did nothing wrong and {was} forgotten by mistake."
    missed = facts.malicious - facts.quarantined - facts.forgotten
    if missed:
        was = "was" if len(missed) == 1 else "were"
        yield (
            f"{listed(sorted(missed))} attacked and {was} never caught: what was learned from "
            "them is still in the model."
        )
    yield from _refusals(facts)
    unexplained = facts.waiting - {c for u in facts.refused for c in u["clients"]}
    if unexplained:
        verb = "is" if len(unexplained) == 1 else "are"
        yield (
            f"{listed(sorted(unexplained))} {verb} in quarantine and not forgotten: what was "
            "learned from them is still in the model."
        )
    if facts.barred:
        verb = "is" if len(facts.barred) == 1 else "are"
        yield f"{listed(sorted(facts.barred))} did nothing wrong and {verb} excluded by mistake."
    for unlearning in facts.served:
        if unlearning["recovery_ended_by"] == "cap":
            yield (
                f"Recovery from the unlearning in round {unlearning['round']} was stopped at its "
                f"cap of {counted(unlearning['recovery_rounds'] or 0, 'round')}: validation "
                "accuracy had not come back to its target."
            )


def _refusals(facts: Facts) -> Iterator[str]:
    done = {target for unlearning in facts.served for target in unlearning["targets"]}
    for unlearning in facts.refused:
        text = f"In round {unlearning['round']}, forgetting {_what(unlearning)} was refused: "
        text += f"{unlearning['refused']}."
        if unlearning["clients"]:
            if not facts.forgotten.issuperset(unlearning["clients"]):
                text += " What was learned from them is still in the model."
        elif not done.issuperset(unlearning["targets"]):
            text += " What was learned from it is still in the model."
        yield text


def _tiles(facts: Facts) -> Iterator[dict[str, str]]:
    """Yield the numbers to see first."""
    shown: Sequence[str | None] = (facts.attack, "test_accuracy")
    if facts.attack is None and facts.asked:
        shown = tuple(_measures(facts))
    for measure in shown:
        label = MEASURED.get(measure or "", "")
        before, after, retrained, final = (
            facts.share(point, measure) for point in ("before", "after", "retrained", "final")
        )
        if after is not None:
            yield {
                "label": label,
                "from": "" if before is None else percent(before),
                "value": percent(after),
                "note": "" if retrained is None else f"retrained: {percent(retrained)}",
            }
        elif final is not None:
            note = "at the end of the run"
            yield {"label": label, "from": "", "value": percent(final), "note": note}
    spent = [u["recovery_rounds"] for u in facts.served if u["recovery_rounds"] is not None]
    if spent:
        yield {
            "label": "Recovery",
            "from": "",
            "value": counted(sum(spent), "round", spell=False),
            "note": _ending(facts.served[-1]),
        }
    speed = facts.report["speedup"]["rounds"]
    if speed is not None:
        yield {
            "label": "Retraining instead",
            "from": "",
            "value": f"{speed:.1f}{SPACE}{TIMES}",
            "note": "the rounds that recovery took",
        }


# ---------------------------------------------------------------- tables
def _models(facts: Facts) -> list[dict[str, Any]]:
    """Return the rows of the table of models, leaving out what cannot exist."""
    report = facts.report
    rows = []
    for key, name, meaning in POINTS:
        point = report[key]
        if key == "final":
            shown = point is not None and (
                report["after"] is None or point["round"] != report["after"]["round"]
            )
        else:
            shown = bool(facts.served) or point is not None
        if shown:
            rows.append({"key": key, "name": name, "meaning": meaning, "point": point})
    return rows


def _measures(facts: Facts) -> dict[str, str]:
    """Return measure -> name, for the columns of the table of models."""
    found = {"test_accuracy": "Test accuracy"}
    if facts.attack is not None:
        found[facts.attack] = ATTACKS[facts.attack]
    for measure in ("retained_accuracy", "forget_accuracy"):
        if any(record[measure] is not None for record in facts.rounds):
            found[measure] = MEASURED[measure]
    return found


def _unlearning(unlearning: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    sizes = sum(layer["of"] for layer in unlearning["zeroed_by_layer"].values())
    rounds, bound = unlearning["recovery_rounds"], unlearning["recovery_bound"]
    if unlearning["refused"] is not None:
        recovery = ""
    elif rounds is None:
        superseded = unlearning is not facts.served[-1]
        recovery = "cut short by the next unlearning" if superseded else "none was needed"
    else:
        recovery = counted(rounds, "round", spell=False)
        if bound is not None:
            recovery += f", budget {bound}"
        recovery += f"; {_ending(unlearning)}"
    return {
        "record": unlearning,
        "recovery": recovery,
        "share": unlearning["zeroed"] / sizes if sizes else None,
        "megabytes": f"{unlearning['memory_bytes'] / 1e6:.1f}{SPACE}MB",
        "sent": f"{unlearning['bytes_sent'] / 1e6:.1f}{SPACE}MB",
        "what": _what(unlearning) if unlearning["holders"] or not unlearning["clients"] else "",
        "method": titled(unlearning["method"]),
        "settings": ", ".join(f"{k} {v}" for k, v in unlearning["settings"].items()),
        "progress": ", ".join(
            f"{key.replace('_', ' ')} {value:.4g}"
            for key, value in unlearning.get("progress", {}).items()
        ),
        "mistaken": sorted(facts.mistaken.intersection(unlearning["clients"])),
        "marks": [] if unlearning["refused"] else [_marks(one) for one in unlearning["marks"]],
    }


def _marks(found: Mapping[str, Any]) -> str:
    """Say what a leaver says of the rows that it marked."""
    if found["marked"] is None:
        return (
            f"{found['word_of']} marked no rows, and its request was withdrawn: {found['reason']}."
        )
    text = f"{found['word_of']} marked rows in round {found['marked']} ({found['kind']} memory)"
    if found["after"] is not None:
        text += (
            f", {found['markers']} in number: loss {found['before']:.3f} before and "
            f"{found['after']:.3f} after"
        )
    if found["losses"]:
        later = ", ".join(f"{one['loss']:.3f}" for one in found["losses"])
        text += (
            f", then {later} since it was forgotten, a rise of {found['rise']:.3f} of "
            f"{found['needed']:.3f} needed"
        )
    why = f" ({found['reason']})" if found["reason"] else ""
    return f"{text}. Result: {found['result']}{why}. This is the client's word, not a proof."


def _ending(unlearning: Mapping[str, Any]) -> str:
    """Say what ended the recovery."""
    target = unlearning["recovery_target"]
    if unlearning["recovery_ended_by"] == "recovered":
        reached = "" if target is None else f" of {percent(target)}"
        return f"validation accuracy reached its target{reached}"
    return "stopped at the cap" if unlearning["recovery_ended_by"] == "cap" else ""


def _speedup(facts: Facts) -> str:
    """Compare the cost with retraining's, in one sentence."""
    report = facts.report
    needed, speed = report["retrain_rounds_needed"], report["speedup"]
    if not facts.served or report["retrained"] is None:
        return ""
    if needed is None:
        return "Retraining did not come back to the accuracy before, so its cost is not compared."
    tolerance = report["settings"].get("recovery-tolerance")
    within = "" if tolerance is None else f"within {100 * tolerance:g} points of "
    text = f"Retraining came back to {within}the test accuracy before in {counted(needed, 'round')}"
    if speed["rounds"] is None or speed["seconds"] is None:
        return f"{text}."
    return (
        f"{text}: {speed['rounds']:.1f} times the recovery rounds, and {speed['seconds']:.1f} "
        "times the seconds that unlearning and recovery took."
    )


def _verdict(facts: Facts, key: str, name: str, question: str) -> dict[str, Any]:
    verdict = facts.report["verdict"][key]
    measured = verdict["value"] is not None and verdict["interval"] is not None
    return {
        "name": name,
        "question": question,
        "measure": MEASURED.get(verdict["measure"] or "", ""),
        "result": verdict["result"] if measured else "not measured",
        "meaning": RESULTS[verdict["result"]] if measured else "",
        "numbers": verdict if measured else None,
        "gauge": _gauge(verdict) if measured else None,
    }


def _gauge(verdict: Mapping[str, Any]) -> dict[str, float]:
    """Return where to draw interval, tolerance and difference, in percent of the width."""
    low, high = verdict["interval"]
    tolerance = verdict["tolerance"]
    difference = verdict["value"] - verdict["baseline"]
    limit = 1.15 * max(2 * tolerance, *(abs(x) for x in (low, high, difference))) or 1.0

    def place(value: float) -> float:
        return round(50 + 50 * value / limit, 2)

    return {
        "low": place(low),
        "width": round(place(high) - place(low), 2),
        "left": place(-tolerance),
        "inside": round(place(tolerance) - place(-tolerance), 2),
        "difference": place(difference),
    }


def _figures(facts: Facts) -> list[dict[str, str]]:
    narrow = figures(facts.report, narrow=True)
    return [
        {
            "name": name,
            "title": FIGURES[name][0],
            "caption": " ".join([FIGURES[name][1], *_reading(name, facts)]),
            "wide": svg,
            "narrow": narrow[name],
        }
        for name, svg in figures(facts.report).items()
    ]


def _reading(name: str, facts: Facts) -> Iterator[str]:
    """Yield how to read those parts of a figure that not every run has."""
    if name == "detection" and any(record["evidence"] for record in facts.rounds):
        yield (
            "Below: the number that decides whether anyone is flagged in a round; filled dots "
            "are rounds in which someone was."
        )
    if name != "curves":
        return
    if facts.attack is not None:
        yield f"{ATTACKS[facts.attack]} should fall to where it is in a retrained model."
    if "forget_accuracy" in _measures(facts):
        if not facts.asked:
            yield (
                "Forget accuracy is the share of the attackers' training examples, poisoned labels "
                "included, that the model answers as they taught it."
            )
        else:
            yield (
                "Forget accuracy is the share of what is to be forgotten that the model answers as "
                "it was taught: clients' training data, the samples named, and test examples of a "
                "class."
            )
    if facts.attack is not None and facts.report["natural_rounds"]:
        yield "Dotted: the attack without any unlearning, had its clients merely stayed away."
    if facts.share("retrained", facts.attack) is not None:
        yield "Dash-dotted: the attack on the retrained model."
    if facts.detecting:
        yield "Flags do not count during warm-up, nor while the model recovers."


def _detection(facts: Facts) -> Iterator[str]:
    """Yield sentences on who was flagged, and what a flag led to."""
    settings = facts.report["settings"]
    if not facts.detecting:
        yield "No detector was on: nobody looked for malicious clients."
        return
    yield (
        f"A client is put in quarantine once {settings['hits']} of the last "
        f"{settings['window']} rounds that it took part in have flagged it{_warming(settings)}."
    )
    honest = sorted(set(facts.report["ever_flagged"]) - facts.malicious)
    spared = [client for client in honest if client not in facts.quarantined]
    if spared:
        yield (f"Flagged, though honest, but not often enough to be excluded: {listed(spared, 8)}.")
    unseen = sorted(facts.malicious - set(facts.report["ever_flagged"]))
    if unseen:
        yield f"Attackers that were never flagged: {listed(unseen, 8)}."


def _client(name: str, facts: Facts) -> dict[str, Any]:
    # The roster need not list who was never suspected.
    status = facts.report["clients"]["roster"].get(name, "active")
    flagged = [r["round"] for r in facts.rounds if name in r["flagged"]]
    capped = [r["round"] for r in facts.rounds if name in r["capped"]]
    rejected: dict[str, list[int]] = {}
    for record in facts.rounds:
        if name in record["rejected"]:
            rejected.setdefault(record["rejected"][name], []).append(record["round"])
    return {
        "name": name,
        "malicious": name in facts.malicious,
        "mistaken": name in facts.mistaken | facts.barred,
        "status": status,
        "rounds": sum(name in record["participants"] for record in facts.rounds),
        "flagged": ranges(flagged),
        "rejected": [(ranges(numbers), reason) for reason, numbers in rejected.items()],
        "rejections": sum(map(len, rejected.values())),
        "capped": ranges(capped),
        "remarkable": bool(
            flagged or capped or rejected or name in facts.malicious or status != "active"
        ),
        "quarantined": next(
            (
                (r["round"], r["quarantined"][name])
                for r in facts.rounds
                if name in r["quarantined"]
            ),
            None,
        ),
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting as text, those of tables as ``table.key``."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _shown(value: Any) -> str:
    if value is None or value in ("", [], ()):
        return DASH
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        return "; ".join(", ".join(f"{k} {v}" for k, v in item.items()) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


# ---------------------------------------------------------------- words and numbers
def percent(share: float | None) -> str:
    """Return a share as a percentage with one decimal, or a dash."""
    return DASH if share is None else f"{100 * share:.1f}{SPACE}%"


def points(difference: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    text = f"{abs(100 * difference):.1f}"
    if float(text) == 0:
        return text
    return f"{'+' if difference > 0 else MINUS}{text}"


def duration(seconds: float) -> str:
    """Return seconds for people."""
    if seconds < 0.1:
        return f"{1000 * seconds:.1f}{SPACE}ms"
    return f"{seconds:.1f}{SPACE}s"


def number_word(number: int) -> str:
    """Return ``three``; larger numbers in digits."""
    return WORDS[number] if number < len(WORDS) else str(number)


def counted(number: int, noun: str, *, spell: bool = True) -> str:
    """Return ``three rounds``; small numbers as words."""
    shown = number_word(number) if spell else str(number)
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return ``a, b and c``; of many, the first ``most`` and how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def ranges(numbers: Iterable[int]) -> str:
    """Return round numbers with runs joined."""
    return ", ".join(str(a) if a == b else f"{a}{DASH}{b}" for a, b in spans(numbers))


def _what(unlearning: Mapping[str, Any]) -> str:
    """Return what was, or should have been, forgotten."""
    whom = unlearning["clients"]
    return listed(whom if whom and not unlearning["holders"] else unlearning["targets"])


def _effect(facts: Facts, share: float) -> str:
    return EFFECTS[facts.attack or ""].format(percent(share))


def _whom(facts: Facts) -> str:
    if facts.malicious == facts.forgotten:
        return "them"
    return "them and the other attackers" if facts.malicious - facts.forgotten else "them"
