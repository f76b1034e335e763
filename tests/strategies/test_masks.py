"""Masks and noise by sums that clients send: against one data set, and against liars."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.actions import Selection, Statistics, joined
from strategies.methods.interface import Network
from strategies.methods.masks import (
    MASKS,
    ClassDiscriminative,
    Mask,
    Noise,
)
from strategies.methods.survey import StatisticsError
from tests.strategies.canned import CLASS, model, run, situation, trained, waiting
from tests.strategies.small import client
from unlearning import channel_masks, fisher, masking, tfidf
from unlearning import sums as adding
from unlearning.channel_masks import Convolution
from unlearning.errors import MissingNeedError
from unlearning.plan import Answer
from unlearning.randomness import generator

RATE = 0.3
NETWORK = Network((Convolution("first"), Convolution("second")), ("last.weight",), 2)
NOISE = Noise(network=Network(head=("last.weight", "last.bias")))
LIKE = {"first": torch.zeros(3), "second": torch.zeros(2)}


def images(value=1.0):
    """Two convolutions of 3 and 2 channels, a linear layer and a counter."""
    return {
        "first.weight": torch.full((3, 1, 2, 2), value),
        "first.bias": torch.full((3,), value),
        "second.weight": torch.full((2, 3, 2, 2), value),
        "second.bias": torch.full((2,), value),
        "last.weight": torch.full((2, 2), value),
        "norm.num_batches_tracked": torch.tensor(7),
    }


def rows(like, count, seed):
    """What single rows add, as whole numbers from 1 to 5: means differ by less than 10 times."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randint(1, 6, t.shape, generator=draw).float() for name, t in like.items()}
        for _ in range(count)
    ]


def total(parts, like):
    return {name: sum((part[name] for part in parts), torch.zeros(t.shape))
            for name, t in like.items()}  # fmt: skip


def answering(groups, like):
    """Clients with lists of rows per group: ``groups[client][group]``."""

    def reply(who, question):
        held = groups[int(who[-4:])]
        counts = {f"{group}-count": len(part) for group, part in held.items()}
        sums = {group: total(part, like) for group, part in held.items()}
        return Answer(who, joined(**sums), counts, 100)  # all have as many rows, and more

    return reply


def changed(reply, *, of=1, metrics=None, **tensors):
    """Let one client send other tensors or counts."""

    def lie(who, question):
        honest = reply(who, question)
        if who != client(of):
            return honest
        named = {name.replace("__", "/").replace("_dot_", "."): t for name, t in tensors.items()}
        return dataclasses.replace(
            honest,
            arrays={**honest.arrays, **named},
            metrics={**honest.metrics, **(metrics or {})},
        )

    return lie


def means(parts, like):
    return {name: tensor / len(parts) for name, tensor in total(parts, like).items()}


def highest(scores, rate):
    """The ceil(R n) highest of all scores, the earlier of equal ones, by sorting."""
    flat = [float(x) for tensor in scores.values() for x in tensor.reshape(-1)]
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[: math.ceil(rate * len(flat))]
    chosen, start = {}, 0
    for name, tensor in scores.items():
        places = [i - start for i in order if start <= i < start + tensor.numel()]
        chosen[name] = torch.zeros(tensor.numel(), dtype=torch.bool)
        chosen[name][places] = True
        chosen[name] = chosen[name].reshape(tensor.shape)
        start += tensor.numel()
    return chosen


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- sums add
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=3),
)
def test_a_fisher_mask_is_that_of_one_data_set(seed, counts):
    like = trained(model())
    forget, remain = rows(like, 12, seed), rows(like, 12, seed + 1)
    groups, a, b = [], 1, 1  # one row of either at least
    for number, (more, others) in enumerate(counts):
        first = number == 0
        groups.append({"forget": forget[0 if first else a : a + more],
                       "remain": remain[0 if first else b : b + others]})  # fmt: skip
        a, b = a + more, b + others
    found, (asked,) = run(
        Mask(rate=RATE).plan(situation(waiting((0, 1, 2)))), answering(groups, like)
    )
    ours, theirs = means(forget[:a], like), means(remain[:b], like)
    chosen = highest({name: ours[name] - theirs[name] for name in like}, RATE)
    same(found.masks, chosen)
    start = model()
    for name, tensor in found.model.items():
        mask = chosen.get(name, torch.zeros(tensor.shape, dtype=torch.bool))
        assert torch.equal(tensor, start[name].masked_fill(mask, 0))
    assert asked.action == Statistics.action
    assert (asked.config["kind"], asked.config["forget-class"]) == ("fisher", 1)
    assert asked.expects.keys() == joined(forget=like, remain=like).keys()
    # A pruned share bounds FedUP's recovery and nobody else's.
    assert found.rate == 0
    assert not found.exact


