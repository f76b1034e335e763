"""Exact forgetting through the wrapper against the closed form of training without a client."""

import pytest
import torch

from strategies import messages
from strategies.forgetting import needs_of
from strategies.memory import Memory
from tests.strategies.small import GONE, client, everything, federation, play
from tests.unlearning.quadratics import closed_form, regression
from unlearning.catalogue import SERVER, Target
from unlearning.routing import Request


def regressions(truth):
    """Seven clients' examples; those to be forgotten pull elsewhere."""
    return [regression(n, 6 + n, -5 * truth if client(n) in GONE else truth) for n in range(7)]


def stepping(clients, joins=()):
    """Answers of these clients, in float64, from the round on in which each joins."""

    def reply(partition, number, model):
        if number < dict(joins).get(partition, 1):
            raise RuntimeError("not yet here")
        one = clients[partition]
        return messages.train_reply({"w": one.step(model["w"])}, {"loss": 1.0}, one.size)

    return reply


def forgotten(name, clients, start, before, grid, joins=()):
    """Train, forget two of seven, and return record and model of that round, and the one before."""
    wrapped = federation(
        name, others=everything(), memory=Memory(needs_of(everything())), quorum=0.4
    )
    records, models = play(wrapped, grid(stepping(clients, joins), 7), before, model={"w": start})
    assert not any(record.capped for record in records)  # the weights are the sizes
    exact = SERVER[name].guarantee == "exact"
    wrapped.request(
        Request(
            Target.CLIENT,
            GONE,
            "privacy",
            guarantee="exact" if exact else "approximate",
            method=name,
        )
    )
    records, after = play(
        wrapped, grid(stepping(clients, joins), 7), before, played=before, model=models[-1]
    )
    return records[0].unlearning, after[0]["w"], models[-1]["w"]


@pytest.mark.parametrize(
    ("name", "joins", "origin"),
    [
        ("retrain", {}, 0),
        ("rollback", {}, 0),
        ("retrain", {3: 4, 4: 3}, 0),
        ("rollback", {3: 4, 4: 3}, 2),
    ],
)
def test_exact_forgetting_ends_where_training_without_them_does(name, joins, origin, scripted_grid):
    truth = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    start = torch.tensor([4.0, 3.0, -5.0], dtype=torch.float64)
    clients = regressions(truth)
    record, found, original = forgotten(name, clients, start, 5, scripted_grid, joins.items())
    assert record.settings == {"rounds": 6 - origin, "from_round": origin}
    retained = [one for n, one in enumerate(clients) if client(n) not in GONE]
    # Numbers below 16 in float64, of which a round rounds off some 1e-15.
    expected = closed_form(retained, 6, start)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if not joins:
        everybody = closed_form(clients, 5, start)
        torch.testing.assert_close(original, everybody, rtol=0, atol=1e-12)
    for elsewhere in (original, closed_form(clients, 6, start), closed_form(retained, 5, start)):
        assert float((elsewhere - expected).norm()) > 0.1


def test_fedrecover_ends_there_too_where_it_knows_all_curvature(scripted_grid):
    # In one dimension, where one pair of differences is all there is to know.
    truth = torch.tensor([2.0], dtype=torch.float64)
    start = torch.tensor([-6.0], dtype=torch.float64)
    clients = regressions(truth)
    record, found, original = forgotten("fedrecover", clients, start, 12, scripted_grid)
    assert record.rounds_asked < 13
    retained = [one for n, one in enumerate(clients) if client(n) not in GONE]
    expected = closed_form(retained, 13, start)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert float((original - expected).norm()) > 0.1
