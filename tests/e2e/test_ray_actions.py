"""On real Ray: every client action once, with the answers that one process gives."""

import pytest

from simulation.engines import ray
from simulation.engines.inprocess import InProcessGrid
from strategies.directory import wait_for_nodes
from tests.client.every_action import CASES, CLIENTS, MARKING, Asked, assert_same, lacking, parts

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("cases", [CASES, MARKING], ids=["logged", "marking"])
def test_every_action_is_answered_on_ray_as_in_one_process_bit_for_bit(tmp_path, cases):
    assert not lacking()
    asked, found = Asked(tmp_path / "ray", cases=cases), {}

    def play(grid):
        wait_for_nodes(grid, CLIENTS, patience_s=60)
        found.update(asked.all_replies(grid))

    ray.run(play, asked.app, CLIENTS)
    alone = Asked(tmp_path / "alone", cases=cases)
    expected = alone.all_replies(InProcessGrid(alone.app, CLIENTS))
    assert len(expected) == (2 + len(cases)) * CLIENTS
    assert_same(found, expected)
    moved = {case for (case, _), reply in expected.items() if alone.is_moved(parts(reply)[0])}
    numbers = {"forget", "batches", "marks"}  # which answer without a tensor
    assert moved == {case for case, _ in expected} - numbers
    told = {"forget": "rows", "batches": "rows", "marks": "markers"}
    for case in numbers & set(cases):
        assert all(parts(expected[case, client])[1][told[case]] for client in range(CLIENTS))
