"""At which rates clients train in the rounds after an unlearning, through a whole federation."""

import pytest

from client import train
from server.settings import parse_overrides
from simulation.engines.inprocess import InProcessGrid
from simulation.experiment import Experiment, client_app, with_folder
from simulation.scenario import parse_scenario
from strategies.recovery import RecoveryWatch

SETTINGS = {
    "task": "digits", "model": "mlp-32", "examples": 200, "rounds": 20, "detector": "none",
    "method": "none", "rate-limit": 1, "recovery-cap": 6, "local-epochs": 2,
    "learning-rate": 0.2, "learning-rate-milestones": "6,9", "learning-rate-factor": 0.5,
}  # fmt: skip
ASKED = {"round": 12, "target": "client", "clients": [1], "guarantee": "approximate",
         "cooperates": True}  # fmt: skip


def played(method, monkeypatch, **settings):
    """Round -> how clients trained in it, by local epochs and rate; and the record."""
    seen, watch = {}, RecoveryWatch.observe
    made = train.optimizer_for

    def spy(parameters, settings, number):
        seen.setdefault(number, set()).add(
            (settings.local_epochs, train.learning_rate(settings, number))
        )
        return made(parameters, settings, number)

    monkeypatch.setattr(train, "optimizer_for", spy)
    # Nothing says that the model is back, so recovery takes all its rounds.
    monkeypatch.setattr(RecoveryWatch, "observe", lambda self, n, accuracy: watch(self, n, None))
    raw = {
        "name": "mine", "summary": "mine", "clients": {"total": 3},
        "baselines": {"natural": False, "retrain": False},
        "requests": [ASKED | {"method": method}],
        "settings": SETTINGS | {"ready-methods": method} | settings,
    }  # fmt: skip
    with with_folder(parse_scenario(raw, parse_overrides([]))) as scenario:
        experiment = Experiment(scenario)
        experiment.play(InProcessGrid(client_app(scenario), 3))
    (record,) = [r.unlearning for r in experiment.outcome.rounds if r.unlearning is not None]
    assert (record.number, record.recovery_rounds) == (13, 6)
    assert all(len(found) == 1 for found in seen.values())
    return {number: found.pop() for number, found in seen.items()}, record


USUAL = {number: (2, 0.2 * 0.5 ** ((number > 6) + (number > 9))) for number in range(1, 21)}


@pytest.mark.parametrize("method", ["fisher-mask", "random-mask"])
def test_after_a_mask_the_trainings_rates_are_replayed_in_five_rounds(method, monkeypatch):
    found, record = played(method, monkeypatch)
    squeezed = [0.2, 0.2, 0.2, 0.1, 0.05, 0.05]  # of round 13, see tests/strategies/test_tuning.py
    expected = USUAL | {14 + place: (1, rate) for place, rate in enumerate(squeezed)}
    assert found.keys() == expected.keys()
    for number, (epochs, rate) in expected.items():
        assert found[number] == (epochs, pytest.approx(rate))
    assert record.settings["recovery_schedule"] == "replay"
    assert record.settings["recovery_rates"] == "0.2, 0.2, 0.2, 0.1, 0.05"


def test_a_constant_rate_is_the_first_one(monkeypatch):
    found, record = played("random-mask", monkeypatch, **{"recovery-schedule": "constant"})
    assert [found[number] for number in range(14, 21)] == [(1, 0.2)] * 6 + [(2, 0.05)]
    assert record.settings["recovery_schedule"] == "constant"


@pytest.mark.parametrize("method", ["not", "natural"])
def test_after_other_methods_nothing_changes(method, monkeypatch):
    found, record = played(method, monkeypatch)
    assert found == USUAL
    assert "recovery_schedule" not in record.settings
