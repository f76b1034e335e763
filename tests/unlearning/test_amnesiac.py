"""Amnesiac unlearning against its definition: methods 6.1, 6.2, 6.6."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import partial_updates as partial
from unlearning.amnesiac import (
    NOTHING,
    LoggedUpdate,
    Removed,
    affected,
    amnesiac,
    concentrated_batches,
    contribution,
    halved,
    taken_back,
    update_of,
)
from unlearning.errors import ParametersError, RefusedRequestError
from unlearning.gradients import gradient
from unlearning.parameters import byte_size
from unlearning.randomness import generator

INPUTS = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3
TRAINED = ("head.weight", "head.bias")


def forward(model, inputs):
    return inputs @ model["head.weight"].T + model["head.bias"]


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(3, 4, generator=draw),
        "head.bias": torch.randn(3, generator=draw),
        "norm.running_mean": torch.randn(2, generator=draw),
        "norm.num_batches_tracked": torch.tensor(3),
    }


def scalar(value):
    return {"w": torch.tensor([float(value)])}


def entry(when, samples, value, share=1.0):
    return LoggedUpdate(when, frozenset(samples), scalar(value), share)


LOG = [
    entry((0, 0, 0), {1, 2}, 1),
    entry((0, 0, 1), {3, 4}, 10),
    entry((0, 1, 0), {2, 3}, 100),
    entry((1, 0, 0), {1, 4}, 1000),
]


def trained(seed=0, epochs=3, drop=None, order=None):
    """Return (initial model, model, log) of a training with momentum; a buffer counts batches."""
    model, speed, log = drawn(seed), {}, []
    start = {name: tensor.clone() for name, tensor in model.items()}
    for epoch in range(epochs):
        rows = torch.randperm(24, generator=generator(seed, epoch))
        batches = torch.split(rows, 6) if order is None else order(epoch)
        for place, batch in enumerate(batches):
            step = gradient(model, forward, functional.cross_entropy, INPUTS[batch], LABELS[batch])
            speed = {name: 0.9 * speed.get(name, 0) + step[name] for name in step}
            after = partial.stepped(model, speed, 0.1)
            after["norm.num_batches_tracked"] = model["norm.num_batches_tracked"] + 1
            update = update_of(model, after)
            if drop is not None:
                shares = dict.fromkeys(update, drop)
                kept = partial.kept_entries(update, shares, "random", generator(seed, epoch, place))
                update = partial.partial(update, kept)
            log.append(LoggedUpdate((0, epoch, place), frozenset(batch.tolist()), update))
            model = after
    return start, model, log


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


# ---------------------------------------------------------------- subtracting


def test_the_subtraction_by_hand():
    # Sample 2 was in the first and the third batch: 1111 - 1 - 100
    found, removed = amnesiac(scalar(1111), LOG, {2})
    assert found["w"].item() == 1010
    assert removed == Removed(frozenset({2}), frozenset({(0, 0, 0), (0, 1, 0)}))


def test_a_batch_is_subtracted_once_whoever_asks():
    # Sample 1 shares a batch with sample 2, which is gone already: 1010 - 1000
    model, removed = amnesiac(scalar(1111), LOG, {2})
    model, removed = amnesiac(model, LOG, {1}, removed)
    assert model["w"].item() == 10
    assert removed.samples == {1, 2}
    both, removed_both = amnesiac(scalar(1111), LOG, {1, 2})
    assert both["w"].item() == 10
    assert removed_both == removed


def test_samples_are_not_removed_twice():
    _, removed = amnesiac(scalar(1111), LOG, {2})
    with pytest.raises(RefusedRequestError, match="already removed: 2; ask for other"):
        amnesiac(scalar(1010), LOG, {2, 3}, removed)
    with pytest.raises(RefusedRequestError, match="already removed"):
        contribution(scalar(0), LOG, {2}, removed)
    with pytest.raises(RefusedRequestError, match="already removed"):
        amnesiac(scalar(1010), [], {2}, removed, stop=lambda model: False)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 20),
    first=st.sets(st.integers(0, 23), max_size=3),
    more=st.sets(st.integers(0, 23), max_size=3),
)
def test_requests_add_up(seed, first, more):
    _, model, log = trained(seed, epochs=2)
    once, all_removed = amnesiac(model, log, first | more)
    part, removed = amnesiac(model, log, first)
    twice, removed = amnesiac(part, log, more - first, removed)
    assert removed == all_removed
    close(once, twice, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 40))
def test_with_every_batch_affected_the_initial_weights_come_back(seed):
    start, model, log = trained(seed)
    found, removed = amnesiac(model, log, range(24))
    assert len(removed.batches) == 12
    for name in TRAINED:
        torch.testing.assert_close(found[name], start[name], rtol=0, atol=1e-4)
        assert not torch.allclose(model[name], start[name], atol=1e-2)
    for name in ("norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(found[name], model[name])


def test_without_affected_batches_nothing_changes():
    _, model, log = trained()
    for samples in (set(), {99}):
        found, removed = amnesiac(model, log, samples)
        assert same(found, model)
        assert removed == Removed(frozenset(samples), frozenset())
    found, _ = amnesiac(model, [], {1})
    assert same(found, model)
    assert found["head.weight"] is not model["head.weight"]


def test_inputs_are_left_untouched_and_a_log_may_be_read_once():
    _, model, log = trained()
    _, again, other = trained()
    found, _ = amnesiac(model, iter(log), {1, 2})
    assert same(model, again)
    assert all(same(one.update, two.update) for one, two in zip(log, other, strict=True))
    assert list(found) == list(model)
    assert all(found[name].dtype == model[name].dtype for name in model)
    assert Removed() == NOTHING


# ---------------------------------------------------------------- stopping


def test_the_latest_epoch_goes_first_and_a_stop_is_asked_between_epochs():
    seen = []

    def stop(model):
        seen.append(model["w"].item())
        return model["w"].item() < 200

    # All hold 1, 2, 3 or 4: 1111 - 1000 (round 1), and 111 is under 200.
    found, removed = amnesiac(scalar(1111), LOG, {1, 2, 3, 4}, stop=stop)

    assert seen == [1111, 111]
    assert found["w"].item() == 111
    assert removed == Removed(frozenset(), frozenset({(1, 0, 0)}))
    # What is left may be asked for later.
    rest, removed = amnesiac(found, LOG, {1, 2, 3, 4}, removed)
    assert rest["w"].item() == 0
    assert removed.samples == {1, 2, 3, 4}
    assert len(removed.batches) == 4


def test_a_stop_that_never_says_yes_subtracts_all():
    asked = []
    found, removed = amnesiac(
        scalar(1111), LOG[::-1], {2, 3}, stop=lambda model: bool(asked.append(model["w"].item()))
    )
    # Batches of an epoch belong together: (0, 1) with 100, then (0, 0) with 1 and 10.
    assert asked == [1111, 1011]
    assert found["w"].item() == 1000
    assert removed.samples == {2, 3}


def test_what_is_forgotten_already_is_not_subtracted():
    found, removed = amnesiac(scalar(1111), LOG, {1}, stop=lambda model: True)
    assert found["w"].item() == 1111
    assert removed == NOTHING


# ---------------------------------------------------------------- partial logs and half precision


def test_a_partial_log_that_drops_nothing_is_the_full_one_bit_for_bit():
    _, model, log = trained()
    _, _, whole = trained(drop=0.0)
    assert same(amnesiac(model, log, {1, 5})[0], amnesiac(model, whole, {1, 5})[0])


def test_a_partial_log_that_drops_all_changes_nothing():
    _, model, log = trained(drop=1.0)
    assert same(amnesiac(model, log, {1, 5})[0], model)


def test_a_partial_log_moves_kept_entries_only():
    _, model, full = trained(epochs=1)
    _, _, log = trained(epochs=1, drop=0.5)
    (one,) = affected(log, {0})
    (whole,) = affected(full, {0})
    found, _ = amnesiac(model, log, {0})
    for name in TRAINED:
        kept = one.update[name] != 0
        expected = torch.where(kept, model[name] - whole.update[name], model[name])
        assert torch.equal(found[name], expected)
        assert int(kept.sum()) == kept.numel() - math.ceil(kept.numel() / 2)


def test_half_precision_halves_the_log_and_rounds_by_a_part_in_2048():
    _, model, log = trained()
    small = [LoggedUpdate(one.when, one.samples, halved(one.update)) for one in log]
    assert byte_size([one.update for one in small]) * 2 == byte_size([one.update for one in log])

    full, removed = amnesiac(model, log, {1, 5})
    found, _ = amnesiac(model, small, {1, 5})

    for name in TRAINED:
        taken = sum(one.update[name].abs() for one in log if one.when in removed.batches)
        slack = taken / 2048 + len(log) * (2**-25 + 1e-6)
        assert ((found[name] - full[name]).abs() <= slack).all()
        assert found[name].dtype == torch.float32
        assert not torch.equal(found[name], full[name])


def test_updates_too_large_for_half_precision_are_refused():
    assert halved(scalar(65519))["w"].item() == 65504
    with pytest.raises(ParametersError, match="not finite"):
        halved(scalar(65520))


# ---------------------------------------------------------------- federated


def test_what_a_client_sends_by_hand():
    # Sample 2, with shares 1/2 and 1/4 of the rounds: .5 * 1 + .25 * 100
    log = [entry((0, 0, 0), {1, 2}, 1, 0.5), entry((3, 0, 0), {2}, 100, 0.25)]
    sent, removed = contribution(scalar(7), log, {2})
    assert sent["w"].item() == 25.5
    assert removed.batches == {(0, 0, 0), (3, 0, 0)}
    assert taken_back(scalar(30), sent)["w"].item() == 4.5


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 20))
def test_all_samples_of_a_client_are_all_of_its_weighted_updates(seed):
    # Negative gradients (methods 4): the model less sum_t p_k D_k
    start, end, log = trained(seed)
    rounds = [
        LoggedUpdate((turn, *one.when[1:]), one.samples, one.update, share)
        for turn, share in ((0, 0.3), (1, 0.6))
        for one in log
    ]
    sent, _ = contribution(end, rounds, range(24))
    for name in TRAINED:
        torch.testing.assert_close(
            sent[name], 0.9 * (end[name] - start[name]), rtol=1e-4, atol=1e-5
        )
    assert list(sent) == list(TRAINED)
    nothing, removed = contribution(end, rounds, set())
    assert not any(tensor.any() for tensor in nothing.values())
    assert removed == NOTHING
    assert same(taken_back(end, nothing), end)


# ---------------------------------------------------------------- refusals


def test_logs_that_do_not_fit_are_refused():
    _, model, log = trained()
    short = {"head.weight": log[0].update["head.weight"]}
    wrong = {**log[0].update, "head.bias": torch.ones(4)}
    bad = {**log[0].update, "head.bias": torch.full((3,), math.nan)}
    buffer = {**log[0].update, "norm.running_mean": torch.ones(2)}
    for update in (short, wrong, bad, buffer):
        one = LoggedUpdate((0, 0, 0), frozenset({1}), update)
        with pytest.raises(ParametersError):
            amnesiac(model, [one], {1})
        with pytest.raises(ParametersError):
            contribution(model, [one], {1})
        with pytest.raises(ParametersError):
            taken_back(model, update)
    with pytest.raises(ParametersError, match=r"holds batch \(0, 0, 0\) twice"):
        amnesiac(scalar(0), [LOG[0], LOG[0]], {1})
    with pytest.raises(ParametersError, match=r"share must lie in \[0, 1\], got 2"):
        contribution(scalar(0), [entry((0, 0, 0), {1}, 1, 2)], {1})


# ---------------------------------------------------------------- concentrated batches


def divide(size, forgotten, batch_size, share, seed=0):
    return concentrated_batches(size, forgotten, batch_size, share, generator(seed))


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 60),
    batch_size=st.integers(1, 12),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 9),
    of=st.data(),
)
def test_the_forgotten_lie_in_their_share_of_the_batches(size, batch_size, share, seed, of):
    batches = math.ceil(size / batch_size)
    count = math.ceil(share * batches - 1e-9)
    room = size if count == batches else count * batch_size
    wanted = of.draw(st.integers(count, room))
    draw = generator(seed, "forgotten")
    forgotten = set(torch.randperm(size, generator=draw)[:wanted].tolist())

    found = divide(size, forgotten, batch_size, share, seed)

    assert sorted(torch.cat(found).tolist()) == list(range(size))
    assert [len(rows) for rows in found[:-1]] == [batch_size] * (batches - 1)
    assert sum(not forgotten.isdisjoint(rows.tolist()) for rows in found) == count
    again = divide(size, forgotten, batch_size, share, seed)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_batches_are_drawn():
    holding = set()
    for seed in range(30):
        found = divide(40, [0, 1, 2], 4, 0.1, seed)
        holding |= {place for place, rows in enumerate(found) if 0 in rows}
    assert len(holding) > 4
    first = divide(40, [0, 1, 2], 4, 0.3, 0)
    assert first[0].tolist() != sorted(first[0].tolist())


def test_nothing_to_forget_is_an_ordinary_epoch():
    found = divide(10, [], 4, 0.5)
    assert [len(rows) for rows in found] == [4, 4, 2]
    assert sorted(torch.cat(found).tolist()) == list(range(10))


def test_concentrated_training_forgets_with_few_batches():
    forgotten = {0, 1, 2, 3}
    _, _, log = trained(order=lambda epoch: divide(24, forgotten, 6, 0.25, epoch))
    assert len(list(affected(log, forgotten))) == 3  # one of four in each of three epochs


@pytest.mark.parametrize(
    ("size", "forgotten", "batch_size", "share", "message"),
    [
        (10, [0], 2, 1.0, "1 samples do not fit into 5 of 5 batches, which take 5 to 10"),
        (10, range(5), 2, 0.4, "5 samples do not fit into 2 of 5 batches, which take 2 to 4"),
        (10, [10], 2, 0.5, "numbered from 0 to 9"),
        (10, [-1], 2, 0.5, "numbered from 0 to 9"),
        (0, [], 2, 0.5, "at least 1"),
        (10, [], 0, 0.5, "at least 1"),
        (10, [], 2, 0.0, r"the share in \(0, 1\]"),
        (10, [], 2, 1.1, r"the share in \(0, 1\]"),
        (10, [], 2, math.nan, r"the share in \(0, 1\]"),
    ],
)
def test_epochs_that_cannot_be_divided_are_refused(size, forgotten, batch_size, share, message):
    with pytest.raises(ParametersError, match=message):
        divide(size, forgotten, batch_size, share)
