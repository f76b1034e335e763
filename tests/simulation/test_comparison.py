"""Methods side by side: the same start for all, what is counted, and what is said of it."""

import csv
import io
import json
import re
import time
from copy import deepcopy
from html.parser import HTMLParser

import pytest
import torch

from client.task.evaluation import gather, load_state, predict, state_of
from client.task.protocol import load_task
from server.federation import initial_model
from server.settings import parse_overrides
from simulation import comparison
from simulation.commands import grid_of
from simulation.compare_page import render
from simulation.compare_plots import figures
from simulation.compare_progress import line
from simulation.compare_report import (
    Column,
    as_csv,
    as_markdown,
    describe,
    document,
    number,
    remarks,
    results,
    story,
)
from simulation.comparison import Comparison, Trial, Watcher, compared, fingerprint, table
from simulation.probes import FORGET, Probes, build_probes
from simulation.scenario import ScenarioError, load_scenario
from strategies.records import UnlearningRecord
from unlearning.parameters import byte_size

TINY = ["clients.total=5", "clients.malicious=2", "rounds=4", "local-epochs=4", "batch-size=64",
        "model=mlp", "pruning-rate=0.1", "recovery-cap=2"]  # fmt: skip
METHODS = ("drift", "fedup", "federaser", "verifi", "fast", "rollback")
ROUNDS, CLIENTS, KEPT = 4, 5, 3


def compare(*changes, methods=METHODS, **given):
    scenario = load_scenario("demo", parse_overrides([*TINY, *changes]))
    return Comparison(scenario, methods, **given)


def play(*changes, rounds=3, watcher=None, **given):
    found = compare(*changes, rounds=rounds, **given)
    return found.play(grid_of(found.scenario), watcher)


def by_name(trials):
    return {trial.method: trial for trial in trials}


def without_seconds(trial):
    timed = {"seconds", "speedup_seconds"}
    return {k: v for k, v in comparison.as_json(trial).items() if k not in timed}


@pytest.fixture(scope="module")
def trials():
    return play()


# ---------------------------------------------------------------- the same start
class Starts(Watcher):
    """Keeps what every method was given to start from, and whether that was changed later."""

    def __init__(self, monkeypatch):
        self.given, self.copies, self.names = [], [], []
        real = comparison.run_rounds

        def run_rounds(federation, grid, start, **options):
            self.given.append(start)
            self.copies.append({name: tensor.clone() for name, tensor in start.items()})
            return real(federation, grid, start, **options)

        monkeypatch.setattr(comparison, "run_rounds", run_rounds)

    def begin(self, seed, what, rounds):
        if what != comparison.RETRAINED:
            self.names.append(what)


def test_all_methods_start_from_one_model_which_none_of_them_changes(monkeypatch):
    starts = Starts(monkeypatch)
    found = by_name(play(watcher=starts))
    assert starts.names == ["training", *METHODS, "natural", "random"]
    first = starts.copies[1]
    for given, copy in zip(starts.given[1:], starts.copies[1:], strict=True):
        for name, tensor in first.items():
            assert torch.equal(copy[name], tensor)
            assert torch.equal(given[name], tensor)  # after everything
    untrained = starts.copies[0]
    assert found.pop("retrain").started_from == fingerprint(untrained) != fingerprint(first)
    assert {trial.started_from for trial in found.values()} == {fingerprint(first)}


def test_measures_before_are_those_of_the_one_model(trials):
    assert all(trial.before == trials[0].before for trial in trials)
    assert trials[0].before["test_accuracy"] > 0.3


@pytest.mark.parametrize("methods", [METHODS[::-1], ("federaser",), ("fedup",), ("rollback",)])
def test_neither_order_nor_company_changes_a_trial(methods, trials):
    expected = by_name(trials)
    for trial in play(methods=methods):
        assert without_seconds(trial) == without_seconds(expected[trial.method])


