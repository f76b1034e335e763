"""The three statements against their formulas, and the exact one against retraining: methods 3.5."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from unlearning import certificates, ffmu, pcmu
from unlearning.certificates import Closeness, Device, ExactCheck
from unlearning.errors import NotCertifiedError, ParametersError, RefusedRequestError
from unlearning.pcmu import Quantiser

SIGN = Quantiser()  # sigma .1, lam .01: g* = 0
DEAD = Quantiser(sigma=1.0)  # lam 1: g* = .969343
BANDS = [(0.1, 1.0), (1.0, 1.0), (0.5, 1.0), (0.3, 0.0), (2.0, 1.5), (1.0, 60.0)]
lists = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20)


def exactly(*values):
    return torch.tensor(values, dtype=torch.float64)


def doubles(*values):
    return {"w": exactly(*values)}


# ------------------------------------------------------------------ (a) paper radius and budget


def test_in_the_sign_regime_the_radius_is_the_distance_to_the_flip():
    # dPhi = (g - lam) / sigma - (-g - lam) / sigma = 2 g / sigma while minus is more likely than
    # zero: Phi(-x - .1) > Phi(.1 - x) - Phi(-.1 - x), which x = g / sigma is up to 3.1958.
    gradient = exactly(0.0, 1e-6, -0.02, 0.1, -0.319)
    gap = certificates.confidence_gap(gradient, SIGN)
    assert gap.tolist() == pytest.approx([0, 2e-5, 0.4, 2.0, 6.38])
    radius = certificates.gradient_radius(gap, 0.1)
    assert radius.tolist() == pytest.approx(gradient.abs().tolist())
    beyond = certificates.gradient_radius(
        certificates.confidence_gap(exactly(0.33), SIGN), SIGN.sigma
    )
    assert float(beyond) < 0.33 - 1e-4


def test_golden_radii_in_the_dead_zone():
    # At 0: Phi^-1(.682689) = .475233 and Phi^-1(.158655) = -1, so R' = 1.475233 / 2.
    # At 1.2: Phi^-1(.579260) = .2 and Phi^-1(.406837) = -.235689, so R' = .435689 / 2.
    inverse = NormalDist().inv_cdf
    assert (inverse(0.6826894921) + 1) / 2 == pytest.approx(0.737616, abs=5e-7)
    assert (0.2 - inverse(0.4068366)) / 2 == pytest.approx(0.217845, abs=5e-7)
    gap = certificates.confidence_gap(exactly(1.2, 0.0, -1.2), DEAD)
    radius = certificates.gradient_radius(gap, 1.0)
    assert radius.tolist() == pytest.approx([0.217845, 0.737616, 0.217845], abs=5e-7)
    exact = certificates.margin(exactly(1.2, 0.0, -1.2), DEAD)
    assert exact.tolist() == pytest.approx([0.230657, 0.969343, 0.230657], abs=5e-7)


@settings(deadline=None)
@given(values=lists, band=st.sampled_from(BANDS))
def test_the_papers_radius_never_exceeds_the_exact_margin(values, band):
    quantiser = Quantiser(sigma=band[0], lam_factor=band[1])
    gradient = exactly(*values)
    gap = certificates.confidence_gap(gradient, quantiser)
    assert bool(torch.isfinite(gap).all())
    assert bool((gap >= 0).all())
    radius = certificates.gradient_radius(gap, quantiser.sigma)
    exact = certificates.margin(gradient, quantiser)
    assert bool((radius <= exact + 1e-9 * quantiser.sigma).all())
    assert torch.equal(certificates.confidence_gap(-gradient, quantiser), gap)


@settings(deadline=None)
@given(values=lists, band=st.sampled_from(BANDS[:4]))
def test_the_gap_is_that_of_the_two_most_probable_classes(values, band):
    quantiser = Quantiser(sigma=band[0], lam_factor=band[1])
    gradient = exactly(*values)
    gradient = gradient[gradient.abs() < 4 * quantiser.sigma]
    assume(gradient.numel() > 0)
    classes = torch.stack(pcmu.probabilities(gradient, quantiser.sigma, quantiser.lam))
    top = classes.sort(dim=0, descending=True).values
    expected = torch.special.ndtri(top[0]) - torch.special.ndtri(top[1])
    gap = certificates.confidence_gap(gradient, quantiser)
    torch.testing.assert_close(gap, expected, rtol=1e-6, atol=1e-6)


def test_radii_of_gradients_far_out_are_numbers():
    gradient = exactly(0.0, 1e-300, 50.0, 1e6, -1e300)
    for quantiser in (SIGN, DEAD, Quantiser(lam_factor=0.0), Quantiser(sigma=100.0)):
        gap = certificates.confidence_gap(gradient, quantiser)
        assert bool(torch.isfinite(gap).all())
        radius = certificates.gradient_radius(gap, quantiser.sigma)
        exact = certificates.margin(gradient, quantiser)
        assert bool((radius <= exact * (1 + 1e-9) + 1e-9).all())


def test_the_radius_in_the_data():
    # sqrt(16) / .5 x 3
    assert float(certificates.data_radius(exactly(3.0), 16, 0.5)) == 24.0


@pytest.mark.parametrize(
    ("gap", "expected"), [(0.0, 0), (0.02, 0), (1.0, 599), (4.0, 599), (1e12, 599)]
)
def test_golden_budgets_all_but_one_may_go(gap, expected):
    # 36 x 784 / 50,000 = .56448, over dPhi^2: 1411 at .02; .56 at 1; .04 at 4; nothing at 1e12
    found = certificates.budget(exactly(gap), 600, 784, 50_000, 1.0)
    assert found.tolist() == [expected]
    assert found.dtype == torch.int64


def test_budgets_between_the_extremes():
    # 600 - 36 x 10 x 2^2 / (100 x dPhi^2) = 600 - 14.4 / dPhi^2
    found = certificates.budget(exactly(0.2, 0.5, 0.155), 600, 10, 100, 2.0)
    assert found.tolist() == [240, 542, 0]  # 600 - 360, 600 - 57.6, 600 - 599.4 = .6


def test_the_lipschitz_constant_of_pairs():
    # ||(3, 4)|| / ||(2,)|| = 2.5 and 1 / 2
    one = ((exactly(0.0), doubles(0, 0)), (exactly(2.0), doubles(3, 4)))
    two = ((exactly(1.0), doubles(1, 1)), (exactly(3.0), doubles(1, 2)))
    same = ((exactly(1.0), doubles(1, 1)), (exactly(1.0), doubles(1, 1)))
    labels = ((exactly(1.0), doubles(1, 1)), (exactly(1.0), doubles(1, 2)))
    assert certificates.estimated_lipschitz([two, one, same]) == 2.5
    assert certificates.estimated_lipschitz([two, labels]) == math.inf
    still = ((exactly(1.0), doubles(1, 1)), (exactly(2.0), doubles(1, 1)))
    assert certificates.estimated_lipschitz([still]) == 0
    for none in ([], [same]):
        with pytest.raises(ParametersError, match="pairs of samples that differ; draw more"):
            certificates.estimated_lipschitz(none)


def test_the_paper_certificate_by_hand():
    # dPhi = 2 |g| / sigma = .2, 1, 2, .4 and T = 4: R' = |g|, R = 2 / .5 |g|
    # B' = floor(100 - 36 x 8 x .25 / (4 dPhi^2)) = floor(100 - 18 / dPhi^2)
    #    = -350 -> 0, 82, 95, -12.5 -> 0
    gradients = {
        "w": torch.tensor([[0.01, -0.05]]),
        "norm.running_mean": torch.tensor([9.0]),
        "b": torch.tensor([0.1, -0.02]),
    }
    found = certificates.paper_certificate(
        gradients, SIGN, samples=100, dimension=8, lipschitz=0.5, removed=82
    )
    assert found.gradient_radius == pytest.approx((0.01, 0.02))  # of .01 .02 .05 .1
    assert found.data_radius == pytest.approx((0.04, 0.08))
    assert found.budget == (0, 0)
    assert found.share == 0.5
    more = certificates.paper_certificate(
        gradients, SIGN, samples=100, dimension=8, lipschitz=0.5, removed=83, estimated=True
    )
    assert more.share == 0.25
    assert found.statement.startswith(
        "Paper radius and budget (Theorem 1), per coordinate: R' min 0.01, median 0.02; "
        "R min 0.04, median 0.08; B' min 0, median 0; 50 % of coordinates allow 82 to be removed; "
        "L = 0.5. The model's budget is the smallest of them"
    )
    assert "L = 0.5 (estimated)" in more.statement
    assert "shows nothing to be forgotten" in found.statement


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "must be at least 1"),
        ({"dimension": 0}, "must be at least 1"),
        ({"removed": 0}, "must be at least 1"),
        ({"lipschitz": 0.0}, "lipschitz above 0, got 10, 2, 1 and 0.0"),
        ({"lipschitz": math.nan}, "lipschitz above 0"),
        ({"gradients": doubles(math.nan)}, "not finite"),
        ({"gradients": {"running_var": torch.ones(1)}}, "no gradient to certify"),
    ],
)
def test_what_has_no_paper_certificate_is_refused(change, message):
    given_ = {"samples": 10, "dimension": 2, "lipschitz": 1.0, "removed": 1} | change
    gradients = given_.pop("gradients", doubles(1))
    with pytest.raises(ParametersError, match=message):
        certificates.paper_certificate(gradients, SIGN, **given_)


# ---------------------------------------------------------------------- (b) exact one-round check


def device(gradient, samples, removed=0, largest=None):
    found = None if largest is None else doubles(*largest)
    return Device(gradient=doubles(*gradient), samples=samples, removed=removed, largest=found)


def test_margins_by_hand():
    assert certificates.margin(exactly(-0.2, 0.0, 3.0), SIGN).tolist() == [0.2, 0.0, 3.0]
    found = certificates.margin(torch.tensor([-2.0, 0.5]), DEAD)
    assert found.tolist() == pytest.approx([2 - 0.969343, 0.969343 - 0.5], abs=5e-7)
    assert found.dtype == torch.float64


def test_changes_by_hand():
    # 2 / (10 - 2) (|-3| + 5)
    assert certificates.change(exactly(-3.0), exactly(5.0), 2, 10).tolist() == [2.0]
    assert certificates.change(exactly(-3.0), 5.0, 2, 10).tolist() == [2.0]


@settings(deadline=None)
@given(values=st.lists(st.floats(-4, 4), min_size=2, max_size=12), data=st.data())
def test_no_mean_changes_by_more(values, data):
    removed = data.draw(st.integers(1, len(values) - 1))
    gone = data.draw(st.permutations(range(len(values))))[:removed]
    kept = [v for k, v in enumerate(values) if k not in gone]
    mean, after = math.fsum(values) / len(values), math.fsum(kept) / len(kept)
    largest = max(abs(v) for v in values)
    bound = certificates.change(exactly(mean), largest, removed, len(values))
    assert abs(after - mean) <= float(bound) + 1e-12


def test_one_device_by_hand():
    # n = 10, n_f = 2: 1/4 (|G| + c) < |G| is c < 3 |G|
    one = device([1.0, 1.0, -1.0, 0.5], 10, 2, [2.9, 3.1, 2.9, 1.5])
    assert certificates.certified([one], SIGN)["w"].tolist() == [True, False, True, False]


def test_one_device_by_hand_in_the_dead_zone():
    # g* = .969343, n = 10, n_f = 2: 1/4 (|G| + c) < ||G| - g*|
    # .5: .25 (.5 + 1.3) = .45 < .469; .25 (.5 + 1.4) = .475. 1.5: .25 (1.5 + 1.5) > .53.
    # 2: .25 (2 + 2) = 1 < 1.03. 0: .25 x 3.8 < .969.
    one = device([0.5, -0.5, 1.5, 2.0, 0.0], 10, 2, [1.3, 1.4, 1.5, 2.0, 3.8])
    found = certificates.certified([one], DEAD)["w"].tolist()
    assert found == [True, False, False, True, True]


def test_a_clipped_gradient_needs_one_number_only():
    one = Device(gradient=doubles(1.0, 0.4), samples=10, removed=2, largest=2.0)
    # .25 (1 + 2) < 1, .25 (.4 + 2) = .6 > .4
    assert certificates.certified([one], SIGN)["w"].tolist() == [True, False]


def test_more_to_remove_is_harder():
    masks = [
        certificates.certified([device([1.0, 0.4, 0.1], 20, k, [1.5] * 3)], SIGN)["w"]
        for k in range(1, 20)
    ]
    for less, more in itertools.pairwise(masks):
        assert bool((more <= less).all())
    assert masks[0].tolist() == [True, True, True]
    assert masks[-1].tolist() == [False, False, False]


def test_coordinates_that_no_sample_moves_are_certified():
    # c = 0: every sample's gradient is 0, and so are all means. G = 0 alone shows nothing.
    one = device([0.0, 0.0], 10, 2, [0.0, 0.5])
    assert certificates.certified([one], SIGN)["w"].tolist() == [True, False]
    # Others pull by 1 and -1: their average is the same without the samples.
    devices = [one, device([1.0, 1.0], 5), device([-1.0, -1.0], 5)]
    assert certificates.certified(devices, SIGN)["w"].tolist() == [True, False]
    # By samples their shares change, which in numbers need not cancel.
    by_samples = certificates.certified(devices, SIGN, "samples")["w"].tolist()
    assert by_samples == [False, False]
    alone = certificates.certified([one, device([0.0, 0.0], 5)], SIGN, "samples")
    assert alone["w"].tolist() == [True, False]


def test_uniform_federations_move_by_a_share_of_what_devices_do():
    # G = (4 + 1 + 1) / 3 = 2. Device a: 1/4 (4 + c) / 3; alone 2 > (4 + 19) / 12 = 1.92 but
    # with b, which adds 1/2 (1 + 1) / 3 = .33, it is less.
    a, b, other = device([4.0], 10, 2, [19.0]), device([1.0], 6, 2, [1.0]), device([1.0], 3)
    spared = device([1.0], 6)
    assert certificates.certified([a, spared, other], SIGN)["w"].tolist() == [True]
    assert certificates.certified([a, b, other], SIGN)["w"].tolist() == [False]
    # (4 + 20.1) / 12 = 2.008
    worse = device([4.0], 10, 2, [20.1])
    assert certificates.certified([worse, spared, other], SIGN)["w"].tolist() == [False]


def test_federations_weighted_by_samples_move_as_their_samples_do():
    # G = (10 x 4 + 6 x 1 + 4 x 1) / 20 = 2.5; n_f = 2 + 3 of N = 20:
    # (5 x 2.5 + 2 c_a + 3 c_b) / 15 < 2.5 is 2 c_a + 3 c_b < 25
    a, other = device([4.0], 10, 2, [10.9]), device([1.0], 4)
    assert certificates.certified([a, device([1.0], 6, 3, [1.0]), other], SIGN, "samples")[
        "w"
    ].tolist() == [True]
    assert certificates.certified([a, device([1.0], 6, 3, [1.1]), other], SIGN, "samples")[
        "w"
    ].tolist() == [False]


def test_a_deletion_changes_the_shares_too_where_they_are_those_of_the_samples():
    # a's 4 samples have gradients of 0, b's 96 of -1: G = -.96, in the dead zone of .969343.
    # Without 3 of a's it is -96 / 97 = -.9897, and beyond it, though a's own mean did not change.
    a, b = device([0.0], 4, 3, [0.0]), device([-1.0], 96)
    assert pcmu.smoothed(exactly(-96 / 100, -96 / 97), 1.0, 1.0).tolist() == [0, -1]
    assert certificates.certified([a, b], DEAD, "samples")["w"].tolist() == [False]
    # Without 1 of them it is -96 / 99 = -.969697 and beyond; of 5 in 101, -96 / 100 and within.
    assert certificates.certified([device([0.0], 4, 1, [0.0]), b], DEAD, "samples")[
        "w"
    ].tolist() == [False]
    assert certificates.certified([device([0.0], 5, 1, [0.0]), b], DEAD, "samples")[
        "w"
    ].tolist() == [True]
    # Uniform shares stay: G = -1/2 whatever a loses.
    assert certificates.certified([a, b], DEAD)["w"].tolist() == [True]


def test_every_tensor_has_its_own_bound_and_buffers_have_none():
    gradient = {"a": exactly(1.0), "norm.running_mean": exactly(0.0), "b": exactly(1.0)}
    one = Device(
        gradient=gradient, samples=10, removed=2, largest={"a": exactly(5.0), "b": exactly(1.0)}
    )
    found = certificates.certified([one], SIGN)
    assert {name: mask.tolist() for name, mask in found.items()} == {"a": [False], "b": [True]}


def test_a_margin_within_rounding_is_not_certified():
    # n = 4, n_f = 1, G = 1: 1/3 (1 + c) < 1 is c < 2. Rounding: 4 u (4 + 3) c = 6.2e-15,
    # and the change is 1e-15 short of 1 or 3e-14.
    for short, expected in ((3e-15, False), (1e-13, True)):
        one = device([1.0], 4, 1, [2 - short])
        assert float(certificates.change(exactly(1.0), 2 - short, 1, 4)) < 1
        assert certificates.certified([one], SIGN)["w"].tolist() == [expected]


def test_rounding_can_flip_a_step_that_exact_arithmetic_would_keep():
    # Two samples just below and just above g*, with a mean below it that is rounded to above it.
    flipped = 0
    for sigma in torch.linspace(0.6, 1.2, 200).tolist():
        quantiser = Quantiser(sigma=sigma)
        edge = quantiser.threshold
        above = torch.tensor(edge)
        below = torch.nextafter(above, torch.tensor(0.0))
        if not float(below) < edge < float(above):
            below, above = above, torch.nextafter(above, torch.tensor(9.0))
        after = torch.stack([below, above]).mean()
        if (float(below) + float(above)) / 2 < edge < float(after):
            before = torch.stack([below, above, -above]).mean()
            assert pcmu.smoothed(before, sigma, quantiser.lam) == 0
            assert pcmu.smoothed(after, sigma, quantiser.lam) == 1
            # G = below / 3, and G + 1/2 (G + above) is their mean, to within 1e-16.
            largest = float(above)
            moved = certificates.change(before, largest, 1, 3)
            assert float(before + moved) == pytest.approx(edge, rel=1e-7)
            one = Device(gradient={"w": before}, samples=3, removed=1, largest=largest)
            assert not certificates.certified([one], quantiser)["w"]
            flipped += 1
    assert flipped > 5


def test_numbers_too_small_to_be_exact_are_not_certified():
    # Floats of 1.4e-45 and its multiples. 1/99 (1 + 1) x 1e-43 is far below the margin, but each
    # of 100 samples is rounded by up to half of 1.4e-45, which makes as much as 7e-44.
    for size, expected in ((1e-43, False), (1e-37, True)):
        g = torch.tensor([size])
        one = Device(gradient={"w": g}, samples=100, removed=1, largest={"w": g})
        assert certificates.certified([one], SIGN)["w"].tolist() == [expected]


@pytest.mark.parametrize(
    ("devices", "error", "message"),
    [
        ([device([1.0], 10)], ParametersError, "no sample is to be removed"),
        ([], ParametersError, "no sample is to be removed"),
        ([device([1.0], 10, 11, [1.0])], ParametersError, "got 11 of 10"),
        ([device([1.0], 10, -1, [1.0])], ParametersError, "got -1 of 10"),
        ([device([1.0], 0)], ParametersError, "got 0 of 0"),
        ([device([1.0], 10, 10, [1.0])], NotCertifiedError, "lose all of its 10 samples"),
        ([device([1.0], 10, 1)], NotCertifiedError, "needs the largest gradient of a sample"),
        ([device([1.0], 10, 1, [0.9])], ParametersError, "tensor w: .* below the mean"),
        ([device([0.0], 10, 1, [-1.0])], ParametersError, "tensor w: .* below the mean"),
        ([device([1.0], 10, 1, [math.inf])], ParametersError, "not finite"),
        ([device([1.0], 10, 1, [1.0, 1.0])], ParametersError, "tensor w is"),
        ([device([math.nan], 10, 1, [1.0])], ParametersError, "not finite"),
        (
            [Device(gradient=doubles(1), samples=3, removed=1, largest=math.nan)],
            ParametersError,
            "not finite or below",
        ),
        (
            [Device(gradient=doubles(1), samples=3, removed=1, largest=math.inf)],
            ParametersError,
            "not finite or below",
        ),
        ([device([1.0], 9, 1, [1.0]), device([1.0, 2.0], 9)], ParametersError, "tensor w is"),
    ],
)
def test_what_cannot_be_checked_is_refused(devices, error, message):
    with pytest.raises(error, match=message):
        certificates.certified(devices, SIGN)


def test_only_known_weights_are_taken():
    with pytest.raises(ParametersError, match="one of uniform, samples, got 'sample'"):
        certificates.certified([device([1.0], 9, 1, [1.0])], SIGN, "sample")


def test_all_hypotheses_that_fail_are_told():
    model = {"w": torch.ones(1), "norm.running_var": torch.ones(1)}
    certificates.check_certifiable({"w": torch.ones(1)}, SIGN, full=True)
    certificates.check_certifiable(model, SIGN, full=True, frozen_statistics=True)
    with pytest.raises(NotCertifiedError) as error:
        certificates.check_certifiable(model, Quantiser(mode="soft"), full=False)
    assert str(error.value).startswith("Our exact one-round check does not apply: mode must be")
    assert "got soft; devices must send one gradient of all" in str(error.value)
    assert "1 tensors, such as norm.running_var, are statistics" in str(error.value)
    for mode in ("soft", "sample"):
        with pytest.raises(NotCertifiedError, match=f"mode must be hard, got {mode}"):
            certificates.certified([device([1.0], 9, 1, [1.0])], Quantiser(mode=mode))


def test_certified_pairs_add_up_over_rounds():
    check = ExactCheck()
    assert check.share is None
    assert not check.complete
    assert "no round was looked at" in check.statement
    check = check.after({"a": torch.tensor([[True, True]]), "b": torch.tensor([True])})
    assert (check.certified, check.pairs, check.rounds, check.share) == (3, 3, 1, 1.0)
    assert check.complete
    assert check.statement == (
        "Our exact one-round check: 3 of 3 (coordinate, round) pairs certified in 1 rounds, "
        "100 %; all: the model is the one that training without these samples gives"
    )
    check = check.after({"a": torch.tensor([[True, False]]), "b": torch.tensor([True])})
    assert (check.certified, check.pairs, check.rounds) == (5, 6, 2)
    assert check.share == pytest.approx(5 / 6)
    assert not check.complete
    assert "5 of 6 (coordinate, round) pairs certified in 2 rounds, 83.3 %" in check.statement
    assert "not all: nothing is shown" in check.statement


def test_all_but_one_of_many_is_not_100_percent():
    check = ExactCheck(certified=999_999, pairs=1_000_000, rounds=1)
    assert not check.complete
    assert "99.9 %" in check.statement


def test_a_request_is_answered_by_the_model_or_not_at_all():
    model = {"w": torch.ones(2), "running_mean": torch.zeros(1)}
    complete = ExactCheck(certified=6, pairs=6, rounds=3)
    found = certificates.answer(model, complete, 3)
    assert all(torch.equal(found[name], model[name]) for name in model)
    assert found["w"] is not model["w"]
    with pytest.raises(NotCertifiedError, match=r"needs all 4 rounds .* and 3 were looked at"):
        certificates.answer(model, complete, 4)
    with pytest.raises(NotCertifiedError, match=r"5 of 6 .* not all.*use a method that forgets"):
        certificates.answer(model, ExactCheck(certified=5, pairs=6, rounds=3), 3)
    with pytest.raises(NotCertifiedError, match="no round was looked at"):
        certificates.answer(model, ExactCheck(), 0)
    assert issubclass(NotCertifiedError, RefusedRequestError)


# ------------------------------------------------------ (b) against training without the samples


def sample_gradients(model, x, y):
    """Per sample, the gradient of (a tanh(W x) + b - y)^2; shapes (n, ...)."""
    hidden = torch.tanh(x @ model["W"].T)
    residual = hidden @ model["a"] + model["b"] - y
    outer = (2 * residual)[:, None] * model["a"] * (1 - hidden**2)
    return {
        "W": outer[:, :, None] * x[:, None, :],
        "a": (2 * residual)[:, None] * hidden,
        "b": (2 * residual)[:, None],
    }


def mean_gradient(model, data):
    """The same for the mean over samples, as autograd has it: other sums in another order."""
    x, y = data
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in model.items()}
    hidden = torch.tanh(x @ leaves["W"].T)
    loss = ((hidden @ leaves["a"] + leaves["b"] - y) ** 2).mean()
    names = list(leaves)
    grads = torch.autograd.grad(loss, [leaves[name] for name in names])
    return dict(zip(names, grads, strict=True))


def start(draw):
    return {
        "W": torch.randn(2, 3, generator=draw),
        "a": torch.randn(2, generator=draw),
        "b": torch.randn(1, generator=draw),
    }


def shard(draw, n):
    """Samples of a far-away function; the last feature is always 0, as a black pixel is."""
    x = torch.randn(n, 3, generator=draw) * 0.5 + torch.tensor([1.0, -1.0, 0.0])
    x[:, 2] = 0
    return x, 6 + x[:, 0] - x[:, 1] + 0.1 * torch.randn(n, generator=draw)


def without(data, gone):
    keep = torch.ones(len(data[1]), dtype=torch.bool)
    keep[list(gone)] = False
    return data[0][keep], data[1][keep]


def train(model, shards, steps, quantiser, weights="uniform"):
    for number in range(1, steps + 1):
        samples = [len(y) for _, y in shards] if weights == "samples" else None
        sent = [mean_gradient(model, data) for data in shards]
        rate = ffmu.learning_rate(number, steps)
        model = ffmu.server_step(model, sent, rate, quantiser, samples=samples)
    return model


def checked(model, shards, removed, steps, quantiser, weights="uniform"):
    """Train on everything, and check every round for the samples to be removed."""
    check = ExactCheck()
    for number in range(1, steps + 1):
        devices = []
        for data, count in zip(shards, removed, strict=True):
            single = sample_gradients(model, *data)
            largest = {name: tensor.abs().amax(dim=0) for name, tensor in single.items()}
            devices.append(
                Device(
                    gradient=mean_gradient(model, data),
                    samples=len(data[1]),
                    removed=count,
                    largest=largest,
                )
            )
        check = check.after(certificates.certified(devices, quantiser, weights))
        samples = [len(y) for _, y in shards] if weights == "samples" else None
        sent = [each.gradient for each in devices]
        rate = ffmu.learning_rate(number, steps)
        model = ffmu.server_step(model, sent, rate, quantiser, samples=samples)
    return model, check


def same_bits(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_certified_deletions_leave_every_bit_as_retraining_does():
    quantiser = Quantiser(alpha=0.05)
    exact, open_, differing = 0, 0, 0
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        model, data = start(draw), shard(draw, 40 + seed)
        count, steps = 1 + seed % 4, 20 + seed % 30
        gone = torch.randperm(len(data[1]), generator=draw)[:count].tolist()
        trained, check = checked(model, [data], [count], steps, quantiser)
        retrained = train(model, [without(data, gone)], steps, quantiser)
        assert check.rounds == steps
        if check.complete:
            assert same_bits(certificates.answer(trained, check, steps), retrained)
            exact += 1
        else:
            open_ += 1
            differing += not same_bits(trained, retrained)
    assert exact >= 20  # the dead feature is certified in all of them
    assert open_ >= 5
    assert differing >= 1


@pytest.mark.parametrize("weights", ["uniform", "samples"])
@pytest.mark.parametrize("lam_factor", [1.0, 4.5])
def test_certified_deletions_in_a_federation_leave_every_bit_as_retraining_does(
    weights, lam_factor
):
    # lam_factor 4.5 at sigma .1 is lam / sigma = .45: a dead zone of .0087.
    quantiser = Quantiser(alpha=0.05, lam_factor=lam_factor)
    assert (quantiser.threshold > 0) == (lam_factor > 1)
    exact, open_ = 0, 0
    for seed in range(12):
        removed = [1, 3, 0] if seed % 2 else [20, 30, 0]
        draw = torch.Generator().manual_seed(100 + seed)
        model, shards = start(draw), [shard(draw, n) for n in (50, 90, 30)]
        trained, check = checked(model, shards, removed, 12, quantiser, weights)
        left = [
            without(data, torch.randperm(len(data[1]), generator=draw)[:count].tolist())
            for data, count in zip(shards, removed, strict=True)
        ]
        retrained = train(model, left, 12, quantiser, weights)
        if check.complete:
            assert same_bits(trained, retrained)
            exact += 1
        else:
            open_ += 1
    assert exact >= 3
    assert open_ >= 1


def test_the_worst_samples_of_a_certified_training_can_go():
    quantiser, steps = Quantiser(alpha=0.05), 15
    exact = 0
    for seed in range(20):
        draw = torch.Generator().manual_seed(300 + seed)
        model, data = start(draw), shard(draw, 60)
        trained, check = checked(model, [data], [2], steps, quantiser)
        if not check.complete:
            continue
        exact += 1
        pull = sample_gradients(model, *data)
        for name in ("W", "a", "b"):
            flat = pull[name].reshape(len(data[1]), -1)
            for column in range(flat.shape[1]):
                for largest in (True, False):
                    gone = flat[:, column].topk(2, largest=largest).indices.tolist()
                    assert same_bits(trained, train(model, [without(data, gone)], steps, quantiser))
    assert exact >= 5


def test_without_a_certificate_models_do_differ():
    # Loss w x: the gradients are (3, -1, -1), their mean is 1/3 and -1 without the first.
    quantiser = Quantiser(alpha=1.0)
    before = pcmu.step({"w": torch.zeros(1)}, {"w": torch.tensor([1 / 3])}, 1.0, quantiser)
    after = pcmu.step({"w": torch.zeros(1)}, {"w": torch.tensor([-1.0])}, 1.0, quantiser)
    assert (before["w"].item(), after["w"].item()) == (-1.0, 1.0)
    # 1/2 (1/3 + 3) > 1/3
    one = device([1 / 3], 3, 1, [3.0])
    check = ExactCheck().after(certificates.certified([one], quantiser))
    assert not check.complete
    with pytest.raises(NotCertifiedError):
        certificates.answer(before, check, 1)


# ---------------------------------------------------------------------------- (c) closeness bound


def test_closeness_by_hand():
    # (0, 0), (3, 4), (0, 1) are 5, 1 and sqrt(18) = 4.24 apart; their signs (0, 0), (1, 1), (0, 1)
    # sqrt(2), 1 and 1. The ratios are .283, 1 and .236, so C = 1, d = 5, K = 3.
    gradients = [doubles(0, 0), doubles(3, 4), doubles(0, 1)]
    steps = [pcmu.directions(g, Quantiser(alpha=1.0)) for g in gradients]
    found = certificates.closeness(gradients, steps, 0.5)
    assert found.distance == pytest.approx(5)
    assert found.constant == pytest.approx(1)
    assert found.bound == pytest.approx(2 * 1 * 5 / (math.sqrt(2 * math.pi) * 3 * 0.5))
    assert found.vacuous
    assert found.statement == (
        "Closeness bound (Theorem 4): 2.66, vacuous; 3 devices, d = 5, C_obs = 1 (observed, not a "
        "proof). It compares models and says nothing about deletion"
    )


def test_steps_may_be_whole_numbers_and_buffers_do_not_count():
    gradients = [
        {"w": torch.tensor([-1.0]), "v": torch.tensor([1.0]), "running_mean": torch.zeros(1)},
        {"w": torch.tensor([1.0]), "v": torch.tensor([1.0]), "running_mean": torch.ones(1)},
    ]
    steps = [{name: pcmu.smoothed(t, 0.1, 0.01) for name, t in g.items()} for g in gradients]
    found = certificates.closeness(gradients, steps, 0.1)
    assert (found.distance, found.constant) == (2.0, 1.0)


def test_the_bound_falls_as_the_noise_grows():
    gradients, steps = [doubles(0), doubles(2)], [doubles(0), doubles(1)]
    bounds = [certificates.closeness(gradients, steps, sigma).bound for sigma in (0.1, 0.2, 0.8)]
    assert bounds == pytest.approx([bounds[0], bounds[0] / 2, bounds[0] / 8])
    # 1 x .5 x 2 / (2.5066 x 2 x sigma) = .19947 / sigma
    assert bounds[0] == pytest.approx(1.9947, abs=1e-4)
    assert not certificates.closeness(gradients, steps, 0.2).bound >= 1
    assert not certificates.closeness(gradients, steps, 0.2).vacuous


def test_a_bound_of_one_is_vacuous():
    assert Closeness(bound=1.0, constant=1, distance=1, devices=2).vacuous
    assert not Closeness(bound=0.999, constant=1, distance=1, devices=2).vacuous


def test_one_device_and_equal_devices_are_close():
    one = certificates.closeness([doubles(3)], [doubles(1)], 0.1)
    assert (one.bound, one.devices, one.vacuous) == (0.0, 1, False)
    same = certificates.closeness([doubles(3)] * 4, [doubles(1)] * 4, 0.1)
    assert (same.bound, same.distance, same.constant, same.devices) == (0.0, 0.0, 0.0, 4)


def test_gradients_that_nearly_agree_but_step_apart_decide_the_constant():
    gradients = [doubles(1e-9, 5), doubles(-1e-9, 5)]
    steps = [doubles(1, 1), doubles(-1, 1)]
    assert certificates.closeness(gradients, steps, 0.1).constant == pytest.approx(1e9)


@pytest.mark.parametrize(
    ("gradients", "steps", "sigma", "message"),
    [
        ([], [], 0.1, "0 gradients cannot be compared with 0 steps"),
        ([doubles(1)], [], 0.1, "1 gradients cannot be compared with 0"),
        ([doubles(1)], [doubles(1)], 0.0, "sigma must be a number above 0, got 0.0"),
        ([doubles(1), doubles(1, 2)], [doubles(1)] * 2, 0.1, "tensor w is"),
    ],
)
def test_what_cannot_be_compared_is_refused(gradients, steps, sigma, message):
    with pytest.raises(ParametersError, match=message):
        certificates.closeness(gradients, steps, sigma)


# ---------------------------------------------------------------------------------------- purity


def test_nothing_given_is_written_to():
    gradients = {"w": exactly(1.0, -0.2, 0.0)}
    largest = {"w": exactly(2.0, 0.5, 0.0)}
    one = Device(gradient=gradients, samples=30, removed=1, largest=largest)
    for weights in ("uniform", "samples"):
        certificates.certified([one, one], SIGN, weights)["w"].fill_(False)
    certificates.paper_certificate(
        gradients, SIGN, samples=9, dimension=1, lipschitz=1.0, removed=1
    )
    certificates.confidence_gap(gradients["w"], SIGN).add_(1)
    certificates.margin(gradients["w"], SIGN).add_(1)
    certificates.change(gradients["w"], largest["w"], 1, 9).add_(1)
    certificates.closeness([gradients, gradients], [gradients, gradients], 0.1)
    assert gradients["w"].tolist() == [1.0, -0.2, 0.0]
    assert largest["w"].tolist() == [2.0, 0.5, 0.0]
