"""Steps of a client: what they compute with, that they forget, and that they never go wrong silently."""

import dataclasses

import pytest
import torch

from client.forgetting.holding import classes_of, holding_of, rows_of_class
from client.forgetting.steps import STEPS, do
from client.task.evaluation import forward_of
from strategies.actions import Ascend, Ascent, Forget, LabelFlip, Statistics, joined
from strategies.messages import LocalTraining
from tests.client.forgetting.small import CPU, Regression, Small, images, made, same, share
from unlearning.ascent import ascend_partially, distance
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import copied, trained_names
from unlearning.partial_updates import shares_by_depth
from unlearning.randomness import derive_seed, generator

CLASS = {"forget": "class", "forget_class": 0}


@pytest.fixture(scope="module")
def trained():
    return made(Small())


def ball(**changes):
    return Ascend(**{**CLASS, "radius": 1.0, "floor": 0.0, "batch_size": 10, **changes})


# ---------------------------------------------------------------- holding


def test_a_holding_divides_the_rows_in_their_order():
    task = Small()
    data = task.client_data(0, 1)
    chosen = torch.tensor([5, 2, 59])
    holding = holding_of(task, data, chosen, training=LocalTraining(), purpose=(0, 0), device=CPU)
    inputs, targets = data.train.tensors
    assert torch.equal(holding.forget[0], inputs[[2, 5, 59]])
    assert torch.equal(holding.forget[1], targets[[2, 5, 59]])
    kept = [row for row in range(60) if row not in (2, 5, 59)]
    assert torch.equal(holding.remain[0], inputs[kept])
    assert torch.equal(holding.test[1], data.test.tensors[1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [([60], "0 to 59, and there is no row 60"), ([-1], "no row -1"), ([3, 3], "named twice")],
)
def test_rows_that_there_are_not(rows, message):
    task = Small()
    with pytest.raises(ParametersError, match=message):
        holding_of(
            task, task.client_data(0, 1), torch.tensor(rows),
            training=LocalTraining(), purpose=(0, 0), device=CPU,
        )  # fmt: skip


def test_forward_is_in_evaluation_mode_whatever_trained_before(trained):
    model, holding = trained
    before = holding.forward(model, holding.test[0])
    from client.scratch import scratch_for

    scratch_for(holding.task, CPU).model.train()
    assert torch.equal(holding.forward(model, holding.test[0]), before)


def test_forward_of_many_rows_is_that_of_few(trained, monkeypatch):
    model, holding = trained
    monkeypatch.setattr("client.task.evaluation.EVALUATION_BATCH", 7)
    forward = forward_of(Small.cnn(), CPU)
    with torch.no_grad():
        parts = forward(model, holding.remain[0])
    whole = forward(model, holding.remain[0])  # with gradients, all at once
    torch.testing.assert_close(parts, whole.detach())
    assert forward(model, holding.remain[0][:0]).shape == (0, 3)


def test_classes_are_told_by_the_model(trained):
    model, holding = trained
    assert classes_of(model, holding) == 3
    assert rows_of_class(torch.tensor([2, 0, 2]), 2, 3).tolist() == [0, 2]
    for number in (-1, 3):
        with pytest.raises(ParametersError, match=f"0 to 2, got {number}"):
            rows_of_class(torch.tensor([2, 0, 2]), number, 3)
    empty = (holding.forget[0][:0], holding.forget[1][:0])
    bare = dataclasses.replace(holding, forget=empty, remain=empty, test=empty)
    with pytest.raises(MissingNeedError, match="rows to tell the classes by"):
        classes_of(model, bare)


# ---------------------------------------------------------------- ascent


def test_an_ascent_in_a_ball_stays_in_it_and_forgets(trained):
    model, holding = trained
    before = copied(model)
    outcome = do(ball(learning_rate=0.1), joined(reference=model, leaver=model), holding)
    assert same(model, before)
    away = distance(outcome.arrays, model)
    assert 0 < away <= 1 + 1e-5
    assert outcome.metrics["distance"] == pytest.approx(away)
    assert share(outcome.arrays, holding, holding.forget) < share(model, holding, holding.forget)


def test_an_ascent_in_a_ball_ends_under_the_floor_of_the_own_test_rows(trained):
    model, holding = trained
    sent = joined(reference=model, leaver=model)
    # 20 rows in batches of 10: two steps an epoch, and never over a floor of 1.
    wrong = dataclasses.replace(holding, test=(holding.test[0], (holding.test[1] + 1) % 3))
    stopped = do(ball(floor=1.0), sent, wrong).metrics
    assert (stopped["steps"], stopped["stopped"]) == (2, 1)
    whole = do(ball(floor=0.0, farthest=9.0), sent, wrong).metrics
    assert (whole["steps"], whole["stopped"]) == (10, 0)


def test_a_floor_that_nobody_can_measure_stops_nothing_and_that_is_told(trained):
    model, holding = trained
    bare = dataclasses.replace(holding, test=(holding.test[0][:0], holding.test[1][:0]))
    number, numbers = made(Regression(), torch.arange(5), epochs=1)
    for start, rows in ((model, bare), (number, numbers)):
        sent = joined(reference=start, leaver=start)
        asked = Ascend(forget="all", radius=0.5, epochs=1, batch_size=5, floor=1.0)
        found = do(asked, sent, rows)
        free = do(asked.model_copy(update={"floor": 0.0}), sent, rows)
        assert same(found.arrays, free.arrays)
        assert found.metrics == free.metrics
        assert found.metrics["steps"] == len(rows.forget[0]) // 5
        assert (found.metrics["floor_measured"], found.metrics["stopped"]) == (0, 0)
    stopped = do(asked, joined(reference=model, leaver=model), holding).metrics
    assert stopped["floor_measured"] == 1


@pytest.mark.parametrize("sent", [{}, {"reference/w": torch.zeros(1)}, {"w": torch.zeros(1)}])
def test_an_ascent_in_a_ball_wants_both_models(sent, trained):
    with pytest.raises(ParametersError, match="reference and leaver"):
        do(ball(), sent, trained[1])


def test_partial_ascent_is_the_pure_function_with_the_clients_own_draws(trained):
    model, holding = trained
    settings = Ascent(**CLASS, learning_rate=0.05, epochs=2, batch_size=10, forgotten=0)
    found = do(settings, model, holding).arrays
    seed = holding.training.seed
    expected = ascend_partially(
        model, holding.forward, holding.loss, *holding.forget,
        generator=generator(seed, "ascent", 1, 0), shares=shares_by_depth(model, 0.2, 0.8),
        seed=derive_seed(seed, "selection", 1, 0), epochs=2, learning_rate=0.05, batch_size=10,
        stop=lambda current: share(current, holding, holding.forget) == 0,
    )  # fmt: skip
    assert same(found, expected)


@pytest.mark.parametrize("kind", [Ascent, LabelFlip])
def test_partial_and_naive_forget_the_class_and_their_ends_agree(kind, trained):
    model, holding = trained
    common = {**CLASS, "learning_rate": 0.3, "epochs": 30, "batch_size": 10}
    for partial in (True, False):
        found = do(kind(**common, partial=partial), model, holding).arrays
        assert share(found, holding, holding.forget) <= 0.01
        assert share(model, holding, holding.forget) > 0.9
    whole = do(kind(**common, first=1, last=1), model, holding).arrays
    assert same(whole, do(kind(**common, partial=False), model, holding).arrays)


@pytest.mark.parametrize("kind", [Ascent, LabelFlip])
def test_steps_end_once_enough_is_forgotten_and_repeat(kind, trained):
    model, holding = trained
    settings = kind(**CLASS, learning_rate=0.3, forgotten=1.0)
    assert same(do(settings, model, holding).arrays, model)
    moving = kind(**CLASS, learning_rate=0.05, epochs=2, forgotten=0)
    once = do(moving, model, holding).arrays
    assert same(once, do(moving, model, holding).arrays)
    later = dataclasses.replace(holding, purpose=(2, 0))
    assert not same(once, do(moving, model, later).arrays)


@pytest.mark.parametrize("kind", [Ascent, LabelFlip])
def test_depth_and_share_are_those_of_the_settings(kind, trained):
    """A share of 0 in the first layer leaves it alone; buffers are nobody's."""
    model, holding = trained
    settings = kind(**CLASS, learning_rate=0.1, epochs=1, first=0, last=1, forgotten=0)
    found = do(settings, model, holding).arrays
    moved = {name for name in model if not torch.equal(found[name], model[name])}
    assert moved <= set(trained_names(model)) - {"0.weight", "0.bias"}
    assert "5.weight" in moved


@pytest.mark.parametrize("kind", [Ascent, LabelFlip])
def test_without_rows_to_forget_the_model_stays(kind, trained):
    model, holding = trained
    nothing = (holding.forget[0][:0], holding.forget[1][:0])
    found = do(kind(**CLASS), model, dataclasses.replace(holding, forget=nothing))
    assert same(found.arrays, model)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "settings",
    [
        LabelFlip(**CLASS, learning_rate=1e30, epochs=5),
        Ascent(**CLASS, learning_rate=1e38, epochs=5),
    ],
)
def test_a_step_that_diverges_is_told_and_the_model_is_what_it_was(settings, trained):
    model, holding = trained
    before = copied(model)
    with pytest.raises(ParametersError, match=r"finite|diverged"):
        do(settings, model, holding)
    assert same(model, before)