def test_copies_of_the_federation_share_no_folder(trials, tmp_path):
    found = play(f"memory-dir={str(tmp_path)!r}", methods=("fedup",))
    assert without_seconds(found[0]) == without_seconds(by_name(trials)["fedup"])
    assert not list(tmp_path.iterdir())


def test_the_table_has_an_order():
    assert compared(["fedup", "retrain", "drift", "fedup"]) == (
        "fedup", "drift", "natural", "random", "retrain"
    )  # fmt: skip
    assert compared(["random", "kd"]) == ("random", "kd", "natural", "retrain")


def test_a_fingerprint_is_of_the_values_alone():
    model = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(1)}
    turned = {"b": torch.zeros(1), "a": torch.arange(6.0).reshape(3, 2).T.clone().T.reshape(2, 3)}
    assert fingerprint(model) == fingerprint(turned)
    assert fingerprint(model) != fingerprint({**model, "b": torch.ones(1)})


# ---------------------------------------------------------------- what is counted
def test_bytes_and_rounds_are_those_of_the_definitions(trials):
    # W bytes a model, K = 3 clients stay of 5, R = 4 rounds. An ordinary round sends 2 K W.
    scenario = compare().scenario
    size = byte_size([state_of(initial_model(load_task(scenario.settings.task_options()), 0))])
    found, a_round = by_name(trials), 2 * KEPT * size
    # FedEraser replays rounds 1, 3 and 5 (the one in which the request is served) and asks in all
    # but the first; it stores rounds 1 and 3 of six models each.
    own = {"drift": 0, "fedup": 0, "federaser": 2, "verifi": 2, "fast": 0,
           "rollback": ROUNDS + 1, "natural": 0, "random": 0, "retrain": ROUNDS}  # fmt: skip
    stored = {"drift": CLIENTS, "fedup": CLIENTS + 1, "verifi": CLIENTS + 1, "rollback": 1,
              "natural": 0, "random": CLIENTS + 1, "retrain": 1}  # fmt: skip
    assert {name: trial.rounds_asked for name, trial in found.items()} == own
    for name, trial in found.items():
        assert trial.bytes_sent == (own[name] + trial.recovery_rounds) * a_round, name
    assert {name: found[name].memory_bytes / size for name in stored} == stored
    for name, models in {"federaser": 12, "fast": 24}.items():  # in files, which have headers
        assert 0 < found[name].memory_bytes / models - size < 2000


def test_recovery_is_counted_and_ends_at_the_cap(trials):
    found = by_name(trials)
    assert found["rollback"].recovery_rounds == found["retrain"].recovery_rounds == 0
    assert found["rollback"].recovery_ended_by is None
    for name in ("drift", "fedup", "verifi", "natural", "random"):
        trial = found[name]
        assert 1 <= trial.recovery_rounds <= 2
        assert trial.after == trial.curve[trial.recovery_rounds]
        assert trial.unlearned == trial.curve[0]
        assert trial.end == trial.curve[2]
        assert trial.recovery_ended_by == "recovered" or trial.recovery_rounds == 2


def test_retraining_is_followed_from_its_first_round(trials):
    trial = by_name(trials)["retrain"]
    assert len(trial.curve) == ROUNDS
    assert trial.after == trial.end == trial.curve[-1]
    assert trial.speedup_rounds is trial.speedup_seconds is None


@pytest.mark.parametrize(
    ("before", "needed"), [(0.90, 2), (0.93, 3), (0.951, 4), (0.98, None), (None, None)]
)
def test_retraining_needs_the_rounds_until_it_is_within_the_tolerance(before, needed):
    curve = [{"test_accuracy": accuracy} for accuracy in (0.5, 0.88, 0.92, 0.94)]
    curve = [{**measures, "retained_accuracy": None} for measures in curve]
    start = {"test_accuracy": before, "retained_accuracy": None}
    assert comparison._needed(curve, start, 0.02) == needed
    # Where a class goes, by the accuracy on the others, whatever that on all is.
    others = [{"test_accuracy": 0.0, "retained_accuracy": m["test_accuracy"]} for m in curve]
    start = {"test_accuracy": 1.0, "retained_accuracy": before}
    if before is not None:
        assert comparison._needed(others, start, 0.02) == needed


