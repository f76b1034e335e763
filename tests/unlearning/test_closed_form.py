"""Plans against the closed form of training without a client, on linear regression."""

import pytest
import torch

from tests.unlearning.quadratics import RATE, Regression, closed_form, regression, shaped
from unlearning.federaser import federaser
from unlearning.fedrecover import Schedule, fedrecover
from unlearning.history import MemoryHistory, Past
from unlearning.parameters import weighted_mean
from unlearning.plan import Answer, carry_out
from unlearning.retraining import retrain

TRUTH = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
START = torch.tensor([4.0, 3.0, -5.0], dtype=torch.float64)
CLIENTS = {name: regression(seed, 5 + 3 * seed, TRUTH) for seed, name in enumerate("abd")}
CLIENTS["c"] = regression(7, 12, -5 * TRUTH)
EXACT = {"rtol": 0, "atol": 1e-12}
"""Numbers below 16 in float64: a round rounds by some 1e-15, and eta H shrinks what was there."""


def carrier(clients, asked=None):
    def ask(question):
        if asked is not None:
            asked.append((question.config["round"], question.to))
        return [
            Answer(c, {"w": clients[c].step(question.arrays["w"])}, {}, clients[c].size)
            for c in question.to
        ]

    return ask


def kept(clients):
    return [clients[name] for name in sorted(clients) if name != "c"]


def record(clients, rounds, start, sent_by_c=None):
    """A recorded run among all clients, and its last model; c may send what it likes."""
    past, w = {}, start
    weights = {name: float(clients[name].size) for name in sorted(clients)}
    for number in range(1, rounds + 1):
        sent = {name: clients[name].step(w) for name in weights}
        if sent_by_c is not None:
            sent["c"] = sent_by_c(number, sent, weights)
        models = {name: {"w": tensor} for name, tensor in sent.items()}
        past[number] = Past({"w": w}, models, weights)
        w = weighted_mean(list(models.values()), list(weights.values()))["w"]
    return MemoryHistory(past), w


def far(one, other):
    return float((one - other).norm()) > 0.1


@pytest.mark.parametrize("rounds", [0, 1, 2, 7, 40])
def test_retraining_ends_where_training_without_the_client_does(rounds):
    expected = closed_form(kept(CLIENTS), rounds, START)
    asked = []
    found = carry_out(retrain({"w": START}, ("a", "b", "d"), rounds), carrier(CLIENTS, asked))
    torch.testing.assert_close(found["w"], expected, **EXACT)
    assert [number for number, _ in asked] == [*range(1, rounds + 1)]
    # The original run ends at the closed form of all clients, which is elsewhere.
    _, original = record(CLIENTS, rounds, START)
    everybody = closed_form(CLIENTS.values(), rounds, START)
    torch.testing.assert_close(original, everybody, **EXACT)
    assert far(everybody, expected) == (rounds > 0)


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_fedrecover_is_exact_in_one_dimension_where_any_pair_spans_the_space(pairs):
    truth, start = torch.tensor([2.0], dtype=torch.float64), START[:1]
    clients = {name: regression(seed, 6 + seed, truth) for seed, name in enumerate("abd")}
    clients["c"] = regression(8, 9, -5 * truth)
    history, original = record(clients, 15, start)
    asked = []
    found = carry_out(
        fedrecover(history, {"c"}, "abd", pairs=pairs, schedule=Schedule(2, 100, 0)),
        carrier(clients, asked),
    )
    expected = closed_form(kept(clients), 15, start)
    torch.testing.assert_close(found["w"], expected, rtol=0, atol=1e-9)
    assert far(original, expected)
    assert [number for number, _ in asked] == [1, 2]


def test_fedrecover_is_exact_once_its_pairs_span_the_space():
    # L-BFGS has H_k after steps that are conjugate, as steps along its eigenvectors are. The
    # retained clients share these, and client c steers the recorded run so that it is off the
    # retrained one by one of them in each of the rounds 2 to 4, and by anything later.
    draw = torch.Generator().manual_seed(5)
    axes = torch.linalg.qr(torch.randn(3, 3, generator=draw, dtype=torch.float64)).Q
    clients = {
        "a": shaped(1, 6, axes, [1.0, 2.0, 3.0], TRUTH),
        "b": shaped(2, 9, axes, [3.0, 2.5, 0.5], -TRUTH),
        "c": shaped(3, 6, axes, [1.0, 1.0, 1.0], TRUTH),
    }
    torch.testing.assert_close(clients["a"].hessian @ axes[:, 1], 2.0 * axes[:, 1], **EXACT)
    rounds = 12

    def steered(number, sent, weights):
        off = (
            2 * axes[:, number - 1]
            if number <= 3
            else 5 * torch.randn(3, generator=draw, dtype=torch.float64)
        )
        wanted = closed_form(kept(clients), number, START) - off
        others = sum(weights[name] * sent[name] for name in "ab")
        return (sum(weights.values()) * wanted - others) / weights["c"]

    history, original = record(clients, rounds, START, steered)
    expected = closed_form(kept(clients), rounds, START)
    ends = {}
    for pairs in (2, 3, 4):
        asked = []
        plan = fedrecover(
            history, {"c"}, "ab", pairs=pairs, schedule=Schedule(4, 100, 0), abnormal=0.0
        )
        ends[pairs] = carry_out(plan, carrier(clients, asked))["w"]
        assert [number for number, _ in asked][:4] == [1, 2, 3, 4]
        if pairs >= 3:
            assert len(asked) == 4
            torch.testing.assert_close(ends[pairs], expected, rtol=0, atol=1e-9)
    assert far(original, expected)
    assert float((ends[2] - expected).norm()) > 1e-3  # two pairs are not enough for three axes


@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_federaser_of_a_client_with_the_same_examples_is_retraining(rounds):
    # Every recorded update of a is then what it would be without c, and c_k = D_k.
    a = CLIENTS["a"]
    twin = Regression(torch.cat([a.inputs, a.inputs]), torch.cat([a.targets, a.targets]))
    clients = {"a": a, "c": twin}
    history, _ = record(clients, rounds, START)
    plan = federaser(history, {"c"}, "a", interval=1, ratio=1.0)
    found = carry_out(plan, carrier(clients))
    torch.testing.assert_close(found["w"], closed_form([a], rounds, START), **EXACT)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_federaser_takes_steps_of_recorded_length_towards_the_optimum_of_who_is_left(rounds):
    # H_a = h I: wherever on the way from w_0 to its optimum a is, it moves straight on, by
    # eta h |w*_a - w^(t-1)| as recorded in round t, with w^t the closed form of both clients.
    curvature = 0.7
    a = shaped(4, 8, torch.eye(3, dtype=torch.float64), [curvature] * 3, TRUTH)
    clients = {"a": a, "c": CLIENTS["c"]}
    history, original = record(clients, rounds, START)
    asked = []
    plan = federaser(history, {"c"}, "a", interval=1, ratio=1.0)
    found = carry_out(plan, carrier(clients, asked))["w"]
    lengths = [
        RATE * curvature * float((TRUTH - closed_form(clients.values(), t, START)).norm())
        for t in range(rounds)
    ]
    way = TRUTH - START
    assert sum(lengths) < float(way.norm())  # it does not overshoot
    torch.testing.assert_close(found, START + sum(lengths) * way / way.norm(), **EXACT)
    assert [number for number, _ in asked] == [*range(2, rounds + 1)]
    # In round 1 that is retraining; later on only the direction is.
    retrained = closed_form([a], rounds, START)
    assert torch.allclose(found, retrained, **EXACT) == (rounds == 1)
    assert far(original, found)
