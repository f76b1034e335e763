"""Averaging replies as they come: FedAvg's own result, and the screen's own decisions."""

import math
import weakref

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    QFedAvg,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import averaging, flower, messages
from strategies.averaging import average, needs_mean_only, plain_mean
from strategies.exchange import Reply
from strategies.screen import Screen
from unlearning.errors import SecateurError
from unlearning.parameters import weighted_mean

PREVIOUS = {"layer.weight": torch.zeros(3, 2), "norm.count": torch.tensor(5)}


def models(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(count, 3, 2, generator=draw),
        "norm.count": torch.randint(5, 9, (count,), generator=draw),
    }


def name(number):
    return f"client-{number:04d}"


def reply(number, model, weight, row=None, metrics=None):
    content = messages.train_reply(model, metrics or {"loss": 1.0 + number}, weight, row)
    return Reply(name(number), number, Message(content, number, "train"))


def replies_of(stack, weights, chunk):
    """Rows of stacks of ``chunk`` clients each; ``chunk`` 0 for a model of its own each."""
    for number, weight in enumerate(weights):
        if chunk:
            first = number // chunk * chunk
            part = CHUNKS.setdefault(
                (id(stack), first), {k: t[first : first + chunk] for k, t in stack.items()}
            )
            yield reply(number, part, weight, number - first)
        else:
            yield reply(number, {k: t[number] for k, t in stack.items()}, weight)


CHUNKS: dict = {}


def row(stack, number):
    return {key: tensor[number] for key, tensor in stack.items()}


@pytest.mark.parametrize("long_row", [1, averaging.LONG_ROW])
@pytest.mark.parametrize("chunk", [0, 1, 3, 7])
@pytest.mark.parametrize("screen", [None, Screen()])
def test_the_mean_is_fedavgs_up_to_rounding(chunk, screen, long_row, monkeypatch):
    monkeypatch.setattr(averaging, "LONG_ROW", long_row)
    stack, weights = models(7), [10, 12, 10, 11, 10, 12, 10]
    found = average(replies_of(stack, weights, chunk), PREVIOUS, screen)
    parts = [Message(messages.train_reply(row(stack, n), {"loss": 1.0 + n}, w), n, "train")
             for n, w in enumerate(weights)]  # fmt: skip
    arrays, metrics = FedAvg().aggregate_train(1, parts)
    expected = messages.parameters_from(arrays)
    assert found.mean is not None
    assert found.mean.of == tuple(name(n) for n in range(7))
    assert found.mean.num_examples == sum(weights)
    torch.testing.assert_close(
        found.mean.arrays["layer.weight"], expected["layer.weight"], rtol=1e-6, atol=1e-7
    )
    # FedAvg leaves the mean of counters as float64; they are rounded to what they were.
    assert found.mean.arrays["norm.count"].dtype == torch.int64
    assert int(found.mean.arrays["norm.count"]) == round(float(expected["norm.count"]))
    assert found.mean.metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-12)
    assert [a.client for a in found.screened.answers] == [name(n) for n in range(7)]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 99),
    weights=st.lists(st.sampled_from([0, 1, 5, 10, 21, 10**6]), min_size=1, max_size=9),
    scales=st.lists(st.sampled_from([0.0, 1.0, 1.5, 45.0, 1e9, math.nan]), min_size=9, max_size=9),
    odd=st.sets(st.integers(0, 8), max_size=3),
    chunk=st.sampled_from([0, 2, 4]),
)
def test_whatever_comes_is_treated_as_the_screen_treats_it(seed, weights, scales, odd, chunk):
    CHUNKS.clear()
    stack = models(len(weights), seed)
    stack["layer.weight"] *= torch.tensor(scales[: len(weights)]).reshape(-1, 1, 1)
    arriving = [
        r if n not in odd else reply(n, row(stack, n), weights[n], metrics={"other": 1.0})
        for n, r in enumerate(replies_of(stack, weights, chunk))
    ]
    screen = Screen()
    expected = screen.check(arriving, PREVIOUS)
    found = average(iter(arriving), PREVIOUS, screen)
    together = {c for c, why in found.screened.rejected.items() if "in the same sum" in why}
    assert {c: w for c, w in found.screened.rejected.items() if c not in together} == dict(
        expected.rejected
    )
    assert found.screened.faults == expected.faults
    kept = [a for a in expected.answers if a.client not in together]
    if not together:
        assert found.screened.capped == expected.capped
        assert [(a.client, a.num_examples) for a in found.screened.answers] == [
            (a.client, a.num_examples) for a in expected.answers
        ]
    if not kept:
        assert found.mean is None
        return
    capped, _ = screen.cap(kept)
    mean = weighted_mean([a.arrays for a in kept], [float(a.num_examples) for a in capped])
    if not together:
        torch.testing.assert_close(
            found.mean.arrays["layer.weight"], mean["layer.weight"], rtol=1e-5, atol=1e-6
        )


