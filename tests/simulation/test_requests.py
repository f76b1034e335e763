"""Scenarios that ask for forgetting: what they say, what is asked, and that it stays forgotten."""

from pathlib import Path

import pytest
import torch

from client import app as client_app_module
from client import keeping
from client.rows import content_hashes, rows_of_class
from client.task.evaluation import gather, predict
from client.task.protocol import load_task, server_data, size_of
from server.federation import initial_model
from server.settings import parse_overrides
from simulation.attacks.client import AttackedJobs
from simulation.commands import grid_of
from simulation.experiment import Experiment, attackers, with_folder
from simulation.page import render
from simulation.probes import build_probes
from simulation.report import report_of, without_times
from simulation.requests import Asked, RowsError, request_of, rows_of
from simulation.scenario import ScenarioError, load_scenario, parse_scenario
from strategies.actions import Selection
from unlearning.catalogue import Target
from unlearning.errors import RefusedRequestError
from unlearning.parameters import copied

SMALL = ["rounds=3", "examples=300", "local-epochs=8", "recovery-cap=2"]
EARLY = {"round": 2, "target": "class", "label": 3, "guarantee": "approximate"}
ONES = {"round": 2, "target": "samples", "clients": [1], "samples": 5, "guarantee": "approximate"}
MINIMAL = {"name": "mine", "summary": "mine", "clients": {"total": 5}}


def scenario_of(*requests, pairs=(), **more):
    raw = {"name": "mine", "summary": "mine", "extends": "forget-class", "requests": [*requests]}
    return parse_scenario({**raw, **more}, parse_overrides([*SMALL, *pairs]))


def play(scenario):
    with with_folder(scenario) as ready:
        experiment = Experiment(ready)
        experiment.play(grid_of(ready))
    return experiment.outcome


def as_after_a_restart():
    keeping.keeping_at.cache_clear()
    load_task.cache_clear()


# ---------------------------------------------------------------- what a scenario may ask
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({**EARLY, "cause": "malicious"}, "cause = malicious says not to; forget the clients"),
        ({**ONES, "cause": "malicious"}, "forgetting samples trusts those who hold them"),
        ({"round": 2, "target": "class"}, "label = None with target = class"),
        ({**ONES, "label": 3}, "label = 3 with target = samples"),
        ({**ONES, "rows": [1]}, "by rows or by their number, not by both"),
        ({"round": 2, "target": "samples", "clients": [1]}, r"rows = \[\] and samples = None"),
        ({**EARLY, "rows": [1]}, r"rows = \[1\] and samples = None with target = class"),
        ({**ONES, "clients": [1, 2]}, r"clients = \[1, 2\]: rows are numbered at their holder"),
        ({**ONES, "clients": []}, "name that one client"),
        ({"round": 2, "target": "client"}, "target = client names nobody"),
        ({"round": 2, "target": "backdoor", "cause": "malicious"}, "backdoor names nobody"),
        ({**EARLY, "clients": [5]}, "names 5, and partitions are numbered from 0 to 4"),
        ({**EARLY, "method": "magic"}, "there is no method 'magic'; choose one of fedup"),
        ({**EARLY, "round": 0}, r"requests.0.round = 0: "),
        ({**EARLY, "round": 11}, "round = 11 is never played; ask after one of the 10 rounds"),
        ({**EARLY, "most-rounds": 0}, r"requests.0.most-rounds = 0: "),
        ({**EARLY, "colour": "red"}, "unknown key 'requests.0.colour'"),
    ],
)
def test_requests_that_make_no_sense_name_rule_value_and_remedy(request_, message):
    with pytest.raises(ScenarioError, match=message):
        parse_scenario({**MINIMAL, "requests": [request_]}, {})


def test_requests_are_read_as_they_are_written():
    scenario = parse_scenario(
        {**MINIMAL, "may-be-refused": True, "requests": [{**EARLY, "most-rounds": 4}]}, {}
    )
    (asked,) = scenario.requests
    assert (asked.target, asked.label, asked.most_rounds) == (Target.CLASS, 3, 4)
    assert (asked.cause, asked.clients, scenario.may_be_refused) == ("privacy", (), True)
    assert scenario.keeps
    alone = {"round": 1, "target": "client", "clients": [0]}
    assert not parse_scenario({**MINIMAL, "requests": [alone]}, {}).keeps