def channels(kind, seed=3):
    """Three clients, their rows in groups, and what kind of question that answers."""
    groups = {"activation-mask": ("forget", "remain"), "grad-mask": ("forget",)}.get(kind, "01")
    held = [
        {group: rows(LIKE, 2 + n, seed + 10 * n + place) for place, group in enumerate(groups)}
        for n in range(3)
    ]
    reply = answering(held, LIKE)
    made = (
        ClassDiscriminative(network=NETWORK, rate=2 * RATE)
        if kind == "tfidf"
        else Mask(name=kind, network=NETWORK, rate=RATE)
    )
    pooled = {group: [row for part in held for row in part[group]] for group in groups}
    return made, reply, pooled


@pytest.mark.parametrize(
    ("kind", "question"),
    [("activation-mask", "activations"), ("grad-mask", "gradients"), ("tfidf", "classes")],
)
def test_channels_are_those_of_one_data_set(kind, question):
    made, reply, pooled = channels(kind)
    start = situation(waiting((0, 1, 2)), start=images())
    found, (asked,) = run(made.plan(start), reply)
    whole = {
        group: adding.Statistics(total(part, LIKE), len(part)) for group, part in pooled.items()
    }
    if kind == "activation-mask":
        scores = channel_masks.activation_scores(whole["forget"], whole["remain"])
    elif kind == "grad-mask":
        scores = means(pooled["forget"], LIKE)
    else:
        scores = tfidf.tfidf_scores([whole["0"], whole["1"]], 1)
    if kind == "tfidf":
        # Of every layer 0.6, rounded up: 2 of 3 and 2 of 2.
        chosen = {n: highest({n: tensor}, 2 * RATE)[n] for n, tensor in scores.items()}
    else:
        chosen = highest(scores, RATE)
    for layer, mask in chosen.items():
        if kind == "grad-mask":  # 5.3: filters only
            assert f"{layer}.bias" not in found.masks
        else:
            assert torch.equal(found.masks[f"{layer}.bias"], mask)
        filters = found.masks[f"{layer}.weight"].reshape(len(mask), -1)
        assert torch.equal(filters.all(dim=1), mask)
    assert asked.config["kind"] == question
    assert sum(int(mask.sum()) for mask in chosen.values()) > 0
    # 1 = 1 - 0: a masked entry is 0, every other as it was.
    for name, tensor in found.model.items():
        if name in found.masks:
            assert torch.equal(tensor, 1 - found.masks[name].float())
        else:
            assert torch.equal(tensor, images()[name])


def test_tf_idf_by_hand():
    # Class 1, layer first: averages (1, 1, 4), the others' (1, 1, 1). TF = (1/6, 1/6, 4/6). Above
    # their layer's mean are: of class 0, all (1 >= 1); of class 1, the third (4 >= 2). So IDF is
    # ln(3/2), ln(3/2), ln(3/3) = 0: what both classes light up says nothing.
    classes = [[1.0, 1, 1], [1.0, 1, 4]]

    def reply(who, question):
        sums = {str(u): {"first": torch.tensor(v)} for u, v in enumerate(classes)}
        return Answer(who, joined(**sums), {"0-count": 1, "1-count": 1}, 1)

    network = Network((Convolution("first"),), (), 2)
    made = ClassDiscriminative(network=network, rate=0.5)
    found, _ = run(made.plan(situation(waiting((0,)), active=(0,), start=images())), reply)
    assert found.masks["first.bias"].tolist() == [True, True, False]


def test_a_random_mask_asks_nobody_and_comes_from_the_seed():
    masks = []
    for seed in (5, 5, 6):
        plan = Mask(name="random-mask", rate=RATE).plan(situation(waiting((0,)), seed=seed))
        found, asked = run(plan, lambda who, question: None)
        assert not asked
        masks.append(found.masks)
    same(masks[0], masks[1])
    like = trained(model())
    same(masks[0], masking.random_mask(like, RATE, generator(5, "random mask", 4)))
    assert any(not torch.equal(masks[0][name], masks[2][name]) for name in like)
    size = sum(tensor.numel() for tensor in like.values())
    assert sum(int(mask.sum()) for mask in masks[0].values()) == math.ceil(RATE * size)


