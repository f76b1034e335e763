"""Replays of a history, FedEraser and FedRecover, against their definitions and retraining."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning.errors import MissingNeedError, SecateurError
from unlearning.federaser import calibrated, federaser
from unlearning.fedrecover import (
    Schedule,
    abnormality_threshold,
    credible,
    estimated,
    fedrecover,
    usual_schedule,
)
from unlearning.history import MemoryHistory, Past
from unlearning.parameters import difference, norm, weighted_mean
from unlearning.plan import Answer, carry_out
from unlearning.retraining import retrain

NEVER = Schedule(warm_up=10**6, every=1, final=0)
SHIFT = {"a": 1.0, "b": -2.0, "c": 4.0}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 3.0}


def vector(*values):
    return {"w": torch.tensor(values)}


def initial():
    return {
        "w": torch.tensor([[0.5, -1.0], [2.0, 0.0]]),
        "norm.running_mean": torch.tensor([0.0]),
        "norm.num_batches_tracked": torch.tensor(0),
    }


def client(name, *, rate=0.25):
    """Train on a quadratic whose curvature and optimum are the client's own."""

    def train(model, config):
        moved, shift = model["w"], SHIFT[name]
        for _ in range(config.get("local-epochs", 1)):
            moved = moved - rate * (0.3 + 0.1 * abs(shift)) * (moved - shift)
        return {
            "w": moved,
            "norm.running_mean": 0.5 * model["norm.running_mean"] + shift,
            "norm.num_batches_tracked": model["norm.num_batches_tracked"] + 2,
        }

    return train


CLIENTS = {name: client(name) for name in SHIFT}


def carrier(clients, weights=WEIGHTS, *, silent=lambda number, name: False, asked=None):
    def ask(question):
        if asked is not None:
            asked.append(question)
        return [
            Answer(c, clients[c](question.arrays, question.config), num_examples=weights[c])
            for c in question.to
            if not silent(question.config["round"], c)
        ]

    return ask


def record(clients, rounds, start, weights=WEIGHTS, *, absent=lambda number, name: False):
    """Return a run of FedAvg: its history, and its last model."""
    past, model = {}, start
    for number in range(1, rounds + 1):
        present = [c for c in sorted(clients) if not absent(number, c)]
        models = {c: clients[c](model, {"round": number}) for c in present}
        past[number] = Past(model, models, {c: weights[c] for c in present})
        model = weighted_mean(list(models.values()), [weights[c] for c in present])
    return MemoryHistory(past), model


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one, other):
    return norm(difference(one, other))


class Reads(Mapping):
    """A model that counts how often each of its tensors is read."""

    def __init__(self, model, counter, key):
        self.model, self.counter, self.key = model, counter, key

    def __getitem__(self, name):
        self.counter[(*self.key, name)] += 1
        return self.model[name]

    def __iter__(self):
        return iter(self.model)

    def __len__(self):
        return len(self.model)


def counted(history, counter):
    """Return a history whose tensors are counted as they are read."""
    return MemoryHistory(
        {
            number: Past(
                Reads(past.start, counter, (number, "start")),
                {c: Reads(model, counter, (number, c)) for c, model in past.models.items()},
                past.weights,
            )
            for number, past in history.past.items()
        }
    )


PLANS = {
    "federaser": lambda history, forgotten, retained: federaser(
        history, forgotten, retained, interval=1, ratio=1.0
    ),
    "fedrecover": lambda history, forgotten, retained: fedrecover(
        history, forgotten, retained, schedule=Schedule(warm_up=3, every=3, final=1)
    ),
}
both = pytest.mark.parametrize("make", PLANS.values(), ids=PLANS.keys())


# ---------------------------------------------------------------- both


@both
@given(seed=st.integers(0, 100))
@settings(max_examples=10, deadline=None)
def test_nothing_of_a_forgotten_client_is_in_any_sum(make, seed):
    history, _ = record(CLIENTS, 8, initial())
    draw = torch.Generator().manual_seed(seed)
    other = MemoryHistory(
        {
            number: Past(
                past.start,
                past.models | {"c": {"w": 1e3 * torch.randn(2, 2, generator=draw) * float("nan")}},
                past.weights | {"c": float(seed)},
            )
            for number, past in history.past.items()
        }
    )
    asked = []

    expected = carry_out(make(history, {"c"}, "abc"), carrier(CLIENTS))
    found = carry_out(make(other, {"c"}, "abc"), carrier(CLIENTS, asked=asked))

    assert same(found, expected)
    assert all(question.to == ("a", "b") for question in asked)


