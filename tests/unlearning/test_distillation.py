"""Training on the server against gradients by hand, and unlearning by distillation."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning.distillation import distil, distillation_loss, fine_tune, kd_unlearn
from unlearning.errors import MissingNeedError, ParametersError, SecateurError
from unlearning.history import MemoryHistory, Past, without_updates
from unlearning.randomness import generator

INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


def linear(model, inputs):
    return inputs @ model["w"].T + model["b"]


def drawn(seed, *, scale=1.0):
    """A linear classifier of 4 features in 3 classes, with a buffer and a tensor nothing uses."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "w": scale * torch.randn(3, 4, generator=draw),
        "norm.running_mean": torch.randn(2, generator=draw),
        "b": scale * torch.randn(3, generator=draw),
        "unused": torch.randn(2, generator=draw),
        "norm.num_batches_tracked": torch.tensor(7),
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def divergence(student, teacher, temperature=1.0):
    loss = distillation_loss(linear(student, INPUTS), linear(teacher, INPUTS), temperature)
    return float(loss)


# ---------------------------------------------------------------- the loss


def test_the_divergence_by_hand():
    # p = (.9, .1), q = (.5, .5): KL(p || q) = .9 ln 1.8 + .1 ln .2 = .368064; the other way .510826.
    teacher = torch.tensor([[math.log(0.9), math.log(0.1)]])
    student = torch.zeros(1, 2)

    assert float(distillation_loss(student, teacher, 1.0)) == pytest.approx(0.368064, abs=1e-6)


def test_the_temperature_softens_both_and_the_loss_is_scaled_back():
    # Logits 3 ln 9 and 0 at T = 3 are ln 9 and 0: p = (.9, .1). The loss is 9 times the divergence.
    teacher = torch.tensor([[3 * math.log(9), 0.0]])

    found = float(distillation_loss(torch.zeros(1, 2), teacher, 3.0))

    assert found == pytest.approx(9 * 0.368064, abs=1e-5)


def test_the_loss_is_a_mean_over_rows():
    student, teacher = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    one = distillation_loss(student, teacher, 2.0)

    torch.testing.assert_close(
        distillation_loss(student.repeat(5, 1), teacher.repeat(5, 1), 2.0), one
    )


@given(seed=st.integers(0, 100), temperature=st.floats(0.5, 10))
@settings(deadline=None)
def test_the_loss_is_zero_for_equal_logits_and_positive_for_others(seed, temperature):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 3, generator=draw)

    assert float(distillation_loss(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-4)
    assert float(distillation_loss(student, teacher, temperature)) > 0


# ---------------------------------------------------------------- descent


def test_a_step_of_distillation_by_hand():
    # d/dz of T^2 KL(p || softmax(z / T)) is T (q - p); of the mean over n rows, with z = W x + b,
    # dW = T/n sum (q - p) x', db = T/n sum (q - p).
    student, teacher, temperature, rate = drawn(1), drawn(2), 3.0, 0.5
    p = torch.softmax(linear(teacher, INPUTS) / temperature, dim=1)
    q = torch.softmax(linear(student, INPUTS) / temperature, dim=1)
    slope = temperature * (q - p) / len(INPUTS)

    found = distil(
        student,
        teacher,
        linear,
        INPUTS,
        temperature=temperature,
        epochs=1,
        learning_rate=rate,
        batch_size=len(INPUTS),
        generator=generator(0),
    )

    torch.testing.assert_close(found["w"], student["w"] - rate * slope.T @ INPUTS)
    torch.testing.assert_close(found["b"], student["b"] - rate * slope.sum(dim=0))


def test_a_step_of_fine_tuning_by_hand():
    # Cross-entropy: dz = (softmax(z) - onehot) / n.
    start, labels = drawn(1), torch.arange(20) % 3
    slope = torch.softmax(linear(start, INPUTS), dim=1) - functional.one_hot(labels, 3)

    found = tune(start, labels=labels, epochs=1, batch_size=20)

    torch.testing.assert_close(found["w"], start["w"] - 0.1 * slope.T @ INPUTS / 20)
    torch.testing.assert_close(found["b"], start["b"] - 0.1 * slope.mean(dim=0))


def tune(model, *, labels=None, epochs=3, batch_size=8, learning_rate=0.1, seed=0, forward=linear):
    return fine_tune(
        model,
        forward,
        functional.cross_entropy,
        INPUTS,
        torch.zeros(20, dtype=torch.long) if labels is None else labels,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        generator=generator(seed),
    )


def test_fine_tuning_finds_the_least_squares():
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0]])
    targets = INPUTS @ weights.T + 0.5

    found = fine_tune(
        {"w": torch.zeros(1, 4), "b": torch.zeros(1)},
        linear,
        functional.mse_loss,
        INPUTS,
        targets,
        epochs=400,
        learning_rate=0.1,
        batch_size=10,
        generator=generator(0),
    )

    torch.testing.assert_close(found["w"], weights, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["b"], torch.tensor([0.5]), rtol=1e-3, atol=1e-3)


