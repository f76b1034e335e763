"""On real Ray: every client action once, with the answers that one process gives."""

import pytest

from simulation.engines import ray
from simulation.engines.inprocess import InProcessGrid
from strategies.directory import wait_for_nodes
from tests.client.every_action import CASES, CLIENTS, Asked, assert_same, lacking, parts

pytestmark = pytest.mark.ray


def test_every_action_is_answered_on_ray_as_in_one_process_bit_for_bit(tmp_path):
    assert not lacking()
    asked, found = Asked(tmp_path / "ray"), {}

    def play(grid):
        wait_for_nodes(grid, CLIENTS, patience_s=60)
        found.update(asked.all_replies(grid))

    ray.run(play, asked.app, CLIENTS)
    alone = Asked(tmp_path / "alone")
    expected = alone.all_replies(InProcessGrid(alone.app, CLIENTS))
    assert len(expected) == (2 + len(CASES)) * CLIENTS
    assert_same(found, expected)
    moved = {case for (case, _), reply in expected.items() if alone.is_moved(parts(reply)[0])}
    assert moved == {case for case, _ in expected} - {"forget"}  # which answers with a number
    assert all(parts(expected["forget", client])[1]["rows"] for client in range(CLIENTS))