# ---------------------------------------------------------------- noise
@pytest.mark.parametrize("recipe", ["golatkar", "eq2"])
@pytest.mark.parametrize("selection", [CLASS, Selection(forget="samples", forget_tokens="0" * 32)])
def test_noise_is_shaped_by_the_remaining_rows_of_all(recipe, selection):
    like = trained(model())
    held = [{"remain": rows(like, n + 1, n)} for n in range(3)]
    made = Noise(network=Network(head=("last.weight", "last.bias")), recipe=recipe)
    found, _ = run(
        made.plan(situation(waiting((0, 1, 2), selection), seed=3)), answering(held, like)
    )
    information = means([row for part in held for row in part["remain"]], like)
    draw = generator(3, "fisher noise", 4)
    if recipe == "eq2":
        scale = fisher.noise_scale(model(), information)
        expected = fisher.fisher_noise(model(), information, scale, draw)
    else:
        chosen = 1 if selection is CLASS else None
        expected = fisher.golatkar_noise(
            model(), information, draw, head=("last.weight", "last.bias"), forgotten_class=chosen
        )
    same(found.model, expected)
    assert not torch.equal(found.model["first.weight"], model()["first.weight"])


def test_without_remaining_rows_there_is_no_noise():
    like = trained(model())
    held = [{"remain": []} for n in range(3)]
    with pytest.raises(MissingNeedError, match="no client has any"):
        run(Noise().plan(situation(waiting((0, 1, 2)))), answering(held, like))


# ---------------------------------------------------------------- whose rows count as what
@pytest.mark.parametrize("name", [name for name in MASKS if name != "random-mask"])
def test_all_rows_of_who_leaves_are_to_be_forgotten_and_no_rows_of_others(name):
    made = Mask(name=name, network=NETWORK)
    groups = ("forget",) if name == "grad-mask" else ("forget", "remain")
    start = images()
    like = trained(start) if name == "fisher-mask" else LIKE

    def reply(who, question):
        everything = question.config["forget"] == "all"
        of = {"forget": everything, "remain": not everything}
        held = [{group: rows(like, 2 * of[group], int(who[-1])) for group in groups}] * 9
        return answering(held, like)(who, question)

    leaving = situation(waiting((3,), None), active=(0, 1), start=start)
    found, asked = run(made.plan(leaving), reply)
    told = [(question.to, question.config["forget"]) for question in asked]
    others = [] if name == "grad-mask" else [((client(0), client(1)), "none")]
    assert told == [*others, ((client(3),), "all")]
    assert all(question.config["most-samples"] == made.most_samples for question in asked)
    assert all(question.config["forget-class"] == -1 for question in asked)
    assert any(bool(mask.any()) for mask in found.masks.values())


def test_where_all_hold_it_all_are_asked_for_the_class_at_once():
    like = trained(model())
    held = [{"forget": rows(like, 1, n), "remain": rows(like, 1, n)} for n in range(3)]
    _, (asked,) = run(
        Mask(most_samples=5).plan(situation(waiting((0, 1, 2)))), answering(held, like)
    )  # fmt: skip
    assert asked.to == tuple(map(client, range(3)))
    numbers = {"kind": "fisher", "sets": "both", "most-samples": 5}
    assert dict(asked.config) == {**numbers, **CLASS.config()}
    same(asked.arrays, model())


def test_of_clients_that_are_to_forget_nothing_all_rows_remain():
    like = trained(model())
    gone, others = rows(like, 2, 1), [rows(like, 2, n) for n in (2, 3, 4)]

    def reply(who, question):
        mine = gone if question.config["forget"] == "class" else []
        return answering([{"forget": mine, "remain": part} for part in others], like)(who, question)

    found, asked = run(Mask(rate=RATE).plan(situation(waiting((1,)))), reply)
    told = [(question.to, question.config["forget"]) for question in asked]
    assert told == [((client(0), client(2)), "none"), ((client(1),), "class")]
    ours, theirs = means(gone, like), means([row for part in others for row in part], like)
    same(found.masks, highest({name: ours[name] - theirs[name] for name in like}, RATE))


