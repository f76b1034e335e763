"""Rounds in the manner of a method, the jackknife's sums and MacForget, through the same door."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from client.forgetting.steps import do
from client.task.evaluation import state_of
from client.train import Job
from client.train import do as train_on
from strategies.actions import Curvature, MacForget, Noisy, Rapid, Rcad, parted
from tests.client.forgetting.small import CPU, Regression, Small, made, same, share
from unlearning import jackknife, macforget, noisy_descent, rapid_retraining, rcad
from unlearning.errors import MissingNeedError
from unlearning.parameters import copied
from unlearning.randomness import generator

CLASS = {"forget": "class", "forget_class": 0}


@pytest.fixture(scope="module")
def trained():
    return made(Small(), epochs=3)


def test_rapid_rounds_are_the_pure_function(trained):
    model, holding = trained
    settings = Rapid(rapid_rate=0.02, block=2, damping=0.1, beta1=0.5, beta2=0.6)
    expected, _ = rapid_retraining.train(
        model, holding.forward, holding.loss, *holding.remain, epochs=3, batch_size=10,
        generator=generator(0, "rapid", 1, 0), learn=holding.learn,
        settings=rapid_retraining.Settings(0.02, 0.5, 0.6, 0.1, 2),
    )  # fmt: skip
    assert same(do(settings, model, holding).arrays, expected)


STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def test_a_rapid_step_is_taken_in_training_mode_and_keeps_statistics(trained):
    # One batch of all rows: gradient and statistics are those of the network itself.
    model, holding = trained
    count = len(holding.remain[1])
    whole = holding.training.model_copy(update={"local_epochs": 1, "batch_size": count})
    before = copied(model)
    found = do(Rapid(), model, dataclasses.replace(holding, training=whole)).arrays
    assert same(model, before)
    network = Small.cnn().train()
    network.load_state_dict(model)
    order = torch.randperm(count, generator=generator(0, "rapid", 1, 0))
    inputs, targets = (rows[order] for rows in holding.remain)
    holding.loss(network(inputs), targets).backward()
    slope = {name: tensor.grad for name, tensor in network.named_parameters()}
    square = {name: tensor.square() for name, tensor in slope.items()}
    moved, _ = rapid_retraining.step(model, rapid_retraining.initial(model), slope, square)
    for name, tensor in found.items():
        expected = network.state_dict()[name] if name in STATISTICS else moved[name]
        torch.testing.assert_close(tensor, expected)
    assert not any(torch.equal(found[name], model[name]) for name in STATISTICS)


def test_a_pass_in_training_mode_gives_new_buffers_and_writes_to_none(trained):
    model, holding = trained
    before = copied(model)
    outputs, buffers = holding.learn(model, holding.remain[0])
    assert same(model, before)
    assert buffers.keys() == set(STATISTICS)
    assert buffers["1.num_batches_tracked"] == model["1.num_batches_tracked"] + 1
    assert not torch.equal(outputs, holding.forward(model, holding.remain[0]))


def test_what_rapid_retraining_made_from_scratch_survives_an_ordinary_round():
    task = Small()
    _, holding = made(task, epochs=1)
    training = holding.training.model_copy(update={"local_epochs": 8, "learning_rate": 0.01})
    torch.manual_seed(4)
    start = state_of(task.build_model())
    ready = dataclasses.replace(holding, training=training)
    found = do(Rapid(rapid_rate=0.02), start, ready).arrays
    assert same(found, do(Rapid(rapid_rate=0.02), start, ready).arrays)
    reached = share(found, holding, holding.remain)
    assert reached > 0.95
    job = Job(task, TensorDataset(*holding.remain), training, (2, 0), CPU)
    later, _ = train_on(job, found)
    assert share(later, holding, holding.remain) >= reached - 0.02


def test_dropout_in_rapid_rounds_is_drawn_by_round_and_leaves_torchs_own_numbers_alone():
    task = Small(lambda: nn.Sequential(Small.mlp(), nn.Dropout(0.5), nn.Linear(3, 3)))
    model, holding = made(task, epochs=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    once = do(Rapid(), model, holding).arrays
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert same(once, do(Rapid(), model, holding).arrays)
    without, _ = rapid_retraining.train(
        model, holding.forward, holding.loss, *holding.remain, epochs=1, batch_size=10,
        generator=generator(0, "rapid", 1, 0),
    )  # fmt: skip
    assert not same(once, without)


def test_noisy_rounds_are_the_pure_function(trained):
    model, holding = trained
    settings = Noisy(noisy_rate=0.2, decay=0.01, clip=0.5, noise=0.1, steps=2)
    expected = noisy_descent.train(
        model, holding.forward, holding.loss, *holding.remain, steps=2,
        generator=generator(0, "noisy", 1, 0), chunk=64,
        settings=noisy_descent.Settings(0.2, 0.01, 0.5, 0.1),
    )  # fmt: skip
    found = do(settings, model, holding).arrays
    assert same(found, expected)
    assert all(torch.equal(found[name], model[name]) for name in STATISTICS)


OWN = {"learning_rate_milestones": "3,6", "weight_decay": 0.01}
TRAININGS = [OWN | {"momentum": 0.9}, OWN | {"optimizer": "adam", "learning_rate": 0.01}]


def ordinary(model, holding):
    """An ordinary round on the rows that remain."""
    job = Job(holding.task, TensorDataset(*holding.remain), holding.training, holding.purpose, CPU)
    return train_on(job, model)[0]


@pytest.mark.parametrize("own", [{}, *TRAININGS, {"proximal_mu": 0.5}])
def test_rcad_without_strength_is_an_ordinary_round_bit_for_bit(own, trained):
    # Round 5: one milestone of two has passed.
    model, holding = trained
    ready = dataclasses.replace(
        holding, training=holding.training.model_copy(update=own), purpose=(5, 2)
    )
    expected = ordinary(model, ready)
    for source in ("remain", "forget"):
        assert same(do(Rcad(strength=0, source=source), model, ready).arrays, expected)
    empty = (holding.forget[0][:0], holding.forget[1][:0])
    bare = dataclasses.replace(ready, forget=empty)
    assert same(do(Rcad(source="forget"), model, bare).arrays, expected)
    for source in ("remain", "forget"):
        found = do(Rcad(source=source), model, ready).arrays
        assert not same(found, expected)
        # Every plain pass was in training mode, and no other.
        assert torch.equal(found[STATISTICS[2]], expected[STATISTICS[2]])


def test_a_step_of_rcad_is_of_both_terms_and_only_the_plain_pass_moves_statistics(trained):
    model, holding = trained
    count = len(holding.remain[1])
    whole = holding.training.model_copy(update={"local_epochs": 1, "batch_size": count})
    ready = dataclasses.replace(holding, training=whole)
    found = do(Rcad(strength=0.4, radius=0.5), model, ready).arrays
    plain = ordinary(model, ready)
    assert all(torch.equal(found[name], plain[name]) for name in STATISTICS)
    network = Small.cnn().train()
    network.load_state_dict(model)
    inputs, targets = holding.remain
    loss = holding.loss(network(inputs), targets)
    # The perturbed pass is in evaluation mode, with the statistics that the plain pass left.
    now = network.state_dict(keep_vars=True)
    near = rcad.perturbed(now, holding.forward, holding.loss, inputs, targets, 0.5)
    (loss + 0.4 * rcad.confidence(holding.forward(now, near))).backward()
    for name, tensor in network.named_parameters():
        torch.testing.assert_close(
            found[name], model[name] - 0.1 * tensor.grad, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("settings", [Rapid(), Noisy(), Rcad()])
def test_rounds_use_the_rows_that_remain_only_and_draw_by_round(settings, trained):
    model, holding = trained
    once = do(settings, model, holding).arrays
    wrong = (holding.forget[0] * 9, holding.forget[1])
    assert same(once, do(settings, model, dataclasses.replace(holding, forget=wrong)).arrays)
    later = dataclasses.replace(holding, purpose=(2, 0))
    assert not same(once, do(settings, model, later).arrays)


def test_macforget_moves_towards_the_own_test_rows(trained):
    model, holding = trained
    settings = MacForget(**CLASS, steps=4, learning_rate=0.2, share=0.5, penalty=0)
    outcome = do(settings, model, holding)
    expected = macforget.forget(
        model, holding.forward, holding.forget[0],
        macforget.target_posterior(model, holding.forward, holding.test[0], 3),
        steps=4, learning_rate=0.2, share=0.5, penalty=0,
        stop=macforget.as_unsure_as(holding.forward, holding.forget[0], holding.test[0]),
    )  # fmt: skip
    assert same(outcome.arrays, expected.model)
    assert outcome.metrics == {"steps": len(expected.divergences), "stopped": int(expected.stopped)}
    bare = dataclasses.replace(holding, test=(holding.test[0][:0], holding.test[1][:0]))
    assert do(settings, model, bare).metrics == {"steps": 4, "stopped": 0}
    nothing = dataclasses.replace(holding, forget=bare.test)
    assert same(do(settings, model, nothing).arrays, model)


def test_curvature_is_over_all_rows_and_its_gradient_over_those_to_forget(trained):
    model, holding = trained
    outcome = do(Curvature(**CLASS), model, holding)
    assert outcome.metrics == {"hessian-count": 60, "gradient-count": 20}
    parts = parted(outcome.arrays)
    inputs = torch.cat([holding.forget[0], holding.remain[0]])
    hessian = jackknife.hessian_statistics(model, holding.forward, inputs, "5")
    slope = jackknife.gradient_statistics(model, holding.forward, *holding.forget, "5")
    torch.testing.assert_close(parts["hessian"]["5"], hessian.sums["5"])
    torch.testing.assert_close(parts["gradient"]["5"], slope.sums["5"])


def test_what_they_need_and_lack(trained):
    model, holding = trained
    empty = (holding.forget[0][:0], holding.forget[1][:0])
    with pytest.raises(MissingNeedError, match="at least one row"):
        do(Curvature(**CLASS), model, dataclasses.replace(holding, forget=empty, remain=empty))
    with pytest.raises(MissingNeedError, match="no row of this client remains"):
        do(Rcad(), model, dataclasses.replace(holding, remain=empty))
    other, numbers = made(Regression(), torch.arange(5), epochs=1)
    for settings in (Curvature(forget="all"), MacForget(forget="all")):
        with pytest.raises(MissingNeedError, match="one integer label a sample"):
            do(settings, other, numbers)
    found = do(Curvature(forget="all", scope="diag"), other, numbers)  # the diagonal needs none
    assert found.metrics == {"hessian-count": 20, "gradient-count": 5}