def test_recovery_may_outlast_the_rounds_that_all_are_followed_for():
    trial = Trial("not", 0)
    done = UnlearningRecord(5, "not", "malicious", ("a",), recovery_ended_by="cap", rounds_asked=7)
    comparison._fill(trial, done, [{"test_accuracy": n / 10} for n in range(4)], 3, 2)
    shown = (trial.unlearned, trial.after, trial.end)
    assert [measures["test_accuracy"] for measures in shown] == [0.0, 0.3, 0.1]
    assert (trial.recovery_rounds, trial.recovery_ended_by, trial.rounds_asked) == (3, "cap", 7)


def test_rollback_of_everybody_who_came_first_is_retraining_and_one_round_more(trials):
    found = by_name(trials)
    assert found["rollback"].guarantee == found["retrain"].guarantee == "exact"
    assert found["rollback"].unlearned["backdoor_success"] == pytest.approx(
        found["retrain"].after["backdoor_success"], abs=0.05
    )


def test_speedups_compare_what_retraining_needed_with_what_was_spent():
    trial = Trial("fedup", 0, rounds_asked=2, recovery_rounds=3, seconds=8.0)
    comparison._compare(trial, 10, 4.0)
    assert (trial.speedup_rounds, trial.speedup_seconds) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("trial", "needed"),
    [
        (Trial("fedup", 0, rounds_asked=2, recovery_rounds=3, seconds=8.0), None),
        (Trial("fedup", 0, refused="no"), 10),
        (
            Trial("not", 0, rounds_asked=0, recovery_rounds=20, recovery_ended_by="cap", seconds=8),
            10,
        ),
        (Trial("fedup", 0, rounds_asked=0, recovery_rounds=0, seconds=0.0), 10),
    ],
)
def test_there_is_no_speedup_over_what_never_arrived_or_took_nothing(trial, needed):
    comparison._compare(trial, needed, 4.0)
    assert trial.speedup_rounds is trial.speedup_seconds is None


def test_measuring_is_no_cost(monkeypatch):
    real = Probes.measure

    def slowly(self, number, parameters, **given):
        time.sleep(0.3)
        return real(self, number, parameters, **given)

    monkeypatch.setattr(Probes, "measure", slowly)
    for trial in play(methods=("natural",), rounds=1):
        rounds = trial.rounds_asked + trial.recovery_rounds
        assert 0 < trial.seconds < 0.3 * rounds, trial.method


# ---------------------------------------------------------------- who is forgotten
def test_the_forget_set_is_what_the_forgotten_trained_on():
    scenario = compare().scenario
    task = load_task(scenario.settings.task_options())
    model = initial_model(task, 0)
    probes = build_probes(task, None, CLIENTS, model, "cpu", forgotten=(1, 3))
    parts = [gather(task.client_data(partition, CLIENTS).train) for partition in (1, 3)]
    hits = []
    for inputs, targets in parts:
        load_state(model, state_of(model))
        outputs, _ = predict(
            model, torch.utils.data.TensorDataset(inputs, targets), device=torch.device("cpu")
        )
        hits.append(outputs.argmax(dim=1) == targets)
    share = float(torch.cat(hits).double().mean())
    assert probes.measure(0, state_of(model))[FORGET] == pytest.approx(share)


def test_who_only_left_is_no_attacker():
    culprits = compare().partitions
    honest = next(p for p in range(CLIENTS) if p not in culprits)
    one = culprits[0]
    for clients, cause in (((honest,), "privacy"), ((one,), "malicious"), ((), "malicious")):
        found = compare(clients=clients)
        assert found._request("fedup", None).cause == cause
        assert (
            found._request("verifi", None).cause == "privacy"
        )  # it would refuse, and is to be seen