def test_every_epoch_sees_each_row_once_in_an_order_of_its_own():
    rows = {tuple(row.tolist()): index for index, row in enumerate(INPUTS)}
    seen = []

    def forward(model, inputs):
        seen.append([rows[tuple(row.tolist())] for row in inputs])
        return linear(model, inputs)

    tune(drawn(1), epochs=2, forward=forward)

    assert [len(batch) for batch in seen] == [8, 8, 4] * 2
    first, second = [*itertools.chain(*seen[:3])], [*itertools.chain(*seen[3:])]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second != list(range(20))


def test_inputs_and_targets_stay_together():
    # Each row is its own target; a batch with targets of others would have a loss.
    def loss(logits, targets):
        assert torch.equal(logits.detach(), targets)
        return (logits * 0).sum()

    found = fine_tune(
        drawn(1),
        lambda model, inputs: inputs + 0 * model["b"][0],
        loss,
        INPUTS,
        INPUTS,
        epochs=2,
        learning_rate=1.0,
        batch_size=7,
        generator=generator(0),
    )
    assert same(found, drawn(1))


def test_buffers_and_unused_tensors_stay_and_nothing_asks_for_gradients():
    def forward(model, inputs):
        return linear(model, inputs) * model["norm.running_mean"].sum()

    found = tune(drawn(1), forward=forward)

    for name in ("norm.running_mean", "norm.num_batches_tracked", "unused"):
        assert torch.equal(found[name], drawn(1)[name])
    assert list(found) == list(drawn(1))
    assert not any(tensor.requires_grad for tensor in found.values())
    assert not torch.equal(found["w"], drawn(1)["w"])


def test_the_same_seed_gives_the_same_bits_and_another_order_does_not():
    assert same(tune(drawn(1), seed=4), tune(drawn(1), seed=4))
    assert not same(tune(drawn(1), seed=4), tune(drawn(1), seed=5))


def test_inputs_are_left_untouched_even_where_gradients_are_off():
    start, teacher, inputs = drawn(1), drawn(2), INPUTS.clone()

    with torch.no_grad():
        found = tune(start)
        distil(start, teacher, linear, INPUTS, generator=generator(0))

    assert same(found, tune(drawn(1)))
    assert same(start, drawn(1))
    assert same(teacher, drawn(2))
    assert torch.equal(INPUTS, inputs)


def test_no_epochs_are_the_identity():
    assert same(tune(drawn(1), epochs=0), drawn(1))
    assert same(
        distil(drawn(1), drawn(2), linear, INPUTS, epochs=0, generator=generator(0)), drawn(1)
    )


def test_training_needs_data_and_a_rate_that_does_not_diverge():
    nothing = INPUTS[:0]
    with pytest.raises(MissingNeedError, match="needs at least one row"):
        distil(drawn(1), drawn(2), linear, nothing, generator=generator(0))
    with pytest.raises(ParametersError, match="not finite"):
        fine_tune(
            drawn(1),
            linear,
            functional.mse_loss,
            INPUTS,
            torch.zeros(20, 3),
            epochs=60,
            learning_rate=1e3,
            batch_size=20,
            generator=generator(0),
        )


# ---------------------------------------------------------------- distillation


