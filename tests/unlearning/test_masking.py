"""What all masks have in common, against its definition: methods 0, 5, 5.4, 5.8."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning import masking
from unlearning.errors import ParametersError
from unlearning.fedup import prune
from unlearning.randomness import generator

scopes = st.sampled_from(["model", "layer", "tensor"])


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "first.weight": torch.randn(5, 4, generator=draw),
        "first.bias": torch.randn(5, generator=draw),
        "last.weight": torch.randn(3, 5, generator=draw),
    }


def bits(masks):
    return {
        name: "".join(str(int(value)) for value in mask.reshape(-1)) for name, mask in masks.items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_scopes_by_hand():
    # Half of five together: ceil(2.5) = 3; of layer a's (9, 1, 5): 2; per tensor 1, 1 and 1.
    scores = {"a.w": torch.tensor([9.0, 1.0]), "b.w": torch.tensor([7.0, 8.0]),
              "a.b": torch.tensor([5.0])}  # fmt: skip
    assert bits(masking.top_share(scores, 0.5)) == {"a.w": "10", "b.w": "11", "a.b": "0"}
    assert bits(masking.top_share(scores, 0.5, "layer")) == {"a.w": "10", "b.w": "01", "a.b": "1"}
    assert bits(masking.top_share(scores, 0.5, "tensor")) == {"a.w": "10", "b.w": "01", "a.b": "1"}
    assert bits(masking.top_share(scores, 0.2, "layer")) == {"a.w": "10", "b.w": "01", "a.b": "0"}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 40), rate=st.floats(0, 1), scope=scopes)
def test_sizes_are_exact_and_the_highest_are_chosen(seed, rate, scope):
    scores = drawn(seed)
    masks = masking.top_share(scores, rate, scope)
    groups = {
        "model": [list(scores)],
        "layer": [["first.weight", "first.bias"], ["last.weight"]],
        "tensor": [[name] for name in scores],
    }[scope]
    for names in groups:
        inside = torch.cat([scores[name][masks[name]] for name in names])
        outside = torch.cat([scores[name][~masks[name]] for name in names])
        size = len(inside) + len(outside)
        assert len(inside) == math.ceil(rate * size - 1e-9)
        assert not len(inside) or not len(outside) or inside.min() >= outside.max()
    assert list(masks) == list(scores)
    assert all(masks[name].shape == scores[name].shape for name in scores)
    assert same(scores, drawn(seed))


@pytest.mark.parametrize("scope", ["model", "layer", "tensor"])
def test_no_share_is_the_identity_and_the_whole_share_is_zero(scope):
    model = {**drawn(0), "norm.running_mean": torch.ones(2)}
    assert same(prune(model, masking.top_share(drawn(0), 0.0, scope)), model)
    nothing = prune(model, masking.top_share(drawn(0), 1.0, scope))
    assert not any(nothing[name].any() for name in drawn(0))
    assert torch.equal(nothing["norm.running_mean"], torch.ones(2))
    assert masking.top_share({}, 0.5, scope) == {}


def test_equal_scores_fall_to_the_first_entries_and_say_nothing():
    scores = {name: torch.zeros_like(tensor) for name, tensor in drawn(0).items()}
    masks = masking.top_share(scores, 0.1)  # ceil(.1 * 40) = 4
    assert bits(masks)["first.weight"] == "1" * 4 + "0" * 16
    assert sum(int(mask.sum()) for mask in masks.values()) == 4
    assert masking.says_nothing(scores)
    assert masking.says_nothing({})
    assert not masking.says_nothing(drawn(0))
    assert not masking.says_nothing({"a": torch.ones(2), "b": torch.zeros(2)})


def test_scores_and_rates_that_make_no_sense_are_refused():
    with pytest.raises(ParametersError, match="not finite"):
        masking.top_share({"a": torch.tensor([math.nan])}, 0.5)
    with pytest.raises(ParametersError, match="fraction"):
        masking.top_share(drawn(0), 1.5)


def test_random_masks_are_uniform_exact_and_follow_their_generator():
    one, other, another = (
        masking.random_mask(drawn(0), 0.3, generator(seed)) for seed in (1, 1, 2)
    )
    assert same(one, other)
    assert not same(one, another)
    assert {name: mask.shape for name, mask in one.items()} == {
        name: tensor.shape for name, tensor in drawn(0).items()
    }
    # 12 of 40 each time; an entry is in 30 % of 400 masks, 120 with a standard deviation of 9.
    draws = torch.zeros(40)
    for seed in range(400):
        masks = masking.random_mask(drawn(0), 0.3, generator(seed))
        flat = torch.cat([mask.reshape(-1) for mask in masks.values()])
        assert int(flat.sum()) == 12
        draws += flat
    assert (draws - 120).abs().max() < 45


def test_the_replayed_rate_by_hand():
    # Milestones 80 and 120 of 160 in 5 epochs: 2.5 and 3.75; past the end the last rate stays.
    def rate(epoch):
        return masking.replayed_rate(epoch, 0.1, (80, 120), 0.1, 160, 5)

    assert rate(0) == rate(2.49) == 0.1
    assert rate(2.5) == rate(3.74) == pytest.approx(0.01)
    assert rate(3.75) == rate(5) == rate(99) == pytest.approx(0.001)
    # A milestone behind the end of training never came, and never comes.
    assert masking.replayed_rate(99, 0.1, (170,), 0.1, 160, 5) == 0.1


@pytest.mark.parametrize("arguments", [(-1, 160, 5), (0, 0, 5), (0, 160, 0), (math.nan, 1, 1)])
def test_replays_out_of_range_are_refused(arguments):
    epoch, original, budget = arguments
    with pytest.raises(ParametersError, match="cannot replay"):
        masking.replayed_rate(epoch, 0.1, (), 0.1, original, budget)


def test_volatility_by_hand():
    # .5 .9 .5 .7: net (.7 - .5) / 3, absolute (.4 + .4 + .2) / 3
    accuracies = [0.5, 0.9, 0.5, 0.7]
    assert masking.volatility_net(accuracies) == pytest.approx(0.2 / 3)
    assert masking.volatility_abs(accuracies) == pytest.approx(1 / 3)
    for few in ([], [0.5]):
        assert masking.volatility_net(few) is None
        assert masking.volatility_abs(few) is None


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_the_printed_volatility_sees_both_ends_only(accuracies):
    net, absolute = masking.volatility_net(accuracies), masking.volatility_abs(accuracies)
    steps = [after - before for before, after in itertools.pairwise(accuracies)]
    assert net == pytest.approx(sum(steps) / len(steps), abs=1e-9)
    assert absolute >= abs(net) - 1e-9
