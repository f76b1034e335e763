"""Methods in which holders change the model, and rounds of other training: with canned answers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.actions import (
    Amnesiac,
    Ascend,
    Ascent,
    Batches,
    LabelFlip,
    MacForget,
    Noisy,
    Rapid,
    Rcad,
    Selection,
    joined,
    parted,
)
from strategies.methods.holders import Ball, Holders, TakeBack, ascending, flipping, macforget
from strategies.methods.retraining import ReplayError, Retrain, noisy, rapid, rcad
from tests.strategies.canned import (
    CLASS,
    NUMBER,
    memory,
    model,
    run,
    situation,
    trained,
    waiting,
)
from tests.strategies.small import client
from unlearning.errors import (
    MissingNeedError,
    NoBatchLogError,
    NoLastRoundError,
    ParametersError,
    RefusedRequestError,
    SecateurError,
)
from unlearning.parameters import copied
from unlearning.plan import Answer
from unlearning.retraining import federated_average

BUFFER = "norm.running_mean"
TOKENS = Selection(forget="samples", forget_tokens=f"{'0' * 32},{'1' * 32}")


def value(made):
    """The value that every trained entry of a model has."""
    values = {float(x) for tensor in trained(made).values() for x in tensor.reshape(-1)}
    assert max(values) - min(values) < 1e-5
    return min(values)


def holding(*held):
    """Clients' answers: the value of all entries, rows, and the weight if it is another."""

    def reply(who, question):
        made, count, *weight = held[int(who[-1])]
        if made is None:
            return None
        answer = model(made) | {"norm.num_batches_tracked": torch.tensor(99)}
        return Answer(who, answer, {"rows": count}, weight[0] if weight else max(1, count))

    return reply


# ---------------------------------------------------------------- holders take a step
@pytest.mark.parametrize(
    ("make", "step"), [(ascending, Ascent), (flipping, LabelFlip), (macforget, MacForget)]
)
def test_changes_add_up_by_the_rows_of_holders(make, step):
    # w = 1, answers 2 and 5 of 30 and 10 rows: 1 + 3/4 (2 - 1) + 1/4 (5 - 1) = 2.75. The third
    # holds nothing, whatever it sends.
    start = model()
    found, (asked,) = run(
        make(learning_rate=0.5).plan(situation(waiting((0, 1, 2), TOKENS), start=start)),
        holding((2, 30), (5, 10), (9, 0, 1000)),
    )
    assert value(found.model) == pytest.approx(2.75)
    assert value(start) == 1
    assert found.model["norm.num_batches_tracked"] == start["norm.num_batches_tracked"]
    assert found.settings == {"holders": 2, "learning_rate": 0.5}
    assert not found.exact
    assert (asked.action, asked.to) == (step.action, tuple(map(client, range(3))))
    assert step.model_validate(dict(asked.config)) == step(
        learning_rate=0.5, **TOKENS.rows()
    )  # fmt: skip
    assert value(asked.arrays) == 1
    assert asked.expects is None
    assert not asked.everybody


@pytest.mark.parametrize(("strength", "expected"), [(0.0, 1), (0.5, 1.875), (1.0, 2.75), (2.0, 4)])
def test_strength_multiplies_a_holders_weight_up_to_all_of_its_change(strength, expected):
    # 1 + s 3/4 (2 - 1) + s 1/4 (5 - 1), no weight above 1: of s = 2, 1 + 1 + 2 = 4.
    made = Holders(name="ascent", step=Ascent, strength=strength)
    found, _ = run(made.plan(situation(waiting((0, 1)))), holding((2, 30), (5, 10)))
    assert value(found.model) == pytest.approx(expected)


@pytest.mark.parametrize("strength", [-0.1, math.nan])
def test_a_strength_that_would_do_the_opposite_is_refused(strength):
    with pytest.raises(SecateurError, match="strength of holders must be at least 0"):
        Holders(name="ascent", step=Ascent, strength=strength)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 9)), min_size=1, max_size=6))