def test_clients_can_be_forgotten_where_nobody_attacks():
    found = by_name(play("clients.malicious=0", methods=("drift",), clients=(3, 1, 3), rounds=2))
    for trial in found.values():
        assert trial.asked_as == "privacy"
        assert trial.before["backdoor_success"] is trial.before["flip_success"] is None
        assert 0 < trial.before["forget_accuracy"] <= 1


@pytest.mark.parametrize(
    ("changes", "clients", "message"),
    [
        (["clients.malicious=0"], (), "has no attackers, so nobody is to be forgotten; name part"),
        ([], (5,), "--forget 5: partitions are 0 to 4"),
        ([], (-1,), "--forget -1: partitions are 0 to 4"),
        ([], (0, 1, 2, 3, 4), "0 of 5 clients would be left, and a round needs 2"),
        ([], (0, 1, 2, 3), "1 of 5 clients would be left, and a round needs 2"),
    ],
)
def test_somebody_is_forgotten_and_enough_are_left(changes, clients, message):
    with pytest.raises(ScenarioError, match=re.escape(message)):
        compare(*changes, clients=clients)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((), "no method is named; choose among fedup, drift"),
        (("fedup", "x"), "there is no method 'x'"),
    ],
)
def test_methods_exist(methods, message):
    with pytest.raises(ScenarioError, match=message):
        compare(methods=methods)


# ---------------------------------------------------------------- refusals
def test_a_refusal_has_a_reason_and_nothing_else():
    # Three of five leave: FedUP and drift subtraction need a majority; the others do not.
    found = by_name(play(methods=("fedup", "drift", "not"), clients=(0, 1, 2), rounds=2))
    for name in ("fedup", "random", "drift"):
        trial = found[name]
        assert "3 of 5" in trial.refused
        assert [trial.unlearned, trial.after, trial.end, trial.curve] == [{}, {}, {}, []]
        assert trial.seconds is trial.bytes_sent is trial.rounds_asked is None
    assert found["not"].refused is found["natural"].refused is None


def test_what_was_not_recorded_is_a_refusal_before_anything_runs():
    # 24 models of 51 thousand weights take 5 MB.
    large = ["memory-limit=1", "model=mlp-256-128", "local-epochs=1"]
    found = by_name(play(*large, methods=("fast", "federaser"), rounds=1))
    for name in ("fast", "federaser"):
        assert "not recorded" in found[name].refused
    assert found["random"].refused is None


# ---------------------------------------------------------------- the table
def a_trial(method, seed, accuracy, attack, **changes):
    def models(shift):
        share = None if accuracy is None else accuracy - shift
        return {
            "test_accuracy": share,
            "forget_accuracy": share,
            "backdoor_success": attack,
            "flip_success": None,
        }

    given = {
        "guarantee": "none",
        "asked_as": "malicious",
        "started_from": "ab",
        "before": models(0.0),
        "unlearned": models(0.3),
        "after": models(0.02),
        "end": models(0.01),
        "curve": [models(0.3), models(0.02), models(0.01)],
        "recovery_rounds": 1 + seed,
        "recovery_ended_by": "recovered",
        "rounds_asked": 0,
        "seconds": 0.5,
        "memory_bytes": 2_000_000,
        "bytes_sent": 1_000_000,
        "speedup_rounds": 3.0,
        "speedup_seconds": 4.0,
        **changes,
    }
    return Trial(method, seed, **given)


def refused_trial(method, seed, why="too few are left"):
    before = a_trial(method, seed, 0.9, 0.8).before
    return Trial(method, seed, "none", "malicious", "ab", before, refused=why)


def retrained_trial(seed, needed=6, **changes):
    given = {"guarantee": "exact", "recovery_rounds": 0, "recovery_ended_by": None}
    given |= {"rounds_asked": 36, "rounds_needed": needed, "bytes_sent": 30_000_000}
    given |= {"speedup_rounds": None, "speedup_seconds": None}
    return a_trial("retrain", seed, 0.95, 0.001, **(given | changes))


