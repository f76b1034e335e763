"""Rounds in the manner of a method, the jackknife's sums and MacForget, through the same door."""

import dataclasses

import pytest
import torch

from client.forgetting.steps import do
from strategies.actions import Curvature, MacForget, Noisy, Rapid, Rcad, parted
from tests.client.forgetting.small import Regression, Small, made, same
from unlearning import jackknife, macforget, noisy_descent, rapid_retraining, rcad
from unlearning.errors import MissingNeedError
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
        generator=generator(0, "rapid", 1, 0),
        settings=rapid_retraining.Settings(0.02, 0.5, 0.6, 0.1, 2),
    )  # fmt: skip
    assert same(do(settings, model, holding).arrays, expected)


def test_noisy_rounds_are_the_pure_function(trained):
    model, holding = trained
    settings = Noisy(noisy_rate=0.2, decay=0.01, clip=0.5, noise=0.1, steps=2)
    expected = noisy_descent.train(
        model, holding.forward, holding.loss, *holding.remain, steps=2,
        generator=generator(0, "noisy", 1, 0), chunk=64,
        settings=noisy_descent.Settings(0.2, 0.01, 0.5, 0.1),
    )  # fmt: skip
    assert same(do(settings, model, holding).arrays, expected)


def test_rcad_rounds_are_the_pure_function(trained):
    model, holding = trained
    expected = rcad.train(
        model, holding.forward, holding.loss, *holding.remain, epochs=3, learning_rate=0.1,
        batch_size=10, generator=generator(0, "rcad", 1, 0), strength=0.4, radius=0.5,
    )  # fmt: skip
    assert same(do(Rcad(strength=0.4, radius=0.5), model, holding).arrays, expected)


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