# ---------------------------------------------------------------- what the data's owner does
def test_samples_are_drawn_from_the_seed_and_differ_between_requests():
    options = scenario_of(ONES).settings.task_options()
    task, asked = load_task(options), Asked(**ONES)
    found = rows_of(asked, 0, task, 5, seed=1)
    assert found == rows_of(asked, 0, task, 5, seed=1) == tuple(sorted(set(found)))
    assert len(found) == 5
    assert found != rows_of(asked, 1, task, 5, seed=1)
    assert found != rows_of(asked, 0, task, 5, seed=2)
    named = Asked(round=1, target="samples", clients=(1,), rows=(7, 2, 7))
    assert rows_of(named, 0, task, 5, seed=1) == (2, 7)


@pytest.mark.parametrize(
    ("more", "message"),
    [({"rows": [54]}, "row 54 of client-0001, which has 54 rows"), ({"samples": 55}, "samples = 55")],
)  # fmt: skip
def test_rows_that_a_client_does_not_have_are_an_error(more, message):
    task = load_task(scenario_of(ONES).settings.task_options())  # 270 of 300 examples among 5
    asked = Asked(round=1, target="samples", clients=(1,), **more)
    with pytest.raises(RowsError, match=message):
        rows_of(asked, 0, task, 5, seed=0)


def test_the_federation_hears_tokens_alone_and_the_client_knows_what_they_stand_for(tmp_path):
    scenario = scenario_of(ONES, pairs=[f"client-dir={tmp_path}"])
    options = scenario.settings.task_options()
    task = load_task(options)
    request = request_of(scenario.requests[0], (4, 9), task, options, 5)
    assert request.clients == ("client-0001",)
    elsewhere = options.model_copy(update={"client_dir": str(tmp_path / "other")})
    assert request == request_of(scenario.requests[0], (4, 9), task, elsewhere, 5)
    reseeded = elsewhere.model_copy(update={"client_dir": str(tmp_path / "third"), "seed": 9})
    assert request != request_of(scenario.requests[0], (4, 9), task, reseeded, 5)
    named = Selection(forget="samples", forget_tokens=",".join(request.tokens))
    examples = task.client_data(1, 5).train
    assert keeping.Keeping(tmp_path / "1").select(named, examples) == [4, 9]
    assert keeping.Keeping(tmp_path / "2").select(named, examples) == []


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (EARLY, (True, True)),
        ({**EARLY, "cooperates": False, "drops": True}, (False, True)),
        ({"round": 2, "target": "client", "clients": [1]}, (False, False)),
        ({"round": 2, "target": "client", "clients": [1], "cooperates": True}, (True, True)),
    ],
)
def test_who_answers_and_who_drops_is_as_the_scenario_says_or_as_usual(request_, expected):
    scenario = parse_scenario({**MINIMAL, "requests": [request_]}, {})
    options = scenario.settings.task_options()
    request = request_of(scenario.requests[0], (), load_task(options), options, 5)
    assert (request.target_cooperates, request.target_drops) == expected


# ---------------------------------------------------------------- what is measured
def test_the_forget_set_of_a_class_is_its_test_examples_and_validation_goes_without_it():
    options = scenario_of(EARLY).settings.task_options()
    task = load_task(options)
    model = initial_model(task, 0)
    start = copied(model.state_dict())
    probes = build_probes(task, None, 5, model, "cpu", classes={3})
    found = probes.measure(0, start, without={3})

    def share(examples, keep):
        outputs, targets = predict(model, examples, device=torch.device("cpu"))
        rows = keep(targets)
        return float((outputs[rows].argmax(dim=1) == targets[rows]).double().mean())

    data = server_data(task)
    assert found["forget_accuracy"] == pytest.approx(share(data.test, lambda t: t == 3))
    assert found["retained_accuracy"] == pytest.approx(share(data.test, lambda t: t != 3))
    assert found["test_accuracy"] == pytest.approx(share(data.test, lambda t: t >= 0))
    assert found["validation_accuracy"] == pytest.approx(share(data.validation, lambda t: t != 3))
    whole = probes.measure(0, start)["validation_accuracy"]
    assert whole == pytest.approx(share(data.validation, lambda t: t >= 0))
    assert probes.measure(0, start, without=range(10))["validation_accuracy"] is None