def test_the_result_is_between_the_answers(held):
    counted = [(made, count) for made, count in held if count]
    plan = ascending().plan(situation(waiting(range(len(held)))))
    if not counted:
        with pytest.raises(MissingNeedError, match="needs that holders answer"):
            run(plan, holding(*held))
        return
    found, _ = run(plan, holding(*held))
    whole = sum(count for _, count in counted)
    expected = sum(made * count / whole for made, count in counted)
    assert value(found.model) == pytest.approx(expected, abs=1e-4)


def test_holders_that_do_not_answer_weigh_nothing():
    found, _ = run(
        ascending().plan(situation(waiting((0, 1, 2)))), holding((2, 30), (None, 0), (5, 10))
    )
    assert value(found.model) == pytest.approx(2.75)
    with pytest.raises(MissingNeedError, match="ascent needs that holders answer, and none of 2"):
        run(ascending().plan(situation(waiting((0, 1)))), holding((None, 0), (None, 0)))


def test_only_the_holders_that_are_named_are_asked():
    _, (asked,) = run(
        ascending().plan(situation(waiting((1,)), active=range(5))), holding((9, 1), (2, 3))
    )
    assert asked.to == (client(1),)


def test_an_answer_that_is_no_model_is_refused():
    def reply(who, question):
        return Answer(who, model(math.inf), {"rows": 1}, 1)

    with pytest.raises(ParametersError, match="finite"):
        run(ascending().plan(situation(waiting((0,)))), reply)


# ---------------------------------------------------------------- amnesiac
def logged(*rows, first=1, gone=(0.25, 0.5, 0.0)):
    """Clients of which each has so many rows left to take back, and Z_k = ``gone[k]``."""

    def reply(who, question):
        number = int(who[-1])
        if question.action == Batches.action:
            return Answer(who, None, {"rows": rows[number], "first-round": first}, 1)
        answer = {
            name: tensor - gone[number] if tensor.is_floating_point() else tensor
            for name, tensor in question.arrays.items()
        } | {name: torch.tensor([99.0]) for name in question.arrays if name == BUFFER}
        return Answer(who, answer, {"batches": 4 * gone[number]}, 10**number)

    return reply


def test_every_holders_batches_are_subtracted_whole():
    # Z = 0.25 and 0.5: w - Z_0 - Z_1 = 1 - 0.75, whatever a holder weighs. The third has no rows.
    start = model() | {BUFFER: torch.tensor([7.0])}
    found, (checked, asked) = run(
        TakeBack().plan(situation(waiting((0, 1, 2)), start=start)), logged(2, 1, 0)
    )
    # Buffers are the server's own.
    assert found.model.pop(BUFFER) == start.pop(BUFFER) == 7
    assert value(found.model) == 0.25
    assert value(start) == 1
    assert found.settings == {"batches": 3, "holders": 2}
    # All are asked whether they can before anybody takes anything back.
    assert (checked.action, checked.everybody, checked.arrays) == ("query.batches", True, None)
    assert checked.to == tuple(map(client, range(3)))
    assert (asked.action, asked.everybody) == ("train.amnesiac", True)
    assert asked.to == tuple(map(client, range(2)))
    for question in (checked, asked):
        assert dict(question.config) == Amnesiac(**CLASS.rows()).config()
    assert asked.arrays is start


def test_of_who_leaves_everything_is_taken_back():
    _, (_, asked) = run(
        TakeBack().plan(situation(waiting((3,), None), active=(0, 1))),
        logged(0, 0, 0, 9, gone=[0] * 4),
    )
    assert (asked.to, asked.config["forget"]) == ((client(3),), "all")


def test_what_was_taken_back_already_is_refused():
    with pytest.raises(RefusedRequestError, match="already removed, or never held: none of 2"):
        run(TakeBack().plan(situation(waiting((0, 1)))), logged(0, 0))