@both
def test_who_is_not_in_a_round_or_not_retained_is_not_asked_in_it(make):
    history, _ = record(CLIENTS, 6, initial(), absent=lambda n, c: c == "b" and n in (3, 4))
    asked = []

    carry_out(make(history, {"c"}, ("a", "b", "newcomer")), carrier(CLIENTS, asked=asked))

    for question in asked:
        assert set(question.to) <= ({"a"} if question.config["round"] in (3, 4) else {"a", "b"})


@both
def test_a_round_without_anybody_who_stays_changes_nothing(make):
    history, _ = record(CLIENTS, 4, initial(), absent=lambda n, c: c != "c" and n == 2)
    asked = []

    found = carry_out(make(history, {"c"}, "ab"), carrier(CLIENTS, asked=asked))
    without = MemoryHistory({n: past for n, past in history.past.items() if n != 2})

    assert 2 not in {question.config["round"] for question in asked}
    assert same(found, carry_out(make(without, {"c"}, "ab"), carrier(CLIENTS)))


@both
def test_nobody_answers(make):
    history, _ = record(CLIENTS, 6, initial())
    asked = []
    plan = make(history, {"c"}, "ab")

    carry_out(plan, carrier(CLIENTS, silent=lambda n, c: True, asked=asked))

    # The model stays as it was: every further round is asked of the same one, or of one that only
    # estimates moved.
    assert len(asked) >= 3
    assert same(asked[0].arrays, asked[1].arrays)


@both
def test_the_same_run_gives_the_same_bits_and_inputs_are_left_untouched(make):
    history, _ = record(CLIENTS, 8, initial())
    copy, _ = record(CLIENTS, 8, initial())

    one = carry_out(make(history, {"c"}, "ab"), carrier(CLIENTS))
    other = carry_out(make(history, {"c"}, "ab"), carrier(CLIENTS))

    assert same(one, other)
    for number, past in history.past.items():
        assert same(past.start, copy.past[number].start)
        assert all(same(past.models[c], copy.past[number].models[c]) for c in past.models)


@both
def test_names_shapes_and_types_are_kept(make):
    history, _ = record(CLIENTS, 8, initial())

    found = carry_out(make(history, {"c"}, "ab"), carrier(CLIENTS))

    assert list(found) == list(initial())
    for name, tensor in initial().items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)


@both
@pytest.mark.parametrize("forgotten", [frozenset(), frozenset({"c"})])
def test_a_history_without_round_one_is_refused(make, forgotten):
    history, _ = record(CLIENTS, 4, initial())
    late = MemoryHistory({number: history.past[number] for number in (2, 3, 4)})

    with pytest.raises(MissingNeedError, match="round 1 was not recorded"):
        next(make(late, forgotten, "abc"))


@both
def test_replaying_needs_somebody_who_stays(make):
    history, _ = record(CLIENTS, 4, initial())

    for forgotten, retained in (({"a", "b", "c"}, "abc"), ({"c"}, ()), ({"c"}, ("newcomer",))):
        with pytest.raises(SecateurError, match="nobody is left to replay with"):
            next(make(history, forgotten, retained))


@both
def test_a_poisoned_model_comes_nearer_to_the_retrained_one(make):
    history, last = record(CLIENTS, 12, initial())
    retrained = carry_out(retrain(initial(), ("a", "b"), 12), carrier(CLIENTS))

    found = carry_out(make(history, {"c"}, "ab"), carrier(CLIENTS))

    assert distance(vector_of(found), vector_of(retrained)) < 0.5 * distance(
        vector_of(last), vector_of(retrained)
    )


def vector_of(model):
    return {"w": model["w"]}


# ---------------------------------------------------------------- FedEraser


def test_a_calibrated_update_has_the_recorded_length_and_the_fresh_direction():
    # |(3, 4)| = 5.
    found = calibrated(torch.tensor([3.0, 4.0]), torch.tensor([0.0, -0.1]))
    torch.testing.assert_close(found, torch.tensor([0.0, -5.0]))


@given(seed=st.integers(0, 200), scale=st.floats(1e-6, 1e6))
def test_the_length_of_a_fresh_update_does_not_matter(seed, scale):
    draw = torch.Generator().manual_seed(seed)
    recorded, fresh = torch.randn(2, 3, 5, generator=draw)

    found = calibrated(recorded, scale * fresh)

    assert float(found.norm()) == pytest.approx(float(recorded.norm()), rel=1e-5)
    torch.testing.assert_close(found / found.norm(), fresh / fresh.norm())


def test_updates_of_zeros_contribute_nothing():
    zeros, ones = torch.zeros(2), torch.ones(2)
    assert torch.equal(calibrated(ones, zeros), zeros)
    assert torch.equal(calibrated(zeros, ones), zeros)