def test_a_loss_that_is_no_number_is_divergence(trained):
    """Weights of 1e30 are finite, and what two layers of them put out is not."""
    model, holding = trained
    settings = LabelFlip(**CLASS, forgotten=1.0)  # so that there is not a single step
    huge = {n: t * 1e30 if n == "5.weight" else t for n, t in model.items()}
    huge["0.weight"] = huge["0.weight"] * 1e30
    with pytest.raises(ParametersError, match=r"train.label_flip diverged: the loss is"):
        do(settings, huge, holding)


@pytest.mark.parametrize("kind", [Ascent, LabelFlip])
def test_a_task_without_classes_is_refused(kind):
    model, holding = made(Regression(), torch.arange(5), epochs=1)
    with pytest.raises(MissingNeedError, match="one integer label a sample"):
        do(kind(forget="all"), model, holding)


def test_an_action_without_a_step_is_refused(trained):
    with pytest.raises(ParametersError, match=r"no step query.forget; known are query"):
        do(Forget(forget="all"), *trained)
    assert {kind.action for kind in STEPS} >= {
        "train.ascend", "train.ascent", "train.label_flip", "query.statistics",
    }  # fmt: skip


def test_statistics_of_a_model_that_is_not_finite_are_refused(trained):
    model, holding = trained
    bad = {**model, "5.weight": model["5.weight"] / 0}
    with pytest.raises(ParametersError, match="not finite"):
        do(Statistics(forget="all", kind="fisher"), bad, holding)


def test_images_are_what_the_tests_say():
    inputs, targets = images(0, 6).tensors
    assert targets.tolist() == [0, 1, 2] * 2
    assert float(inputs[1, 0, 2:4].mean()) > 0.5 > float(inputs[1, 0, :2].mean())