@pytest.mark.parametrize(("first", "whole"), [(1, True), (2, True), (3, False)])
def test_a_log_must_begin_with_its_clients_first_round(first, whole):
    remembered = memory(model(), model())
    remembered.first_rounds = {client(1): 2}
    plan = TakeBack().plan(situation(waiting((1,)), remembered=remembered))
    if whole:
        assert run(plan, logged(0, 1, first=first))[0].settings["holders"] == 1
        return
    with pytest.raises(NoBatchLogError, match=r"client-0001 begins in round 3, and .* round 2 on"):
        run(plan, logged(0, 1, first=first))


def test_where_models_are_no_averages_a_warning_tells():
    plan = TakeBack().plan(replace(situation(waiting((0,))), averages=False))
    (warning,) = run(plan, logged(1))[0].warnings
    assert warning.startswith("not_an_average: amnesiac")


# ---------------------------------------------------------------- PGA
ENTRIES = sum(tensor.numel() for tensor in trained(model()).values())


def leaving(made, remembered, start):
    """A situation in which client 1 leaves, with what the method froze."""
    evidence = made.freeze(remembered, start, [client(1)])
    return situation(
        waiting((1,), None, evidence), active=(0, 2), start=start, remembered=remembered
    )


def test_a_ball_is_half_as_wide_as_the_way_from_the_start_and_liars_end_on_its_surface():
    # w_ref = 1 and w_0 = 0 in all of n entries: radius sqrt(n) / 2. What is far outside, 1e6 in
    # every entry, is pulled back to 1 + 1/2 in every entry; what is inside stays.
    remembered = memory(model(0.8), model(3.0))
    for sent, expected in ((1e6, 1.5), (-1e6, 0.5), (1.25, 1.25)):
        found, (asked,) = run(
            Ball(settings={"epochs": 3}).plan(leaving(Ball(), remembered, model())),
            lambda who, question, sent=sent: Answer(
                who, model(sent) | {"norm.num_batches_tracked": torch.tensor(99)}, {}, 1
            ),
        )
        assert value(found.model) == pytest.approx(expected, abs=1e-4)
        assert found.model["norm.num_batches_tracked"] == model()["norm.num_batches_tracked"]
        assert found.settings["radius"] == pytest.approx(math.sqrt(ENTRIES) / 2)
        distance = abs(expected - 1) * math.sqrt(ENTRIES)
        assert found.settings["distance"] == pytest.approx(distance, abs=1e-3)
    told = Ascend.model_validate(dict(asked.config))
    assert told == Ascend(forget="all", radius=found.settings["radius"], epochs=3)
    assert (asked.to, asked.everybody) == ((client(1),), True)
    sent = parted(asked.arrays)
    assert sent.keys() == {"reference", "leaver"}
    assert (value(sent["reference"]), value(sent["leaver"])) == (1, 3)
    assert asked.expects.keys() == model().keys()


def test_a_radius_of_ones_own_and_one_from_the_last_round():
    def inside(who, question):
        return Answer(who, parted(question.arrays)["reference"], {}, 1)

    found, _ = run(
        Ball(radius=0.25).plan(leaving(Ball(), memory(model(), model(3.0)), model())), inside
    )
    assert found.settings == {"radius": 0.25, "distance": 0}
    unknown = memory(model(), model(3.0))
    unknown.initial = None  # then from where the last round started: 1 - 0.5
    found, _ = run(Ball().plan(leaving(Ball(), unknown, model())), inside)
    assert found.settings["radius"] == pytest.approx(0.5 * math.sqrt(ENTRIES) / 2)


def test_what_pga_froze_is_a_copy_without_what_others_sent():
    sent, start = model(3.0), model()
    remembered = memory(model(), sent)
    last, reference = Ball().freeze(remembered, start, [client(1)])
    assert last.locals_.keys() == last.weights.keys() == {client(1)}
    for live in (start, *(remembered.last.locals_.values()), remembered.last.previous):
        for tensor in trained(live).values():
            tensor.fill_(7.0)
    assert (value(reference), value(last.locals_[client(1)])) == (1, 3)
    assert value(last.previous) == 0.5


def test_pga_needs_the_last_round_of_who_leaves():
    for remembered in (memory(model()), memory()):
        remembered.last = None if not remembered.last.locals_ else remembered.last
        with pytest.raises(NoLastRoundError, match="pga needs the leaving client's model"):
            Ball().freeze(remembered, model(), [client(1)])