def test_the_forget_set_of_samples_is_the_rows_themselves():
    task = load_task(scenario_of(ONES).settings.task_options())
    probes = build_probes(task, None, 5, initial_model(task, 0), "cpu", samples={1: (4, 9)})
    inputs, targets = gather(probes.probes["forget_accuracy"].examples)
    own = gather(task.client_data(1, 5).train)
    assert torch.equal(inputs, own[0][[4, 9]])
    assert torch.equal(targets, own[1][[4, 9]])
    assert "retained_accuracy" not in probes.probes


# ---------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def of_a_class():
    return play(scenario_of(EARLY))


def test_a_class_is_forgotten_by_those_who_hold_it_and_nobody_leaves(of_a_class):
    report = report_of(of_a_class, "inprocess")
    (unlearning,) = report["unlearnings"]
    assert (unlearning["round"], unlearning["targets"]) == (3, ["class 3"])
    assert unlearning["clients"] == report["clients"]["forgotten"] == []
    assert unlearning["holders"] == [f"client-{n:04d}" for n in range(5)]
    assert unlearning["rounds_asked"] > 0
    assert unlearning["bytes_sent"] > 0
    assert report["clients"]["left_out_of_baselines"] == []
    for record in (*of_a_class.natural_rounds, *of_a_class.retrain_rounds):
        assert len(record.participants) == 5
    assert report["retrained"]["forget_accuracy"] == 0  # it never saw the class
    assert report["retrained"]["retained_accuracy"] > 0.5
    assert report["verdict"]["utility"]["measure"] == "retained_accuracy"
    assert "the federation forgot class 3 on request" in render(report)


def test_validation_leaves_a_class_out_from_the_round_that_forgot_it(of_a_class):
    task = load_task(of_a_class.scenario.settings.task_options())
    validation = server_data(task).validation
    count, gone = size_of(validation), len(rows_of_class(validation, 3))
    assert gone
    for record in of_a_class.rounds:
        rest = count if record.number < 3 else count - gone
        hits = record.measures["validation_accuracy"] * rest
        assert hits == pytest.approx(round(hits), abs=1e-4)


def test_the_same_seed_gives_the_same_report_whatever_folder_was_made(of_a_class):
    again = play(scenario_of(EARLY))
    one, other = (report_of(outcome, "inprocess") for outcome in (of_a_class, again))
    for report in (one, other):
        report["settings"].pop("client-dir")
    assert without_times(one) == without_times(other)


def test_a_folder_that_was_made_is_gone_at_the_end_and_one_that_was_given_stays(tmp_path):
    with with_folder(scenario_of(EARLY)) as ready:
        folder = ready.settings.client_dir
        assert Path(folder).is_dir()
    assert not Path(folder).exists()
    given = scenario_of(EARLY, pairs=[f"client-dir={tmp_path}"])
    with with_folder(given) as ready:
        assert ready.settings.client_dir == str(tmp_path)
    assert tmp_path.is_dir()


def trained_on(monkeypatch, scenario):
    """Return partition -> contents of the rows that training got, in a run of its own."""
    seen = {}
    honest = client_app_module.honest_job

    def watched(message, context, options):
        job = honest(message, context, options)
        partition = int(context.node_config["partition-id"])
        seen.setdefault(partition, set()).update(content_hashes(job.examples))
        return job

    monkeypatch.setattr("simulation.experiment.honest_job", watched)
    play(scenario)
    return seen


def test_what_was_forgotten_is_not_trained_on_by_a_later_run(monkeypatch, tmp_path):
    pairs = [f"client-dir={tmp_path}"]
    scenario = scenario_of(EARLY, ONES, pairs=[*pairs, "rate-limit=1", "rounds=4"])
    first = trained_on(monkeypatch, scenario)
    as_after_a_restart()
    later = trained_on(monkeypatch, scenario_of(pairs=pairs))
    task = load_task(scenario.settings.task_options())
    lost = rows_of(scenario.requests[1], 1, task, 5, scenario.settings.seed)
    for partition in range(5):
        examples = task.client_data(partition, 5).train
        hashes = content_hashes(examples)
        gone = {hashes[row] for row in rows_of_class(examples, 3)}
        gone |= {hashes[row] for row in lost} if partition == 1 else set()
        assert first[partition] == set(hashes)  # the first run did train on them
        assert later[partition] == set(hashes) - gone


