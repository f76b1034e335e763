"""Methods side by side on a class or on samples: holders stay, and nobody finds another's traces."""

import json

import pytest

from client.keeping import FORGOTTEN
from server.settings import parse_overrides
from simulation import comparison
from simulation.commands import grid_of
from simulation.compare_report import describe, document, results, story
from simulation.comparison import Comparison, compared
from simulation.scenario import ScenarioError, load_scenario

TEXT = """
summary = "{target}"
[clients]
total = 3
[[requests]]
round = 1
target = "{target}"
{which}
[settings]
task = "digits"
model = "mlp"
rounds = 3
local-epochs = 3
examples = 300
momentum = 0.9
recovery-cap = 2
"""
WHICH = {"class": "label = 3", "samples": "clients = [1]\nsamples = 20", "client": "clients = [2]"}
METHODS = ("fisher-mask", "amnesiac", "ascent", "rollback")
ROUNDS = 2


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """Compare methods on a scenario that asks for something, or for several things."""

    def made(*targets, changes=(), methods=METHODS, **given):
        text = TEXT.format(target=targets[0], which=WHICH[targets[0]])
        for target in targets[1:]:
            text += f'[[requests]]\nround = 2\ntarget = "{target}"\n{WHICH[target]}\n'
        path = tmp_path_factory.mktemp("scenario") / "asks.toml"
        path.write_text(text)
        scenario = load_scenario(str(path), parse_overrides(list(changes)))
        return Comparison(scenario, methods, rounds=ROUNDS, **given)

    return made


def play(found, look=lambda ready: None):
    with found.in_folder() as ready:
        trials = ready.play(grid_of(ready.scenario))
        look(ready)
        return {trial.method: trial for trial in trials}


def without_seconds(trial):
    timed = {"seconds", "speedup_seconds"}
    return {k: v for k, v in comparison.as_json(trial).items() if k not in timed}


@pytest.fixture(scope="module", params=["class", "samples"])
def case(request, compare):
    found = compare(request.param)
    return request.param, found, play(found)


def test_every_method_serves_the_request_of_the_scenario_from_the_same_model(case):
    name, found, trials = case
    assert list(trials) == [*METHODS, "natural", "random-mask", "retrain"]
    assert all(trial.refused is None for trial in trials.values())
    started = {trial.started_from for method, trial in trials.items() if method != "retrain"}
    assert len(started) == 1
    assert {trial.asked_as for trial in trials.values()} == {"privacy"}
    before = trials["fisher-mask"].before
    assert all(trial.before == before for trial in trials.values())
    assert before["forget_accuracy"] is not None
    assert (before["retained_accuracy"] is not None) == (name == "class")
    assert found.forgotten == (("class 3",) if name == "class" else ("20 samples of client-0001",))
    assert found.clients == ()
    assert found.scenario.settings.batch_log == "random"  # amnesiac is compared


def test_neither_order_nor_company_changes_a_trial(case, compare):
    # Each method finds clients that have dropped nothing, with all their batches logged.
    name, _, expected = case
    for trial in play(compare(name, methods=("amnesiac", "fisher-mask"))).values():
        if trial.method in ("amnesiac", "fisher-mask", "retrain"):
            assert without_seconds(trial) == without_seconds(expected[trial.method])


def test_a_class_is_gone_where_nobody_trains_on_it(compare):
    # Both train from the start on the same rows, so they know nothing of class 3.
    trials = play(compare("class", changes=["rounds=5"], methods=("rollback",)))
    assert trials["retrain"].after["forget_accuracy"] == 0
    assert trials["rollback"].after["forget_accuracy"] == 0
    assert trials["retrain"].before["forget_accuracy"] > 0.5


def test_clients_disks_are_afterwards_as_after_training(compare, tmp_path):
    found = compare("samples", changes=[f"client-dir={str(tmp_path)!r}"], methods=("natural",))
    seen = []
    play(found, lambda ready: seen.append((tmp_path / "1" / FORGOTTEN).read_text()))
    # While it ran the last method's holder had dropped its rows.
    assert len(json.loads(seen[0])["content"]["rows"]) == 20
    left = json.loads((tmp_path / "1" / FORGOTTEN).read_text())
    assert left["content"] == {"rows": {}, "classes": {}}


def test_the_story_and_the_table_are_of_the_data(case):
    name, found, trials = case
    made = document(describe(found), [found], list(trials.values()))
    text = " ".join(story(made))
    groups = {column.group for column in results(made)}
    if name == "class":
        assert "class 3 was to be forgotten" in text
        assert made["forget"] == "class 3"
        assert "accuracy on the other classes was" in text
        assert "Accuracy on the other classes" in groups
        assert "Test accuracy" not in groups
    else:
        assert "20 samples of client-0001 were to be forgotten" in text
        assert "Test accuracy" in groups
    assert "Forget accuracy" in groups


def test_chance_is_a_mask_where_nobody_leaves():
    assert compared(["ascent"], data=True) == ("ascent", "natural", "random-mask", "retrain")
    assert compared(["ascent"]) == ("ascent", "natural", "random", "retrain")


def test_named_partitions_come_before_what_the_scenario_asks(compare):
    found = compare("class", "samples", methods=("fedup",), clients=(1,))
    assert (found.asked, found.forgotten) == (None, ("client-0001",))
    assert found.methods == ("fedup", "natural", "random", "retrain")


def test_a_scenario_may_name_clients_and_one_thing_only(compare):
    found = compare("client", methods=("fedup",))
    assert (found.asked, found.forgotten) == (None, ("client-0002",))
    assert describe(found)["forget"] == [2]
    with pytest.raises(ScenarioError, match="asks for 2 things to be forgotten"):
        compare("class", "samples")
