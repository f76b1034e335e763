"""MacForget, as read here, against its definition: methods 2.9."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning import macforget
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.gradients import gradient

INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
UNSEEN = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
EVEN = torch.full((3,), 1 / 3)
ALL = {"share": 1.0, "penalty": 0.0}


def forward(model, inputs):
    hidden = torch.tanh(inputs @ model["body.weight"].T + model["body.bias"])
    return hidden @ model["head.weight"].T + model["head.bias"]


def drawn(seed, scale=2.0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "body.weight": scale * torch.randn(5, 4, generator=draw),
        "body.bias": torch.randn(5, generator=draw),
        "norm.running_mean": torch.randn(2, generator=draw),
        "head.weight": scale * torch.randn(3, 5, generator=draw),
        "head.bias": torch.randn(3, generator=draw),
        "norm.num_batches_tracked": torch.tensor(2),
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def divergence_of(model, posterior=EVEN):
    return float(macforget.divergence(forward(model, INPUTS), posterior.expand(12, -1)))


# ---------------------------------------------------------------- target


def test_the_target_is_the_mean_posterior_of_unseen_rows():
    # Softmax of (log 3, 0) is (3/4, 1/4), of (0, 0) it is (1/2, 1/2): on average (5/8, 3/8).
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    found = macforget.target_posterior({}, lambda model, rows: rows, logits, 2)
    torch.testing.assert_close(found, torch.tensor([0.625, 0.375]))
    even = macforget.target_posterior({}, lambda model, rows: rows, logits[:0], 4)
    torch.testing.assert_close(even, torch.full((4,), 0.25))
    with pytest.raises(ParametersError, match="2 classes, not 3"):
        macforget.target_posterior({}, lambda model, rows: rows, logits, 3)
    with pytest.raises(ParametersError, match="at least 2 classes"):
        macforget.target_posterior({}, forward, UNSEEN[:0], 1)


def test_the_divergence_by_hand():
    # q = (.5, .5), p = (.8, .2): .5 log(.5/.8) + .5 log(.5/.2) = .223144; of the other row 0.
    logits = torch.tensor([[math.log(4), 0.0], [0.0, 0.0]])
    found = macforget.divergence(logits, torch.full((2, 2), 0.5))
    assert float(found) == pytest.approx(0.223144 / 2, abs=1e-6)


# ---------------------------------------------------------------- mask


def test_a_mask_by_hand():
    slope = {
        "a.weight": torch.tensor([[1.0, -5.0, 2.0], [3.0, 0.0, -4.0]]),
        "a.bias": torch.tensor([100.0, -100.0]),
        "norm.weight": torch.tensor([9.0]),
    }
    # ceil(.4 * 6) = 3 entries: 5, 4 and 3. Of 2 outputs ceil(.5 * 2) = 1: sums are 8 and 7.
    single = macforget.mask(slope, 0.4)
    assert single.keys() == {"a.weight"}
    assert single["a.weight"].tolist() == [[False, True, False], [True, False, True]]
    outputs = macforget.mask(slope, 0.5, "neuron")
    assert outputs["a.weight"].tolist() == [[True] * 3, [False] * 3]
    four = macforget.mask({"c.weight": slope["a.weight"].reshape(2, 3, 1, 1)}, 0.5, "neuron")
    assert four["c.weight"].shape == (2, 3, 1, 1)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 50), share=st.floats(0, 1))
def test_every_weight_has_its_share(seed, share):
    slope = drawn(seed)
    for name, chosen in macforget.mask(slope, share).items():
        assert int(chosen.sum()) == math.ceil(share * chosen.numel() - 1e-9)
        if bool(chosen.any()) and not bool(chosen.all()):
            assert slope[name].abs()[chosen].min() >= slope[name].abs()[~chosen].max()
    assert macforget.mask(slope, share).keys() == {"body.weight", "head.weight"}
    for chosen in macforget.mask(slope, share, "neuron").values():
        outputs = chosen.all(dim=1)
        assert torch.equal(outputs, chosen.any(dim=1))
        assert int(outputs.sum()) == math.ceil(share * len(outputs) - 1e-9)


def test_a_masked_gradient_is_brought_nearer_to_zero():
    slope = {"a": torch.tensor([1.0, -0.3, 0.1, 5.0])}
    chosen = {"a": torch.tensor([True, True, True, False])}
    found = macforget.mask_gradient(slope, chosen, 0.2)
    torch.testing.assert_close(found["a"], torch.tensor([0.8, -0.1, 0.0, 0.0]))
    whole = macforget.mask_gradient(slope, chosen, 0.0)
    assert torch.equal(whole["a"], torch.tensor([1.0, -0.3, 0.1, 0.0]))
    with pytest.raises(ParametersError, match="at least 0"):
        macforget.mask_gradient(slope, chosen, -1.0)


@settings(deadline=None, max_examples=20)
@given(g=st.floats(-2, 2), penalty=st.floats(0, 1))
def test_it_minimises_what_it_says(g, penalty):
    def value(s):
        return 0.5 * (s - g) ** 2 + penalty * abs(s)

    slope, places = {"a": torch.tensor([g], dtype=torch.float64)}, {"a": torch.tensor([True])}
    found = macforget.mask_gradient(slope, places, penalty)["a"].item()
    assert all(value(found) <= value(found + step) + 1e-12 for step in (-1e-3, 1e-3, -g, -found))


# ---------------------------------------------------------------- forgetting


def test_a_step_by_hand():
    model, wanted = drawn(0), EVEN.expand(12, -1)
    slope = gradient(model, forward, macforget.divergence, INPUTS, wanted)
    step = macforget.mask_gradient(slope, macforget.mask(slope, 0.3), 0.01)
    found = macforget.forget(
        model, forward, INPUTS, EVEN, steps=1, learning_rate=0.5, share=0.3, penalty=0.01
    )
    for name in model:
        expected = model[name] - 0.5 * step[name] if name in step else model[name]
        torch.testing.assert_close(found.model[name], expected)
    assert found.divergences == pytest.approx((divergence_of(model),))
    assert not found.stopped


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 60),
    share=st.floats(0.05, 1),
    unit=st.sampled_from(["weight", "neuron"]),
    uniform=st.booleans(),
)
def test_a_small_first_step_lowers_the_divergence(seed, share, unit, uniform):
    model = drawn(seed)
    posterior = macforget.target_posterior(model, forward, UNSEEN[: 0 if uniform else 12], 3)
    found = macforget.forget(
        model, forward, INPUTS, posterior, steps=1, learning_rate=1e-3, share=share, unit=unit
    )
    assert divergence_of(found.model, posterior) < divergence_of(model, posterior)
    assert same(model, drawn(seed))


def test_nothing_kept_or_nothing_to_forget_changes_nothing():
    for more in ({"share": 0.0}, {"penalty": 1e9}, {"steps": 0}, {"learning_rate": 0.0}):
        assert same(macforget.forget(drawn(0), forward, INPUTS, EVEN, **more).model, drawn(0))
    empty = macforget.forget(drawn(0), forward, INPUTS[:0], EVEN, stop=lambda model: True)
    assert same(empty.model, drawn(0))
    assert (empty.divergences, empty.stopped) == ((), False)


def test_it_stops_once_forgotten_rows_are_as_unsure_as_unseen_ones():
    def confidence(model, rows):
        return float(forward(model, rows).softmax(dim=1).amax(dim=1).mean())

    # A model that is sure of the forgotten rows: they are twice as far out.
    model, forgotten = drawn(0, 1.0), 4 * INPUTS
    assert confidence(model, forgotten) > confidence(model, UNSEEN)
    rule = macforget.as_unsure_as(forward, forgotten, UNSEEN)
    found = macforget.forget(
        model, forward, forgotten, EVEN, steps=500, learning_rate=0.05, stop=rule, **ALL
    )
    assert found.stopped
    assert 0 < len(found.divergences) < 500
    assert confidence(found.model, forgotten) <= confidence(found.model, UNSEEN)
    shorter = macforget.forget(
        model, forward, forgotten, EVEN, steps=len(found.divergences) - 1, learning_rate=0.05, **ALL
    )
    assert not rule(shorter.model)
    at_once = macforget.forget(model, forward, UNSEEN, EVEN, stop=lambda model: True)
    assert same(at_once.model, model)
    assert at_once.stopped
    with pytest.raises(MissingNeedError, match="unseen rows"):
        macforget.as_unsure_as(forward, forgotten, UNSEEN[:0])


def test_buffers_and_biases_stay_and_the_result_is_always_the_same():
    model = drawn(3)
    found = macforget.forget(model, forward, INPUTS, EVEN)
    assert same(found.model, macforget.forget(model, forward, INPUTS, EVEN).model)
    for name in ("body.bias", "head.bias", "norm.running_mean", "norm.num_batches_tracked"):
        assert torch.equal(found.model[name], model[name])
    assert len(found.divergences) == macforget.STEPS == 20
    assert found.divergences[-1] < found.divergences[0]
    assert (macforget.LEARNING_RATE, macforget.SHARE, macforget.PENALTY) == (0.01, 0.1, 1e-4)


def test_what_makes_no_sense_is_refused():
    for wrong in (
        {"learning_rate": -1.0}, {"learning_rate": math.nan}, {"share": 1.5}, {"penalty": -1.0},
    ):  # fmt: skip
        with pytest.raises(ParametersError):
            macforget.forget(drawn(0), forward, INPUTS, EVEN, **wrong)
    with pytest.raises(ParametersError, match="not finite"):
        macforget.forget(drawn(0), forward, INPUTS, torch.full((3,), math.nan))
    with pytest.raises(ParametersError, match="not finite"):
        # p - q = (.5, -.5) of a row of 9: a gradient of 4.5 takes 3e38 past the largest number.
        macforget.forget(
            {"weight": torch.zeros(2, 1)}, lambda model, rows: rows @ model["weight"].T,
            torch.full((1, 1), 9.0), torch.tensor([0.0, 1.0]), steps=1, learning_rate=3e38, **ALL,
        )  # fmt: skip
