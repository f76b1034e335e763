"""RCAD against its definition: methods 2.13."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import rcad
from unlearning.distillation import fine_tune
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.randomness import generator

NETWORK = torch.nn.Sequential(
    torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Tanh(), torch.nn.Flatten(),
    torch.nn.Linear(8, 3),
).eval()  # fmt: skip
INPUTS = torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(9) % 3
MANY = {"epochs": 2, "learning_rate": 0.1, "batch_size": 4}
cross_entropy = functional.cross_entropy


def network(model, inputs):
    return torch.func.functional_call(NETWORK, dict(model), (inputs,))


def drawn(seed, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    model = {
        name: scale * torch.randn(tensor.shape, generator=draw)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in NETWORK.state_dict().items()
    }
    model["1.running_var"] = model["1.running_var"].square() + 0.5
    return model


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(model, seed=0, **more):
    return rcad.train(
        model, network, cross_entropy, INPUTS, LABELS,
        **{**MANY, "generator": generator(seed), **more},
    )  # fmt: skip


# ---------------------------------------------------------------- perturbation


def test_a_perturbation_by_hand():
    # loss (x w)^2 / 2 of w = (3, 4): g = (x w) w, a length of 1 along sign(x w) (.6, .8).
    found = rcad.perturbed(
        {"w": torch.tensor([3.0, 4.0])}, lambda model, rows: rows @ model["w"],
        lambda outputs, targets: outputs.square().mean() / 2,
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [4.0, -3.0]]), torch.zeros(3), 2.0,
    )  # fmt: skip
    expected = torch.tensor([[2.2, 1.6], [-2.2, -1.6], [4.0, -3.0]])
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 50), radius=st.floats(0, 3), scale=st.sampled_from([1.0, 1e-8]))
def test_every_row_is_moved_by_the_radius_towards_a_higher_loss(seed, radius, scale):
    # Weights of 1e-8 have gradients of 1e-24 or so, the squares of which float32 does not hold.
    model = drawn(seed, scale)
    found = rcad.perturbed(model, network, cross_entropy, INPUTS, LABELS, radius)
    lengths = torch.linalg.vector_norm((found - INPUTS).flatten(1), dim=1)
    torch.testing.assert_close(lengths, torch.full((9,), radius), rtol=1e-4, atol=1e-5)
    apart = [
        rcad.perturbed(model, network, cross_entropy, INPUTS[i : i + 1], LABELS[i : i + 1], radius)
        for i in range(3)
    ]
    torch.testing.assert_close(found[:3], torch.cat(apart), rtol=1e-3, atol=1e-4)
    if scale == 1:
        near = rcad.perturbed(model, network, cross_entropy, INPUTS, LABELS, 1e-3)
        before = cross_entropy(network(model, INPUTS), LABELS)
        assert cross_entropy(network(model, near), LABELS) > before


def test_a_row_without_a_gradient_stays():
    model = {name: torch.zeros_like(tensor) for name, tensor in drawn(0).items()}
    model["1.running_var"] = torch.ones(2)
    found = rcad.perturbed(model, network, cross_entropy, INPUTS, LABELS)
    assert torch.equal(found, INPUTS)


# ---------------------------------------------------------------- confidence


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), classes=st.integers(2, 9), scale=st.floats(0, 200))
def test_confidence_lies_between_none_and_all(seed, classes, scale):
    logits = scale * torch.randn(5, classes, generator=generator(seed))
    assert -1e-6 <= float(rcad.confidence(logits)) <= math.log(classes) + 1e-6


def test_confidence_by_hand():
    assert float(rcad.confidence(torch.zeros(2, 4))) == pytest.approx(0, abs=1e-7)
    assert float(rcad.confidence(torch.tensor([[900.0, 0, 0]]))) == pytest.approx(math.log(3))
    # p = (.8, .2): log 2 + .8 log .8 + .2 log .2 = .693147 - .500402
    logits = torch.tensor([[math.log(4), 0.0], [0.0, math.log(4)]])
    assert float(rcad.confidence(logits)) == pytest.approx(0.192745, abs=1e-6)


# ---------------------------------------------------------------- training


def test_the_objective_is_both_terms():
    model = drawn(1)
    aim = rcad.objective(network, cross_entropy, strength=0.7, radius=0.5)
    near = rcad.perturbed(model, network, cross_entropy, INPUTS, LABELS, 0.5)
    expected = cross_entropy(network(model, INPUTS), LABELS)
    expected = expected + 0.7 * rcad.confidence(network(model, near))
    torch.testing.assert_close(aim(model, INPUTS, LABELS), expected)


def test_no_strength_is_fine_tuning_bit_for_bit():
    expected = fine_tune(
        drawn(0), network, cross_entropy, INPUTS, LABELS, generator=generator(0), **MANY
    )
    assert same(train(drawn(0), strength=0.0), expected)
    assert same(train(drawn(0), strength=0.0, forget=(INPUTS, LABELS)), expected)
    assert not same(train(drawn(0)), expected)


def test_it_lowers_confidence_along_the_perturbation():
    def near(model):
        rows = rcad.perturbed(model, network, cross_entropy, INPUTS, LABELS)
        return float(rcad.confidence(network(model, rows)))

    without, with_ = (train(drawn(0), epochs=20, strength=s) for s in (0.0, 2.0))
    assert near(with_) < near(without)


def test_rows_to_forget_may_be_perturbed_instead():
    others = (INPUTS[:2] + 5, LABELS[:2])
    model = drawn(1)
    aim = rcad.objective(network, cross_entropy, forget=others, generator=generator(0))
    near = rcad.perturbed(model, network, cross_entropy, *others)
    expected = cross_entropy(network(model, INPUTS), LABELS)
    expected = expected + 0.2 * rcad.confidence(network(model, near))
    torch.testing.assert_close(aim(model, INPUTS, LABELS), expected)
    assert same(train(model, forget=others), train(model, forget=others))
    assert not same(train(model, forget=others), train(model))


def test_no_more_rows_are_drawn_than_a_batch_has():
    seen = []

    def forward(model, rows):
        seen.append(len(rows))
        return network(model, rows)

    aim = rcad.objective(
        forward, cross_entropy, forget=(INPUTS, LABELS), most=4, generator=generator(0)
    )
    aim(drawn(0), INPUTS[:3], LABELS[:3])
    aim(drawn(0), INPUTS, LABELS)
    # The plain pass, the one for the perturbation, and the perturbed one.
    assert seen == [3, 3, 3, 9, 4, 4]


def test_inputs_and_statistics_are_left_alone_and_a_seed_fixes_all():
    model, before = drawn(0), INPUTS.clone()
    found = train(model)
    assert same(model, drawn(0))
    assert torch.equal(INPUTS, before)
    assert same(found, train(drawn(0)))
    assert not same(found, train(drawn(0), seed=1))
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(found[name], model[name])
    assert (rcad.STRENGTH, rcad.RADIUS) == (0.2, 1.0)


def test_what_makes_no_sense_is_refused():
    for wrong in ({"strength": -0.1}, {"strength": math.nan}, {"radius": -1.0}):
        with pytest.raises(ParametersError, match="at least 0"):
            train(drawn(0), **wrong)
    with pytest.raises(MissingNeedError, match="real numbers"):
        rcad.perturbed(drawn(0), network, cross_entropy, LABELS, LABELS)
    with pytest.raises(MissingNeedError, match="at least one"):
        train(drawn(0), forget=(INPUTS[:0], LABELS[:0]))
    with pytest.raises(MissingNeedError, match="a generator"):
        rcad.objective(network, cross_entropy, forget=(INPUTS, LABELS))
    with pytest.raises(ParametersError, match="cannot go with"):
        rcad.train(
            drawn(0), network, cross_entropy, INPUTS, LABELS[:2], generator=generator(0), **MANY
        )
    with pytest.raises(MissingNeedError, match="at least one row"):
        rcad.train(
            drawn(0), network, cross_entropy, INPUTS[:0], LABELS[:0],
            generator=generator(0), **MANY,
        )  # fmt: skip