def test_two_rounds_by_hand():
    # Round 1: a 1, b 3 of weight 4 in all: (4 + 3 * 8) / 4 = 7, (0 + 3 * 4) / 4 = 3.
    # Round 3: a 2, b 2. Recorded updates (3, 4) and (0, 2), of lengths 5 and 2. Fresh ones
    # (0, -9) and (1, 0): calibrated (0, -5) and (2, 0); their mean is (1, -2.5).
    history = MemoryHistory(
        {
            1: Past(
                vector(0.0, 0.0),
                {"a": vector(4.0, 0.0), "b": vector(8.0, 4.0), "c": vector(9e9, 9e9)},
                {"a": 1.0, "b": 3.0, "c": 50.0},
            ),
            3: Past(
                vector(10.0, 10.0),
                {"a": vector(13.0, 14.0), "b": vector(10.0, 12.0)},
                {"a": 2.0, "b": 2.0},
            ),
        }
    )
    plan = federaser(history, {"c"}, ("b", "a"), ratio=0.5, local_epochs=4)

    question = next(plan)

    assert (question.action, question.to, question.mean) == ("train", ("a", "b"), False)
    assert question.config == {"round": 3, "local-epochs": 2}
    assert question.arrays["w"].tolist() == [7.0, 3.0]
    # What clients claim to weigh today does not count.
    answers = [Answer("a", vector(7.0, -6.0), num_examples=9), Answer("b", vector(8.0, 3.0))]
    with pytest.raises(StopIteration) as stop:
        plan.send(answers)
    assert stop.value.value["w"].tolist() == [8.0, 0.5]


def test_each_tensor_is_calibrated_on_its_own():
    # Lengths 5 and 1; over both tensors together they would be mixed.
    start = {"a": torch.zeros(2), "b": torch.zeros(2)}
    recorded = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0, 0.0])}
    history = MemoryHistory(
        {1: Past(start, {"x": start}, {"x": 1.0}), 2: Past(start, {"x": recorded}, {"x": 1.0})}
    )
    fresh = {"a": torch.tensor([0.5, 0.0]), "b": torch.tensor([0.0, 20.0])}

    found = carry_out(federaser(history, (), "x", interval=1), lambda ask: [Answer("x", fresh)])

    assert found["a"].tolist() == [5.0, 0.0]
    assert found["b"].tolist() == [0.0, 1.0]


def test_updates_are_calibrated_before_they_are_averaged():
    # Recorded lengths 1 and 1 in opposite fresh directions cancel; the mean fresh update would
    # have been scaled to the length of the mean recorded one.
    zero = vector(0.0)
    history = MemoryHistory(
        {
            1: Past(zero, {"a": zero, "b": zero}, {"a": 1.0, "b": 1.0}),
            2: Past(zero, {"a": vector(1.0), "b": vector(1.0)}, {"a": 1.0, "b": 1.0}),
        }
    )

    found = carry_out(
        federaser(history, (), "ab", interval=1),
        lambda ask: [Answer("a", vector(8.0)), Answer("b", vector(-2.0))],
    )

    assert found["w"].tolist() == [0.0]


def test_without_anybody_to_forget_full_calibration_is_the_original_run():
    # Clients that would do today what they did then have d_k = D_k, and so c_k = D_k.
    history, last = record(CLIENTS, 7, initial())
    asked = []

    found = carry_out(
        federaser(history, (), "abc", interval=1, ratio=1.0), carrier(CLIENTS, asked=asked)
    )

    torch.testing.assert_close(found, last)
    for question in asked:
        torch.testing.assert_close(question.arrays, history.start(question.config["round"]))


@pytest.mark.parametrize(
    ("recorded", "interval", "asked"),
    [
        (range(1, 8), 1, [2, 3, 4, 5, 6, 7]),
        (range(1, 8), 2, [3, 5, 7]),
        ((1, 3, 5, 7), 2, [3, 5, 7]),
        (range(1, 8), 9, []),
        (range(1, 15, 3), 2, [7, 13]),
        (range(1, 12, 2), 3, [7]),
        ((1, 2, 5), 2, [5]),
    ],
)
def test_rounds_used_are_those_of_the_interval_that_were_recorded(recorded, interval, asked):
    history, _ = record(CLIENTS, 14, initial())
    kept = MemoryHistory({number: history.past[number] for number in recorded})
    questions = []

    carry_out(federaser(kept, {"c"}, "ab", interval=interval), carrier(CLIENTS, asked=questions))

    assert [question.config["round"] for question in questions] == asked


