"""Client actions side by side in threads: the bits of one after another, and errors of one's own."""

import threading

import pytest
import torch

from client.app import honest_job
from client.forgetting.steps import LEARNING, STEPS
from simulation.engines.inprocess import InProcessGrid
from simulation.engines.training import Training
from tests.client.every_action import CASES, Asked, assert_same, parts

CLIENTS = 4


def grid_for(folder, workers=None):
    """Return what is asked and a grid with so many threads, or one without any."""
    asked = Asked(folder, clients=CLIENTS)

    def job_of(message, context):
        return honest_job(message, context, asked.options)

    grid = InProcessGrid(asked.app, CLIENTS, job_of=job_of if workers else None)
    grid._training = Training(workers or 1)
    return asked, grid


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    asked, grid = grid_for(tmp_path_factory.mktemp("alone"))
    return asked.all_replies(grid)


def steps_of(replies):
    """Return the answers to steps; rounds of FFMU together are equal up to rounding only."""
    return {key: r for key, r in replies.items() if type(CASES.get(key[0])) in STEPS}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_threads_gives_the_bits_of_one_after_another(workers, one_by_one, tmp_path):
    asked, grid = grid_for(tmp_path, workers)
    seen, answer = set(), grid._answer

    def watched(message):
        seen.add((message.metadata.message_type, threading.current_thread().name))
        return answer(message)

    grid._answer = watched
    before = torch.random.get_rng_state()
    found = asked.all_replies(grid)
    assert torch.equal(before, torch.random.get_rng_state())
    assert_same(steps_of(found), steps_of(one_by_one))
    main = threading.current_thread().name
    elsewhere = {action for action, name in seen if name != main}
    assert elsewhere == ({k.action for k in STEPS if k not in LEARNING} if workers > 1 else set())
    assert ("query.forget", main) in seen  # what waits for the disk, and writes to it


def test_what_one_client_cannot_do_is_its_own_error(one_by_one, tmp_path):
    asked, grid = grid_for(tmp_path, 2)
    nodes = list(grid.get_node_ids())
    for _, sent in asked.rounds(nodes):
        list(grid.send_and_receive(sent))
    grid.contexts[nodes[2]].node_config["batch-log"] = "nonsense"
    assert grid._training.used_threads
    for case in ("ascent", "noisy", "fisher"):
        replies = list(grid.send_and_receive(asked.messages(case, nodes)))
        assert [reply.metadata.src_node_id for reply in replies] == nodes
        assert [reply.has_error() for reply in replies] == [False, False, True, False]
        assert "batch-log" in replies[2].error.reason
        for place in (0, 1, 3):
            tensors, metrics = parts(replies[place])
            expected, told = parts(one_by_one[case, place])
            assert metrics == told
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_two_messages_to_one_client_are_answered_one_after_the_other(tmp_path, monkeypatch):
    asked, grid = grid_for(tmp_path, 2)
    nodes = list(grid.get_node_ids())
    for _, sent in asked.rounds(nodes):
        list(grid.send_and_receive(sent))
    assert grid._training.used_threads
    monkeypatch.setattr(grid._training, "in_threads", None)
    twice = [*asked.messages("fisher", nodes), *asked.messages("fisher", nodes[:1])]
    assert not any(reply.has_error() for reply in grid.send_and_receive(twice))
