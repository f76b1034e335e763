"""Plans: driven by canned answers, and replayed from a journal after a crash."""

import pytest
import torch

from strategies.store import MemoryJournal
from unlearning.errors import SecateurError
from unlearning.plan import Answer, Ask, carry_out
from unlearning.retraining import retrain


class CrashError(Exception):
    """Stands for the process ending."""


def counting_plan(steps):
    total = 0
    for step in range(steps):
        answers = yield Ask("query.number", to=("a",), config={"step": step})
        total += answers[0].num_examples
    return total


def test_a_plan_that_asks_nobody_returns_at_once():
    def plan():
        return 7
        yield

    def nobody(ask):
        raise AssertionError(f"asked {ask}")

    assert carry_out(plan(), nobody) == 7


def test_after_a_crash_the_plan_goes_on_and_nobody_is_asked_twice():
    journal, asked = MemoryJournal(), []

    def ask(question):
        if len(asked) == 3:
            raise CrashError
        asked.append(question.config["step"])
        return [Answer("a", num_examples=10 ** question.config["step"])]

    with pytest.raises(CrashError):
        carry_out(counting_plan(5), ask, journal)
    recovered = []

    def ask_again(question):
        recovered.append(question.config["step"])
        return [Answer("a", num_examples=10 ** question.config["step"])]

    assert carry_out(counting_plan(5), ask_again, journal) == 11111
    assert asked == [0, 1, 2]
    assert recovered == [3, 4]


def test_answers_are_journaled_before_the_plan_sees_them():
    journal = MemoryJournal()

    def plan():
        yield Ask("train", to=("a",))
        raise CrashError

    with pytest.raises(CrashError):
        carry_out(plan(), lambda ask: [Answer("a")], journal)
    assert len(journal.answers()) == 1


def test_a_finished_journal_replays_without_asking():
    journal = MemoryJournal([[Answer("a", num_examples=2)], [Answer("a", num_examples=3)]])

    def nobody(ask):
        raise AssertionError(f"asked {ask}")

    assert carry_out(counting_plan(2), nobody, journal) == 5


def test_retraining_averages_every_round_and_numbers_it():
    asked = []

    def ask(question):
        asked.append((question.action, question.to, question.config["round"]))
        start = question.arrays["w"]
        # Two clients step by 1 and by 4 with weights 2 and 1: the mean steps by 2.
        return [
            Answer("a", {"w": start + 1}, num_examples=2),
            Answer("b", {"w": start + 4}, num_examples=1),
        ]

    model = carry_out(retrain({"w": torch.zeros(1)}, ("a", "b"), 3, first_round=5), ask)
    assert model["w"].tolist() == [6.0]
    assert asked == [("train", ("a", "b"), n) for n in (5, 6, 7)]


def test_retraining_for_no_rounds_is_the_identity_and_without_clients_an_error():
    start = {"w": torch.zeros(1)}
    assert carry_out(retrain(start, ("a",), 0), lambda ask: []) is start
    with pytest.raises(SecateurError, match="nobody is left"):
        carry_out(retrain(start, (), 1), lambda ask: [])
