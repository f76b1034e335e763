"""Quantised gradients against their definition: methods 3.1 and 3.2."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning import pcmu
from unlearning.errors import ParametersError
from unlearning.pcmu import Quantiser

CDF = NormalDist().cdf
CRITICAL = -NormalDist().inv_cdf(1 / 3)  # three classes of a third each at g = 0: .430727
SETTINGS = [(0.1, 0.01), (1.0, 1.0), (0.5, 0.25)]
lists = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20)
sigmas = st.floats(0.01, 3)
ratios = st.floats(0, 4)


def exactly(*values):
    return torch.tensor(values, dtype=torch.float64)


def batchnorm_like():
    return {
        "weight": torch.tensor([1.0, -2.0, 0.5]),
        "running_mean": torch.tensor([7.0]),
        "num_batches_tracked": torch.tensor(3),
    }


# ------------------------------------------------------------------------------------- quantiser


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_quantiser_by_hand(dtype):
    values = torch.tensor([-3.0, -0.5, -0.25, 0.0, 0.5, 0.75], dtype=dtype)
    found = pcmu.quantise(values, 0.5)  # at the boundary it is 0
    assert found.tolist() == [-1, 0, 0, 0, 0, 1]
    assert found.dtype == torch.int8


def test_the_boundary_is_not_rounded_to_the_type_of_the_values():
    # .1 in float32 is 0.100000001490116, which is above .1
    assert pcmu.quantise(torch.tensor([0.1, -0.1]), 0.1).tolist() == [1, -1]


# ------------------------------------------------------------------------------------- threshold


@pytest.mark.parametrize(
    ("sigma", "lam", "expected"), [(0.1, 0.01, 0.0), (1.0, 1.0, 0.969343), (0.5, 0.25, 0.093138)]
)
def test_golden_thresholds(sigma, lam, expected):
    assert pcmu.threshold(sigma, lam) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 30.0])
def test_the_dead_zone_opens_where_three_classes_are_equal(sigma):
    assert abs(CRITICAL - 0.430727) < 5e-7
    assert pcmu.threshold(sigma, 0.43 * sigma) == 0
    assert pcmu.threshold(sigma, (CRITICAL - 1e-9) * sigma) == 0
    assert 0 < pcmu.threshold(sigma, (CRITICAL + 1e-6) * sigma) < 1e-4 * sigma
    assert pcmu.threshold(sigma, 0.44 * sigma) > 0.01 * sigma


@settings(deadline=None)
@given(sigma=sigmas, ratio=st.floats(CRITICAL + 1e-3, 30))
def test_at_the_threshold_zero_and_one_are_equally_likely(sigma, ratio):
    lam = ratio * sigma
    found = pcmu.threshold(sigma, lam)
    plus = CDF((found - lam) / sigma)
    zero = CDF((lam - found) / sigma) - CDF((-lam - found) / sigma)
    assert plus == pytest.approx(zero, abs=1e-12)
    assert 0 < found <= lam


@pytest.mark.parametrize("ratio", [4.0, 8.0, 40.0])
def test_far_from_the_noise_the_threshold_is_lam(ratio):
    # 2 Phi((g* - lam) / sigma) = 1 - Phi(-lam/sigma - g*/sigma): within sigma Phi(-2 ratio) or so
    assert pcmu.threshold(0.5, 0.5 * ratio) == pytest.approx(0.5 * ratio, rel=1e-9)
    assert pcmu.threshold(0.5, 0.5 * ratio) <= 0.5 * ratio


@settings(deadline=None)
@given(sigma=sigmas, ratio=ratios, scale=st.floats(0.01, 100))
def test_the_threshold_has_the_unit_of_the_gradient(sigma, ratio, scale):
    one = pcmu.threshold(sigma, ratio * sigma)
    other = pcmu.threshold(scale * sigma, scale * ratio * sigma)
    assert other == pytest.approx(scale * one, rel=1e-6, abs=1e-9 * scale)


def test_the_threshold_is_computed_once():
    pcmu.threshold.cache_clear()
    quantiser = Quantiser(sigma=0.7)
    pcmu.step({"w": torch.ones(3)}, {"w": torch.ones(3)}, 0.1, quantiser)
    pcmu.step({"w": torch.ones(3)}, {"w": torch.ones(3)}, 0.1, quantiser)
    assert pcmu.threshold.cache_info().misses == 1


# ------------------------------------------------------------------- smoothing, and its soft mean


@pytest.mark.parametrize(
    ("sigma", "lam", "gradient", "plus", "minus", "zero", "smooth"),
    [
        (0.1, 0.01, 0.001, 0.464144, 0.456205, 0.079652, 1),
        (0.1, 0.01, 0.05, 0.655422, 0.274253, 0.070325, 1),
        (0.1, 0.01, -0.05, 0.274253, 0.655422, 0.070325, -1),
        (1.0, 1.0, 0.9, 0.460172, 0.028717, 0.511111, 0),
        (1.0, 1.0, 0.99, 0.496011, 0.023295, 0.480694, 1),
    ],
)
def test_golden_probabilities(sigma, lam, gradient, plus, minus, zero, smooth):
    found = [float(p) for p in pcmu.probabilities(exactly(gradient), sigma, lam)]
    assert found == pytest.approx([plus, minus, zero], abs=1e-6)
    assert pcmu.smoothed(exactly(gradient), sigma, lam).tolist() == [smooth]


def test_golden_directions_and_means():
    assert pcmu.smoothed(exactly(0.0), 0.1, 0.01).tolist() == [0]  # a tie, 0 by rule
    assert pcmu.smoothed(exactly(0.1, 0.01), 0.5, 0.25).tolist() == [1, 0]
    found = pcmu.soft_mean(exactly(0.05, -0.05), 0.1, 0.01)
    assert found.tolist() == pytest.approx([0.381169, -0.381169], abs=5e-7)
    assert pcmu.slope_at_zero(0.1, 0.01) == pytest.approx(7.939051, abs=5e-7)
    assert pcmu.slope_at_zero(1.0, 1.0) == pytest.approx(0.483941, abs=5e-7)


@pytest.mark.parametrize(("sigma", "lam"), SETTINGS)
def test_the_closed_form_is_the_class_that_most_draws_fall_into(sigma, lam):
    draws = 1_000_000
    draw = torch.Generator().manual_seed(3)
    noise = sigma * torch.randn(draws, generator=draw, dtype=torch.float64)
    grid = torch.linspace(-2.5, 2.5, 30, dtype=torch.float64) * sigma
    edge = pcmu.threshold(sigma, lam)
    near = exactly(edge - 0.02 * sigma, edge + 0.02 * sigma, 0.013 * sigma)
    compared = 0
    for gradient in torch.cat([grid, near]):
        drawn = pcmu.quantise(gradient + noise, lam)
        counts = torch.stack([(drawn == 0).sum(), (drawn == 1).sum(), (drawn == -1).sum()])
        plus, minus, zero = pcmu.probabilities(gradient, sigma, lam)
        # Standard error of a share of 1e6 draws: at most sqrt(.25 / 1e6) = 5e-4.
        assert counts / draws == pytest.approx([float(zero), float(plus), float(minus)], abs=2e-3)
        mean = float(drawn.double().mean())
        assert float(pcmu.soft_mean(gradient, sigma, lam)) == pytest.approx(mean, abs=4e-3)
        if abs(abs(float(gradient)) - edge) > 3e-3 * sigma:
            most = [0, 1, -1][int(counts.argmax())]
            assert int(pcmu.smoothed(gradient, sigma, lam)) == most
            compared += 1
    assert compared == 33


@settings(deadline=None)
@given(values=lists, sigma=sigmas, ratio=ratios)
def test_smoothing_is_odd_and_ternary_and_goes_with_the_sign(values, sigma, ratio):
    gradient = torch.tensor(values)
    found = pcmu.smoothed(gradient, sigma, ratio * sigma)
    assert set(found.tolist()) <= {-1, 0, 1}
    assert torch.equal(pcmu.smoothed(-gradient, sigma, ratio * sigma), -found)
    assert bool((found * gradient >= 0).all())


@settings(deadline=None)
@given(values=lists, sigma=sigmas, ratio=ratios)
def test_smoothing_is_the_most_probable_class(values, sigma, ratio):
    gradient, lam = exactly(*values), ratio * sigma
    edge = pcmu.threshold(sigma, lam)
    gradient = gradient[(gradient.abs() - edge).abs() > 1e-9 * sigma]
    plus, minus, zero = pcmu.probabilities(gradient, sigma, lam)
    assert torch.stack([plus, minus, zero]).sum(dim=0).tolist() == pytest.approx(
        [1.0] * len(gradient)
    )
    best = torch.maximum(torch.maximum(plus, minus), zero)
    found = pcmu.smoothed(gradient, sigma, lam)
    chosen = torch.where(found == 0, zero, torch.where(found > 0, plus, minus))
    assert torch.allclose(chosen, best, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(values=lists, sigma=sigmas, seed=st.integers(0, 100))
def test_coordinates_do_not_see_each_other(values, sigma, seed):
    gradient = torch.tensor(values)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    for mode in ("hard", "soft"):
        quantiser = Quantiser(sigma=sigma, mode=mode)
        one = pcmu.direction(gradient, quantiser)[order]
        assert torch.equal(one, pcmu.direction(gradient[order], quantiser))


@settings(deadline=None)
@given(values=lists, sigma=sigmas)
def test_without_a_band_smoothing_is_the_sign(values, sigma):
    gradient = torch.tensor(values)
    assert torch.equal(pcmu.smoothed(gradient, sigma, 0.0).float(), gradient.sign())


def test_with_ever_less_noise_and_band_smoothing_is_the_sign():
    gradient = exactly(-1e-6, -0.3, 0.0, 1e-9, 2.0)
    for sigma in (0.4, 0.1, 1e-3, 1e-8):
        assert pcmu.smoothed(gradient, sigma, sigma**2).tolist() == [-1, -1, 0, 1, 1]


@settings(deadline=None)
@given(values=lists, sigma=sigmas, ratio=ratios)
def test_the_soft_mean_is_odd_increasing_and_within_one(values, sigma, ratio):
    gradient = exactly(*sorted(values))
    found = pcmu.soft_mean(gradient, sigma, ratio * sigma)
    assert torch.equal(pcmu.soft_mean(-gradient, sigma, ratio * sigma), -found)
    assert bool((found.diff() >= 0).all())
    assert bool((found.abs() <= 1).all())
    small = gradient.abs() < (ratio + 5) * sigma  # beyond, 1 - 3e-7 and more is soon rounded to 1
    assert bool((found[small].abs() < 1).all())
    assert bool((found * gradient >= 0).all())


@pytest.mark.parametrize(("sigma", "lam"), [*SETTINGS, (2.0, 0.0), (0.3, 1.2)])
def test_the_slope_at_zero_is_the_limit_of_the_difference(sigma, lam):
    # m is odd, so (m(h) - m(-h)) / 2h = m'(0) + O(h^2)
    h = 1e-4 * sigma
    ends = pcmu.soft_mean(exactly(h, -h), sigma, lam)
    assert float(ends[0] - ends[1]) / (2 * h) == pytest.approx(
        pcmu.slope_at_zero(sigma, lam), rel=1e-6
    )


@pytest.mark.parametrize(("sigma", "lam"), SETTINGS)
def test_the_rescaled_mean_is_the_gradient_where_it_is_small_and_bounded_where_it_is_large(
    sigma, lam
):
    small = exactly(1e-4, -3e-4) * sigma
    assert pcmu.rescaled_mean(small, sigma, lam).tolist() == pytest.approx(small.tolist(), rel=1e-6)
    bound = sigma * math.sqrt(math.pi / 2) * math.exp(lam**2 / (2 * sigma**2))
    large = pcmu.rescaled_mean(exactly(50.0, -50.0) * sigma, sigma, lam)
    assert large.tolist() == pytest.approx([bound, -bound])


# ------------------------------------------------------------------------------ settings, warning


def test_the_defaults_are_the_papers_and_ours():
    quantiser = Quantiser()
    assert (quantiser.sigma, quantiser.lam_factor, quantiser.mode) == (0.1, 1.0, "hard")
    assert quantiser.alpha == 0.01
    assert quantiser.lam == pytest.approx(0.01)
    assert Quantiser(sigma=0.5, lam_factor=3).lam == pytest.approx(0.75)  # 3 (1/2)^2
    assert Quantiser(sigma=0.5).threshold == pytest.approx(0.093138, abs=5e-7)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"sigma": 0.0}, "sigma must be a number above 0, got 0.0"),
        ({"sigma": math.nan}, "sigma must be a number above 0, got nan"),
        ({"sigma": math.inf}, "sigma must be a number above 0, got inf"),
        ({"lam_factor": -1.0}, "lam_factor must be a number of at least 0, got -1.0"),
        ({"lam_factor": math.nan}, "lam_factor must be"),
        ({"mode": "medium"}, "mode must be one of hard, soft, sample, got 'medium'"),
        ({"alpha": 0.0}, "alpha must be a number above 0, got 0.0"),
        ({"alpha": math.inf}, "alpha must be"),
        ({"sigma": 1e200}, "lam = lam_factor sigma.2 is inf; lower sigma or lam_factor"),
        ({"sigma": 14.0, "mode": "soft"}, "lam of at most 13 sigma, got 14; lower"),
        ({"sigma": -1.0, "alpha": -2.0}, "sigma must be .* got -1.0; alpha must be .* got -2.0"),
    ],
)
def test_settings_out_of_range_are_refused_all_at_once(given_, message):
    with pytest.raises(ParametersError, match=message):
        Quantiser(**given_)


def test_the_widest_band_that_soft_takes_is_still_a_number():
    quantiser = Quantiser(sigma=13.0, mode="soft")
    assert bool(torch.isfinite(pcmu.direction(torch.tensor([1e4, -1e4]), quantiser)).all())


def test_a_dead_zone_is_told_with_its_size():
    assert pcmu.dead_zone(Quantiser(sigma=0.43)) is None
    assert pcmu.dead_zone(Quantiser(sigma=0.5, mode="soft")) is None
    assert pcmu.dead_zone(Quantiser(sigma=0.5, mode="sample")) is None
    assert pcmu.dead_zone(Quantiser(sigma=0.5, lam_factor=0.5)) is None
    warning = pcmu.dead_zone(Quantiser(sigma=0.5))
    assert warning.startswith("DeadZone(0.09314): with sigma 0.5 and lam 0.25")
    assert "lower sigma" in warning
    assert pcmu.dead_zone(Quantiser(sigma=0.44)).startswith("DeadZone(0.0")


# ------------------------------------------------------------------------------- modes, and steps


def test_a_hard_direction_is_alpha_long_whatever_the_gradient():
    gradient = torch.tensor([[1e-6, -3.0], [0.0, 40.0]])
    found = pcmu.direction(gradient, Quantiser(alpha=0.25))
    assert found.tolist() == [[0.25, -0.25], [0.0, 0.25]]
    assert found.dtype == torch.float32


def test_a_soft_direction_is_the_rescaled_mean_and_has_no_alpha():
    gradient = torch.tensor([1e-3, -0.05, 4.0])
    expected = pcmu.rescaled_mean(gradient, 0.1, 0.01).float()
    for alpha in (0.01, 7.0):
        found = pcmu.direction(gradient, Quantiser(mode="soft", alpha=alpha))
        assert torch.equal(found, expected)
        assert found.dtype == torch.float32


def test_a_sampled_direction_is_one_draw_with_the_soft_mean_on_average():
    gradient = torch.full((200_000,), 0.05)
    quantiser = Quantiser(mode="sample", alpha=2.0)
    found = pcmu.direction(gradient, quantiser, torch.Generator().manual_seed(1))
    again = pcmu.direction(gradient, quantiser, torch.Generator().manual_seed(1))
    assert torch.equal(found, again)
    assert set(found.tolist()) == {-2.0, 0.0, 2.0}
    # Standard error 2 sqrt(.93 / 2e5) = .0043 about 2 m(.05) = 2 x .381169.
    assert float(found.mean()) == pytest.approx(0.762338, abs=0.015)
    with pytest.raises(ParametersError, match="sample needs a generator"):
        pcmu.direction(gradient, quantiser)


def test_directions_are_those_of_the_trained_tensors():
    gradients = {**batchnorm_like(), "bias": torch.tensor([-1.0])}
    found = pcmu.directions(gradients, Quantiser())
    assert {name: t.tolist() for name, t in found.items()} == {
        "weight": pytest.approx([0.01, -0.01, 0.01]),
        "bias": pytest.approx([-0.01]),
    }


def test_a_step_by_hand():
    # w - lr alpha S(g) = (1, -2, .5) - .5 x .25 x (1, 0, -1)
    model = batchnorm_like()
    gradients = {"weight": torch.tensor([3.0, 0.0, -1e-4]), "running_mean": torch.ones(1)}
    found = pcmu.step(model, gradients, 0.5, Quantiser(alpha=0.25))
    assert found["weight"].tolist() == [0.875, -2.0, 0.625]
    assert list(found) == list(model)
    for name in ("running_mean", "num_batches_tracked"):
        assert torch.equal(found[name], model[name])
        assert found[name] is not model[name]
        assert found[name].dtype == model[name].dtype


@pytest.mark.parametrize("mode", ["hard", "soft", "sample"])
def test_what_is_given_is_never_written_to(mode):
    model, gradients = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.3, -0.4])}
    kept = model["w"].clone(), gradients["w"].clone()
    draw = torch.Generator().manual_seed(1)
    quantiser = Quantiser(mode=mode)
    found = pcmu.step(model, gradients, 0.1, quantiser, draw)
    for tensor in (*found.values(), *pcmu.directions(gradients, quantiser, draw).values()):
        tensor.add_(1)
    pcmu.probabilities(gradients["w"].double(), 0.1, 0.01)[0].add_(1)
    pcmu.soft_mean(gradients["w"].double(), 0.1, 0.01).add_(1)
    assert torch.equal(model["w"], kept[0])
    assert torch.equal(gradients["w"], kept[1])


def test_doubles_stay_doubles_and_equal_directions_give_equal_bits():
    model = {"w": torch.tensor([0.1, 0.7], dtype=torch.float64)}
    one = pcmu.step(model, {"w": exactly(1e-9, -5.0)}, 0.1, Quantiser())
    other = pcmu.step(model, {"w": exactly(0.2, -1e-3)}, 0.1, Quantiser())
    assert one["w"].dtype == torch.float64
    assert torch.equal(one["w"], other["w"])


@pytest.mark.parametrize(
    ("gradient", "rate", "message"),
    [
        ({"w": torch.tensor([math.nan])}, 0.1, "tensor w holds values that are not finite"),
        ({"w": torch.tensor([math.inf])}, 0.1, "not finite"),
        ({"v": torch.ones(1)}, 0.1, "differ in their tensors: v, w"),
        ({"w": torch.ones(2)}, 0.1, r"tensor w is \(1,\)"),
        ({"w": exactly(1.0)}, 0.1, "float64"),
        ({"w": torch.ones(1)}, 0.0, "learning rate must be a number above 0, got 0.0"),
        ({"w": torch.ones(1)}, math.inf, "learning rate must be"),
    ],
)
def test_what_is_no_step_is_refused(gradient, rate, message):
    with pytest.raises(ParametersError, match=message):
        pcmu.step({"w": torch.ones(1)}, gradient, rate, Quantiser())


def test_a_model_that_is_lost_is_refused():
    with pytest.raises(ParametersError, match="not finite"):
        pcmu.step({"w": torch.full((1,), -3e38)}, {"w": torch.ones(1)}, 1e38, Quantiser(alpha=5.0))