@pytest.mark.parametrize(
    ("ratio", "epochs", "trained"),
    [(0.5, 1, 1), (0.5, 10, 5), (0.2, 10, 2), (0.1, 3, 1), (1.0, 3, 3), (0.5, 3, 2)],
)
def test_calibration_takes_a_share_of_the_epochs_and_at_least_one(ratio, epochs, trained):
    history, _ = record(CLIENTS, 2, initial())
    plan = federaser(history, {"c"}, "ab", interval=1, ratio=ratio, local_epochs=epochs)

    assert next(plan).config["local-epochs"] == trained


@pytest.mark.parametrize("answer", [None, "without a model"])
def test_who_does_not_answer_is_left_out_of_the_mean(answer):
    zero = vector(0.0)
    weights = {"a": 1.0, "b": 3.0}
    history = MemoryHistory(
        {
            1: Past(zero, {"a": zero, "b": zero}, weights),
            2: Past(zero, {"a": vector(2.0), "b": vector(9.0)}, weights),
        }
    )
    answers = [Answer("a", vector(-1.0))] + ([Answer("b")] if answer else [])

    found = carry_out(federaser(history, (), "ab", interval=1), lambda ask: answers)

    # All of the weight is a's: -1 scaled to the length 2.
    assert found["w"].tolist() == [-2.0]


def test_if_nobody_answers_the_model_stays():
    history, _ = record(CLIENTS, 6, initial())
    first = weighted_mean([history.models(1)[c] for c in "ab"], [1.0, 2.0])

    found = carry_out(
        federaser(history, {"c"}, "ab", interval=1), carrier(CLIENTS, silent=lambda n, c: True)
    )

    torch.testing.assert_close(found, first)


def test_buffers_are_averages_of_the_answers():
    model = {"w": torch.zeros(1), "n.running_var": torch.zeros(1), "n.num_batches_tracked": 0}
    start = {name: torch.as_tensor(tensor) for name, tensor in model.items()}

    def local(w, variance, count):
        return {
            "w": torch.tensor([w]),
            "n.running_var": torch.tensor([variance]),
            "n.num_batches_tracked": torch.tensor(count),
        }

    weights = {"a": 1.0, "b": 3.0}
    recorded = {"a": local(1.0, 7.0, 70), "b": local(1.0, 9.0, 90)}
    history = MemoryHistory(
        {number: Past(start, recorded, weights) for number in (1, 2)},
    )
    answers = [Answer("a", local(5.0, 4.0, 10)), Answer("b", local(5.0, 8.0, 15))]

    first = carry_out(federaser(history, (), "ab", interval=3), lambda ask: [])
    found = carry_out(federaser(history, (), "ab", interval=1), lambda ask: answers)

    # (7 + 3 * 9) / 4 and (70 + 3 * 90) / 4; (4 + 3 * 8) / 4 and (10 + 3 * 15) / 4 = 13.75.
    assert (first["n.running_var"].item(), first["n.num_batches_tracked"].item()) == (8.5, 85)
    assert (found["n.running_var"].item(), found["n.num_batches_tracked"].item()) == (7.0, 14)
    assert found["n.num_batches_tracked"].dtype == torch.int64
    assert found["w"].tolist() == [2.0]


def test_federaser_reads_each_tensor_once_and_nothing_of_the_forgotten():
    history, _ = record(CLIENTS, 6, initial())
    reads = Counter()

    carry_out(federaser(counted(history, reads), {"c"}, "ab", interval=2), carrier(CLIENTS))

    assert set(reads.values()) == {1}
    assert {key[0] for key in reads} == {1, 3, 5}
    assert {key[1] for key in reads} == {"start", "a", "b"}


def test_an_interval_of_no_rounds_is_refused():
    history, _ = record(CLIENTS, 2, initial())

    with pytest.raises(SecateurError, match="at least 1 round, got 0"):
        next(federaser(history, {"c"}, "ab", interval=0))


# ---------------------------------------------------------------- FedRecover: the schedule


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (8, Schedule(3, 2, 2)),
        (24, Schedule(3, 3, 2)),
        (40, Schedule(4, 5, 2)),
        (41, Schedule(20, 20, 5)),
        (200, Schedule(20, 20, 5)),
    ],
)
def test_the_usual_schedule(rounds, expected):
    assert usual_schedule(rounds) == expected


def test_exact_rounds_by_hand():
    schedule = Schedule(warm_up=3, every=4, final=2)
    exact = [place for place in range(1, 15) if schedule.exact(place, 14)]
    assert exact == [1, 2, 3, 7, 11, 13, 14]


