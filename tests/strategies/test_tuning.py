"""Rates of the rounds after a mask: methods 5."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.train import learning_rate
from strategies.messages import LocalTraining
from strategies.records import UnlearningRecord
from strategies.recovery import Recovery, RecoveryWatch
from strategies.tuning import RATE, Schedule

CONFIG = {
    "seed": 4,
    "learning-rate": 0.2,
    "learning-rate-milestones": "6,9",
    "learning-rate-factor": 0.5,
    "local-epochs": 3,
    "momentum": 0.9,
}


def rates(schedule, rounds, config=CONFIG):
    return [schedule.told(spent, config)[RATE] for spent in range(1, rounds + 1)]


def test_thirteen_rounds_squeezed_into_five_by_hand():
    # Rounds of recovery begin at 0, 1, .. of 5, that is at 0, 2.6, 5.2, 7.8 and 10.4 of 13: past
    # the milestone 6 from the fourth on, and past 9 from the fifth; then the last rate stays.
    expected = [0.2, 0.2, 0.2, 0.1, 0.05, 0.05, 0.05]
    assert rates(Schedule(13), 7) == pytest.approx(expected)
    assert rates(Schedule(13, "constant"), 7) == [0.2] * 7
    assert Schedule(13).settings(CONFIG) == {
        "recovery_schedule": "replay",
        "recovery_rates": "0.2, 0.2, 0.2, 0.1, 0.05",
    }


def test_a_training_that_passed_no_milestone_has_its_first_rate():
    # After 6 rounds the next would have been past the first milestone, and so is what follows five.
    assert rates(Schedule(5), 9) == [0.2] * 9
    assert rates(Schedule(6), 9) == pytest.approx([0.2] * 5 + [0.1] * 4)


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(0, 50),
    st.lists(st.integers(0, 50), max_size=3),
)  # fmt: skip
def test_clients_train_at_the_rate_told_whatever_the_rounds_number(played, spent, more, passed):
    config = CONFIG | {"learning-rate-milestones": ",".join(map(str, passed))}
    told = Schedule(played).told(spent, config)
    settings = LocalTraining.model_validate(config | told)
    assert learning_rate(settings, played + spent + more) == told[RATE]
    assert (settings.local_epochs, settings.momentum, settings.seed) == (1, 0.9, 4)
    # A rate that the training itself had, in the round of which it is the beginning.
    then = min(spent - 1, 5) * played / 5
    whole = LocalTraining.model_validate(config)
    assert told[RATE] == pytest.approx(learning_rate(whole, int(then + 1e-9) + 1))


def test_clients_that_are_told_no_rate_are_told_none():
    assert Schedule(13).told(1, {"lr": 0.1}) == {}
    assert Schedule(13).settings({"lr": 0.1}) == {"recovery_schedule": "none"}


def test_a_schedule_is_told_while_its_recovery_goes_on_and_no_longer():
    watch = RecoveryWatch(Recovery(cap=2))
    assert watch.told(5, CONFIG) == {}
    watch.begin(UnlearningRecord(13, "fisher-mask", "privacy", ()), 0.04, Schedule(13))
    watch.observe(13, None)
    assert watch.told(14, CONFIG) == Schedule(13).told(1, CONFIG)
    watch.observe(14, None)
    assert watch.told(15, CONFIG) == Schedule(13).told(2, CONFIG)
    watch.observe(15, None)
    assert watch.current is None
    assert watch.told(16, CONFIG) == {}
    watch.begin(UnlearningRecord(20, "fedup", "privacy", ()), 0.04)
    assert watch.told(21, CONFIG) == {}