def test_means_and_deviations_by_hand():
    rows = table([a_trial("fedup", 0, 0.9, 0.1), a_trial("fedup", 1, 0.8, 0.4)])
    (row,) = rows
    assert row["before_test_accuracy"] == pytest.approx(0.85)
    # ((0.05)^2 + (0.05)^2) / (2 - 1) = 0.005, whose root is 0.0707...
    assert row["before_test_accuracy_sd"] == pytest.approx(0.0707106781)
    assert row["after_backdoor_success"] == pytest.approx(0.25)
    assert row["after_backdoor_success_sd"] == pytest.approx(0.2121320344)
    assert (row["recovery_rounds"], row["seconds"], row["seconds_sd"]) == (1.5, 0.5, 0.0)
    assert row["after_flip_success"] is row["after_flip_success_sd"] is None
    assert (row["seeds"], row["served"], row["capped"]) == (2, 2, 0)


def test_one_seed_has_no_deviation():
    (row,) = table([a_trial("fedup", 0, 0.9, 0.1, recovery_ended_by="cap")])
    assert row["before_test_accuracy"] == 0.9
    assert row["before_test_accuracy_sd"] is None
    assert row["capped"] == 1


def test_refused_seeds_are_in_no_mean():
    rows = table([a_trial("kd", 0, 0.9, 0.1), refused_trial("kd", 1), refused_trial("fast", 0)])
    some, none = rows
    assert (some["seeds"], some["served"], some["refused"]) == (2, 1, "too few are left")
    assert some["before_test_accuracy"] == 0.9
    assert (none["seeds"], none["served"]) == (1, 0)
    assert {none[f"{key}"] for key in (*comparison.COSTS, "after_test_accuracy")} == {None}


def test_a_trial_survives_json(trials):
    for trial in trials:
        values = json.loads(json.dumps(comparison.as_json(trial)))
        assert comparison.as_json(Trial(**values)) == comparison.as_json(trial)


# ---------------------------------------------------------------- what is said of it
def a_document(found, *, seeds=(0,), methods=("fedup",), named=False, changes=()):
    clients = (1, 3) if named else ()
    given = [
        compare(*changes, methods=methods, seed=seed, clients=clients, rounds=3) for seed in seeds
    ]
    return document(describe(given[0]), given, found)


def usual():
    found = []
    for seed in (0, 1):
        found += [a_trial("fedup", seed, 0.9 + 0.02 * seed, 0.02), refused_trial("kd", seed)]
        found += [a_trial("verifi", seed, 0.9, 0.2, asked_as="privacy", rounds_asked=2)]
        found += [a_trial("natural", seed, 0.9, 0.5), a_trial("random", seed, 0.9, 0.4)]
        found += [retrained_trial(seed)]
    return a_document(found, seeds=(0, 1), methods=("fedup", "kd", "verifi"))


def single():
    found = [a_trial("fedup", 0, 0.9, 0.02, recovery_ended_by="cap", warnings=("watch out",))]
    return a_document([*found, a_trial("natural", 0, 0.9, 0.5), retrained_trial(0, None)])


def all_refused():
    found = [refused_trial(name, 0) for name in ("fedup", "natural", "random")]
    return a_document([*found, retrained_trial(0)])


def partly_refused():
    found = [a_trial("fedup", 0, 0.9, 0.02), refused_trial("fedup", 1)]
    found += [a_trial("natural", s, 0.9, 0.5) for s in (0, 1)]
    return a_document([*found, retrained_trial(0), retrained_trial(1, None)], seeds=(0, 1))


def nothing_measured():
    found = [a_trial(name, 0, None, None) for name in ("fedup", "natural", "random")]
    empty = retrained_trial(0, None)
    for moment in ("before", "unlearned", "after", "end"):
        setattr(empty, moment, found[0].before)
    empty.curve = [found[0].before]
    return a_document([*found, empty])


