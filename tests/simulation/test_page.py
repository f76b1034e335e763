"""The page tells every kind of run truthfully, escapes what it is told, and loads nothing."""

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from html import escape
from html.parser import HTMLParser
from typing import Any

import pytest

from simulation.page import listed, percent, points, ranges, render
from simulation.plots import figures

CLIENTS = [f"client-000{k}" for k in range(6)]
MEASURES = (
    "test_accuracy",
    "validation_accuracy",
    "forget_accuracy",
    "retained_accuracy",
    "backdoor_success",
    "flip_success",
)
VOID = {"meta", "br", "img", "link", "hr", "input"}
HOSTILE = '<script>alert("x")</script><img src=//evil.example/a.png onerror=alert(1)> $\\frac{$ & _'


# ---------------------------------------------------------------- making reports
def measures(test: float | None, forget: float | None, attack: float | None) -> dict[str, Any]:
    return {
        "test_accuracy": test,
        "validation_accuracy": test,
        "forget_accuracy": forget,
        "retained_accuracy": None,
        "backdoor_success": attack,
        "flip_success": None,
    }


def a_round(number: int, phase: str = "train", **changes: Any) -> dict[str, Any]:
    return {
        "round": number,
        "phase": phase,
        "participants": list(CLIENTS) if number else [],
        "rejected": {},
        "quarantined": {},
        "capped": {},
        "note": "",
        **measures(0.1 + 0.1 * number, 0.5, 0.9),
        "train_loss": 0.5,
        "scores": {c: 0.9 if c in CLIENTS[:2] else -0.1 for c in CLIENTS} if number else {},
        "flagged": [],
        "evidence": {"cohesion_gap": 0.5, "cohesion_rest": 0.1} if number else {},
        "finding": "",
        "seconds": 0.2,
        **changes,
    }


def an_unlearning(number: int, clients: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "round": number,
        "method": "fedup",
        "cause": "malicious",
        "targets": [", ".join(clients)],
        "clients": clients,
        "holders": [],
        "guarantee": "none",
        "rounds_asked": 0,
        "bytes_sent": 0,
        "settings": {"rate": 0.15, "rate_chosen": "fixed"},
        "zeroed": 160,
        "zeroed_by_layer": {
            "0.weight": {"zeroed": 10, "of": 100},
            "2.weight": {"zeroed": 150, "of": 1000},
        },
        "seconds": 0.01,
        "memory_bytes": 2_000_000,
        "recovery_rounds": 2,
        "recovery_ended_by": "recovered",
        "recovery_bound": 1,
        "recovery_target": 0.48,
        "warnings": ["recovery took 2 rounds, more than FedUP's bound of 1"],
        "refused": None,
        "marks": [],
        **changes,
    }


NOTHING = {
    "measure": None,
    "result": "inconclusive",
    "value": None,
    "baseline": None,
    "tolerance": None,
}
NOTHING |= {"interval": None}


