"""The federated step against eq. 13-15: methods 3.3."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning import ffmu, pcmu
from unlearning.errors import ParametersError
from unlearning.pcmu import Quantiser

seeds = st.integers(0, 1000)


def scalar(*values):
    return {"w": torch.tensor([float(value) for value in values])}


def model(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(3, 4, generator=draw),
        "norm.running_var": torch.rand(3, generator=draw),
        "norm.num_batches_tracked": torch.tensor(seed),
        "layer.bias": torch.randn(3, generator=draw),
    }


def alike(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------- learning rate


def test_the_learning_rate_falls_after_half_and_three_quarters():
    found = [ffmu.learning_rate(number, 8, 2.0) for number in range(1, 9)]
    assert found == pytest.approx([2, 2, 2, 2, 0.2, 0.2, 0.02, 0.02])
    rates = [ffmu.learning_rate(number, 200) for number in (1, 100, 101, 150, 151, 200)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_rounds_that_do_not_divide_fall_at_the_next_whole_one():
    # of 5: half is 2.5 and three quarters 3.75, so from 3 and from 4
    found = [ffmu.learning_rate(number, 5, 1.0) for number in range(1, 6)]
    assert found == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert ffmu.learning_rate(1, 1, 1.0) == pytest.approx(0.01)  # after both
    assert ffmu.learning_rate(1, 2, 1.0) == 1.0


@pytest.mark.parametrize(
    ("number", "rounds", "initial", "message"),
    [
        (0, 5, 0.1, "must lie from 1 to 5, got 0"),
        (6, 5, 0.1, "must lie from 1 to 5, got 6"),
        (1, 5, 0.0, "learning rate must be a number above 0, got 0.0"),
        (1, 5, math.nan, "learning rate must be"),
    ],
)
def test_a_round_that_is_none_has_no_learning_rate(number, rounds, initial, message):
    with pytest.raises(ParametersError, match=message):
        ffmu.learning_rate(number, rounds, initial)


# -------------------------------------------------------------------------------------- averages


def test_averages_by_hand():
    sent = [scalar(4, -1), scalar(0, 3)]
    assert ffmu.average(sent)["w"].tolist() == [2.0, 1.0]
    # 3/4 of the first and 1/4 of the other
    assert ffmu.average(sent, [30, 10])["w"].tolist() == [3.0, 0.0]


def test_averages_leave_buffers_out():
    assert list(ffmu.average([model(1), model(2)])) == ["layer.weight", "layer.bias"]


@settings(deadline=None)
@given(seed=seeds, order=st.permutations(range(5)))
def test_averages_do_not_depend_on_the_order_of_devices(seed, order):
    sent, samples = [model(seed + k) for k in range(5)], [3, 1, 4, 1, 5]
    for weights in (None, samples):
        one = ffmu.average(sent, weights)
        turned = None if weights is None else [weights[k] for k in order]
        other = ffmu.average([sent[k] for k in order], turned)
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize(
    ("sent", "samples", "message"),
    [
        ([], None, "no device sent a gradient"),
        ([scalar(1), scalar(1, 2)], None, "tensor w is"),
        ([scalar(1), {"v": torch.ones(1)}], None, "differ in their tensors: v, w"),
        ([scalar(1)], [1, 2], "1 models cannot be averaged with 2 weights"),
        ([scalar(1)], [0], "weights must be non-negative"),
    ],
)
def test_what_has_no_average_is_refused(sent, samples, message):
    with pytest.raises(ParametersError, match=message):
        ffmu.average(sent, samples)


# ------------------------------------------------------------------------------------- the server


def test_a_server_step_by_hand():
    # Gbar = (1, -1, 0): w - .1 x .05 x (1, -1, 0); a step of 5e-3
    assert ffmu.ALPHA_SERVER == 0.05
    found = ffmu.server_step(
        scalar(1, 1, 1),
        [scalar(4, -3, 2), scalar(-2, 1, -2)],
        0.1,
        Quantiser(alpha=ffmu.ALPHA_SERVER),
    )
    assert found["w"].tolist() == pytest.approx([0.995, 1.005, 1.0])


def test_it_is_the_average_that_is_quantised_not_the_gradients():
    # Signs of the gradients sum to -1, the gradients themselves to 8.
    sent = [scalar(10), scalar(-1), scalar(-1)]
    assert ffmu.server_step(scalar(0), sent, 1.0, Quantiser(alpha=1.0))["w"].item() == -1
    # By samples: (10 - 90 - 1) / 101 < 0
    found = ffmu.server_step(scalar(0), sent, 1.0, Quantiser(alpha=1.0), samples=[1, 90, 10])
    assert found["w"].item() == 1


@settings(deadline=None)
@given(seed=seeds, mode=st.sampled_from(["hard", "soft", "sample"]))
def test_a_federation_of_one_is_pcmu(seed, mode):
    quantiser = Quantiser(mode=mode)
    draws = [torch.Generator().manual_seed(9) for _ in range(3)]
    alone = pcmu.step(model(seed), model(seed + 1), 0.1, quantiser, draws[0])
    for samples, draw in ((None, draws[1]), ([17], draws[2])):
        found = ffmu.server_step(
            model(seed), [model(seed + 1)], 0.1, quantiser, samples=samples, generator=draw
        )
        assert alike(found, alone)


@settings(deadline=None)
@given(seed=seeds, count=st.integers(1, 12))
def test_equal_shards_give_the_server_the_step_of_a_device(seed, count):
    quantiser = Quantiser()
    sent = [model(seed)] * count
    found = ffmu.server_step(model(seed + 1), sent, 0.1, quantiser)
    assert alike(found, pcmu.step(model(seed + 1), model(seed), 0.1, quantiser))


def test_inputs_stay_as_they_are():
    start, sent = model(1), [model(2), model(3)]
    found = ffmu.server_step(start, sent, 0.1, Quantiser(), samples=[2, 3])
    for tensor in found.values():
        tensor.add_(1)
    assert alike(start, model(1))
    assert all(alike(gradient, model(2 + k)) for k, gradient in enumerate(sent))


# --------------------------------------------------------------------------------------- a device


def test_a_device_round_by_hand():
    # g = v - x; lr alpha = 1/4. v: 1 -> .75 (g = 1) -> 1 (g = .75 - 2 < 0) -> .75 (g = .5)
    # Gbar = (1 - 1.25 + .5) / 3
    seen = []

    def gradient_of(v, x):
        seen.append(v["w"].item())
        return {"w": v["w"] - x}

    start = scalar(1)
    local, mean = ffmu.device_round(
        start, iter([0.0, 2.0, 0.5]), gradient_of, 0.5, Quantiser(alpha=0.5)
    )
    assert seen == [1.0, 0.75, 1.0]
    assert local["w"].item() == 0.75
    assert mean["w"].item() == pytest.approx(0.25 / 3)
    assert start["w"].item() == 1.0


def test_one_batch_of_everything_sends_the_gradient_at_the_start():
    found = []

    def gradient_of(v, _):
        found.append({name: 2 * v[name] for name in ("layer.weight", "layer.bias")})
        return found[-1]

    local, mean = ffmu.device_round(model(4), [None], gradient_of, 0.1, Quantiser())
    assert alike(mean, found[0])
    assert alike(local, pcmu.step(model(4), found[0], 0.1, Quantiser()))
    assert alike(found[0], {name: 2 * model(4)[name] for name in found[0]})


def test_a_device_samples_its_noise_from_what_it_is_given():
    runs = [
        ffmu.device_round(
            model(4),
            [None] * 3,
            lambda v, _: v,
            0.1,
            Quantiser(mode="sample", sigma=2.0),
            torch.Generator().manual_seed(seed),
        )[0]
        for seed in (1, 1, 2)
    ]
    assert alike(runs[0], runs[1])
    assert not alike(runs[0], runs[2])


def test_a_device_without_data_is_refused():
    with pytest.raises(ParametersError, match="without a batch"):
        ffmu.device_round(scalar(1), [], lambda v, _: v, 0.1, Quantiser())


# ------------------------------------------------------------------------- in the form of a model

numbers = st.floats(-4, 4, width=32) | st.floats(-(2.0**-30), 2.0**-30, width=32) | st.just(0.0)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_gradients_travel_as_models_and_keep_their_signs(pairs):
    weights, gradients = (scalar(*column) for column in zip(*pairs, strict=True))
    sent = ffmu.as_model(weights, gradients)
    found, exact = ffmu.as_gradient(weights, sent)["w"], gradients["w"]
    assert torch.equal(found.sign(), exact.sign())
    assert torch.equal(sent["w"] == weights["w"], exact == 0)
    allowed = 2.0**-23 * (weights["w"].abs() + exact.abs()) + 2.0**-149
    assert bool(((found - exact).abs() <= allowed).all())


def test_a_gradient_too_small_to_be_seen_is_sent_as_the_next_number():
    sent = ffmu.as_model(scalar(1, 1, -1, 1), scalar(1e-30, -1e-30, 1e-30, 0))["w"].tolist()
    assert sent == [1 - 2.0**-24, 1 + 2.0**-23, -1 - 2.0**-23, 1]


def test_other_tensors_travel_as_they_are():
    start = model(4)
    sent = ffmu.as_model(start, {n: t for n, t in model(5).items() if t.is_floating_point()})
    for name in ("norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(sent[name], start[name])
        assert name not in ffmu.as_gradient(start, sent)
    assert torch.equal(sent["layer.bias"], start["layer.bias"] - model(5)["layer.bias"])
