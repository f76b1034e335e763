"""Methods in which holders change the model, and rounds of other training: with canned answers."""

import math
import re
from dataclasses import replace
from statistics import median_low

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
from strategies.methods.catalogue import MAKE
from strategies.methods.holders import (
    Ball,
    Holders,
    TakeBack,
    ascending,
    flipping,
    macforget,
    named,
)
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
    # w = 1, answers 2 and 5 of 20 and 10 rows: 1 + 2/3 (2 - 1) + 1/3 (5 - 1) = 3. The third
    # holds nothing, whatever it sends.
    start = model()
    found, (asked,) = run(
        make(learning_rate=0.5).plan(situation(waiting((0, 1, 2), TOKENS), start=start)),
        holding((2, 20), (5, 10), (9, 0, 1000)),
    )
    assert value(found.model) == pytest.approx(3)
    assert value(start) == 1
    assert found.model["norm.num_batches_tracked"] == start["norm.num_batches_tracked"]
    assert {"holders": 2, "strength": 1.0, "learning_rate": 0.5}.items() <= found.settings.items()
    assert not found.exact
    assert (asked.action, asked.to) == (step.action, tuple(map(client, range(3))))
    assert step.model_validate(dict(asked.config)) == step(
        learning_rate=0.5, **TOKENS.rows()
    )  # fmt: skip
    assert value(asked.arrays) == 1
    assert asked.expects is None
    assert (asked.everybody, asked.away) == (True, True)  # who refuses may not be missing


@pytest.mark.parametrize(
    ("strength", "expected"), [(0.0, 1), (0.5, 2), (1.0, 3), (1.5, 4), (2.0, 14 / 3)]
)
def test_strength_multiplies_a_holders_weight_up_to_all_of_its_change(strength, expected):
    # 1 + s 2/3 (2 - 1) + s 1/3 (5 - 1), no weight above 1: of s = 1.5, 1 + 1 + 2 = 4. At s = 2 the
    # first one's would be 4/3, and counts as 1: 1 + 1 + 2/3 4.
    made = Holders(name="ascent", step=Ascent, strength=strength)
    found, _ = run(made.plan(situation(waiting((0, 1)))), holding((2, 20), (5, 10)))
    assert value(found.model) == pytest.approx(expected)


def test_a_holders_weight_is_capped_among_those_that_hold_something():
    # Rows 4, 5 and 900, median 5: the third counts as 10, whatever those without rows weigh.
    claims = holding((2, 4), (2, 5), (21, 900), (9, 0, 700), (9, 0, 700), (9, 0, 700))
    found, _ = run(ascending().plan(situation(waiting(range(6)))), claims)
    assert value(found.model) == pytest.approx(1 + (4 + 5 + 10 * 20) / 19)
    (warning,) = found.warnings
    assert warning.startswith("capped: client-0002 claims 900 rows, more than 2 times the")
    made = Holders(name="ascent", step=Ascent, weight_cap=3.0)
    found, _ = run(made.plan(situation(waiting(range(6)))), claims)
    assert value(found.model) == pytest.approx(1 + (4 + 5 + 15 * 20) / 24)


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
    most = 2 * median_low(count for _, count in counted)
    whole = sum(min(count, most) for _, count in counted)
    expected = sum(made * min(count, most) / whole for made, count in counted)
    assert value(found.model) == pytest.approx(expected, abs=1e-4)


def test_holders_that_do_not_answer_weigh_nothing():
    found, _ = run(
        ascending().plan(situation(waiting((0, 1, 2)))), holding((2, 20), (None, 0), (5, 10))
    )
    assert value(found.model) == pytest.approx(3)
    with pytest.raises(MissingNeedError, match="ascent needs that holders answer, and none of 2"):
        run(ascending().plan(situation(waiting((0, 1)))), holding((None, 0), (None, 0)))


@pytest.mark.parametrize("make", [macforget, ascending])
def test_how_far_holders_got_is_in_the_record_and_that_none_moved_is_warned_of(make):
    def saying(*told):
        def reply(who, question):
            moved, rows, steps = told[int(who[-1])]
            metrics = {"rows": rows, "steps": steps, "stopped": int(not steps)}
            return Answer(who, model(1.0 + moved), metrics, max(1, rows))

        return reply

    plan = make().plan(situation(waiting((0, 1, 2))))
    found, _ = run(plan, saying((0.5, 10, 7), (0.0, 10, 0), (0.0, 0, 0)))
    steps = {"steps": 7, "most_steps": 7, "stopped": 1, "most_stopped": 1}
    assert found.progress == {
        "holders_moved": 1, "farthest": pytest.approx(0.5 * math.sqrt(ENTRIES)),
        **(steps if make is macforget else {}),
    }  # fmt: skip
    assert found.warnings == ()
    found, _ = run(make().plan(situation(waiting((0, 1)))), saying((0.0, 10, 0), (0.0, 5, 0)))
    assert (found.progress["holders_moved"], found.progress["farthest"]) == (0, 0)
    (warning,) = found.warnings
    assert warning.startswith("unmoved: none of 2 holders changed the model")
    assert value(found.model) == 1