def nobody_attacks():
    found = [a_trial(name, 0, 0.9, None, asked_as="privacy") for name in ("fedup", "natural")]
    found.append(retrained_trial(0))
    for trial in found:
        for measures in (trial.before, trial.unlearned, trial.after, trial.end, *trial.curve):
            measures["backdoor_success"] = None
        trial.asked_as = "privacy"
    return a_document(found, named=True, changes=["clients.malicious=0"])


HOSTILE = '<script>alert("x")</script> | $\\frac{$ & _\nsecond line'


def hostile():
    made = single()
    made["scenario"] = HOSTILE
    made["summary"] = HOSTILE
    made["settings"]["model"] = HOSTILE
    for trial in made["trials"]:
        trial["warnings"] = [HOSTILE]
    made["table"][0] |= {"refused": HOSTILE}
    return made


CASES = {
    make.__name__: make
    for make in (
        usual,
        single,
        all_refused,
        partly_refused,
        nothing_measured,
        nobody_attacks,
        hostile,
    )
}


class Page(HTMLParser):
    """Checks nesting; collects text, tags, ids and references."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.ids, self.links = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta", "br", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name != "src"
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href"):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]()


def test_the_page_is_whole_and_loads_nothing(case):
    text = render(case)
    page = Page(text)
    assert text.lstrip().startswith("<!doctype html>")
    assert page.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert len(page.ids) == len(set(page.ids))
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert "://" not in re.sub(r'xmlns(:\w+)?="http://www\.w3\.org/[\w/]+"', "", text)
    for row in case["table"]:
        assert row["method"] in page.text
    assert "What this is not" in page.text


def test_the_same_document_gives_the_same_files_and_stays_as_it_is(case):
    untouched = deepcopy(case)
    assert render(case) == render(untouched)
    assert figures(case) == figures(untouched)
    assert case == untouched


def test_csv_has_every_column_and_a_row_per_method(case):
    rows = list(csv.DictReader(io.StringIO(as_csv(case))))
    assert [row["method"] for row in rows] == [row["method"] for row in case["table"]]
    assert list(rows[0]) == list(case["table"][0])


def test_markdown_tables_are_rectangular(case):
    text = as_markdown(case).replace("\\|", "")
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) == 2 + len(case["table"])
    assert "<script" not in text


def test_the_document_has_the_promised_shape(trials):
    made = a_document(trials, methods=METHODS)
    assert json.loads(json.dumps(made)) == made
    assert list(made) == [
        "schema_version", "secateur", "scenario", "summary", "methods", "rounds_followed", "forget",
        "settings", "seeds", "forgotten", "environment", "trials", "table",
    ]  # fmt: skip
    assert made["methods"] == [row["method"] for row in made["table"]]
    assert made["forgotten"] == {"0": [f"client-000{p}" for p in compare().partitions]}
    assert made["settings"]["clients"] == {"total": 5, "malicious": 2}
    assert "seed" not in made["settings"]


def test_seeds_of_one_comparison_are_described_alike():
    seeds = [compare(seed=seed) for seed in (0, 1)]
    other = compare("learning-rate=0.1")
    assert describe(seeds[0]) == describe(seeds[1])
    assert describe(seeds[0]) != describe(other)
    named = compare(seed=0, clients=seeds[0].partitions)
    assert describe(seeds[0])["forget"] == "attackers"
    assert describe(named)["forget"] == list(seeds[0].partitions)


def test_real_trials_make_a_page_with_every_figure(trials):
    made = a_document(trials, methods=METHODS)
    assert list(figures(made)) == ["curves", "forgetting", "bytes"]
    assert Page(render(made)).text.count("Backdoor success") > 1


def test_figures_need_something_to_show():
    assert list(figures(usual())) == ["curves", "forgetting", "bytes"]
    assert list(figures(nothing_measured())) == ["bytes"]
    assert figures(all_refused()) == {}
    assert "Forget accuracy after recovery" in figures(nobody_attacks())["forgetting"]


def test_every_method_is_named_in_every_figure():
    for svg in figures(usual()).values():
        for name in ("fedup", "verifi", "natural", "random"):
            assert f">{name}<" in svg
        assert ">kd<" not in svg  # refused
    assert ">fedup (1 of 2 seeds)<" in figures(partly_refused())["curves"]


def test_the_story_says_who_when_and_how_often():
    text = " ".join(story(usual()))
    assert "Five clients trained one model together for four rounds" in text
    assert "two of them planted a backdoor" in text
    assert "After round 4, the attackers (client-0000 and client-0002) were to be forg" in text
    assert "was followed for three rounds. All this was done two times, with seeds 0 and 1." in text
    assert "needed 6 of its 4 rounds to come within 2 points" in text
    assert "nothing here tells how much is chance" in " ".join(story(single()))


def test_attackers_that_differ_between_seeds_are_told_by_seed():
    made = usual() | {"forgotten": {str(seed): [f"client-{seed}"] for seed in range(7)}}
    text = " ".join(story(made))
    assert "the attackers (seed 0: client-0; seed 1: client-1; " in text
    assert "seed 4: client-4; and so on for two more seeds) were" in text


def test_the_story_says_where_retraining_never_arrived():
    assert "Retraining never came within 2 points" in " ".join(story(single()))
    assert "With one seed it never did" in " ".join(story(partly_refused()))


def test_the_story_of_clients_who_only_left():
    text = " ".join(story(nobody_attacks()))
    assert "client-0001 and client-0003 were to be forgotten" in text
    assert "of them" not in text


def test_remarks_tell_refusals_caps_and_who_was_asked_otherwise():
    made = usual()
    found = {row["method"]: remarks(row, made) for row in made["table"]}
    assert found["kd"] == ["refused: too few are left"]
    assert found["fedup"] == found["natural"] == found["retrain"] == []
    assert "as if they had only left" in found["verifi"][0]
    row = partly_refused()["table"][0]
    assert remarks(row, partly_refused()) == ["refused with 1 of the seeds: too few are left"]
    assert remarks(single()["table"][0], single()) == [
        "with 1 of 1 seed recovery was stopped at its cap: accuracy had not come back"
    ]
    assert not [
        note for row in nobody_attacks()["table"] for note in remarks(row, nobody_attacks())
    ]


def test_the_line_of_a_finished_method_has_its_main_numbers():
    told = line(a_trial("fedup", 0, 0.9, 0.0, rounds_asked=2, recovery_rounds=1))
    assert " ".join(told.split()) == (
        "fedup accuracy 88.0% backdoor 0.0% forget accuracy 88.0% 3 rounds 0.5 s"
    )
    assert "refused: [bold" in line(refused_trial("kd", 0, "[bold]")).replace("\\", "")
    assert " ".join(line(a_trial("not", 0, None, None)).split()) == "not 1 round 0.5 s"


def test_what_was_not_measured_is_a_dash():
    made = nothing_measured()
    assert {column.show(made["table"][0]) for column in results(made)} == {"\u2013"}


def test_cells_hold_mean_and_deviation():
    accuracy = next(c for c in results(usual()) if c.key == "after_test_accuracy")
    # 0.88 and 0.90: mean 0.89, deviation sqrt(2) / 100
    assert accuracy.show(usual()["table"][0]) == "89.0\u00a0\u00b1\u00a01.4"
    assert accuracy.show(single()["table"][0]) == "88.0"
    assert accuracy.name == "Test accuracy after recovery, %"
    assert Column("seconds", "", "Seconds", number).name == "Seconds"


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [
        (2.0, None, "2"),
        (2.0, 0.0, "2"),
        (2.0, 0.5, "2.0 ± 0.5"),
        (1.25, None, "1.2"),
        (0.25, 0.125, "0.25 ± 0.12"),
        (0.0381, 0.002, "0.038 ± 0.002"),
        (0.0, 0.0, "0"),
    ],
)
def test_numbers_have_the_digits_that_count(mean, deviation, text):
    assert number(mean, deviation).replace("\u00a0", " ") == text
