"""FFMU as a scenario: what it learns, what it is tied to, and what its report says."""

import json

import pytest

from server.federation import build_strategy
from server.settings import SettingsError, parse_overrides, read_settings
from simulation.certify import speed
from simulation.engines.inprocess import InProcessGrid
from simulation.experiment import Experiment, client_app, with_folder
from simulation.report import report_of, without_times
from simulation.scenario import load_scenario, parse_scenario
from strategies.ffmu import FFMU
from strategies.records import Phase, RoundRecord
from unlearning import ffmu, pcmu
from unlearning.certificates import CLOSENESS, EXACT, PAPER

SMALL = ["rounds=6", "examples=300"]


def run(*pairs, name="ffmu"):
    scenario = load_scenario(name, parse_overrides([*SMALL, *pairs]))
    experiment = Experiment(scenario)
    experiment.play(InProcessGrid(client_app(scenario), scenario.clients.total))
    report = report_of(experiment.outcome, "inprocess")
    assert json.loads(json.dumps(report)) == report
    return report


@pytest.fixture(scope="module")
def full():
    return run("local-gradient=full", "gradient-clip=0.01")


def test_it_learns():
    report = run("local-gradient=path", "examples=0", "rounds=12")
    assert report["final"]["test_accuracy"] > 0.7 > report["rounds"][0]["test_accuracy"] + 0.3
    assert all(len(r["participants"]) == 10 for r in report["rounds"][1:])


def test_the_three_statements_bear_their_own_labels(full):
    told = full["ffmu"]
    assert PAPER == "Paper radius and budget (Theorem 1), per coordinate"
    for key, label in (("paper", PAPER), ("exact", EXACT), ("closeness", CLOSENESS)):
        assert told[key]["statement"].startswith(label)
    assert told["threshold"] == 0
    assert told["warnings"] == []
    low, median = told["paper"]["gradient_radius"]
    assert 0 <= low <= median
    assert told["paper"]["budget"][0] == 0
    assert told["paper"]["estimated"]
    assert told["paper"]["lipschitz"] > 0
    assert told["exact"]["removed"] == 1
    assert 0 < told["exact"]["share"] < 1
    assert not told["exact"]["certified"]
    assert "not all: nothing is shown" in told["exact"]["statement"]
    assert told["closeness"]["vacuous"]
    assert told["closeness"]["devices"] == 10


def test_the_speed_is_not_claimed_where_it_was_not_measured(full):
    assert full["ffmu"]["speedup_vs_retrain"] is None
    assert "5 to 6 times" in full["ffmu"]["speedup_note"]


def test_the_paper_certificate_takes_the_users_constant_and_request(full):
    """B' = floor(N - 36 d L^2 / (T dPhi^2)): what it takes grows with the square of L."""
    told = run("gradient-clip=0.01", "lipschitz=1e-9", "certify-samples=3")["ffmu"]
    samples = 270  # of 300 examples; next to nothing is taken: all but one may go
    assert told["paper"]["budget"][1] == samples - 1
    assert (told["paper"]["lipschitz"], told["paper"]["estimated"]) == (1e-9, False)
    assert "estimated" not in told["paper"]["statement"]
    assert told["paper"]["removed"] == told["exact"]["removed"] == 3
    assert told["exact"]["share"] < full["ffmu"]["exact"]["share"]
    loose = run("gradient-clip=0.01", "lipschitz=1e9")["ffmu"]["paper"]
    assert loose["budget"] == [0, 0]
    assert loose["share"] == 0
    every = run("rounds=1", "certify-samples=27")["ffmu"]["exact"]  # all of a client's
    assert every["share"] is None
    assert "cannot lose all" in every["statement"]


def test_the_speed_is_what_was_trained_twice_over_what_was_trained_once():
    def rounds(phase, *seconds):
        return [RoundRecord(n, phase, seconds=s) for n, s in enumerate(seconds)]

    trained = [*rounds(Phase.TRAIN, 100, 2, 4), *rounds(Phase.UNLEARN, 50)]
    told = speed(trained, rounds(Phase.RETRAIN, 6, 6, 6), rounds=4)
    assert told["speedup_vs_retrain"] == (4 * 3 + 18) / (4 * 3)  # round 0 trains nothing
    assert "only if the request is certified" in told["speedup_note"]
    assert speed(trained, [], rounds=4)["speedup_vs_retrain"] is None


