"""A plan's asks over a Grid: who is asked, which rounds count, and what is counted."""

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg

from strategies.directory import by_partition
from strategies.rounds import replies_needed
from strategies.screen import Screen
from strategies.wrapper import Unlearning
from tests.strategies.small import MODEL, client, learning
from unlearning.plan import Ask, senders

SIZE = sum(t.nelement() * t.element_size() for t in MODEL.values())
FIVE = tuple(client(n) for n in range(5))


def answering(grid, partitions, *, one_by_one=False):
    """Let the replies of these clients through, and no other."""
    send = grid.send_and_receive
    nodes = list(grid.get_node_ids())
    kept = {nodes[partition] for partition in partitions}

    def reached(outgoing, *, timeout=None):
        sent = list(outgoing)
        replies = send(sent, timeout=timeout)
        if sent[0].metadata.message_type.startswith("query"):
            return replies
        node_of = {m.metadata.message_id: m.metadata.dst_node_id for m in sent}
        arrived = [m for m in replies if node_of[m.metadata.reply_to_message_id] in kept]
        return iter(arrived) if one_by_one else arrived

    grid.send_and_receive = reached
    return grid


def carrier(grid, quorum=0.5, **more):
    wrapped = Unlearning(
        FedAvg(**more),
        screen=Screen(),
        identify=by_partition,
        quorum=quorum,
        seed=0,
        deadline_s=1.0,
    )
    wrapped.directory.refresh(grid)
    return wrapped.plan_rounds(grid, ConfigRecord())


@pytest.mark.parametrize(
    ("quorum", "asked", "needed"),
    [
        (0.0, 5, 1),
        (0.2, 5, 1),
        (0.21, 5, 2),
        (0.5, 5, 3),
        (0.5, 4, 2),
        (1.0, 5, 5),
        (1.0, 0, 1),
        # Shares that floating point puts a little over a whole number.
        (0.07, 100, 7),
        (0.55, 20, 11),
    ],
)
def test_a_round_needs_a_share_of_those_asked_and_one_at_least(quorum, asked, needed):
    assert replies_needed(quorum, asked) == needed


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize(("quorum", "needed"), [(0.0, 1), (0.4, 2), (0.5, 3), (1.0, 5)])
def test_a_round_of_training_counts_from_the_quorum_on(
    quorum, needed, one_by_one, mean, scripted_grid
):
    for count in (needed - 1, needed):
        grid = answering(scripted_grid(learning(), 5), range(count), one_by_one=one_by_one)
        rounds = carrier(grid, quorum)
        answers = rounds.ask(Ask("train", FIVE, MODEL, {"round": 1}, mean=mean))
        there = FIVE[:count] if count >= needed else ()
        assert senders(answers) == there
        assert len(answers) == (1 if one_by_one and mean and there else len(there))
        # Who trained in a round that does not count has no part in the model.
        assert rounds.answered == {*there}
        assert list(rounds.rejected) == [*FIVE[count:]]
        assert rounds.asks == 1
        assert rounds.bytes_sent == SIZE * (5 + count)  # what came was sent, used or not
        model = rounds.aggregate(1, MODEL, answers)
        assert (model is MODEL) == (not there)


def test_other_actions_count_whoever_answers(scripted_grid):
    rounds = carrier(answering(scripted_grid(learning(), 5, {4: 0.25}), [4]), quorum=1.0)
    answers = rounds.ask(Ask("evaluate", FIVE, MODEL, {"round": 1}))
    assert [(a.client, a.metrics["accuracy"]) for a in answers] == [(client(4), 0.25)]
    assert rounds.answered == set()
    assert (rounds.asks, rounds.bytes_sent) == (1, 5 * SIZE)  # no model comes back
    rounds.ask(Ask("query.identity", FIVE[:2]))
    assert (rounds.asks, rounds.bytes_sent) == (2, 5 * SIZE)


def test_rounds_add_up(scripted_grid):
    asked = []
    rounds = carrier(answering(scripted_grid(learning(asked), 5), range(4)))
    first = rounds.ask(Ask("train", FIVE[:2], MODEL, {"round": 1}))
    second = rounds.ask(Ask("train", FIVE[2:], MODEL, {"round": 2}))
    assert asked == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]
    assert [*senders(first), *senders(second)] == [*FIVE[:4]]
    assert rounds.answered == {*FIVE[:4]}
    assert list(rounds.rejected) == [FIVE[4]]  # of the last ask alone
    assert (rounds.asks, rounds.bytes_sent) == (2, SIZE * (2 + 2 + 3 + 2))


def test_plans_that_are_content_with_a_mean_sample_as_the_strategy_does(scripted_grid):
    for mean, count in ((True, 2), (False, 5)):
        asked = []
        grid = scripted_grid(learning(asked), 5)
        rounds = carrier(grid, fraction_train=0.4, min_train_nodes=2, min_available_nodes=2)
        answers = rounds.ask(Ask("train", FIVE, MODEL, {"round": 1}, mean=mean))
        assert len(asked) == len(answers) == count
        again = carrier(grid, fraction_train=0.4, min_train_nodes=2, min_available_nodes=2)
        assert senders(again.ask(Ask("train", FIVE, MODEL, {"round": 1}, mean=mean))) == senders(
            answers
        )
        for answer in answers:
            assert not torch.equal(answer.arrays["first.weight"], MODEL["first.weight"])