def test_corrections_come_in_no_less_than_every_round():
    with pytest.raises(SecateurError, match="every 1 or more rounds, got 0"):
        Schedule(1, 0, 1)


@given(
    rounds=st.integers(1, 30),
    warm_up=st.integers(0, 10),
    every=st.integers(1, 10),
    final=st.integers(0, 6),
)
@settings(max_examples=40, deadline=None)
def test_clients_train_as_often_as_scheduled_and_constant_updates_are_exact(
    rounds, warm_up, every, final
):
    # Without curvature every estimate is the recorded update, which is not abnormal.
    clients = {c: lambda model, config, c=c: {"w": model["w"] + SHIFT[c]} for c in SHIFT}
    history, _ = record(clients, rounds, vector(0.0))
    asked = []

    found = carry_out(
        fedrecover(history, {"c"}, "ab", schedule=Schedule(warm_up, every, final)),
        carrier(clients, asked=asked),
    )

    # Cao et al.: T_w + T_f + floor((R - T_w - T_f) / T_c) rounds, where there are so many.
    between = max(0, rounds - warm_up - final)
    assert len(asked) == min(rounds, warm_up + final) + between // every
    assert all(question.to == ("a", "b") for question in asked)
    # (1 * 1 - 2 * 2) / 3 = -1 a round.
    torch.testing.assert_close(found, vector(-1.0 * rounds))


# ---------------------------------------------------------------- FedRecover: estimates


def test_an_estimate_by_hand():
    # s = (2, 0), y = -(-1, 0): B = .5 I. D = (3, 3) - .5 (1, 4).
    pairs = [(torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0]))]

    found = estimated(torch.tensor([3.0, 3.0]), torch.tensor([1.0, 4.0]), pairs)

    torch.testing.assert_close(found, torch.tensor([2.5, 1.0]))


def test_without_pairs_the_estimate_is_the_recorded_update():
    recorded = torch.tensor([1.0, 2.0])
    assert torch.equal(estimated(recorded, torch.ones(2), []), recorded)


def axes(size, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=draw, dtype=torch.float64)).Q.float()


def quadratic(basis, curvatures, optimum):
    """A step of gradient descent on a quadratic with these eigenvectors and eigenvalues."""
    hessian = basis @ torch.diag(torch.tensor(curvatures)) @ basis.T
    centre = torch.full((len(curvatures),), optimum)
    return lambda model, config: {"w": model["w"] - hessian @ (model["w"] - centre)}


def test_quadratics_are_exact_after_as_many_pairs_as_dimensions():
    # L-BFGS has the Hessian once it saw steps along its eigenvectors. The recorded run is placed
    # so that in rounds 2 to 4 it is off the retrained one by just these, and by anything after.
    basis = axes(3)
    clients = {
        "a": quadratic(basis, [0.1, 0.2, 0.3], 1.0),
        "b": quadratic(basis, [0.3, 0.25, 0.05], -4.0),
    }
    retraining, last = record(clients, 12, vector(1.0, -2.0, 3.0))
    draw = torch.Generator().manual_seed(1)
    past = {1: retraining.past[1]}
    for number in range(2, 13):
        off = basis[:, number - 2] if number <= 4 else 5 * torch.randn(3, generator=draw)
        start = {"w": retraining.start(number)["w"] - 2 * off}
        models = {c: train(start, {}) for c, train in clients.items()}
        past[number] = Past(start, models, retraining.weights(number))
    asked = []

    found = carry_out(
        fedrecover(MemoryHistory(past), {"c"}, "ab", pairs=3, schedule=Schedule(4, 100, 0)),
        carrier(clients, asked=asked),
    )

    torch.testing.assert_close(found, last, rtol=1e-4, atol=1e-4)
    assert [question.config["round"] for question in asked] == [1, 2, 3, 4]
    # Recorded updates alone would have ended elsewhere.
    assert distance(found, last) < 1e-3 * norm(difference(past[12].start, retraining.start(12)))


def test_each_client_has_a_curvature_of_its_own():
    # All curvatures of a client are the same, so one pair is enough: B_k = h_k I.
    clients = {"a": quadratic(axes(4), [0.1] * 4, 1.0), "b": quadratic(axes(4), [0.4] * 4, -1.0)}
    clients["c"] = quadratic(axes(4), [0.2] * 4, 6.0)
    start = vector(9.0, -7.0, 5.0, -3.0)
    history, _ = record(clients, 24, start)
    retrained = carry_out(retrain(start, ("a", "b"), 24), carrier(clients))
    asked = []

    found = carry_out(fedrecover(history, {"c"}, "ab"), carrier(clients, asked=asked))

    torch.testing.assert_close(found, retrained, rtol=1e-4, atol=1e-4)
    # usual_schedule(24): 3 rounds of warm-up, 2 final ones, every third of the 19 between.
    assert len(asked) == 3 + 2 + 6


