"""What is kept of a training, against ``certificates.certified`` and by hand: methods 3.5b."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import certificates, margins
from unlearning.certificates import Device
from unlearning.errors import MissingNeedError, NotCertifiedError, ParametersError
from unlearning.gradients import per_sample_gradients
from unlearning.margins import EDGES, Margins
from unlearning.pcmu import Quantiser

SIGN = Quantiser()
"""g* = 0: the margin is |G|."""


def scalar(*values):
    return {"w": torch.tensor([float(value) for value in values])}


def zeros(count):
    return scalar(*[0.0] * count)


def device(values, samples, largest, removed=0):
    return Device(
        gradient=scalar(*values), samples=samples, removed=removed, largest=float(largest)
    )


# ------------------------------------------------------------------------------------ on a device


def forward(model, inputs):
    return inputs @ model["weight"].T + model["bias"]


def linear(seed, rows=70):
    draw = torch.Generator().manual_seed(seed)
    model = {"weight": torch.randn(2, 3, generator=draw), "bias": torch.randn(2, generator=draw)}
    inputs = torch.randn(rows, 3, generator=draw)
    inputs[:, 2] = 0  # a pixel that is always black
    return model, inputs, torch.randint(0, 2, (rows,), generator=draw)


@pytest.mark.parametrize("clip", [math.inf, 0.3])
def test_each_sample_is_clipped_and_then_they_are_averaged(clip):
    model, inputs, targets = linear(1)  # more than a chunk
    found = margins.bounded_gradient(
        model, forward, functional.cross_entropy, inputs, targets, clip=clip
    )
    single = per_sample_gradients(model, forward, functional.cross_entropy, inputs, targets)
    for name, rows in single.items():
        assert torch.allclose(found.gradient[name], rows.clamp(-clip, clip).mean(dim=0), atol=1e-6)
    largest = max(float(rows.abs().max()) for rows in single.values())
    assert largest > 0.3
    assert found.largest == (largest if clip == math.inf else clip)
    assert not found.gradient["weight"][:, 2].any()
    assert found.cancelled == 0


def test_samples_that_cancel_out_are_told_from_samples_that_move_nothing():
    # (w x - y)^2 / 2 at w = 0: gradients -x y, of 1 and -1 their mean is 0; x = 0 moves nothing
    def loss(outputs, targets):
        return ((outputs - targets) ** 2 / 2).mean()

    def product(model, inputs):
        return inputs * model["w"]

    inputs = torch.zeros(2 + margins.CHUNK, 2)  # the last chunk moves nothing
    targets = torch.full_like(inputs, 5.0)
    inputs[:2, 0] = 1
    targets[:2, 0] = torch.tensor([2.0, -2.0])
    found = margins.bounded_gradient(zeros(2), product, loss, inputs, targets)
    assert found.gradient["w"].tolist() == [0, 0]
    assert (found.cancelled, found.largest) == (1, 1.0)


@pytest.mark.parametrize(
    ("rows", "clip", "error"),
    [(0, math.inf, MissingNeedError), (3, 0.0, ParametersError), (3, math.nan, ParametersError)],
)
def test_gradients_that_are_none_are_refused(rows, clip, error):
    model, inputs, targets = linear(2, rows)
    with pytest.raises(error):
        margins.bounded_gradient(
            model, forward, functional.cross_entropy, inputs, targets, clip=clip
        )


def test_gradients_that_are_no_numbers_are_refused():
    model, inputs, targets = linear(3)
    inputs[5] = math.inf
    with pytest.raises(ParametersError, match="not finite"):
        margins.bounded_gradient(model, forward, functional.cross_entropy, inputs, targets)


@given(
    sizes=st.lists(st.sampled_from([1, 5, 63, 64, 65, 130]), min_size=1, max_size=4),
    clip=st.sampled_from([math.inf, 0.3]),
)
@settings(max_examples=30, deadline=None)
def test_devices_together_give_what_each_gives(sizes, clip):
    model, inputs, targets = linear(4, sum(sizes))
    held = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
    found = margins.bounded_gradients(model, forward, functional.cross_entropy, held, clip=clip)
    assert len(found) == len(sizes)
    for together, rows in zip(found, held, strict=True):
        alone = margins.bounded_gradient(model, forward, functional.cross_entropy, *rows, clip=clip)
        assert together.largest == pytest.approx(alone.largest, rel=1e-5)
        assert together.cancelled == alone.cancelled
        for name, tensor in alone.gradient.items():
            assert torch.allclose(together.gradient[name], tensor, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------- on the server


def test_loads_by_hand():
    # 1 of 5 and 2 of 6: 1/4 + 2/4
    assert margins.load([(1, 5), (2, 6), (0, 3)]) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("removals", "error", "message"),
    [
        ([(0, 4)], ParametersError, "nothing to certify"),
        ([], ParametersError, "nothing to certify"),
        ([(1, 9), (4, 4)], NotCertifiedError, "cannot lose all of its 4 samples"),
        ([(5, 4)], ParametersError, "got 5 of 4"),
        ([(-1, 4)], ParametersError, "got -1 of 4"),
        ([(0, 0)], ParametersError, "got 0 of 0"),
    ],
)
def test_requests_that_are_none_have_no_load(removals, error, message):
    with pytest.raises(error, match=message):
        margins.load(removals)


def test_reaches_by_hand():
    # Means (.3, -.1, 0, 0): 2 |mean| / (max_k |G_k| + c), c = 1. The third cancels out between
    # devices, the last is moved by nobody.
    devices = [device([0.2, 0.1, 0.5, 0], 50, 1), device([0.4, -0.3, -0.5, 0], 80, 0.6)]
    found = margins.reach(zeros(4), devices, SIGN)
    assert found[:2].tolist() == pytest.approx([0.6 / 1.4, 0.2 / 1.3], rel=1e-3)
    assert found[2] < 0
    assert found[3] == math.inf
    assert margins.reach(zeros(4), devices, SIGN, cancelled=True)[3] < 0


def test_in_the_dead_zone_the_margin_is_the_distance_to_its_edge():
    quantiser = Quantiser(sigma=0.5)
    edge = quantiser.threshold  # .093138
    found = margins.reach(zeros(2), [device([0.0, 0.2], 50, 1)], quantiser, cancelled=True)
    assert found.tolist() == pytest.approx([edge, (0.2 - edge) / 1.2], rel=1e-3)


def test_large_weights_leave_less_for_what_travels_as_a_difference():
    # 8 u |w| of w = 1000 is 4.8e-4
    one = [device([1e-3], 50, 1)]
    near, far = (margins.reach(scalar(w), one, SIGN).item() for w in (0.0, 1000.0))
    assert near - far == pytest.approx(8 * 2**-24 * 1000 / 1.001, rel=1e-3)


values = st.floats(-1, 1, width=32)


@given(
    st.lists(
        st.tuples(st.lists(values, min_size=3, max_size=3), st.integers(2, 60), st.integers(0, 5)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.1, 0.5]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_within_reach_is_certified_by_the_check_itself(drawn, sigma):
    quantiser = Quantiser(sigma=sigma)
    devices = [device(g, n + 5, 1.0, removed) for g, n, removed in drawn]
    if not any(each.removed for each in devices):
        return
    asked = margins.load((each.removed, each.samples) for each in devices)
    found = margins.reach(zeros(3), devices, quantiser, cancelled=True)
    mask = certificates.certified(devices, quantiser)["w"]
    assert bool((mask | (found <= asked)).all())
    if len(devices) == 1:  # nothing is lost but rounding
        assert bool((~mask | (found > asked * (1 - 1e-3) - 1e-4)).all())


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([device([0.5], 5, 0.4)], "larger than what it says"),
        ([device([0.5], 5, math.nan)], "as one number"),
        ([device([0.5], 5, math.inf)], "as one number"),
        ([Device(gradient=scalar(1), samples=5)], "as one number, got None"),
        ([Device(gradient=scalar(1), samples=5, largest=scalar(1))], "as one number"),
        ([device([math.nan], 5, 1)], "not finite"),
        ([device([0.5], 5, 1), device([0.5], 0, 1)], "at least one sample, got 0"),
    ],
)
def test_devices_that_contradict_themselves_are_refused(devices, message):
    with pytest.raises(ParametersError, match=message):
        margins.reach(zeros(1), devices, SIGN)


# ------------------------------------------------------------------------------------------- kept


def kept(*rounds):
    found = Margins()
    for reaches in rounds:
        found = found.after(torch.tensor(reaches, dtype=torch.float64))
    return found


def test_pairs_of_all_rounds_are_counted():
    found = kept([0.5, 2.0, math.inf], [0.011, 3.0, math.inf])
    assert (found.rounds, found.lowest) == (2, 0.011)
    assert [found.check(load).certified for load in (0.01, 0.02, 1.0, 100.0)] == [6, 5, 4, 2]
    check = found.check(0.01)
    assert (check.pairs, check.rounds, check.complete) == (6, 2, True)
    assert not found.check(0.011).complete  # the smallest reach itself is not within reach


def test_a_round_without_a_certificate_spoils_all():
    found = kept([1.0, 1.0], [0.0, 0.0])
    assert found.check(1e-30).certified == 2
    assert not found.check(1e-30).complete
    assert Margins().check(0.1).share is None


reaches = st.floats(-1, 100) | st.just(math.inf) | st.sampled_from(EDGES[::16].tolist())


@given(st.lists(st.lists(reaches, min_size=1, max_size=6), min_size=1, max_size=4), reaches)
@settings(max_examples=150, deadline=None)
def test_never_more_is_certified_than_is_within_reach_and_hardly_less(rounds, asked):
    if not 0 < asked < math.inf:
        return
    found, flat = kept(*rounds).check(asked), [value for row in rounds for value in row]
    assert found.pairs == len(flat)
    assert found.complete == (min(flat) > asked)
    assert found.certified <= sum(value > asked for value in flat)
    step = 10 ** (1 / 8) * (1 + 1e-9)
    assert found.certified >= sum(value > max(asked * step, 1e-12 * step) for value in flat)
    assert found.certified >= kept(*rounds).check(2 * asked).certified