def test_a_norm_that_is_rejected_takes_those_of_its_octave_along_and_says_so():
    # Norms: five of 1, one of 17, one of 31. The median is 1 and the limit 20, and 17 and 31 are
    # both in [16, 32): their sum cannot be told apart.
    stack = {"w": torch.tensor([[1.0]] * 5 + [[17.0], [31.0]])}
    part = [reply(n, stack, 10, n) for n in range(7)]
    found = average(part, {"w": torch.zeros(1)}, Screen())
    assert set(found.screened.rejected) == {name(5), name(6)}
    assert "times the round's median" in found.screened.rejected[name(6)]
    assert "in the same sum" in found.screened.rejected[name(5)]
    assert found.screened.faults == {name(6)}  # the other did nothing wrong
    assert found.mean.arrays["w"].tolist() == [1.0]


def test_a_norm_without_end_spoils_no_honest_clients_sum():
    # 1e200 squared is beyond float64; the honest norms lie in the octave of 0.5 to 1.
    stack = {"w": torch.tensor([[0.6], [0.7], [0.8], [0.9], [1e200]], dtype=torch.float64)}
    part = [reply(n, stack, 10, n) for n in range(5)]
    found = average(part, {"w": torch.zeros(1, dtype=torch.float64)}, Screen())
    assert set(found.screened.rejected) == {name(4)}
    assert float(found.mean.arrays["w"]) == pytest.approx(0.75)


def test_tensors_without_dimensions_are_averaged_too():
    stack = {"heat": torch.tensor([1.0, 3.0, math.nan]), "w": torch.zeros(3, 2)}
    schema = {"heat": torch.tensor(0.0), "w": torch.zeros(2)}
    found = average([reply(n, stack, 10, n) for n in range(3)], schema, Screen())
    assert found.screened.rejected == {name(2): "tensor heat holds NaN or Inf"}
    assert float(found.mean.arrays["heat"]) == 2.0


def test_unscreened_replies_that_do_not_fit_end_the_round_with_a_reason():
    part = [reply(n, {"v": torch.zeros(2, 1)}, 10, n) for n in range(2)]
    with pytest.raises(SecateurError, match="client-0000 cannot be averaged: missing tensors w"):
        average(part, {"w": torch.zeros(1)}, None)


def test_errors_and_silence_are_told_and_the_rest_counts():
    stack = {"w": torch.ones(3, 1)}
    asked = flower.with_id(Message(RecordDict(), 4, "train"))
    arriving = [
        *(reply(n, stack, 10, n) for n in range(3)),
        Reply(name(3), 3, None),
        Reply(name(4), 4, flower.error_reply(asked, ValueError("oops"))),
    ]
    found = average(arriving, {"w": torch.zeros(1)}, Screen())
    assert found.screened.rejected[name(3)] == "no reply before the deadline"
    assert "oops" in found.screened.rejected[name(4)]
    assert found.screened.faults == frozenset()
    assert found.mean.arrays["w"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda s: s.update(extra=torch.zeros(3)), "unknown tensors extra"),
        (lambda s: s.pop("w") is None, "missing tensors w"),
        (lambda s: s.update(w=torch.zeros(3, 2)), r"tensor w has shape (2,), expected (1,)"),
        (lambda s: s.update(w=torch.zeros(3, 1).double()), "tensor w has dtype float64"),
    ],
)
def test_a_stack_that_does_not_fit_is_refused_for_every_client(spoil, reason):
    stack = {"w": torch.zeros(3, 1), "b": torch.zeros(3, 1)}
    spoil(stack)
    schema = {"w": torch.zeros(1), "b": torch.zeros(1)}
    found = average([reply(n, stack, 10, n) for n in range(3)], schema, Screen())
    assert all(reason in found.screened.rejected[name(n)] for n in range(3))
    assert len(found.screened.faults) == 3
    assert found.mean is None