def caught() -> dict[str, Any]:
    """Two attackers plant a backdoor; they are flagged, forgotten in round 4, recovered from."""
    bad, rest = CLIENTS[:2], CLIENTS[2:]
    rounds = [a_round(0), *(a_round(n, flagged=bad) for n in (1, 2, 3))]
    reason = "flagged in 2 of its last 2 rounds"
    unlearned = {"participants": rest, **measures(0.2, 0.1, 0.0)}
    rounds += [
        a_round(4, "unlearn", flagged=bad, quarantined=dict.fromkeys(bad, reason), **unlearned),
        a_round(5, "recover", participants=rest, scores=dict.fromkeys(rest, 0.1)),
        a_round(6, "recover", participants=rest, scores=dict.fromkeys(rest, 0.1)),
    ]
    retrained = [a_round(n, "retrain", participants=rest, scores={}) for n in (1, 2, 3)]
    return {
        "schema_version": 1,
        "secateur": "0.1.0",
        "scenario": "small",
        "summary": "Two of six plant a backdoor",
        "engine": "inprocess",
        "seed": 3,
        "settings": {
            "seed": 3,
            "data-dir": "",
            "detector": "cohort",
            "detector-threshold": 0.0,
            "warm-up": 2,
            "hits": 2,
            "window": 3,
            "recovery-tolerance": 0.02,
            "clients": {"total": 6, "malicious": 2},
            "attack": {"kind": "backdoor", "target": 7, "pairs": []},
            "baselines": {"natural": True, "retrain": True},
        },
        "environment": {"python": "3.11", "flwr": "1.39.0", "torch": "2.14.1", "device": "cpu"},
        "clients": {
            "total": 6,
            "malicious": bad,
            "forgotten": bad,
            "roster": {c: "banned" if c in bad else "active" for c in CLIENTS},
        },
        "rounds": [*rounds, *retrained],
        "natural_rounds": [a_round(n, "retrain", scores={}) for n in (4, 5, 6)],
        "detections": [
            {
                "round": n,
                "client": client,
                "detector": "cohort",
                "score": 0.9,
                "threshold": 0.3,
                "decided_by": "cohesion_gap",
                "evidence": 0.5,
            }
            for n in (1, 2, 3, 4)
            for client in bad
        ],
        "ever_flagged": bad,
        "unlearnings": [an_unlearning(4, bad)],
        "before": {**measures(0.501, 0.5, 0.884), "round": 3},
        "unlearned": {**measures(0.2, 0.1, 0.0), "round": 4},
        "after": {**measures(0.602, 0.3, 0.028), "round": 6},
        "retrained": {**measures(0.613, 0.3, 0.003), "round": 3},
        "natural": {**measures(0.624, 0.4, 0.381), "round": 6},
        "final": {**measures(0.602, 0.3, 0.028), "round": 6},
        "retrain_rounds_needed": 3,
        "speedup": {"rounds": 1.5, "seconds": 1.25},
        "verdict": {
            "utility": {
                "measure": "test_accuracy",
                "result": "pass",
                "value": 0.602,
                "baseline": 0.613,
                "tolerance": 0.02,
                "interval": [-0.019, 0.004],
            },
            "forgetting": {
                "measure": "backdoor_success",
                "result": "fail",
                "value": 0.11,
                "baseline": 0.003,
                "tolerance": 0.03,
                "interval": [0.05, 0.16],
            },
            "privacy": dict(NOTHING),
            "hidden_knowledge": dict(NOTHING),
        },
    }


def without_unlearning(report: dict[str, Any]) -> dict[str, Any]:
    for point in ("before", "unlearned", "after", "retrained", "natural"):
        report[point] = None
    report["rounds"] = [a_round(n) for n in range(7)]
    report["clients"]["forgotten"] = []
    report["clients"]["roster"] = dict.fromkeys(CLIENTS, "active")
    report["verdict"] = {name: dict(NOTHING) for name in report["verdict"]}
    empty: dict[str, list[Any]] = {"natural_rounds": [], "detections": [], "unlearnings": []}
    none = {"rounds": None, "seconds": None}
    return report | empty | {"ever_flagged": [], "retrain_rounds_needed": None, "speedup": none}


def without_measures(report: dict[str, Any], *names: str) -> dict[str, Any]:
    points_ = ("before", "unlearned", "after", "retrained", "natural", "final")
    records = [*report["rounds"], *report["natural_rounds"], *(report[p] for p in points_)]
    for record in filter(None, records):
        record.update(dict.fromkeys(names))
    return report


def clean() -> dict[str, Any]:
    report = without_unlearning(caught())
    report["settings"]["attack"] = None
    report["clients"]["malicious"] = []
    return without_measures(report, "forget_accuracy", "backdoor_success")


def missed() -> dict[str, Any]:
    return without_unlearning(caught())


def label_flip() -> dict[str, Any]:
    report = caught()
    report["settings"]["attack"] = {"kind": "label-flip", "target": 0, "pairs": [[3, 8]]}
    points_ = ("before", "unlearned", "after", "retrained", "natural", "final")
    for record in [*report["rounds"], *report["natural_rounds"], *(report[p] for p in points_)]:
        record["flip_success"], record["backdoor_success"] = record["backdoor_success"], None
    report["verdict"]["forgetting"]["measure"] = "flip_success"
    return report


def refused() -> dict[str, Any]:
    report = without_unlearning(caught())
    bad, why = CLIENTS[:2], "too few honest clients are left"
    nothing = {"zeroed": 0, "zeroed_by_layer": {}, "settings": {}, "warnings": []}
    nothing |= {f"recovery_{key}": None for key in ("rounds", "ended_by", "bound", "target")}
    report["unlearnings"] = [an_unlearning(4, bad, refused=why, **nothing)]
    report["rounds"][4]["phase"] = "unlearn"
    report["rounds"][4]["quarantined"] = dict.fromkeys(bad, "flagged in 2 of its last 2 rounds")
    report["clients"]["roster"] |= dict.fromkeys(bad, "quarantined")
    return report


