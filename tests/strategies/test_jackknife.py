"""The infinitesimal jackknife in a federation: against one data set, and against liars."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from strategies.actions import Curvature, Selection, joined
from strategies.methods.interface import UNKNOWN, Network
from strategies.methods.jackknife import Jackknife
from strategies.methods.survey import StatisticsError
from tests.strategies.canned import run, situation, waiting
from tests.strategies.small import client, forward
from unlearning import fisher, jackknife
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import trained_names
from unlearning.plan import Answer
from unlearning.sums import Statistics, added

DRAW = torch.Generator().manual_seed(4)
MODEL = {
    "first.weight": torch.randn(4, 3, generator=DRAW),
    "first.bias": torch.randn(4, generator=DRAW),
    "norm.num_batches_tracked": torch.tensor(3),
    "last.weight": torch.randn(2, 4, generator=DRAW),
    "last.bias": torch.randn(2, generator=DRAW),
}
INPUTS = torch.randn(150, 3, generator=DRAW)
LABELS = (torch.rand(150, generator=DRAW) < 0.5).long()
KNOWN = Network(classes=2)
SAMPLES = Selection(forget="samples", forget_tokens="0" * 32)


def parts(scope, held, gone):
    """Sums of a client with rows ``held``, of which the first ``gone`` are to be forgotten."""
    inputs, labels = INPUTS[held], LABELS[held]
    if scope == "last":
        return (
            jackknife.hessian_statistics(MODEL, forward, inputs, "last"),
            jackknife.gradient_statistics(MODEL, forward, inputs[:gone], labels[:gone], "last"),
        )
    loss = functional.cross_entropy
    return (
        fisher.fisher_statistics(MODEL, forward, loss, inputs, labels),
        jackknife.slope_statistics(MODEL, forward, loss, inputs[:gone], labels[:gone]),
    )


def answering(scope, gone=(2, 0, 0), lie=lambda who, sums: sums):
    """Three clients with 50 rows each."""

    def reply(who, question):
        n = int(who[-1])
        assert question.config["scope"] == scope
        forgets = gone[n] if question.config["forget"] != "none" else 0
        rows = list(range(50 * n, 50 * n + 50))
        hessian, gradient = lie(who, parts(scope, rows, forgets))
        return Answer(
            who,
            joined(hessian=hessian.sums, gradient=gradient.sums),
            {"hessian-count": hessian.count, "gradient-count": gradient.count},
            50,
        )

    return reply


def of(number, change):
    """Let one client send something else."""
    return lambda who, sums: change(*sums) if who == client(number) else sums


def scaled(part, factor, count=None):
    return Statistics(
        {name: factor * tensor for name, tensor in part.sums.items()},
        part.count if count is None else count,
    )


def corrected(scope, gone=(2, 0, 0), clients=(0, 1, 2)):
    """What one data set would give."""
    every = [parts(scope, list(range(50 * n, 50 * n + 50)), gone[n]) for n in clients]
    hessian, gradient = (added(column) for column in zip(*every, strict=True))
    if scope == "diag":
        return jackknife.corrected_diagonally(MODEL, gradient, hessian)
    return jackknife.corrected(MODEL, "last", hessian, gradient)


def ij(**settings):
    return Jackknife(**{"network": KNOWN, **settings})


def there(selection=SAMPLES, holders=(0,), **more):
    return situation(waiting(holders, selection, method="ij"), start=MODEL, **more)


@pytest.mark.parametrize("scope", ["last", "diag"])
def test_a_correction_is_that_of_one_data_set(scope):
    found, asked = run(ij(scope=scope).plan(there()), answering(scope))
    expected = corrected(scope)
    for name, tensor in expected.items():
        torch.testing.assert_close(found.model[name], tensor, rtol=1e-5, atol=1e-7)
    told = [(question.action, question.to, question.config["forget"]) for question in asked]
    assert told == [(Curvature.action, (client(1), client(2)), "none"),
                    (Curvature.action, (client(0),), "samples")]  # fmt: skip
    assert (found.settings["rows"], found.settings["of"]) == (2, 150)
    assert found.settings["scope"] == scope
    moved = {n for n in expected if not torch.equal(found.model[n], MODEL[n])}
    last = {"last.weight", "last.bias"}
    assert moved == (set(trained_names(MODEL)) if scope == "diag" else last)


def test_by_itself_a_layer_too_large_or_none_is_corrected_by_the_diagonal():
    # 2 * (2,000 + 1) unknowns are over 4,000.
    large = {"last.weight": torch.zeros(2, 2000), "last.bias": torch.zeros(2)}
    for start in (large, {"norm.weight": torch.ones(3)}):
        waits = situation(waiting((0,), SAMPLES), start=start)
        with pytest.raises(MissingNeedError, match=r"linear layer|set the scope to diag"):
            run(ij(scope="last").plan(waits), lambda who, question: None)
        question = next(ij().plan(waits))
        assert question.config["scope"] == "diag"
        assert set(question.expects) == {f"{g}/{n}" for g in ("hessian", "gradient") for n in start}
    assert next(ij().plan(there())).config["scope"] == "last"


def test_what_training_does_not_move_stays_and_the_last_layer_goes_whole():
    frozen = "last.bias"
    network = Network(classes=2, trained=frozenset(trained_names(MODEL)) - {frozen})

    def without(who, sums):
        return [
            Statistics({n: t for n, t in part.sums.items() if n != frozen}, part.count)
            for part in sums
        ]

    found, _ = run(ij(network=network).plan(there()), answering("diag", lie=without))
    expected = {**corrected("diag"), frozen: MODEL[frozen]}  # the diagonal couples no two entries
    for name, tensor in expected.items():
        torch.testing.assert_close(found.model[name], tensor, rtol=1e-5, atol=1e-7)
    assert torch.equal(found.model[frozen], MODEL[frozen])
    assert found.model.keys() == MODEL.keys()
    size = torch.cat([MODEL[name].flatten() for name in network.trained]).norm()
    moved = torch.cat([(found.model[n] - MODEL[n]).flatten() for n in network.trained]).norm()
    assert found.settings["length"] == round(float(moved / size), 4)
    with pytest.raises(MissingNeedError, match=r"training does not move last\.bias; set the scope"):
        next(ij(scope="last", network=network).plan(there()))
    early = Network(classes=2, trained=frozenset(trained_names(MODEL)) - {"first.weight"})
    assert next(ij(network=early).plan(there())).config["scope"] == "last"


def test_without_classes_there_is_the_diagonal_alone():
    assert next(ij(network=UNKNOWN).plan(there())).config["scope"] == "diag"
    with pytest.raises(MissingNeedError, match=r"a task with classes.*; set ij\.scope=diag$"):
        next(ij(scope="last", network=UNKNOWN).plan(there()))


IMPOSSIBLE = {
    "not symmetric": of(1, lambda h, g: (dataclasses.replace(h, sums={
        "last": h.sums["last"] + torch.ones(10, 10).triu(1)}), g)),
    "of negative eigenvalues": of(1, lambda h, g: (scaled(h, -1), g)),
    "of rows to forget that it was asked nothing of": of(
        1, lambda h, g: (h, Statistics({"last": torch.ones(10).double()}, 1))),
    "over more rows than it dropped": of(1, lambda h, g: (h, scaled(g, 1, 3))),
}  # fmt: skip


@pytest.mark.parametrize("lie", IMPOSSIBLE)
def test_what_no_data_could_give_is_left_out(lie):
    holders = (0, 1) if "dropped" in lie else (0,)
    waits = there(holders=holders)
    waits.dropped.update(dict.fromkeys(map(client, holders), 2))
    gone = (2, 2, 0) if len(holders) > 1 else (2, 0, 0)
    found, _ = run(ij().plan(waits), answering("last", gone, IMPOSSIBLE[lie]))
    expected = corrected("last", gone, clients=(0, 2))
    for name, tensor in expected.items():
        torch.testing.assert_close(found.model[name], tensor, rtol=1e-5, atol=1e-7)
    assert "is without client-0001: no usable statistics" in "".join(found.warnings)


def test_negative_squares_are_left_out_of_the_diagonal():
    found, _ = run(ij(scope="diag").plan(there()),
                   answering("diag", lie=of(1, lambda h, g: (scaled(h, -1), g))))  # fmt: skip
    for name, tensor in corrected("diag", clients=(0, 2)).items():
        torch.testing.assert_close(found.model[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [10**9, 500])
def test_a_hessian_weighs_no_more_than_its_clients_rows(count):
    # The same average of 50 rows, claimed of more, changes nothing.
    def more(h, g):
        return scaled(h, count / h.count, count), g

    found, _ = run(ij().plan(there()), answering("last", lie=of(2, more)))
    assert found.settings["of"] == 150
    for name, tensor in corrected("last").items():
        torch.testing.assert_close(found.model[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_gradient_far_longer_than_others_is_shortened():
    gone = (2, 2, 2)
    waits = there(holders=(0, 1, 2))
    lie = of(2, lambda h, g: (h, scaled(g, 1e9)))
    found, _ = run(ij(longest=1e9).plan(waits), answering("last", gone, lie))
    truth = {n: parts("last", list(range(50 * n, 50 * n + 50)), 2) for n in range(3)}
    liar = truth[2][1].sums["last"]
    # Of two honest lengths and a longer one the median is the longer honest one.
    honest = max(float(truth[n][1].sums["last"].norm()) for n in (0, 1))
    sums = truth[0][1].sums["last"] + truth[1][1].sums["last"]
    gradient = Statistics({"last": sums + liar / liar.norm() * 10 * honest}, 6)
    expected = jackknife.corrected(
        MODEL, "last", added([h for h, _ in truth.values()]), gradient
    )  # fmt: skip
    torch.testing.assert_close(found.model["last.weight"], expected["last.weight"])
    assert found.settings["clipped"] > 0.99


def test_a_correction_far_longer_than_what_it_corrects_is_refused():
    lie = of(0, lambda h, g: (h, scaled(g, 1e6)))
    with pytest.raises(ParametersError, match=r"more than 2 times what it corrects.*retrain"):
        run(ij().plan(there()), answering("last", lie=lie))
    # One holder alone cannot be held against others, and the record says so.
    found, _ = run(ij().plan(there()), answering("last"))
    assert (
        "unclipped: too few clients to compare, and what they sent was believed: gradient of 1"
        in (found.warnings)
    )
    length = torch.cat(
        [(found.model[n] - MODEL[n]).flatten() for n in ("last.weight", "last.bias")]
    )
    size = torch.cat([MODEL[n].flatten() for n in ("last.weight", "last.bias")])
    assert found.settings["length"] == round(float(length.norm() / size.norm()), 4)


def test_without_half_of_the_clients_or_the_holder_nothing_is_corrected():
    silent = answering("last")
    with pytest.raises(StatisticsError, match="somebody who holds"):
        run(ij().plan(there()),
            lambda who, question: None if who == client(0) else silent(who, question))  # fmt: skip
    with pytest.raises(StatisticsError, match="2 of 3 clients, and 1 sent some"):
        run(ij().plan(there()),
            lambda who, question: silent(who, question) if who == client(0) else None)  # fmt: skip