def test_nothing_is_held_but_the_stack_at_hand():
    held = []

    def arriving():
        for number in range(20):
            stack = {"w": torch.full((2, 1), float(number))}
            held.append(weakref.ref(stack["w"]))
            yield reply(2 * number, stack, 10, 0)
            yield reply(2 * number + 1, stack, 10, 1)
            del stack
            assert sum(ref() is not None for ref in held) <= 3

    found = average(arriving(), {"w": torch.zeros(1)}, None)
    assert float(found.mean.arrays["w"]) == 9.5  # mean of 0 to 19
    assert len(found.mean.of) == 40


class Mine(FedAvg):
    pass


def test_only_strategies_known_to_need_no_more_get_a_mean():
    for kind in (FedAvg, FedAvgM, FedAdam, FedAdagrad, FedYogi):
        assert needs_mean_only(kind())
    assert needs_mean_only(FedProx(proximal_mu=0.1))
    for kind in (FedMedian, FedTrimmedAvg, Krum, Mine):
        assert not needs_mean_only(kind())
    assert not needs_mean_only(QFedAvg(client_learning_rate=0.1))
    assert not needs_mean_only(FedAvg(weighted_by_key="mine"))
    assert not needs_mean_only(FedAvg(train_metrics_aggr_fn=lambda records, key: None))


@pytest.mark.parametrize(
    "make",
    [FedAvg, lambda: FedProx(proximal_mu=0.1), lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
     FedAdam, FedAdagrad, FedYogi],
)  # fmt: skip
def test_one_reply_with_the_mean_gives_such_a_strategy_the_same_model(make, scripted_grid):
    from strategies.loop import run_rounds
    from strategies.wrapper import Unlearning

    start = {"w": torch.tensor([1.0, -2.0])}

    def client(partition, number, model):
        moved = {k: v + 0.1 * (partition + 1) * number for k, v in model.items()}
        return messages.train_reply(moved, {"loss": 1.0 + partition}, 10 + partition)

    def play(one_by_one):
        grid = scripted_grid(client, 5)
        if one_by_one:
            send = grid.send_and_receive
            grid.send_and_receive = lambda m, timeout=None: iter(send(m, timeout=timeout))
        kept = []
        final = run_rounds(
            Unlearning(make(), seed=0), grid, start, rounds=4,
            on_round=lambda record, model: kept.append(record.metrics.get("loss")),
        )  # fmt: skip
        return final["w"], kept

    (mean, losses), (every, expected) = play(True), play(False)
    # FedAdam and its like make float64 of float32; the mean path holds them to the schema.
    torch.testing.assert_close(mean, every.to(mean.dtype), rtol=1e-5, atol=1e-6)
    assert losses[1:] == pytest.approx(expected[1:])


# ---------------------------------------------------------------- in the wrapper
def one_by_one(grid):
    send = grid.send_and_receive
    grid.send_and_receive = lambda m, timeout=None: iter(list(send(m, timeout=timeout)))
    return grid


def misbehaving(partition, number, model):
    """Client 0 sends NaN, 1 raises, 2 claims many examples; from round 3 on, 3 to 5 raise too."""
    if partition == 1 or (number >= 3 and partition >= 3):
        raise ValueError("oops")
    moved = {k: v + (math.nan if partition == 0 else 0.1 * partition) for k, v in model.items()}
    return messages.train_reply(moved, {"loss": 1.0}, 90 if partition == 2 else 10)