def several() -> dict[str, Any]:
    """First an attacker and an honest client, then the other attacker; the cap ends it."""
    report = caught()
    first, second = [CLIENTS[0], CLIENTS[4]], [CLIENTS[1]]
    cut_short = {"recovery_rounds": None, "recovery_ended_by": None}
    report["unlearnings"] = [
        an_unlearning(4, first, **cut_short),
        an_unlearning(5, second, recovery_rounds=1, recovery_ended_by="cap"),
    ]
    report["clients"]["forgotten"] = sorted([*first, *second])
    report["clients"]["roster"][CLIENTS[4]] = "banned"
    report["rounds"][5]["phase"] = "unlearn"
    report["rounds"][5]["quarantined"] = {second[0]: "flagged in 2 of its last 3 rounds"}
    report["rounds"][2]["note"] = "previous model kept: 1 of 6 clients sent a usable reply"
    return report


def nulls() -> dict[str, Any]:
    """Nobody measured anything, nobody looked, and no baseline ran."""
    report = without_measures(caught(), *MEASURES)
    report["settings"]["detector"] = "none"
    report["retrained"] = report["natural"] = None
    report["natural_rounds"] = report["detections"] = []
    report["retrain_rounds_needed"] = None
    report["speedup"] = {"rounds": None, "seconds": None}
    report["clients"]["roster"] = {}
    report["verdict"] = {name: dict(NOTHING) for name in report["verdict"]}
    for record in report["rounds"]:
        record |= {"scores": {}, "flagged": [], "evidence": {}}
    for unlearning in report["unlearnings"]:
        unlearning |= {"recovery_target": None, "recovery_bound": None, "zeroed_by_layer": {}}
    return report


def hostile() -> dict[str, Any]:
    """Everything that comes from outside tries to get out."""
    report = caught()
    name = HOSTILE[:40]
    report |= {"scenario": HOSTILE, "summary": HOSTILE}
    for record in report["rounds"][1:]:
        record["rejected"] = {name: f"error {record['round']}: {HOSTILE}"}
        record["scores"] = {**record["scores"], name: 0.2}
        record |= {"note": HOSTILE, "finding": HOSTILE}
    report["clients"]["malicious"] = [*CLIENTS[:2], name]
    report["unlearnings"][0] |= {"clients": [*CLIENTS[:2], name], "warnings": [HOSTILE]}
    layers = report["unlearnings"][0]["zeroed_by_layer"]
    layers[HOSTILE] = layers["0.weight"]
    report["settings"]["data-dir"] = HOSTILE
    return report


def of_a_class() -> dict[str, Any]:
    """Everybody drops class 3; nobody attacks, and nobody leaves."""
    report = clean()
    whole = caught()
    for point in ("before", "unlearned", "after", "retrained", "natural"):
        report[point] = whole[point] | {"backdoor_success": None}
    for record in [*report["rounds"], *(report[p] for p in ("before", "unlearned", "after"))]:
        record |= {"retained_accuracy": 0.7, "forget_accuracy": 0.25}
    report["retrained"]["retained_accuracy"] = 0.75
    report["settings"]["requests"] = [{"round": 3, "target": "class", "label": 3}]
    report["unlearnings"] = [
        an_unlearning(
            4, [], cause="privacy", method="fisher-mask", targets=["class 3"], holders=CLIENTS,
            rounds_asked=2, bytes_sent=1_500_000,
        )
    ]  # fmt: skip
    report["rounds"][4]["phase"] = "unlearn"
    return report


def class_refused() -> dict[str, Any]:
    """A class was asked for, of nobody in particular, and nothing was done."""
    report = clean()
    nothing = {"zeroed": 0, "zeroed_by_layer": {}, "settings": {}, "warnings": [], "method": ""}
    nothing |= {f"recovery_{key}": None for key in ("rounds", "ended_by", "bound", "target")}
    why = "none of 6 clients holds class 12"
    report["unlearnings"] = [
        an_unlearning(4, [], cause="privacy", targets=["class 12"], refused=why, **nothing)
    ]
    return report


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    make.__name__: make
    for make in (
        caught,
        clean,
        missed,
        label_flip,
        refused,
        several,
        nulls,
        hostile,
        of_a_class,
        class_refused,
    )
}


@cache
def page_of(case: str) -> str:
    return render(CASES[case]())


@cache
def figures_of(case: str) -> dict[str, str]:
    return figures(CASES[case]())


# ---------------------------------------------------------------- reading pages
INLINE = "data:image/png;base64,"