@pytest.mark.parametrize(("floor", "measured", "warned"), [(0.1, 0, 1), (0.1, 1, 0), (0.0, 0, 0)])
def test_a_floor_that_nobody_could_measure_is_warned_of(floor, measured, warned):
    made = Ball(radius=0.25, settings={"floor": floor, "farthest": 1e3})

    def reply(who, question):
        told = {"rows": 3, "steps": 4, "stopped": 0, "floor_measured": measured}
        return Answer(who, parted(question.arrays)["reference"], told, 1)

    found, _ = run(made.plan(leaving(made, memory(model(), model(3.0)), model())), reply)
    assert len(found.warnings) == warned
    assert all(text.startswith("floor_not_measured: client-0001") for text in found.warnings)
    assert found.progress == {"steps": 4, "distance": 0, "stopped": 0, "floor_measured": measured}


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
def logged(*rows, first=1, gone=(0.25, 0.5, 0.0), keeps=()):
    """Clients of which each has so many rows left to take back, and Z_k = ``gone[k]``.

    Those in ``keeps`` still have them when they are told that it was taken back.
    """
    told = []

    def reply(who, question):
        number = int(who[-1])
        if question.action == Batches.action:
            left = rows[number] if who not in told or number in keeps else 0
            told.append(who)
            return Answer(who, None, {"rows": left, "first-round": first}, 1)
        answer = {
            name: tensor - gone[number] if tensor.is_floating_point() else tensor
            for name, tensor in question.arrays.items()
        } | {name: torch.tensor([99.0]) for name in question.arrays if name == BUFFER}
        return Answer(who, answer, {"batches": 4 * gone[number]}, 10**number)

    return reply