# ---------------------------------------------------------------- rounds of other training
def stepping(who, question):
    """Clients 0, 1 and 2 move by 1, 2 and 3; equal weights, so a round moves by 2."""
    moved = {n: t + 1 + int(who[-1]) if t.is_floating_point() else t
             for n, t in question.arrays.items()}  # fmt: skip
    return Answer(who, moved, {}, 1)


STEPS = {
    # Round 4: half of 4 rounds from round 0; a fifth of 4, rounded up, from now; 4 from now.
    "rapid-retraining": (rapid, Rapid, {"rapid_rate": 0.25}, [1, 2], 0.0, True),
    "noisy-gd": (noisy, Noisy, {"noise": 0.25, "clip": 2.0}, [5], 1.0, False),
    "rcad": (rcad, Rcad, {"strength": 0.5}, [5, 6, 7, 8], 1.0, False),
}


@pytest.mark.parametrize("name", STEPS)
def test_rounds_of_a_step_carry_its_settings(name):
    make, step, own, numbers, origin, exact = STEPS[name]
    told = []

    def played(number, start, answers):
        told.append((number, round(value(start), 4), len(answers)))

    start = model()
    found, asked = run(
        make(**own).plan(situation(waiting((0, 1, 2)), start=start, played=played)), stepping
    )
    assert make(**own).name == name
    assert [question.config["round"] for question in asked] == numbers
    for place, question in enumerate(asked):
        assert (question.action, question.mean) == (step.action, True)
        assert question.to == tuple(map(client, range(3)))
        assert step.model_validate(dict(question.config)) == step(**own)
        assert value(question.arrays) == pytest.approx(origin + 2 * place)
    assert value(found.model) == pytest.approx(origin + 2 * len(numbers))
    assert (found.exact, found.origin) == (exact, 0 if exact else None)
    assert found.settings["rounds"] == len(numbers)
    assert value(start) == 1
    if exact:  # what was played again takes the place of what was
        assert told == [(n, 2.0 * (n - 1), 3) for n in numbers]
    else:
        assert told == []
        assert step(**own).config().items() <= found.settings.items()


def test_shares_of_rounds_are_rounded_up_and_a_step_is_no_plain_training():
    assert len(run(noisy(share=0.51).plan(situation(waiting((0,)))), stepping)[1]) == 3
    assert len(run(rapid(share=0.51).plan(situation(waiting((0,)))), stepping)[1]) == 3
    assert [rapid().rounds(n) for n in (1, 4, 5)] == [1, 2, 3]
    _, asked = run(Retrain().plan(situation(waiting((0,)))), stepping)
    assert [(q.action, dict(q.config)) for q in asked] == [
        ("train", {"round": n}) for n in range(1, NUMBER + 1)
    ]


@pytest.mark.parametrize("name", STEPS)
def test_training_that_too_few_answer_is_no_forgetting(name):
    make, _, own, numbers, _, _ = STEPS[name]

    def silent(who, question):
        return None

    def aggregate(number, start, answers):
        return federated_average(number, start, answers) if answers else start

    start = situation(waiting((0,)), aggregate=aggregate)
    with pytest.raises(ReplayError, match=f"1 of the first 1 of {len(numbers)} rounds"):
        run(make(**own).plan(start), silent)


def test_a_round_without_a_model_among_many_is_warned_of():
    def aggregate(number, start, answers):
        return start if number == NUMBER + 2 else federated_average(number, start, answers)

    start = situation(waiting((0,)), aggregate=aggregate)
    found, asked = run(rcad(share=2.0).plan(start), stepping)
    assert len(asked) == 8
    assert found.warnings == ("rounds without a model: 6",)
    assert value(found.model) == pytest.approx(1 + 7 * 2)


def test_joined_and_copied_models_are_apart():
    one = joined(reference=model(), leaver=model(2.0))
    assert parted(one).keys() == {"reference", "leaver"}
    assert value(copied(parted(one)["leaver"])) == 2