@pytest.mark.parametrize("quorum", [0.1, 0.5])
@pytest.mark.parametrize("make", [FedAvg, FedMedian])
def test_the_wrapper_notes_and_decides_the_same_as_replies_come(make, quorum, scripted_grid):
    from strategies.loop import run_rounds
    from strategies.wrapper import Unlearning

    def play(prepare):
        federation = Unlearning(make(), screen=Screen(), quorum=quorum, seed=0)
        records, models = [], []
        run_rounds(
            federation, prepare(scripted_grid(misbehaving, 6)), {"w": torch.ones(2)}, rounds=4,
            on_round=lambda record, model: (records.append(record), models.append(model)),
        )  # fmt: skip
        return (
            records,
            models,
            {c: vars(federation.roster.entry(c)) for c in federation.directory.clients()},
        )

    (records, models, roster), (expected, others, entries) = play(one_by_one), play(lambda g: g)
    for found, other in zip(records, expected, strict=True):
        for field in ("asked", "participants", "rejected", "capped", "note"):
            assert getattr(found, field) == getattr(other, field), field
    assert roster == entries
    for one, other in zip(models, others, strict=True):
        torch.testing.assert_close(one["w"], other["w"])
    # Round 1 counts with four of six usable; round 3, with one of six, never does at half.
    assert records[1].capped
    assert len(records[1].rejected) == 2
    assert bool(records[3].note) == (quorum == 0.5)


def test_plans_screen_what_they_average(scripted_grid):
    from flwr.app import ConfigRecord

    from strategies.wrapper import Unlearning
    from unlearning.plan import Ask, senders

    found = []
    for prepare in (one_by_one, lambda grid: grid):
        federation = Unlearning(FedAvg(), screen=Screen(), seed=0)
        grid = prepare(scripted_grid(misbehaving, 6))
        federation.directory.refresh(grid)
        carrier = federation.plan_rounds(grid, ConfigRecord())
        start = {"w": torch.ones(2)}
        ask = Ask("train", federation.directory.clients(), start, {"round": 1}, mean=True)
        answers = carrier.ask(ask)
        found.append((answers, carrier.aggregate(1, start, answers), dict(carrier.rejected)))
        below = carrier.ask(Ask("train", ask.to, start, {"round": 3}, mean=True))
        assert carrier.aggregate(3, start, below) is start  # below the quorum
    (merged, one, rejected), (answers, other, expected) = found
    assert len(merged) == 1
    assert senders(merged) == senders(answers)
    assert rejected == expected
    assert len(rejected) == 2
    torch.testing.assert_close(one["w"], other["w"])
    assert torch.isfinite(one["w"]).all()


@pytest.mark.parametrize("make", [FedAvg, lambda: FedProx(proximal_mu=0.1)])
@given(seed=st.integers(0, 999), weights=st.lists(st.integers(1, 999), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_a_plain_mean_is_fedavgs_bit_for_bit(make, seed, weights):
    stack = {
        "w": models(len(weights), seed)["layer.weight"],
        "heat": models(len(weights), seed)["layer.weight"][:, 0, 0],
    }
    replies = [
        Message(
            messages.train_reply(row(stack, n), {"loss": 0.1 + n / 3, "hits": n}, w), n, "train"
        )
        for n, w in enumerate(weights)
    ]
    strategy = make()
    arrays, metrics = strategy.aggregate_train(1, list(replies))
    mean, told = plain_mean(strategy, replies)
    expected = messages.parameters_from(arrays)
    assert mean.keys() == expected.keys()
    assert all(torch.equal(mean[key], expected[key]) for key in mean)
    assert dict(told) == dict(metrics)


def test_what_is_no_plain_mean_is_left_to_the_strategy():
    def sent(model, **more):
        return Message(messages.train_reply(model, {"loss": 1.0, **more}, 10), 1, "train")

    one = sent({"w": torch.ones(2)})
    assert plain_mean(FedAvg(), [one]) is not None
    for strategy in (FedMedian(), FedAdam(), Mine(), FedAvg(weighted_by_key="mine")):
        assert plain_mean(strategy, [one]) is None
    for other in (
        sent({"w": torch.ones(3)}), sent({"v": torch.ones(2)}), sent({"w": torch.ones(2)}, more=1.0),
        sent({"w": torch.ones(2)}, more=[1.0]), Message(RecordDict(), 1, "train"),
    ):  # fmt: skip
        assert plain_mean(FedAvg(), [one, other]) is None
    assert plain_mean(FedAvg(), [sent({"n": torch.tensor(1)})]) is None
    assert plain_mean(FedAvg(), []) is None
