"""RCAD against its definition: methods 2.13."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import rcad
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.randomness import generator

NETWORK = torch.nn.Sequential(
    torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Tanh(), torch.nn.Flatten(),
    torch.nn.Linear(8, 3),
).eval()  # fmt: skip
INPUTS = torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(9) % 3
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


# ---------------------------------------------------------------- the penalty


def test_the_penalty_is_confidence_around_the_batch():
    model = drawn(1)
    before, inputs = {**model}, INPUTS.clone()
    aim = rcad.penalty(network, cross_entropy, strength=0.7, radius=0.5)
    near = rcad.perturbed(model, network, cross_entropy, INPUTS, LABELS, 0.5)
    expected = 0.7 * rcad.confidence(network(model, near))
    torch.testing.assert_close(aim(model, INPUTS, LABELS), expected)
    assert float(rcad.penalty(network, cross_entropy, strength=0.0)(model, INPUTS, LABELS)) == 0
    assert same(model, before)
    assert torch.equal(INPUTS, inputs)
    assert (rcad.STRENGTH, rcad.RADIUS) == (0.2, 1.0)


def test_a_step_down_lowers_confidence_along_the_perturbation():
    leaves = {n: t.requires_grad_() for n, t in drawn(0).items() if n in ("4.weight", "4.bias")}
    model, aim = {**drawn(0), **leaves}, rcad.penalty(network, cross_entropy)
    slope = torch.autograd.grad(aim(model, INPUTS, LABELS), list(leaves.values()))
    moved = {n: (t - 0.1 * g).detach() for (n, t), g in zip(leaves.items(), slope, strict=True)}
    assert aim({**model, **moved}, INPUTS, LABELS) < aim(model, INPUTS, LABELS)


def test_rows_to_forget_may_be_perturbed_instead():
    others = (INPUTS[:2] + 5, LABELS[:2])
    model = drawn(1)
    aim = rcad.penalty(network, cross_entropy, forget=others, generator=generator(0))
    near = rcad.perturbed(model, network, cross_entropy, *others)
    torch.testing.assert_close(
        aim(model, INPUTS, LABELS), 0.2 * rcad.confidence(network(model, near))
    )


def test_no_more_rows_are_drawn_than_a_batch_has():
    seen = []

    def forward(model, rows):
        seen.append(len(rows))
        return network(model, rows)

    aim = rcad.penalty(
        forward, cross_entropy, forget=(INPUTS, LABELS), most=4, generator=generator(0)
    )
    aim(drawn(0), INPUTS[:3], LABELS[:3])
    aim(drawn(0), INPUTS, LABELS)
    # The pass for the perturbation, and the perturbed one.
    assert seen == [3, 3, 4, 4]


def test_what_makes_no_sense_is_refused():
    for wrong in ({"strength": -0.1}, {"strength": math.nan}, {"radius": -1.0}):
        with pytest.raises(ParametersError, match="at least 0"):
            rcad.penalty(network, cross_entropy, **wrong)(drawn(0), INPUTS, LABELS)
    with pytest.raises(MissingNeedError, match="real numbers"):
        rcad.perturbed(drawn(0), network, cross_entropy, LABELS, LABELS)
    with pytest.raises(MissingNeedError, match="at least one"):
        rcad.penalty(
            network, cross_entropy, forget=(INPUTS[:0], LABELS[:0]), generator=generator(0)
        )
    with pytest.raises(MissingNeedError, match="a generator"):
        rcad.penalty(network, cross_entropy, forget=(INPUTS, LABELS))
    with pytest.raises(ParametersError, match="cannot go with"):
        rcad.penalty(network, cross_entropy)(drawn(0), INPUTS, LABELS[:2])