def test_the_retrain_baseline_gives_a_speed():
    asked = {"round": 1, "target": "class", "label": 3, "guarantee": "approximate"}
    raw = {"name": "mine", "summary": "mine", "extends": "ffmu", "requests": [asked]}
    scenario = parse_scenario(raw, parse_overrides([*SMALL, "rounds=3", "recovery-cap=1"]))
    with with_folder(scenario) as ready:
        experiment = Experiment(ready)
        experiment.play(InProcessGrid(client_app(ready), 10))
    report = report_of(experiment.outcome, "inprocess")
    assert report["ffmu"]["speedup_vs_retrain"] > 1
    assert "speedup_vs_retrain" not in without_times(report)["ffmu"]


def test_without_full_gradients_nothing_is_certified():
    told = run("local-gradient=path", "rounds=2")["ffmu"]
    assert told["exact"]["share"] is None
    assert "one gradient of all their samples" in told["exact"]["statement"]
    told = run("strategy=ffmu-n", "local-gradient=path", "rounds=2")["ffmu"]
    assert told["paper"] is None
    assert told["closeness"] is None
    assert not told["exact"]["certified"]


def test_a_dead_zone_is_told():
    told = run("sigma=0.6", "rounds=2")["ffmu"]
    assert told["threshold"] == pytest.approx(pcmu.threshold(0.6, 0.36))
    assert told["warnings"][0].startswith("DeadZone(")


def test_other_strategies_have_no_such_statements():
    assert run("strategy=fedavg", "rounds=1")["ffmu"] is None


def test_any_scenario_can_be_trained_so():
    report = run("strategy=ffmu", "detector=none", "method=none", "rounds=2", name="label-flip")
    assert report["ffmu"]["exact"]["share"] is None
    assert report["clients"]["malicious"]
    assert all(not r["note"] and not r["rejected"] for r in report["rounds"])


# --------------------------------------------------------------------------------------- settings


def test_keys_reach_the_strategy_and_its_action():
    strategy = build_strategy(
        read_settings(
            {"strategy": "ffmu", "rounds": 7, "sigma": 0.2, "lam-factor": 2, "quantiser": "soft",
             "alpha-local": 0.3, "alpha-server": 0.4, "local-gradient": "full",
             "gradient-clip": 0.5, "gradient-weights": "samples", "learning-rate": 0.6, "seed": 9}
        )
    )  # fmt: skip
    assert isinstance(strategy, FFMU)
    assert strategy.action.quantiser == pcmu.Quantiser(
        sigma=0.2, lam_factor=2, mode="soft", alpha=0.3
    )
    assert strategy.quantiser == pcmu.Quantiser(sigma=0.2, lam_factor=2, mode="soft", alpha=0.4)
    assert (strategy.action.local, strategy.action.clip, strategy.action.models) == (
        "full", 0.5, False,
    )  # fmt: skip
    assert (strategy.rounds, strategy.learning_rate, strategy.weights, strategy.seed) == (
        7, 0.6, "samples", 9,
    )  # fmt: skip
    assert strategy.min_available_nodes == 2


def test_defaults_are_those_of_the_specification():
    settings = read_settings({"strategy": "ffmu"})
    assert (settings.sigma, settings.lam_factor, settings.quantiser) == (0.1, 1.0, "hard")
    assert (settings.alpha_local, settings.alpha_server) == (pcmu.ALPHA, ffmu.ALPHA_SERVER)
    assert build_strategy(read_settings({"strategy": "ffmu-n"})).action.models


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma": 0}, "sigma = 0"),
        ({"lam-factor": -1}, "lam-factor = -1"),
        ({"quantiser": "loud"}, "quantiser = 'loud'"),
        ({"gradient-clip": -0.1}, "gradient-clip = -0.1"),
        ({"strategy": "ffmu-n", "local-gradient": "full"}, "is not for strategy ffmu-n"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(SettingsError, match=message):
        read_settings(values)


def test_a_soft_mean_that_overflows_is_refused_when_it_is_built():
    settings = read_settings({"strategy": "ffmu", "quantiser": "soft", "sigma": 20})
    with pytest.raises(SettingsError, match="mode soft needs lam of at most 13 sigma"):
        build_strategy(settings)
