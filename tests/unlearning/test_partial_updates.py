"""Partial updates against their definitions: methods 6.2, 6.3, 6.6."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import partial_updates as partial
from unlearning.distillation import fine_tune
from unlearning.errors import ParametersError
from unlearning.parameters import byte_size
from unlearning.randomness import generator

INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 3
TRAINED = ("first.weight", "first.bias", "last.weight", "last.bias")
patterns = st.sampled_from(["comb", "block", "random"])


def forward(model, inputs):
    hidden = torch.tanh(inputs @ model["first.weight"].T + model["first.bias"])
    return hidden @ model["last.weight"].T + model["last.bias"] + model["norm.running_mean"].sum()


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "first.weight": torch.randn(5, 4, generator=draw),
        "first.bias": torch.randn(5, generator=draw),
        "norm.running_mean": torch.randn(2, generator=draw),
        "norm.num_batches_tracked": torch.tensor(3),
        "last.weight": torch.randn(3, 5, generator=draw),
        "last.bias": torch.randn(3, generator=draw),
    }


def update(seed):
    return {name: drawn(seed)[name] for name in TRAINED}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def bits(mask):
    return "".join(str(int(value)) for value in mask.reshape(-1))


def train(model, **more):
    return partial.train_partially(
        model, forward, more.pop("loss", functional.cross_entropy), INPUTS, LABELS,
        **{"epochs": 3, "learning_rate": 0.1, "batch_size": 8, "generator": generator(0), **more},
    )  # fmt: skip


# ---------------------------------------------------------------- depth


def test_the_schedule_by_hand():
    # L = 4 from .8 to .2: steps of -.2
    assert partial.depth_schedule(4, 0.8, 0.2) == pytest.approx((0.8, 0.6, 0.4, 0.2))
    assert partial.depth_schedule(0, 0.8, 0.2) == ()
    assert partial.depth_schedule(1, 0.8, 0.2) == (0.5,)
    assert (partial.MANY, partial.FEW) == (0.8, 0.2)


@settings(max_examples=30)
@given(count=st.integers(0, 30), first=st.floats(0, 1), last=st.floats(0, 1))
def test_schedules_are_monotone_reach_their_ends_and_reflect_each_other(count, first, last):
    found = partial.depth_schedule(count, first, last)

    assert len(found) == count
    assert all(0 <= share <= 1 for share in found)
    ordered = sorted(found, reverse=first > last)
    assert list(found) == pytest.approx(ordered, abs=1e-12)
    assert found[::-1] == pytest.approx(partial.depth_schedule(count, last, first), abs=1e-12)
    if count > 1:
        assert (found[0], found[-1]) == (first, last)


def test_a_layer_is_weight_and_bias_and_buffers_are_none():
    assert partial.shares_by_depth(drawn(0)) == {
        "first.weight": 0.8,
        "first.bias": 0.8,
        "last.weight": 0.2,
        "last.bias": 0.2,
    }
    rising = partial.shares_by_depth(drawn(0), partial.FEW, partial.MANY)
    assert rising["first.bias"] == 0.2
    assert rising["last.weight"] == 0.8
    assert partial.layers(["a.b.weight", "a.b.bias", "a.c.weight", "w"]) == {
        "a.b": ("a.b.weight", "a.b.bias"),
        "a.c": ("a.c.weight",),
        "": ("w",),
    }


@pytest.mark.parametrize(("first", "last"), [(-0.1, 0.5), (0.5, 1.1), (math.nan, 0.5)])
def test_shares_lie_between_zero_and_one(first, last):
    with pytest.raises(ParametersError, match=r"must lie in \[0, 1\]"):
        partial.depth_schedule(3, first, last)


# ---------------------------------------------------------------- logged updates


def test_what_is_dropped_by_hand():
    # ceil(.5 * 3) = 2 of (1, -3, 2) and of (4, 5) ceil(.5 * 2) = 1; of all five ceil(.5 * 5) = 3
    found = {"a": torch.tensor([1.0, -3.0, 2.0]), "b": torch.tensor([4.0, 5.0])}

    layerwise = partial.kept_entries(found, {"a": 0.5, "b": 0.5}, "magnitude")
    together = partial.kept_globally(found, 0.5)

    assert {name: bits(mask) for name, mask in layerwise.items()} == {"a": "010", "b": "01"}
    assert {name: bits(mask) for name, mask in together.items()} == {"a": "000", "b": "11"}
    kept = partial.partial(found, layerwise)
    assert kept["a"].tolist() == [0, -3, 0]
    assert kept["b"].tolist() == [0, 5]


def test_of_equal_magnitudes_the_first_are_dropped():
    ties = {"a": torch.tensor([1.0, -1.0, 1.0, -1.0])}
    assert bits(partial.kept_entries(ties, {"a": 0.5}, "magnitude")["a"]) == "0011"
    assert bits(partial.kept_globally(ties, 0.25)["a"]) == "0111"


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 40),
    first=st.floats(0, 1),
    last=st.floats(0, 1),
    dropping=st.sampled_from(["random", "magnitude"]),
)
def test_counts_are_exact_and_kept_entries_are_the_update(seed, first, last, dropping):
    full, shares = update(seed), partial.shares_by_depth(drawn(seed), first, last)

    kept = partial.kept_entries(full, shares, dropping, generator(seed))
    found = partial.partial(full, kept)

    assert list(found) == list(full)
    for name, tensor in full.items():
        size = tensor.numel()
        assert int(kept[name].sum()) == size - math.ceil(shares[name] * size - 1e-9)
        assert torch.equal(found[name][kept[name]], tensor[kept[name]])
        assert not found[name][~kept[name]].any()
        assert found[name].dtype == tensor.dtype
        if dropping == "magnitude" and 0 < kept[name].sum() < size:
            assert tensor[kept[name]].abs().min() >= tensor[~kept[name]].abs().max()
    assert same(partial.unpacked(partial.packed(full, kept), kept), found)
    entries = sum(int(mask.sum()) for mask in kept.values())
    assert byte_size([partial.packed(full, kept)]) == 4 * entries


@pytest.mark.parametrize("dropping", ["random", "magnitude"])
def test_dropping_nothing_keeps_all_bits_and_dropping_all_leaves_nothing(dropping):
    full = update(1)
    for share in (0.0, 1.0):
        kept = partial.kept_entries(full, dict.fromkeys(full, share), dropping, generator(0))
        found = partial.partial(full, kept)
        assert same(found, full if share == 0 else {n: 0 * t.abs() for n, t in full.items()})


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 40), share=st.floats(0, 1))
def test_dropping_globally_keeps_the_largest_of_all(seed, share):
    full = update(seed)
    kept = partial.kept_globally(full, share)

    size = sum(tensor.numel() for tensor in full.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == size - math.ceil(share * size - 1e-9)
    inside = torch.cat([full[name][kept[name]].abs() for name in full])
    outside = torch.cat([full[name][~kept[name]].abs() for name in full])
    assert not len(inside) or not len(outside) or inside.min() >= outside.max()
    assert all(kept[name].shape == full[name].shape for name in full)


def test_random_dropping_follows_its_generator():
    full = update(0)
    shares = dict.fromkeys(full, 0.5)
    one, other, another = (
        partial.kept_entries(full, shares, "random", generator(seed)) for seed in (1, 1, 2)
    )
    assert same(one, other)
    assert not same(one, another)
    # Uniform: every entry is kept in about half of 400 draws; 5 standard deviations are 50.
    draws = torch.stack([
        partial.kept_entries(full, shares, "random", generator(seed))["first.weight"]
        for seed in range(400)
    ])  # fmt: skip
    assert (draws.sum(dim=0) - 200).abs().max() < 50


def test_logs_that_make_no_sense_are_refused():
    full = update(0)
    with pytest.raises(ParametersError, match="differ in their tensors: other"):
        partial.kept_entries(full, {**dict.fromkeys(full, 0.5), "other": 0.5}, "magnitude")
    with pytest.raises(ParametersError, match="needs a generator"):
        partial.kept_entries(full, dict.fromkeys(full, 0.5), "random")
    with pytest.raises(ParametersError, match="fraction"):
        partial.kept_entries(full, dict.fromkeys(full, 1.5), "magnitude")
    with pytest.raises(ParametersError, match="not finite"):
        partial.kept_globally({"a": torch.tensor([math.nan, 1.0])}, 0.5)
    with pytest.raises(ParametersError, match="a has 3 values for 2 entries"):
        partial.unpacked({"a": torch.ones(3)}, {"a": torch.tensor([True, False, True])})
    assert partial.kept_globally({}, 0.5) == {}


# ---------------------------------------------------------------- selections


@pytest.mark.parametrize(
    ("size", "share", "expected"),
    [(10, 0.3, "0001001001"), (7, 0.5, "0010101"), (5, 0.05, "00001"), (3, 1, "111"), (2, 0, "00")],
)
def test_the_comb_by_hand(size, share, expected):
    # methods 13; of 10 with u = 3: floor(3 (i + 1) / 10) grows at i = 3, 6 and 9
    assert bits(partial.selection((size,), share)) == expected


def test_patterns_move_by_hand():
    moved = [bits(partial.selection((7,), 0.5, epoch)) for epoch in range(3)]
    assert moved == ["0010101", "1001010", "0100101"]
    blocks = [bits(partial.selection((5,), 0.4, epoch, "block")) for epoch in range(4)]
    assert blocks == ["11000", "00110", "10001", "01100"]


def test_counts_are_rounded_down_but_never_by_rounding_errors():
    # .29 * 100 is 28.999999999999996 in floating point
    assert partial.selected_count(100, 0.29) == 29
    assert partial.selected_count(7, 0.5) == 3
    assert partial.selected_count(1000, 1e-9) == 1
    assert partial.selected_count(0, 0.5) == 0
    assert partial.selected_count(5, 0) == 0


@settings(deadline=None, max_examples=30)
@given(
    size=st.integers(1, 60), share=st.floats(0.01, 1), epoch=st.integers(0, 90), pattern=patterns
)
def test_selections_are_periodic_of_exact_size_and_soon_cover_everything(
    size, share, epoch, pattern
):
    def chosen(epoch):
        found = partial.selection((size,), share, epoch, pattern, generator(3))
        assert found.dtype == torch.bool
        return found

    count = partial.selected_count(size, share)
    assert int(chosen(epoch).sum()) == count
    assert torch.equal(chosen(epoch + size), chosen(epoch))
    soon = torch.stack([chosen(epoch + more) for more in range(math.ceil(size / count))])
    assert soon.any(dim=0).all()
    if pattern == "comb":
        assert torch.equal(chosen(epoch + 1), chosen(epoch).roll(1))


def test_selections_have_the_tensors_shapes_and_streams_of_their_own():
    model, shares = drawn(0), partial.shares_by_depth(drawn(0))
    found = partial.selections(model, shares)
    assert {name: mask.shape for name, mask in found.items()} == {
        name: model[name].shape for name in TRAINED
    }
    assert [int(found[name].sum()) for name in TRAINED] == [16, 4, 3, 1]

    twins = {"a": torch.zeros(40), "b": torch.zeros(40)}
    random = partial.selections(twins, dict.fromkeys(twins, 0.5), 2, "random", seed=1)
    assert not torch.equal(random["a"], random["b"])
    assert same(random, partial.selections(twins, dict.fromkeys(twins, 0.5), 2, "random", seed=1))
    other = partial.selections(twins, dict.fromkeys(twins, 0.5), 2, "random", seed=2)
    assert not same(random, other)


def test_selections_that_make_no_sense_are_refused():
    with pytest.raises(ParametersError, match=r"must lie in \[0, 1\], got 1.5"):
        partial.selection((3,), 1.5)
    with pytest.raises(ParametersError, match="counted from 0, got -1"):
        partial.selection((3,), 0.5, -1)
    with pytest.raises(ParametersError, match="needs a generator"):
        partial.selection((3,), 0.5, 0, "random")
    assert partial.selection((0, 3), 0.5).shape == (0, 3)


# ---------------------------------------------------------------- steps


def test_a_step_by_hand():
    # 1 - .5 * 2 = 0 where selected; the other entry keeps its bits whatever its step holds
    model = {"w": torch.tensor([1.0, -0.0]), "other": torch.ones(1)}
    step = {"w": torch.tensor([2.0, math.nan])}

    found = partial.stepped(model, step, 0.5, {"w": torch.tensor([True, False])})

    assert found["w"].tolist() == [0.0, 0.0]
    assert math.copysign(1, found["w"][1]) == -1
    assert torch.equal(found["other"], model["other"])
    assert partial.stepped(model, {"w": torch.tensor([2.0, 2.0])}, -0.5)["w"].tolist() == [2, 1]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 40), pattern=patterns)
def test_a_share_of_one_is_the_naive_method_bit_for_bit(seed, pattern):
    shares = dict.fromkeys(TRAINED, 1.0)
    naive = train(drawn(seed), generator=generator(seed))

    assert same(
        train(drawn(seed), shares=shares, pattern=pattern, generator=generator(seed)), naive
    )
    assert same(
        naive,
        fine_tune(
            drawn(seed), forward, functional.cross_entropy, INPUTS, LABELS, epochs=3,
            learning_rate=0.1, batch_size=8, generator=generator(seed),
        ),
    )  # fmt: skip


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 40), pattern=patterns, bound=st.none() | st.floats(0.1, 1))
def test_an_epoch_moves_selected_entries_only(seed, pattern, bound):
    model = drawn(seed)
    shares = partial.shares_by_depth(model)

    found = train(model, epochs=1, shares=shares, pattern=pattern, seed=seed, longest=bound)

    chosen = partial.selections(model, shares, 0, pattern, seed)
    for name in TRAINED:
        moved = found[name] != model[name]
        assert not moved[~chosen[name]].any()
        assert moved.any()


def test_the_second_epoch_moves_the_next_entries():
    model, shares = drawn(2), dict.fromkeys(TRAINED, 0.2)
    draw = generator(0)
    one = train(model, epochs=1, shares=shares, generator=draw)
    two = train(one, epochs=1, shares=shares, generator=draw)
    both = train(model, epochs=2, shares=shares)

    moved = both["first.weight"] != one["first.weight"]
    assert torch.equal(moved, partial.selection((5, 4), 0.2, 1))
    # Without knowing that an epoch came before, the first entries would move again.
    assert not same(two, both)


def test_the_whole_gradient_is_bounded_before_entries_are_selected():
    # One step: what the naive method with the same bound moves, on the selected entries.
    model = drawn(3)
    shares = partial.shares_by_depth(model)
    chosen = partial.selections(model, shares)
    whole = train(model, epochs=1, batch_size=20, longest=0.01)
    part = train(model, epochs=1, batch_size=20, longest=0.01, shares=shares)
    for name in TRAINED:
        assert torch.equal(part[name], torch.where(chosen[name], whole[name], model[name]))
    length = math.sqrt(sum(float((whole[n] - model[n]).square().sum()) for n in TRAINED))
    assert length == pytest.approx(0.1 * 0.01, rel=1e-2)


def test_a_loss_of_rows_trains_as_their_mean():
    def rows(outputs, targets):
        return functional.cross_entropy(outputs, targets, reduction="none")

    one, other = train(drawn(0), loss=rows), train(drawn(0))
    for name in TRAINED:
        torch.testing.assert_close(one[name], other[name])


def test_training_stops_before_the_epoch_that_is_one_too_many():
    asked = []

    def stop(model):
        asked.append(model)
        return len(asked) == 3

    found = train(drawn(0), epochs=5, stop=stop)
    assert same(found, train(drawn(0), epochs=2))
    assert same(asked[0], drawn(0))
    assert same(train(drawn(0), stop=lambda model: True), drawn(0))


def test_without_rows_or_epochs_nothing_changes():
    assert same(train(drawn(0), epochs=0), drawn(0))
    empty = partial.train_partially(
        drawn(0), forward, functional.cross_entropy, INPUTS[:0], LABELS[:0], epochs=2,
        learning_rate=1.0, batch_size=8, generator=generator(0),
    )  # fmt: skip
    assert same(empty, drawn(0))


def test_other_tensors_stay_and_inputs_are_left_untouched():
    model = drawn(0)
    found = train(model, shares={"last.bias": 1.0})
    assert same(model, drawn(0))
    assert list(found) == list(model)
    changed = {name for name in model if not torch.equal(found[name], model[name])}
    assert changed == {"last.bias"}
    assert not any(tensor.requires_grad for tensor in found.values())


def test_training_that_makes_no_sense_is_refused():
    with pytest.raises(ParametersError, match=r"select from: norm\.running_mean"):
        train(drawn(0), shares={"norm.running_mean": 0.5})
    with pytest.raises(ParametersError, match="20 inputs cannot go with 3"):
        partial.train_partially(
            drawn(0), forward, functional.cross_entropy, INPUTS, LABELS[:3], epochs=1,
            learning_rate=1.0, batch_size=8, generator=generator(0),
        )  # fmt: skip
    with pytest.raises(ParametersError, match="not finite"):
        train(drawn(0), learning_rate=math.inf)


# ---------------------------------------------------------------- merging


def test_merging_by_hand():
    # 1 + .25 (5 - 1) = 2
    model = {"w": torch.tensor([1.0]), "norm.running_mean": torch.tensor([1.0])}
    answer = {"w": torch.tensor([5.0]), "norm.running_mean": torch.tensor([9.0])}
    found = partial.merged(model, answer, 0.25)
    assert found["w"].item() == 2
    assert found["norm.running_mean"].item() == 1


@given(seed=st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_merging_all_takes_over_and_merging_none_changes_nothing(seed):
    model, answer = drawn(seed), drawn(seed + 1)
    assert same(partial.merged(model, answer, 0.0), model)
    over = partial.merged(model, answer, 1.0)
    assert all(torch.equal(over[name], answer[name]) for name in TRAINED)
    assert torch.equal(over["norm.running_mean"], model["norm.running_mean"])
    assert same(model, drawn(seed))


def test_answers_that_cannot_be_merged_are_refused():
    bad = {**drawn(0), "last.bias": torch.full((3,), math.nan)}
    with pytest.raises(ParametersError, match="not finite"):
        partial.merged(drawn(0), bad, 0.5)
    with pytest.raises(ParametersError, match="share must lie"):
        partial.merged(drawn(0), drawn(1), 1.5)
    with pytest.raises(ParametersError, match="differ"):
        partial.merged(drawn(0), {"w": torch.ones(1)}, 0.5)