@pytest.mark.parametrize("batch", [False, True])
def test_attackers_too_train_without_what_was_forgotten(monkeypatch, batch):
    """Of the class, by its owner's labels, nothing is in any round after the request."""
    attack = {"kind": "label-flip", "share": 0.2, "pairs": [[3, 5]]}
    clients = {"total": 5, "malicious": 1}
    scenario = scenario_of(EARLY, attack=attack, clients=clients)
    (partition,) = attackers(scenario)
    seen = []
    made = AttackedJobs.__call__

    def watched(self, message, context, options):
        job = made(self, message, context, options)
        if int(context.node_config["partition-id"]) == partition:
            seen.append((job.purpose[0], job.examples))
        return job

    monkeypatch.setattr(AttackedJobs, "__call__", watched)
    with with_folder(scenario) as ready:
        Experiment(ready).play(grid_of(ready, batch=batch))
    own = load_task(scenario.settings.task_options()).client_data(partition, 5).train
    labels = own.tensors[1]
    sizes = {number: size_of(examples) for number, examples in seen}
    assert sizes[2] == len(labels)
    assert sizes[max(sizes)] == int((labels != 3).sum()) < len(labels)
    after = [examples for number, examples in seen if size_of(examples) < len(labels)]
    assert all(examples is after[0] for examples in after)


def test_samples_are_forgotten_for_their_one_holder():
    outcome = play(scenario_of(ONES))
    (unlearning,) = report_of(outcome, "inprocess")["unlearnings"]
    assert unlearning["targets"] == ["5 samples"]
    assert unlearning["holders"] == ["client-0001"]
    assert outcome.points["after"].measures["forget_accuracy"] is not None
    assert outcome.points["after"].measures["retained_accuracy"] is None
    assert len(outcome.retrain_rounds[0].participants) == 5


def test_a_client_that_asks_leaves_and_is_left_out_of_the_baselines():
    asked = {"round": 2, "target": "client", "clients": [4], "guarantee": "approximate"}
    outcome = play(scenario_of({**asked, "method": "fedup"}))
    (unlearning,) = report_of(outcome, "inprocess")["unlearnings"]
    assert (unlearning["clients"], unlearning["holders"]) == (["client-0004"], [])
    assert outcome.forgotten == ("client-0004",)
    assert "client-0004" not in outcome.retrain_rounds[0].participants
    assert outcome.points["before"].measures["forget_accuracy"] is not None


# ---------------------------------------------------------------- refusals
BUDGET = {"round": 2, "target": "class", "label": 3, "most-rounds": 1}
"""Exact forgetting plays more rounds than one again."""
NOBODY = {**EARLY, "label": 12}


@pytest.mark.parametrize(
    ("request_", "message"),
    [(BUDGET, "1 are allowed"), (NOBODY, "there is no class 12; classes are numbered")],
)
def test_a_request_that_is_refused_ends_the_run_or_is_in_the_report(request_, message):
    with pytest.raises(RefusedRequestError, match=message):
        play(scenario_of(request_))
    outcome = play(scenario_of(request_, **{"may-be-refused": True}))
    report = report_of(outcome, "inprocess")
    (unlearning,) = report["unlearnings"]
    assert message in unlearning["refused"]
    assert unlearning["targets"] == [f"class {request_['label']}"]
    assert report["after"] is None
    assert f"forgetting class {request_['label']} was refused" in render(report)


def test_the_built_in_scenarios_ask_for_what_they_say():
    (asked,) = load_scenario("forget-class").requests
    assert (asked.target, asked.label, asked.clients) == (Target.CLASS, 3, ())
    (asked,) = load_scenario("forget-samples").requests
    assert (asked.target, asked.samples, asked.clients) == (Target.SAMPLES, 20, (1,))