class Reader(HTMLParser):
    """Checks nesting; collects text, ids and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())

    def values(self, wanted: str) -> Iterator[str]:
        return (value for _, name, value in self.attributes if name == wanted)


def text_of(case: str) -> str:
    return Reader(page_of(case)).text


# ---------------------------------------------------------------- every page
@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_page_is_one_well_formed_document(case: str) -> None:
    page = page_of(case)

    reader = Reader(page)

    assert page.lstrip().startswith("<!doctype html>")
    assert reader.text.count("What happened") == 1


def test_page_loads_nothing(case: str) -> None:
    page = page_of(case)
    reader = Reader(page)

    assert {tag for tag, _, _ in reader.attributes}.isdisjoint({"script", "link", "iframe", "img"})
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert not list(reader.values("src"))
    for name in ("href", "xlink:href"):
        assert all(value.startswith(("#", INLINE)) for value in reader.values(name))
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page)
    assert "@import" not in page
    without_namespaces = re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[\w/]+"', "", page)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces


def test_ids_are_unique_and_references_lead_somewhere(case: str) -> None:
    page = page_of(case)
    reader = Reader(page)

    ids = list(reader.values("id"))
    targets = [*reader.values("href"), *reader.values("xlink:href")]
    references = {target[1:] for target in targets if not target.startswith(INLINE)}
    references |= set(re.findall(r"url\(#([\w-]+)\)", page))

    assert len(ids) == len(set(ids))
    assert references <= set(ids)


def test_every_client_is_named(case: str) -> None:
    text = text_of(case)

    assert all(client in text for client in CLIENTS)


def test_same_report_gives_the_same_bytes() -> None:
    assert render(caught()) == page_of("caught")


def test_report_is_not_changed() -> None:
    report = caught()
    untouched = deepcopy(report)

    render(report)

    assert report == untouched


# ---------------------------------------------------------------- what is told
def test_story_of_caught_attackers() -> None:
    text = text_of("caught")

    assert (
        "Six clients trained one model together for six rounds, each on its own data; two of them "
        "(client-0000 and client-0001) taught it a backdoor: to read any input with a hidden mark "
        "as class 7."
    ) in text
    assert "Before anything was forgotten, the backdoor worked on 88.4 % of the marked" in text
    assert "In round 4, client-0000 and client-0001 were caught and forgotten." in text
    assert (
        "Two recovery rounds later it was 2.8 %; in a model retrained from the start without them, "
        "0.3 %; had they only been left out, 38.1 %."
    ) in text
    assert "Test accuracy went from 50.1 % before to 60.2 % after; retrained, it is 61.3 %." in text
    assert "Attention" not in text


def test_a_class_that_was_forgotten_is_told_of_as_data_and_not_as_clients() -> None:
    text = text_of("of_a_class")
    assert "the federation forgot class 3 on request; six clients dropped what they held" in text
    assert "Forget accuracy went from 25.0 % before to 25.0 % after; retrained, it is" in text
    assert "Accuracy on the other classes went from 70.0 % before to 70.0 % after; retrained, it " \
        "is 75.0 %" in text  # fmt: skip
    assert "2 times, 1.5 MB sent" in text
    assert "round 3, target class, label 3" in text
    assert "attackers' training examples" not in text


def test_a_refused_class_is_an_alert_that_names_the_class() -> None:
    text = text_of("class_refused")
    assert "forgetting class 12 was refused: none of 6 clients holds class 12." in text
    assert "What was learned from it is still in the model." in text


def test_cost_is_compared_with_retraining() -> None:
    text = text_of("caught")

    assert "2 rounds, budget 1; validation accuracy reached its target of 48.0 %" in text
    assert (
        "within 2 points of the test accuracy before in three rounds: 1.5 times the recovery "
        "rounds, and 1.2 times the seconds"
    ) in text


def test_verdicts_give_numbers_and_say_what_was_not_measured() -> None:
    text = text_of("caught")

    assert "\u22121.1 points, 95 % interval \u22121.9 to +0.4" in text
    assert "+10.7 points, 95 % interval +5.0 to +16.0" in text
    assert "The whole interval lies inside the tolerance." in text
    assert "The whole interval lies outside the tolerance." in text
    assert text.count("not measured") == 2  # privacy and hidden knowledge


def test_run_without_attackers() -> None:
    text = text_of("clean")

    assert "none of them attacked it." in text
    assert "The detector accused nobody, and nobody was forgotten." in text
    assert "the model classified 60.2 % of the test inputs correctly" in text
    assert "* attacker" not in text
    assert 'class="chip attacker"' not in page_of("clean")
    assert "Forget accuracy" not in text
    assert "Verdict" not in text
    assert "Attention" not in text


def test_attackers_that_were_missed() -> None:
    text = text_of("missed")

    assert "The detector caught none of them, and nobody was forgotten." in text
    assert "At the end, the backdoor worked on 2.8 % of the marked inputs." in text
    assert "client-0000 and client-0001 attacked and were never caught" in text


def test_label_flip_is_told_by_its_own_measure() -> None:
    text = text_of("label_flip")

    assert "swapping the labels" in text
    assert "Before anything was forgotten, the model repeated 88.4 % of the swapped labels." in text
    assert "Label-flip success" in text
    assert "Backdoor success" not in text


def test_refusal_is_told_with_its_reason() -> None:
    text = text_of("refused")

    assert (
        "In round 4, forgetting client-0000 and client-0001 was refused: too few honest clients "
        "are left. What was learned from them is still in the model."
    ) in text
    assert "were excluded, but nobody was forgotten." in text


def test_mistakes_caps_and_kept_models_are_told() -> None:
    text = text_of("several")

    assert "In round 4, client-0000 and client-0004 were judged malicious and forgotten." in text
    assert "client-0004 did nothing wrong and was forgotten by mistake." in text
    assert "In round 5, client-0001 was caught and forgotten." in text
    assert "cut short by the next unlearning" in text
    assert "round 5 was stopped at its cap of one round" in text
    assert "Round 2: previous model kept: 1 of 6 clients sent a usable reply" in text


def test_what_was_not_measured_is_a_dash() -> None:
    text = text_of("nulls")

    assert "No detector was on" in text
    assert "A dash means: not measured." in text
    assert "0.0 %" not in text
    assert "None" not in text


def test_hostile_text_is_shown_as_text() -> None:
    page = page_of("hostile")

    assert "<script" not in page
    assert "<img" not in page
    assert escape(HOSTILE[:30], quote=False).split("(")[0] in page
    assert f"error 3: {HOSTILE}" in "".join(Reader(page).texts)


def test_of_many_clients_the_uneventful_are_folded_away() -> None:
    report = nulls()
    report["rounds"][1]["participants"] = [*CLIENTS, *(f"extra-{n:02}" for n in range(20))]

    text = Reader(render(report)).text

    assert "24 more clients, honest, active, never flagged" in text
    assert "extra-19: 1 round in the model" in text


# ---------------------------------------------------------------- figures
def test_figures_without_anything_to_show_are_left_out() -> None:
    assert list(figures_of("caught")) == ["curves", "detection", "pruning"]
    assert list(figures_of("clean")) == ["curves", "detection"]
    assert list(figures_of("nulls")) == []


def test_figures_are_complete_files_of_their_own() -> None:
    for svg in figures_of("caught").values():
        assert svg.startswith("<svg")
        assert 'xmlns="http://www.w3.org/2000/svg"' in svg


def test_threshold_is_drawn_where_it_is_known() -> None:
    assert "against its threshold 0.3" in figures_of("caught")["detection"]
    assert "against its threshold" not in figures_of("clean")["detection"]

    report = clean()
    report["rounds"][1] |= {"decided_by": "cohesion_gap", "threshold": 0.25}

    assert "against its threshold 0.25" in figures(report)["detection"]


def test_of_many_clients_the_suspects_are_drawn() -> None:
    report = caught()
    crowd = {f"extra-{number:03}": 0.0 for number in range(60)}
    for record in report["rounds"]:
        record["scores"] = crowd | record["scores"]

    svg = figures(report)["detection"]

    assert "26 more clients, never suspected, are not drawn" in svg
    assert all(client in svg for client in CLIENTS[:2])


# ---------------------------------------------------------------- words and numbers
@pytest.mark.parametrize(
    ("share", "shown"), [(0.88449, "88.4\u00a0%"), (1.0, "100.0\u00a0%"), (None, "\u2013")]
)
def test_percent(share: float | None, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("difference", "shown"), [(0.0251, "+2.5"), (-0.03, "\u22123.0"), (-0.0001, "0.0")]
)
def test_points(difference: float, shown: str) -> None:
    assert points(difference) == shown


def test_lists() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["a", "b", "c"], most=2) == "a, b and 1 more"
    assert ranges([1, 2, 3, 7]) == "1\u20133, 7"


def test_how_far_holders_got_is_shown_and_an_approximation_is_named_as_one():
    report = clean()
    report["unlearnings"] = [
        an_unlearning(
            4, [], cause="privacy", method="macforget", targets=["class 3"], holders=CLIENTS,
            progress={"holders_moved": 2, "most_steps": 20, "farthest": 0.12345},
        )
    ]  # fmt: skip
    report["rounds"][4]["phase"] = "unlearn"
    page = render(report)
    assert "MacForget (approximate)" in page
    assert "holders moved 2, most steps 20, farthest 0.1235" in page
    report["unlearnings"][0] |= {"method": "fedup", "progress": {}}
    page = render(report)
    assert "(approximate)" not in page
    assert "step</dt>" not in page
