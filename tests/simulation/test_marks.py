"""A client that marks rows before it leaves, through a whole federation, forgotten and not."""

import functools

import pytest

from server.settings import parse_overrides
from simulation.commands import grid_of
from simulation.experiment import Experiment, with_folder
from simulation.page import render
from simulation.report import report_of
from simulation.requests import Asked
from simulation.scenario import ScenarioError, parse_scenario
from strategies.roster import Status
from unlearning.errors import RefusedRequestError

LEAVER = {"round": 2, "target": "client", "clients": [3], "marks": "forgettable"}
NATURAL = {"guarantee": "approximate", "method": "natural"}
SETTINGS = ["rounds=6", "ready-methods=rollback,natural", "baselines.natural=false"]


def scenario_of(pairs=(), **request):
    raw = {
        "name": "mine",
        "summary": "mine",
        "extends": "forget-class",
        "clients": {"total": 4},
        "requests": [LEAVER | request],
    }
    return parse_scenario(raw, parse_overrides([*SETTINGS, "baselines.retrain=false", *pairs]))


@functools.cache
def played(*pairs, **request):
    with with_folder(scenario_of(pairs, **request)) as ready:
        experiment = Experiment(ready)
        experiment.play(grid_of(ready))
    return experiment.outcome


def check_in(outcome):
    ((record, left),) = outcome.unlearnings
    assert left == ("client-0003",)
    (found,) = record.marks
    return record, found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_who_was_forgotten_exactly_finds_its_marks_gone_and_who_was_not_finds_them(seed):
    # Marked in the fifth round, after which training has converged: with nothing else to move the
    # model, leaving the client out forgets nothing. A replay goes through the five rounds again.
    converged = (f"seed={seed}", "learning-rate-milestones=5", "learning-rate-factor=1e-6")
    exact, gone = check_in(played(*converged))
    natural, there = check_in(played(*converged, **NATURAL))
    assert (exact.method, natural.method) == ("rollback", "natural")
    for found in (gone, there):
        assert (found.kind, found.marked, found.client) == ("forgettable", 5, "client-0003")
        assert list(found.losses) == [7, 8, 9]
        assert found.before > found.after  # the marked update survived the average
        assert found.needed == pytest.approx((found.before - found.after) / 2)
        assert found.rise == pytest.approx(max(found.losses.values()) - found.after)
    # Up to the unlearning both are the same federation.
    assert (gone.before, gone.after, gone.markers) == (there.before, there.after, there.markers)
    assert (gone.result, there.result) == ("pass", "fail")
    assert list(there.losses.values()) == pytest.approx([there.after] * 3, abs=1e-3)


def test_the_report_and_its_page_say_whose_word_it_is():
    outcome = played("seed=0")
    report = report_of(outcome, "inprocess")
    assert report["settings"]["requests"][0]["marks"] == "forgettable"
    (unlearning,) = report["unlearnings"]
    (marks,) = unlearning["marks"]
    _, found = check_in(outcome)
    assert marks == {
        "client": "client-0003",
        "word_of": "client-0003",
        "kind": "forgettable",
        "marked": 5,
        "markers": found.markers,
        "before": found.before,
        "after": found.after,
        "losses": [{"round": n, "loss": loss} for n, loss in found.losses.items()],
        "rise": found.rise,
        "needed": found.needed,
        "result": "pass",
        "reason": "",
    }
    page = render(report)
    assert "client-0003 marked rows in round 5 (forgettable memory)" in page
    assert "Result: pass. This is the client&#39;s word, not a proof." in page
    assert outcome.rounds[-1].number == 9
    assert outcome.roster == {"client-0003": str(Status.BANNED)} | {
        client: status for client, status in outcome.roster.items() if client != "client-0003"
    }


def test_clients_one_after_another_mark_the_same():
    with with_folder(scenario_of(["seed=0"])) as ready:
        experiment = Experiment(ready)
        experiment.play(grid_of(ready, batch=False))
    _, alone = check_in(experiment.outcome)
    _, together = check_in(played("seed=0"))
    assert alone.result == together.result
    assert alone.markers == together.markers
    assert alone.after == pytest.approx(together.after, abs=1e-3)


def test_a_client_that_may_not_mark_ends_the_run_or_is_reported():
    refusing = ["seed=0", "refuse=mark"]
    with (
        with_folder(scenario_of(refusing)) as ready,
        pytest.raises(RefusedRequestError, match=r"client-0003 did not mark rows: .*'mark'"),
    ):
        Experiment(ready).play(grid_of(ready))
    scenario = scenario_of(refusing)
    with with_folder(scenario.model_copy(update={"may_be_refused": True})) as ready:
        experiment = Experiment(ready)
        experiment.play(grid_of(ready))
    record, found = check_in(experiment.outcome)
    assert record.refused == found.reason
    assert "this client's owner does not allow 'mark'" in record.refused
    assert experiment.outcome.roster.get("client-0003", "active") == "active"
    report = report_of(experiment.outcome, "inprocess")
    assert report["unlearnings"][0]["clients"] == ["client-0003"]
    assert "forgetting client-0003 was refused" in render(report)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"cause": "malicious"}, "cause = malicious"),
        ({"clients": [1, 2]}, r"clients = \[1, 2\]: one client that leaves"),
        ({"target": "backdoor"}, "target = backdoor"),
        ({"target": "class", "label": 3}, "target = class"),
        ({"marks": "random"}, "requests.0.marks"),
    ],
)
def test_marks_of_others_are_refused_when_a_scenario_is_read(request_, message):
    with pytest.raises(ScenarioError, match=message):
        scenario_of(**request_)


def test_clients_that_mark_keep_something():
    assert scenario_of().keeps
    assert not scenario_of(marks=None).keeps
    assert Asked(round=1, target="client", clients=(1,)).marks is None