def test_the_student_comes_to_predict_what_the_teacher_does():
    student, teacher = drawn(1), drawn(2)
    after = [divergence(student, teacher)]
    for epochs in (1, 10, 100):
        found = distil(student, teacher, linear, INPUTS, epochs=epochs, generator=generator(0))
        after.append(divergence(found, teacher))

    assert after == sorted(after, reverse=True)
    assert after[-1] < 0.5 * after[0]


def test_a_teacher_has_nothing_to_teach_itself():
    found = distil(drawn(1), drawn(1), linear, INPUTS, generator=generator(0))

    torch.testing.assert_close(found, drawn(1), rtol=0, atol=1e-5)


def test_the_last_model_that_may_be_kept_is_returned():
    asked = []

    def keep(candidate):
        asked.append(candidate)
        return len(asked) < 3

    found = distil(drawn(1), drawn(2), linear, INPUTS, generator=generator(0), keep=keep)

    assert len(asked) == 3
    assert same(found, asked[1])
    assert same(found, distil(drawn(1), drawn(2), linear, INPUTS, epochs=2, generator=generator(0)))


def test_if_no_epoch_may_be_kept_the_student_is_returned():
    found = distil(
        drawn(1), drawn(2), linear, INPUTS, generator=generator(0), keep=lambda model: False
    )

    assert same(found, drawn(1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_the_temperature_must_be_over_zero(temperature):
    with pytest.raises(SecateurError, match=f"over 0, got {temperature}"):
        distil(drawn(1), drawn(2), linear, INPUTS, temperature=temperature, generator=generator(0))


# ---------------------------------------------------------------- unlearning


def history():
    """Two rounds of four clients, with weights 1 to 4."""
    return MemoryHistory(
        {
            number: Past(
                drawn(100 * number),
                {c: drawn(100 * number + n) for n, c in enumerate("abcd", start=1)},
                dict(zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True)),
            )
            for number in (1, 2)
        }
    )


def unlearn(forgotten, *, model=None, epochs=0, **settings):
    return kd_unlearn(
        drawn(5) if model is None else model,
        history(),
        frozenset(forgotten),
        linear,
        INPUTS,
        epochs=epochs,
        generator=generator(0),
        **settings,
    )


def test_without_epochs_it_is_the_subtraction_by_hand():
    # b has 2 of 10 in both rounds. Buffers stay.
    sent = [drawn(102)["w"] - drawn(100)["w"], drawn(202)["w"] - drawn(200)["w"]]

    found = unlearn("b")

    torch.testing.assert_close(found["w"], drawn(5)["w"] - 0.2 * (sent[0] + sent[1]))
    assert torch.equal(found["norm.running_mean"], drawn(5)["norm.running_mean"])
    assert same(found, without_updates(drawn(5), history(), frozenset("b")))


def test_forgetting_two_is_forgetting_one_after_the_other():
    torch.testing.assert_close(unlearn("ab"), unlearn("b", model=unlearn("a")))


def test_nobody_to_forget_is_the_identity_before_the_distillation():
    assert same(unlearn(""), drawn(5))


def test_distillation_starts_from_the_subtraction_and_learns_the_old_model():
    subtracted = unlearn("bd")

    found = unlearn("bd", epochs=30, learning_rate=0.1, temperature=2.0)

    assert divergence(found, drawn(5)) < 0.5 * divergence(subtracted, drawn(5))
    assert same(
        found,
        distil(
            subtracted,
            drawn(5),
            linear,
            INPUTS,
            epochs=30,
            learning_rate=0.1,
            temperature=2.0,
            generator=generator(0),
        ),
    )


def test_distillation_ends_before_the_probe_rises_more_than_the_margin():
    # The probe rises by 2 points an epoch above its level after the subtraction: .2, .22, .24.
    probed, levels = [], iter([0.2, 0.22, 0.24])

    def probe(model):
        probed.append(model)
        return next(levels)

    found = unlearn("b", epochs=9, probe=probe)

    assert same(found, unlearn("b", epochs=1))
    assert same(probed[0], unlearn("b"))


def test_the_margin_is_above_the_level_after_the_subtraction():
    levels = iter([0.9, 0.91, 0.5, 0.93, 0.94])

    found = unlearn("b", epochs=9, probe=lambda model: next(levels))

    assert same(found, unlearn("b", epochs=3))