def test_without_what_remains_holders_alone_are_asked_and_decide():
    like = trained(model())
    held = [{"forget": rows(like, 2, n)} for n in range(3)]
    made = Mask(rate=RATE, remain="none")
    found, (asked,) = run(made.plan(situation(waiting((0, 2)))), answering(held, like))
    assert asked.to == (client(0), client(2))
    assert asked.config["sets"] == "forget"
    assert asked.expects.keys() == joined(forget=like).keys()
    averages = means([row for n in (0, 2) for row in held[n]["forget"]], like)
    same(found.masks, highest(averages, RATE))


@pytest.mark.parametrize("form", ["mean", "sum", "ratio"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_forms_and_scopes_are_those_of_one_data_set(form, scope):
    like = trained(model())
    held = [{"forget": rows(like, 2, n), "remain": rows(like, 3, 9 + n)} for n in range(3)]
    made = Mask(rate=RATE, form=form, scope=scope)
    found, _ = run(made.plan(situation(waiting((0, 1, 2)))), answering(held, like))
    ours, theirs = (
        total([row for part in held for row in part[group]], like) for group in ("forget", "remain")
    )
    scores = {
        "mean": {n: ours[n] / 6 - theirs[n] / 9 for n in like},
        "sum": {n: ours[n] - theirs[n] for n in like},
        "ratio": {n: (ours[n] / 6) / (ours[n] / 6 + theirs[n] / 9) for n in like},
    }[form]
    if scope == "model":
        expected = highest(scores, RATE)
    else:
        expected = {n: highest({n: tensor}, RATE)[n] for n, tensor in scores.items()}
    same(found.masks, expected)
    assert (found.settings["form"], found.settings["scope"]) == (form, scope)


@pytest.mark.parametrize(("recipe", "size"), [("golatkar", "alpha"), ("eq2", "relative")])
def test_without_size_noise_leaves_a_model_as_it_is(recipe, size):
    selection = Selection(forget="samples", forget_tokens="0" * 32)
    waits = situation(waiting((0, 1, 2), selection), start=model())
    made = Noise(network=NOISE.network, recipe=recipe, **{size: 0.0})
    found, _ = run(made.plan(waits), three(made, trained(model())))
    same(found.model, model())


def test_noise_asks_for_no_sums_that_it_does_not_use():
    like = trained(model())
    held = [{"remain": rows(like, 2, n)} for n in range(3)]
    _, (asked,) = run(NOISE.plan(situation(waiting((0, 1, 2)))), answering(held, like))
    assert asked.config["sets"] == "remain"
    assert asked.expects.keys() == joined(remain=like).keys()


def test_with_nothing_that_remains_scores_are_of_what_is_forgotten_alone():
    like = trained(model())
    held = [{"forget": rows(like, 2, n), "remain": []} for n in range(3)]
    found, _ = run(
        Mask(rate=RATE).plan(situation(waiting((0, 1, 2)))), answering(held, like)
    )  # fmt: skip
    same(found.masks, highest(means([r for h in held for r in h["forget"]], like), RATE))


def test_a_mask_by_chance_alone_is_warned_of():
    like = trained(model())
    alike = rows(like, 1, 1)
    held = [{"forget": alike, "remain": alike}] * 3
    found, _ = run(Mask().plan(situation(waiting((0, 1, 2)))), answering(held, like))
    assert "same_scores" in found.warnings[0]
    other = [{"forget": rows(like, 1, 2), "remain": alike}] * 3
    found, _ = run(Mask().plan(situation(waiting((0, 1, 2)))), answering(other, like))
    assert not found.warnings
    # Two more clients of three would do to hold any of them against the others.
    found, _ = run(Mask().plan(situation(waiting((0, 1)), active=(0, 1))), answering(other, like))
    assert [warning.split(":")[0] for warning in found.warnings] == ["unclipped"]
    assert "forget of 2, remain of 2" in found.warnings[0]


# ---------------------------------------------------------------- liars
@pytest.mark.parametrize("name", ["fisher-mask", "activation-mask", "grad-mask", "tfidf"])
@pytest.mark.parametrize("group", [0, 1])
def test_a_liar_moves_a_mask_no_further_than_ten_medians(name, group):
    # Three honest clients and a liar, all with averages of 1 to 5: the median is the second
    # smallest of four, the same where the largest is larger still. So 1e6 times as much counts as
    # exactly 10 medians, whatever else is claimed.
    like = trained(images()) if name == "fisher-mask" else LIKE
    groups = {"grad-mask": ("forget",), "tfidf": ("0", "1")}.get(name, ("forget", "remain"))
    chosen = groups[min(group, len(groups) - 1)]
    held = [{g: rows(like, 3, 7 * n + p) for p, g in enumerate(groups)} for n in range(4)]
    honest = answering(held, like)
    averages = [means(part[chosen], like) for part in held]
    largest = max(range(4), key=lambda n: float(averages[n][next(iter(like))].sum()))

    def saying(average):
        def reply(who, question):
            answer = honest(who, question)
            if who != client(largest):
                return answer
            sums = {f"{chosen}/{n}": 3 * average[n] for n in like}
            return dataclasses.replace(answer, arrays={**answer.arrays, **sums})

        return reply

    others = [averages[n] for n in range(4) if n != largest]
    huge = {n: 1e6 * averages[largest][n] for n in like}
    second = {n: torch.stack([one[n] for one in others]).sort(dim=0)[0][1] for n in like}
    bound = {n: 10 * second[n] for n in like}
    made = (
        ClassDiscriminative(network=NETWORK, rate=RATE)
        if name == "tfidf"
        else Mask(name=name, network=NETWORK, rate=RATE)
    )
    start = situation(waiting(range(4)), active=range(4), start=images())
    lied, limited, true = (
        run(made.plan(start), saying(average))[0]
        for average in (huge, bound, {n: averages[largest][n] for n in like})
    )
    same(lied.masks, limited.masks)
    same(true.masks, run(made.plan(start), honest)[0].masks)


@pytest.mark.parametrize(
    ("sums", "chosen"),
    [
        # -1e6 counts as -10: the channels sum to -8, 3 and 0, and the second is the highest.
        ([[1.0, 1, 0], [1.0, 1, 0], [-1e6, 1, 0]], [False, True, False]),
        # 1e6 counts as 10 where others say -1: they sum to 8, 3 and 0.
        ([[-1.0, 1, 0], [-1.0, 1, 0], [1e6, 1, 0]], [True, False, False]),
        # To 8 and 9: honest clients still decide.
        ([[-1.0, 3, 0], [-1.0, 3, 0], [1e6, 3, 0]], [False, True, False]),
    ],
)
def test_negative_contributions_are_clipped_as_positive_ones_are(sums, chosen):
    def reply(who, question):
        return Answer(who, {"forget/first": torch.tensor(sums[int(who[-1])])},
                      {"forget-count": 1}, 1)  # fmt: skip

    network = Network((Convolution("first"),), (), 2)
    made = Mask(name="grad-mask", network=network, rate=0.3)
    found, _ = run(made.plan(situation(waiting((0, 1, 2)), start=images())), reply)
    assert found.masks["first.weight"].flatten(1).all(dim=1).tolist() == chosen


BAD = {
    "NaN": {"remain__last_dot_bias": torch.tensor([math.nan, 1.0])},
    "infinite": {"remain__last_dot_bias": torch.tensor([math.inf, 1.0])},
    "negative": {"remain__last_dot_bias": torch.tensor([-1.0, 1.0])},
    "of another shape": {"remain__last_dot_bias": torch.ones(3)},
    "of whole numbers": {"remain__last_dot_bias": torch.ones(2, dtype=torch.int64)},
    "of no such tensor": {"remain__other": torch.ones(2)},
    "over no rows": {"metrics": {"remain-count": 0}},
    "over half rows": {"metrics": {"remain-count": 2.5}},
    "over less than no rows": {"metrics": {"remain-count": -2}},
    "over no number of rows": {"metrics": {"remain-count": math.nan}},
    "over infinitely many rows": {"metrics": {"remain-count": math.inf}},
    "over more rows than were asked for": {"metrics": {"remain-count": 2001}},
}


def three(made, like):
    """Three clients with two rows of every set."""
    groups = ("remain",) if isinstance(made, Noise) else ("forget", "remain")
    held = [{g: rows(like, 2, 7 * n + p) for p, g in enumerate(groups)} for n in range(3)]
    return answering(held, like)


def without(reply, *silent):
    return lambda who, question: None if who in map(client, silent) else reply(who, question)


@pytest.mark.parametrize("lie", BAD)
@pytest.mark.parametrize("made", [Mask(), NOISE], ids=["mask", "noise"])
def test_sums_that_cannot_be_are_left_out_by_name(lie, made):
    honest = three(made, trained(model()))
    start, waits = model(), situation(waiting((0, 1, 2)))
    found, _ = run(
        made.plan(situation(waiting((0, 1, 2)), start=start)), changed(honest, **BAD[lie])
    )
    same(start, model())
    expected, _ = run(made.plan(waits), without(honest, 1))
    same(found.model, expected.model)
    unheard = [warning for warning in found.warnings if warning.startswith("unheard")]
    assert len(unheard) == 1
    assert unheard[0].startswith("unheard: query.statistics is without client-0001: no usable")
    assert (found.settings["clients"], expected.settings["clients"]) == (2, 2)


@pytest.mark.parametrize("made", [Mask(), NOISE], ids=["mask", "noise"])
def test_without_half_of_those_asked_a_request_is_refused_with_all_reasons(made):
    honest = three(made, trained(model()))
    bad = BAD["negative"]
    lying = changed(changed(honest, **bad), of=2, metrics={"remain-count": 0.5})
    with pytest.raises(StatisticsError) as refused:
        run(made.plan(situation(waiting((0, 1, 2)))), lying)
    assert "2 of 3 clients, and 1 sent some; client-0001: " in str(refused.value)
    assert "client-0002: no usable statistics: a number of rows is whole" in str(refused.value)
    # Of two, one is half.
    both = situation(waiting((0, 1)), active=(0, 1))
    run(made.plan(both), changed(honest, **bad))


def test_without_any_holder_of_what_is_to_be_forgotten_a_request_is_refused():
    like = trained(model())
    held = [{"forget": rows(like, 2 * (n == 1), n), "remain": rows(like, 2, n)} for n in range(3)]
    plan = Mask().plan(situation(waiting((0, 1, 2))))
    with pytest.raises(StatisticsError, match=r"somebody who holds.*none came; client-0001: no"):
        run(plan, changed(answering(held, like), **BAD["NaN"]))
    run(NOISE.plan(situation(waiting((0, 1, 2)))),
        changed(three(NOISE, like), **BAD["NaN"]))  # fmt: skip


@pytest.mark.parametrize("lie", [None, BAD["negative"]])
def test_who_dropped_rows_and_is_not_heard_is_named(lie):
    honest = three(Mask(), trained(model()))
    reply = without(honest, 1) if lie is None else changed(honest, **lie)
    waits = situation(waiting((0, 1, 2)))
    waits.dropped.update({client(0): 2, client(1): 2, client(2): 2})
    found, _ = run(Mask().plan(waits), reply)
    (told,) = [w for w in found.warnings if w.startswith("unheard_holder")]
    assert told == (
        "unheard_holder: client-0001 dropped 2 rows, and no sums over them came in"
    )  # fmt: skip
    # Who dropped nothing is no holder.
    waits.dropped[client(1)] = 0
    found, _ = run(Mask().plan(waits), without(honest, 1))
    assert not [w for w in found.warnings if w.startswith("unheard_holder")]


def test_sums_over_what_is_to_be_forgotten_that_are_all_zero_are_refused():
    like = trained(model())
    held = [{"forget": rows(like, 2, n), "remain": rows(like, 2, n)} for n in range(3)]
    honest = answering(held, like)

    def nothing(who, question):
        answer = honest(who, question)
        zeros = {n: torch.zeros_like(t) for n, t in answer.arrays.items() if n.startswith("forget")}
        return dataclasses.replace(answer, arrays={**answer.arrays, **zeros})

    with pytest.raises(StatisticsError, match="sums over the 6 rows to forget are all 0"):
        run(Mask().plan(situation(waiting((0, 1, 2)))), nothing)


# ---------------------------------------------------------------- how many rows count
def test_nobody_forgets_more_rows_than_it_dropped():
    honest = three(Mask(), trained(model()))
    for dropped, used in ((2, 3), (1, 2), (0, 2)):
        waits = situation(waiting((0, 1, 2)))
        waits.dropped.update({client(0): 2, client(1): dropped, client(2): 2})
        found, _ = run(Mask().plan(waits), honest)
        assert found.settings["clients"] == used
        claim = f"claim 2 samples, and there are at most {dropped}"
        assert any(claim in warning for warning in found.warnings) == (used == 2)


def test_who_is_to_forget_nothing_has_no_rows_to_forget():
    honest = three(Mask(), trained(model()))

    def reply(who, question):
        answer = honest(who, question)
        if question.config["forget"] == "none" and who == client(0):
            zeros = {n: 0 * t for n, t in answer.arrays.items() if n.startswith("forget")}
            answer = dataclasses.replace(answer, arrays={**answer.arrays, **zeros},
                                         metrics={**answer.metrics, "forget-count": 0})  # fmt: skip
        return answer

    found, _ = run(Mask().plan(situation(waiting((1,)))), reply)
    assert found.settings["clients"] == 2
    assert "client-0002: no usable statistics: statistics claim 2" in found.warnings[0]


def test_rows_weigh_no_more_than_in_an_average_of_models():
    # Four clients with 10, 10, 10 and 1,000 rows: the last weighs as 20 among them. It sends sums
    # over 100 + 900 rows, which therefore count as 2 + 18.
    network = Network((Convolution("first"),), (), 2)
    of = {
        "forget": [torch.tensor([1.0, 0, 1])] * 3 + [torch.tensor([0, 200.0, 100])],
        "remain": [torch.tensor([9.0, 9, 9])] * 3 + [torch.tensor([900.0, 900, 900])],
    }

    def reply(who, question):
        n = int(who[-1])
        sums = {f"{group}/first": parts[n] for group, parts in of.items()}
        counts = {"forget-count": 1 if n < 3 else 100, "remain-count": 9 if n < 3 else 900}
        return Answer(who, sums, counts, 10 if n < 3 else 1000)

    made = Mask(name="activation-mask", network=network, rate=0.3)
    four = situation(waiting(range(4)), active=range(4), start=images())
    found, _ = run(made.plan(four), reply)
    # Averages 3, 0 + 2 * 2, 3 + 2 of 5 rows: the third channel is the highest. With all that is
    # claimed it would be 3, 200, 103 of 103, and the second.
    assert found.masks["first.weight"].flatten(1).all(dim=1).tolist() == [False, False, True]


def test_zeros_claimed_over_many_rows_do_not_cancel_a_mask():
    # Averages 3 for what is to be forgotten and 1 for the rest in the first channel, 0 and 1 in
    # the others; three clients with 2 + 18 rows. The fourth claims 100 rows of zeros of its 100,
    # and counts as 2 of 8: 2.25, still over 1. Of 40, its weight among models, it would be 18 / 46.
    def reply(who, question):
        if who == client(3):
            sums = {"forget/first": torch.zeros(3), "remain/first": torch.zeros(3)}
            return Answer(who, sums, {"forget-count": 100, "remain-count": 0}, 100)
        sums = {"forget/first": torch.tensor([6.0, 0, 0]), "remain/first": torch.full((3,), 18.0)}
        return Answer(who, sums, {"forget-count": 2, "remain-count": 18}, 20)

    made = Mask(name="fisher-mask", rate=0.3)
    survey = made._found(
        situation(waiting(range(4)), active=range(4), start=images()),
        "activations",
        {group: {"first": torch.zeros(3)} for group in ("forget", "remain")},
    )
    found, _ = run(survey, reply)
    assert found.totals["forget"].count == 8
    assert adding.means(found.totals["forget"])["first"].tolist() == pytest.approx([2.25, 0, 0])
    assert adding.means(found.totals["remain"])["first"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["activation-mask", "grad-mask", "tfidf"])
def test_channels_too(name):
    made, reply, _ = channels(name)
    group = "1" if name == "tfidf" else "forget"
    start = situation(waiting((0, 1, 2)), start=images())
    lies = [
        {f"{group}__second": torch.tensor([math.nan, 1.0])},
        {f"{group}__second": torch.ones(3)},
        {"metrics": {f"{group}-count": 2001}},
        {"metrics": {f"{group}-count": 0.5}},
    ]
    if name != "grad-mask":
        lies.append({f"{group}__second": torch.tensor([-1.0, 1.0])})
    expected, _ = run(made.plan(start), without(reply, 1))
    for lie in lies:
        found, _ = run(made.plan(start), changed(reply, **lie))
        same(found.masks, expected.masks)
        assert "client-0001: no usable statistics" in found.warnings[0]
    for fine in [{"metrics": {f"{group}-count": 2000}},
                 *[{"forget__second": torch.tensor([-1.0, 1.0])}] * (name == "grad-mask")]:  # fmt: skip
        found, _ = run(made.plan(start), changed(reply, **fine))
        assert found.settings["clients"] == 3


def test_a_client_that_sent_nothing_is_no_client_with_nothing():
    def reply(who, question):
        return Answer(who, None, {"forget-count": 0, "remain-count": 0}, 1)

    with pytest.raises(StatisticsError, match=r"client-0000.*client-0001.*client-0002"):
        run(Mask().plan(situation(waiting((0, 1, 2)))), reply)


@pytest.mark.parametrize("made", [Mask(), Noise(), Mask(name="grad-mask", network=NETWORK)])
def test_without_an_answer_there_is_no_mask(made):
    with pytest.raises(StatisticsError, match="1 of 2 clients, and 0 sent some"):
        run(
            made.plan(situation(waiting((0, 1)), active=(0, 1), start=images())),
            lambda who, question: None,
        )


@pytest.mark.parametrize(
    "made", [Mask(name="activation-mask"), Mask(name="grad-mask"), ClassDiscriminative()]
)
def test_without_convolutions_no_channel_can_be_chosen(made):
    with pytest.raises(MissingNeedError, match="needs a network with convolutions"):
        run(made.plan(situation(waiting((0,)))), lambda who, question: None)
    assert made.freeze(None, {}, ()) is None


@pytest.mark.parametrize("norm", [True, False])
def test_tf_idf_silences_a_channel_where_it_is_read_and_normalised(norm):
    start = images() | {"norm.weight": torch.ones(3), "norm.bias": torch.ones(3)}
    network = Network((Convolution("first", "norm", ("second",)),), (), 2)
    classes = [[1.0, 1, 1], [1.0, 4, 1]]  # as by hand above, with channel 1 to stay

    def reply(who, question):
        sums = {str(u): {"first": torch.tensor(v)} for u, v in enumerate(classes)}
        return Answer(who, joined(**sums), {"0-count": 1, "1-count": 1}, 1)

    made = ClassDiscriminative(network=network, rate=0.3, norm=norm)
    found, _ = run(made.plan(situation(waiting((0,)), active=(0,), start=start)), reply)
    assert found.model["first.bias"].tolist() == [0, 1, 1]
    for name in ("norm.weight", "norm.bias"):
        assert found.model[name].tolist() == ([0, 1, 1] if norm else [1, 1, 1])
    assert torch.equal(found.model["second.weight"] == 0,
                       torch.tensor([1, 0, 0]).bool().reshape(1, 3, 1, 1).expand(2, 3, 2, 2))  # fmt: skip
    assert (found.settings["rate"], found.settings["norm"]) == (0.3, norm)


# ---------------------------------------------------------------- what training does not move
FROZEN = {"first.weight", "first.bias", "second.bias", "last.bias"}


@pytest.mark.parametrize(
    "name",
    ["fisher-mask", "random-mask", "activation-mask", "grad-mask", "tfidf", "golatkar", "eq2"],
)
def test_what_is_frozen_is_neither_masked_nor_blurred(name):
    start = images() | {"last.bias": torch.full((2,), 1.0)}
    names = frozenset(n for n, t in start.items() if t.is_floating_point()) - FROZEN
    following = (Convolution("first", None, ("second",)), Convolution("second"))
    network = dataclasses.replace(NETWORK, convolutions=following, trained=names)
    squares = {n: start[n] for n in names}
    if name in ("golatkar", "eq2"):
        made, like, groups = Noise(network=network, recipe=name), squares, ("forget", "remain")
    elif name == "tfidf":
        made, like, groups = ClassDiscriminative(network=network, rate=0.5), LIKE, ("0", "1")
    else:
        made = Mask(name=name, network=network, rate=0.4)
        like = squares if name == "fisher-mask" else LIKE
        groups = ("forget",) if name == "grad-mask" else ("forget", "remain")
    # The frozen layer is where the scores are highest: only that it is frozen protects it.
    held = {g: [{n: t + (50.0 if n == "first" and g in ("forget", "1") else 0) + 0.1 * place
                 for n, t in row.items()} for row in rows(like, 3, place)]
            for place, g in enumerate(groups)}  # fmt: skip
    reply = answering([held] * 3, like)
    found, _ = run(made.plan(situation(waiting((0, 1, 2)), start=start)), reply)
    changed_ = {n for n, t in start.items() if not torch.equal(found.model[n], t)}
    assert changed_
    assert not changed_ - names
    assert set(found.masks) <= names


def test_a_network_whose_convolutions_are_all_frozen_has_no_channels_to_mask():
    made = Mask(name="activation-mask", rate=0.9,
                network=dataclasses.replace(NETWORK, trained=frozenset({"last.weight"})))  # fmt: skip
    reply = answering([{"forget": rows(LIKE, 2, 1), "remain": rows(LIKE, 2, 2)}] * 3, LIKE)
    with pytest.raises(MissingNeedError, match="a convolution that is not frozen"):
        run(made.plan(situation(waiting((0, 1, 2)), start=images())), reply)