def test_every_holders_batches_are_subtracted_whole():
    # Z = 0.25 and 0.5: w - Z_0 - Z_1 = 1 - 0.75, whatever a holder weighs. The third has no rows.
    start = model() | {BUFFER: torch.tensor([7.0])}
    remembered = memory()
    found, (checked, asked, told) = run(
        TakeBack().plan(situation(waiting((0, 1, 2)), start=start, remembered=remembered)),
        logged(2, 1, 0),
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
    assert asked.arrays is start
    request = asked.config["request"]
    assert dict(asked.config) == Amnesiac(**CLASS.rows(), request=request).config()
    # Then those who did are told; what a message to them says of it is not the plan's.
    assert remembered.taken_back == (request,)
    assert (told.action, told.to, told.everybody) == ("query.batches", asked.to, False)
    for question in (checked, told):
        assert dict(question.config) == Batches(**CLASS.rows()).config()
    assert found.warnings == ()


def test_a_request_is_called_the_same_only_for_the_same_rows_in_the_same_round():
    def called(selection, **more):
        return named(replace(situation(waiting((0,), selection)), **more))

    assert called(CLASS) == called(CLASS)
    assert len({called(CLASS), called(TOKENS), called(CLASS, number=NUMBER + 1)}) == 3


def test_nothing_counts_as_taken_back_before_all_have_answered_with_something_finite():
    remembered = memory()

    def lost(who, question):
        raise RefusedRequestError(f"no answer to {question.action}")

    for reply, error in (
        (logged(1, 1, gone=[-3e38, -3e38]), ParametersError),
        (lambda who, q: (lost if q.action == Amnesiac.action else logged(1, 1))(who, q),
         RefusedRequestError),
    ):  # fmt: skip
        with pytest.raises(error):
            run(TakeBack().plan(situation(waiting((0, 1)), remembered=remembered)), reply)
        assert remembered.taken_back == ()


def test_who_keeps_what_was_taken_back_is_named():
    found, _ = run(TakeBack().plan(situation(waiting((0, 1)))), logged(1, 2, keeps=(1,)))
    assert found.warnings == ("not deleted: client-0001 can still take back the same",)


def test_of_who_leaves_everything_is_taken_back():
    _, (_, asked, _) = run(
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


def test_a_log_that_tells_of_training_that_does_not_count_is_of_no_use():
    remembered = memory()
    remembered.unlogged = {client(1): 3}
    for holder, fails in ((0, False), (1, True)):
        plan = TakeBack().plan(situation(waiting((holder,)), remembered=remembered))
        if fails:
            with pytest.raises(NoBatchLogError, match="client-0001 is of no use from round 3 on"):
                run(plan, logged(1, 1))
        else:
            assert run(plan, logged(1, 1))[0].settings["holders"] == 1


# ---------------------------------------------------------------- PGA
ENTRIES = sum(tensor.numel() for tensor in trained(model()).values())


def leaving(made, remembered, start):
    """A situation in which client 1 leaves, with what the method froze."""
    evidence = made.freeze(remembered, start, [client(1)])
    return situation(
        waiting((1,), None, evidence), active=(0, 2), start=start, remembered=remembered
    )


FROM_START = Ball(radius="start", settings={"epochs": 3, "farthest": 1e3})


def inside(who, question, **metrics):
    return Answer(who, parted(question.arrays)["reference"], metrics, 1)


def test_a_ball_from_the_start_and_liars_end_on_its_surface():
    # w_ref = 1 and w_0 = 0 in all of n entries: radius sqrt(n) / 2. What is far outside, 1e6 in
    # every entry, is pulled back to 1 + 1/2 in every entry; what is inside stays.
    remembered = memory(model(0.8), model(3.0))
    for sent, expected in ((1e6, 1.5), (-1e6, 0.5), (1.25, 1.25)):
        found, (asked,) = run(
            FROM_START.plan(leaving(FROM_START, remembered, model())),
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
    radius = found.settings["radius"]
    assert told == Ascend(forget="all", radius=radius, epochs=3, farthest=1e3)
    assert (asked.to, asked.everybody) == ((client(1),), True)
    sent = parted(asked.arrays)
    assert sent.keys() == {"reference", "leaver"}
    assert (value(sent["reference"]), value(sent["leaver"])) == (1, 3)
    assert asked.expects.keys() == model().keys()


def test_the_radius_is_measured_by_freshly_initialised_models():
    # w_ref = 1, drawn models 2 and 4 in all of n entries: sqrt(1/3 (n + 9 n) / 2).
    made = Ball(drawn=lambda: iter([model(2.0), model(4.0)]))
    found, (asked,) = run(made.plan(leaving(made, memory(model(), model(3.0)), model())), inside)
    assert found.settings["radius"] == pytest.approx(math.sqrt(5 * ENTRIES / 3))
    assert asked.config["radius"] == found.settings["radius"]


def test_a_radius_that_nothing_tells_is_refused_and_one_of_ones_own_is_taken():
    with pytest.raises(MissingNeedError, match="there are none; give some, or a radius"):
        leaving(Ball(), memory(model(), model(3.0)), model())
    unknown = memory(model(), model(3.0))
    unknown.initial = None  # half of the last round's step would be no ball to forget in
    with pytest.raises(MissingNeedError, match="radius = start needs the initial model"):
        leaving(FROM_START, unknown, model())
    own = Ball(radius=0.25)
    found, _ = run(own.plan(leaving(own, unknown, model())), inside)
    assert {"radius": 0.25, "distance": 0}.items() <= found.settings.items()


@pytest.mark.parametrize(("farthest", "warned"), [(1.9, True), (2.1, False)])
def test_a_start_that_is_too_far_to_climb_from_is_warned_of(farthest, warned):
    # Models 1 and 1 + 2 / sqrt(n) in all of n entries are 2 apart.
    apart = model(1 + 2 / math.sqrt(ENTRIES))
    made = Ball(radius=0.25, settings={"farthest": farthest, "floor": 0.0})
    found, _ = run(made.plan(leaving(made, memory(model(), apart), model())), inside)
    told = f"far_at_first: the others' average is 2 from .* farther than {farthest} from it"
    assert bool(found.warnings) == warned
    assert all(re.match(told, warning) for warning in found.warnings)


def test_how_the_ascent_went_is_told_as_far_as_the_client_says():
    made = Ball(radius=0.25)
    pending = leaving(made, memory(model(), model(3.0)), model())
    found, _ = run(made.plan(pending), lambda w, q: inside(w, q, steps=7, stopped=1, rows=9))
    assert {"radius": 0.25, "distance": 0}.items() <= found.settings.items()
    assert found.progress == {"steps": 7, "distance": 0, "stopped": 1, "floor_measured": 0}


@pytest.mark.parametrize(
    "name", ["ascent", "label-flip", "macforget", "pga", "rapid-retraining", "noisy-gd", "rcad"]
)
def test_what_a_method_is_not_set_by_is_refused_when_it_is_made(name):
    with pytest.raises(
        SecateurError, match=rf"^{name} has no setting lerning_rate = 9\.0; it has "
    ):
        MAKE[name](lerning_rate=9.0)
    # What says whose rows are meant, and what the messages' own keys are called, is no setting.
    for key in ("forget", "forget_class", "learning-rate"):
        with pytest.raises(SecateurError, match=f"^{name} has no setting {key} = 'all'"):
            MAKE[name](**{key: "all"})
    with pytest.raises(SecateurError) as caught:
        MAKE[name](colour="red")
    offered = str(caught.value).partition("it has ")[2].split(", ")
    assert len(offered) > 1
    asked = {"strength", "share", "radius"} & set(offered)
    assert MAKE[name](**dict.fromkeys(asked, 0.5)) is not None  # what it offers, it takes


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ascent", {"epochs": 0}, "ascent: epochs = 0: Input should be greater than or equal to 1"),
        ("ascent", {"pattern": "plaid"}, "ascent: pattern = 'plaid': Input should be 'comb'"),
        ("ascent", {"strength": -1.0}, "strength of holders must be at least 0, got -1.0"),
        (
            "label-flip",
            {"first": "much"},
            "label-flip: first = 'much': Input should be a valid num",
        ),
        ("label-flip", {"learning_rate": math.inf}, "learning_rate = inf: a setting must be a fin"),
        ("macforget", {"share": 1.5}, "macforget: share = 1.5: Input should be less than or equal"),
        ("macforget", {"strength": math.nan}, "strength of holders must be at least 0, got nan"),
        ("pga", {"floor": 2}, "pga: floor = 2: Input should be less than or equal to 1"),
        ("pga", {"radius": -1.0}, "radius of a ball must be at least 0, got -1.0"),
        ("rapid-retraining", {"rapid_rate": 0}, "rapid_rate = 0: Input should be greater than 0"),
        ("rapid-retraining", {"share": 0.0}, "share of rounds that rapid-retraining plays must be"),
        ("noisy-gd", {"clip": -2}, "noisy-gd: clip = -2: Input should be greater than 0"),
        ("rcad", {"share": math.nan}, "share of rounds that rcad plays must be over 0, got nan"),
    ],
)
def test_values_that_cannot_be_are_one_line_when_a_method_is_made(name, wrong, message):
    with pytest.raises(SecateurError, match=re.escape(message)) as caught:
        MAKE[name](**wrong)
    assert "\n" not in str(caught.value)


def test_settings_are_told_in_their_types_and_all_of_them():
    made = ascending(epochs="7", partial="no")
    found, (asked,) = run(made.plan(situation(waiting((0,)))), holding((2.0, 30)))
    told = Ascent(forget="none", epochs=7, partial=False).model_dump(
        exclude={"forget", "forget_class", "forget_tokens"}
    )
    assert {key: found.settings[key] for key in told} == told
    assert (asked.config["epochs"], asked.config["partial"]) == (7, False)


def test_what_pga_froze_is_a_copy_without_what_others_sent():
    sent, start = model(3.0), model()
    remembered = memory(model(), sent)
    last, reference, radius = FROM_START.freeze(remembered, start, [client(1)])
    assert last.locals_.keys() == last.weights.keys() == {client(1)}
    for live in (start, *(remembered.last.locals_.values()), remembered.last.previous):
        for tensor in trained(live).values():
            tensor.fill_(7.0)
    assert (value(reference), value(last.locals_[client(1)])) == (1, 3)
    assert value(last.previous) == 0.5
    assert radius == pytest.approx(math.sqrt(ENTRIES) / 2)


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
        assert {kebab(n): v for n, v in own.items()}.items() <= found.settings.items()
        assert not found.settings.keys() & set(TOKENS.config())


def kebab(name):
    return name.replace("_", "-")


@pytest.mark.parametrize(
    ("pending", "told", "warning"),
    [
        ([waiting((0,), TOKENS)], TOKENS, None),
        ([waiting((0,), TOKENS), waiting((1,), CLASS)], TOKENS, "one_source"),
        ([waiting((3,), None)], Selection(forget="none"), "no_source"),
    ],
)
def test_rcad_may_perturb_what_is_forgotten_and_says_whose(pending, told, warning):
    found, asked = run(rcad(source="forget").plan(situation(*pending)), stepping)
    assert all(told.config().items() <= dict(question.config).items() for question in asked)
    assert asked[0].config["source"] == found.settings["source"] == "forget"
    assert [text.split(":")[0] for text in found.warnings] == ([warning] if warning else [])
    _, usual = run(rcad().plan(situation(*pending)), stepping)
    assert usual[0].config["forget"] == "none"


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