def regression(seed, examples, truth, *, features=6):
    """Ten steps of gradient descent on a least-squares problem of the client's own."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, features, generator=draw)
    y = x @ truth + 0.1 * torch.randn(examples, generator=draw)

    def train(model, config):
        w = model["w"]
        for _ in range(10):
            w = w - 0.02 * x.T @ (x @ w - y) / examples
        return {"w": w}

    return train


def test_estimates_bring_regression_nearer_to_retraining_than_recorded_updates_do():
    truth = torch.linspace(-1, 1, 6)
    clients = {name: regression(seed, 20, truth) for seed, name in enumerate("abd")}
    clients["c"] = regression(9, 20, -5 * truth)
    weights = dict.fromkeys("abcd", 20.0)
    start = {"w": torch.zeros(6)}
    history, last = record(clients, 30, start, weights)
    ask = carrier(clients, weights)
    retrained = carry_out(retrain(start, ("a", "b", "d"), 30), ask)
    schedule = Schedule(warm_up=3, every=100, final=0)

    found = carry_out(fedrecover(history, {"c"}, "abd", schedule=schedule), ask)
    # No pairs, no curvature.
    recorded = carry_out(
        fedrecover(history, {"c"}, "abd", schedule=Schedule(0, 100, 0), abnormal=0.0), ask
    )

    poisoned = distance(last, retrained)
    assert distance(found, retrained) < 0.1 * poisoned
    assert distance(found, retrained) < 0.1 * distance(recorded, retrained)


def test_a_warm_up_of_all_rounds_is_retraining_bit_for_bit():
    history, _ = record(CLIENTS, 9, initial())
    asked, ask_retrain = [], []

    found = carry_out(
        fedrecover(history, {"c"}, "ab", schedule=NEVER), carrier(CLIENTS, asked=asked)
    )
    retrained = carry_out(retrain(initial(), ("a", "b"), 9), carrier(CLIENTS, asked=ask_retrain))

    assert same(found, retrained)
    for one, other in zip(asked, ask_retrain, strict=True):
        assert (one.action, one.to, dict(one.config)) == (
            other.action,
            other.to,
            dict(other.config),
        )


def test_buffers_move_in_exact_rounds_only():
    history, _ = record(CLIENTS, 9, initial())
    asked = []

    found = carry_out(
        fedrecover(history, {"c"}, "ab", schedule=Schedule(2, 4, 1), abnormal=0.9),
        carrier(CLIENTS, asked=asked),
    )

    whole = [question.config["round"] for question in asked if question.to == ("a", "b")]
    counts = {q.config["round"]: int(q.arrays["norm.num_batches_tracked"]) for q in asked}
    # Every exact round adds 2 batches; rounds 1, 2, 6 and 9 are exact.
    assert set(whole) >= {1, 2, 6, 9}
    assert (counts[1], counts[2], counts[6], counts[9]) == (0, 2, 4, 6)
    assert int(found["norm.num_batches_tracked"]) == 8
    # running_mean: half of it plus the mean (1 - 2 * 2) / 3 = -1 of the shifts, four times.
    torch.testing.assert_close(found["norm.running_mean"], torch.tensor([-1.875]))


@pytest.mark.parametrize(("pairs", "end"), [(1, [3.3, 3.8]), (2, [3.0, 3.8])])
def test_only_the_latest_pairs_count(pairs, end):
    # The replay is at (0, 0), (1, 1), (1.5, 2), (2.5, 2.8): off the recorded run by 0, e1, e2 and
    # e1. The updates that it asks for fall short of the recorded (1, 1) by 0, .5 e1 and .2 e2. By
    # the later pair alone B = .2 I and the fourth update is (.8, 1); by both it is (.5, 1).
    starts = ((0.0, 0.0), (0.0, 1.0), (1.5, 1.0), (1.5, 2.8))
    past = {
        number: Past(vector(*start), {"a": vector(start[0] + 1, start[1] + 1)}, {"a": 1.0})
        for number, start in enumerate(starts, start=1)
    }
    sent = {1: torch.tensor([1.0, 1.0]), 2: torch.tensor([0.5, 1.0]), 3: torch.tensor([1.0, 0.8])}
    schedule = Schedule(warm_up=3, every=100, final=0)

    found = carry_out(
        fedrecover(MemoryHistory(past), (), "a", pairs=pairs, schedule=schedule),
        lambda ask: [Answer("a", {"w": ask.arrays["w"] + sent[ask.config["round"]]}, {}, 1)],
    )

    torch.testing.assert_close(found, vector(*end))


# ---------------------------------------------------------------- FedRecover: abnormality


def threshold_history():
    # |D|: a 1 2 3 4, b 5 6 7 8 in round 1; a 20 0 0 0, b 0 0 0 0 in round 2. c is not asked about.
    start = vector(1.0, 1.0, 1.0, 1.0)
    weights = dict.fromkeys("abc", 1.0)

    def local(*update):
        return {"w": start["w"] + torch.tensor(update)}

    huge = local(1e6, 1e6, 1e6, 1e6)
    one = {"a": local(1.0, -2.0, 3.0, 4.0), "b": local(5.0, 6.0, -7.0, 8.0), "c": huge}
    two = {"a": local(-20.0, 0.0, 0.0, 0.0), "b": start, "c": huge}
    return MemoryHistory({1: Past(start, one, weights), 2: Past(start, two, weights)})


@pytest.mark.parametrize(
    ("share", "threshold"),
    # Of 8 entries 0, 0, 1, 2, 4 and 7 may exceed it: the larger of both rounds' values.
    [(0.0, 20.0), (0.124, 20.0), (0.125, 7.0), (0.25, 6.0), (0.5, 4.0), (0.9, 1.0)],
)
def test_the_threshold_by_hand(share, threshold):
    assert abnormality_threshold(threshold_history(), {"a", "b"}, share) == threshold


@given(seed=st.integers(0, 100), share=st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_no_more_than_its_share_exceeds_the_threshold(seed, share):
    draw = torch.Generator().manual_seed(seed)
    models = {c: {"w": torch.randn(7, generator=draw)} for c in "abc"}
    history = MemoryHistory({1: Past({"w": torch.zeros(7)}, models, dict.fromkeys("abc", 1.0))})

    threshold = abnormality_threshold(history, "abc", share)

    entries = torch.cat([model["w"] for model in models.values()]).abs()
    assert int((entries > threshold).sum()) <= share * 21 + 1e-6
    assert int((entries >= threshold).sum()) > share * 21 - 1e-6  # the least such threshold


def abnormal_history(third=0.0):
    """Return three rounds of two clients, all of whose recorded updates are 0.1.

    The replay is at 1 more than the recorded run in round 2, and wherever ``third`` puts it in 3.
    """
    weights = {"a": 1.0, "b": 3.0}
    starts = {1: vector(0.0), 2: vector(-1.0), 3: vector(third)}
    return MemoryHistory(
        {
            number: Past(start, {key: {"w": start["w"] + 0.1} for key in "ab"}, weights)
            for number, start in starts.items()
        }
    )


ONE_PAIR = Schedule(warm_up=2, every=100, final=0)


def play(history, answers):
    """Drive FedRecover with updates by round and client; return its model and who was asked."""
    asked = []

    def ask(question):
        number = question.config["round"]
        asked.append((number, question.to))
        return [
            Answer(c, {"w": question.arrays["w"] + answers[number][c]}, num_examples=w)
            for c, w in (("a", 1), ("b", 3))
            if c in question.to and c in answers[number]
        ]

    plan = fedrecover(history, (), "ab", pairs=1, schedule=ONE_PAIR)
    return carry_out(plan, ask)["w"].item(), asked


def test_only_a_client_with_an_abnormal_estimate_is_asked():
    # v = 0 in round 1 and in round 2, where a sends .1 and b -.5, of weights 1 and 3: v = -.35 in
    # round 3. b: s = 1, y = -(-.5 - .1) = .6, B = .6. Recorded at -1.35 it is 1 off again:
    # .1 - .6 = -.5 is larger than .1. a: B = 0, estimate .1.
    rounds = {1: {"a": 0.0, "b": 0.0}, 2: {"a": 0.1, "b": -0.5}, 3: {"b": 0.04}}

    found, asked = play(abnormal_history(third=-1.35), rounds)

    assert asked == [(1, ("a", "b")), (2, ("a", "b")), (3, ("b",))]
    assert found == pytest.approx(-0.35 + (0.1 + 3 * 0.04) / 4, abs=1e-6)


def test_an_estimate_within_the_threshold_is_used():
    # As above with a and b exchanged, so that v = -.05 in round 3; recorded at -.3 it is .25 off
    # and a's estimate .1 - .6 * .25 = -.05.
    rounds = {1: {"a": 0.0, "b": 0.0}, 2: {"a": -0.5, "b": 0.1}}

    found, asked = play(abnormal_history(third=-0.3), rounds)

    assert asked == [(1, ("a", "b")), (2, ("a", "b"))]
    assert found == pytest.approx(-0.05 + (-0.05 + 3 * 0.1) / 4, abs=1e-6)


def test_an_abnormal_client_that_does_not_answer_is_left_out():
    rounds = {1: {"a": 0.0, "b": 0.0}, 2: {"a": -0.5, "b": 0.1}, 3: {}}

    found, _ = play(abnormal_history(third=-1.05), rounds)

    assert found == pytest.approx(-0.05 + 0.1, abs=1e-6)


def test_a_round_in_which_all_are_abnormal_and_silent_changes_nothing():
    rounds = {1: {"a": 0.0, "b": 0.0}, 2: {"a": -0.5, "b": -0.5}, 3: {}}

    found, asked = play(abnormal_history(third=-1.5), rounds)

    assert asked[-1] == (3, ("a", "b"))
    assert found == pytest.approx(-0.5)


def test_an_estimate_that_is_not_a_number_is_abnormal():
    # The replay is infinitely far from the recorded model.
    rounds = {1: {"a": 0.0, "b": 0.0}, 2: {"a": -3e38, "b": -3e38}, 3: {"a": -1.0, "b": -1.0}}

    _, asked = play(abnormal_history(third=3e38), rounds)

    assert asked[-1] == (3, ("a", "b"))


def test_what_an_abnormal_client_sends_improves_its_next_estimate():
    # Its curvature turns from .6 to .2 in round 3; with the old one round 4 would be abnormal.
    history = abnormal_history(third=-1.05)
    fourth = vector(-0.965)  # .975 below v = .01
    past = dict(history.past)
    past[4] = Past(fourth, {key: {"w": fourth["w"] + 0.1} for key in "ab"}, {"a": 1.0, "b": 3.0})
    rounds = {1: {"a": 0.0, "b": 0.0}, 2: {"a": -0.5, "b": 0.1}, 3: {"a": -0.06}}

    found, asked = play(MemoryHistory(past), rounds)

    # Round 3: v = -.05 + (-.06 + .3) / 4 = .01. a: s = 1, y = .16, B = .16.
    # Round 4: .975 off: .1 - .16 * .975 = -.056 is within .1, and b is as recorded.
    assert [number for number, _ in asked] == [1, 2, 3]
    assert found == pytest.approx(0.01 + (-0.056 + 0.3) / 4, abs=1e-6)


def test_fedrecover_reads_no_buffers_nothing_of_the_forgotten_and_little_twice():
    # An update is read for the threshold, for its round, and again if its client was asked alone.
    history, _ = record(CLIENTS, 12, initial())
    reads = Counter()

    carry_out(fedrecover(counted(history, reads), {"c"}, "ab", abnormal=0.0), carrier(CLIENTS))

    assert {key[1] for key in reads} == {"start", "a", "b"}
    assert all(reads[number, c, "w"] <= 3 for number, c in itertools.product(range(1, 13), "ab"))
    assert not any(reads[number, c, "norm.running_mean"] for number in range(1, 13) for c in "ab")


@pytest.mark.parametrize(("update", "asked_again"), [(-0.85, False), (-1.4, True)])
def test_an_estimate_that_overshoots_is_abnormal_however_small_it_is(update, asked_again):
    # a: s = 1, y = .1 - update, so B = .95 or 1.5. In round 3 the replay is .05 above the recorded
    # model: the estimate is .1 - .05 B, well within tau = .1, and differs from the recorded update
    # by .05 B, which must not exceed .05.
    rounds = {1: {"a": 0.0, "b": 0.0}, 2: {"a": update, "b": 0.1}, 3: {"a": 0.03}}
    before = (update + 3 * 0.1) / 4

    found, asked = play(abnormal_history(third=before - 0.05), rounds)

    assert (asked[-1] == (3, ("a",))) is asked_again
    own = 0.03 if asked_again else 0.1 - 0.05 * 0.95
    assert found == pytest.approx(before + (own + 3 * 0.1) / 4, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "threshold", "expected"),
    [
        (3.0, 9.0, True),
        (5.0, 9.0, True),  # as far as v is from w
        (5.1, 9.0, False),
        (3.0, 3.9, False),  # an entry of 4 is larger than tau
        (math.nan, 9.0, False),
    ],
)
def test_what_is_credible(change, threshold, expected):
    movement = torch.tensor([3.0, 4.0])  # of length 5
    recorded = torch.tensor([1.0, 1.0])
    update = recorded + torch.tensor([change, 0.0])
    assert credible(update, recorded, movement, threshold) is expected
