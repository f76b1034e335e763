"""What all methods have in common, on one made-up federation."""

import copy

import pytest
import torch
from torch.nn import functional

from unlearning import (
    distillation,
    drift,
    fast,
    federaser,
    fedrecover,
    fedup,
    negation,
    negative_gradients,
    retraining,
    verifi,
)
from unlearning.catalogue import SERVER
from unlearning.history import MemoryHistory, Past, shares
from unlearning.parameters import mean, prunable_names, weighted_mean
from unlearning.plan import Answer, carry_out

CLIENTS = tuple("abcde")
GONE = frozenset("de")
NOBODY: frozenset[str] = frozenset()
ROUNDS = 5


def initial():
    draw = torch.Generator().manual_seed(1)
    return {
        "one.weight": torch.randn(4, 3, generator=draw),
        "one.bias": torch.randn(4, generator=draw),
        "norm.running_mean": torch.randn(4, generator=draw),
        "norm.num_batches_tracked": torch.tensor(0),
        "two.weight": torch.randn(2, 4, generator=draw),
        "two.bias": torch.randn(2, generator=draw),
    }


def trained(client, number, model):
    """What a client makes of a model: a step towards values of its own, and some noise."""
    draw = torch.Generator().manual_seed(97 * number + ord(client))
    pull = 1.5 if client in GONE else 0.3
    return {
        name: tensor + 0.05 * pull * torch.randn(tensor.shape, generator=draw) - 0.02 * tensor
        if tensor.is_floating_point()
        else tensor + ord(client) % 3
        for name, tensor in model.items()
    }


class World:
    """A federation of five that has played a few rounds."""

    def __init__(self):
        self.weights = {client: float(n) for n, client in enumerate(CLIENTS, 2)}
        model, past, self.ledger = initial(), {}, {}
        for number in range(1, ROUNDS + 1):
            sent = {client: trained(client, number, model) for client in CLIENTS}
            past[number] = Past(model, sent, self.weights)
            self.ledger = drift.updated(self.ledger, sent, self.weights)
            model = weighted_mean(list(sent.values()), list(self.weights.values()))
        self.model, self.history = model, MemoryHistory(past)
        draw = torch.Generator().manual_seed(4)
        self.inputs = torch.randn(10, 3, generator=draw)
        self.targets = torch.randint(0, 2, (10,), generator=draw)

    @property
    def last(self):
        return self.history.past[ROUNDS]

    def others(self, gone):
        kept = [client for client in CLIENTS if client not in gone]
        return weighted_mean([self.last.models[c] for c in kept], [self.weights[c] for c in kept])

    def retained(self, gone):
        return tuple(client for client in CLIENTS if client not in gone)

    def answer(self, ask):
        number = int(ask.config["round"])
        return [Answer(c, trained(c, number, ask.arrays), {}, self.weights[c]) for c in ask.to]


def forward(model, inputs):
    hidden = functional.relu(
        functional.linear(inputs, model["one.weight"], model["one.bias"])
        - model["norm.running_mean"]
    )
    return functional.linear(hidden, model["two.weight"], model["two.bias"])


def pruned(world, gone, **more):
    names, others = prunable_names(world.model), world.others(gone)
    flagged = mean([world.last.models[c] for c in sorted(gone)]) if gone else others
    dis = fedup.disagreement(flagged, others, names)
    masks = fedup.conflict_mask(dis, world.last.start, 0.3, flagged=flagged, **more)
    return fedup.prune(others, masks)


def taken_back(world, gone):
    share = sum(shares(world.weights)[client] for client in gone)
    return drift.subtract(
        world.others(gone), [[world.ledger[c] for c in sorted(gone)]], [share], 0.4
    )


def scaled(world, gone):
    parts = shares(world.weights)
    left = sorted(gone)
    plan = verifi.scale_to_unlearn(
        world.last.start,
        world.others(gone),
        [world.last.models[c] for c in left],
        [parts[c] for c in left],
        world.retained(gone),
        first_round=ROUNDS + 1,
    )
    return carry_out(plan, world.answer)


def replayed(plan):
    return lambda world, gone: carry_out(
        plan(world.history, gone, world.retained(gone)), world.answer
    )


def again(world, gone):
    return carry_out(retraining.retrain(initial(), world.retained(gone), ROUNDS), world.answer)


def distilled(world, gone, epochs=2):
    return distillation.kd_unlearn(
        world.model,
        world.history,
        gone,
        forward,
        world.inputs,
        epochs=epochs,
        generator=torch.Generator().manual_seed(2),
    )


RUN = {
    "fedup": pruned,
    "random": lambda world, gone: pruned(
        world, gone, score="random", generator=torch.Generator().manual_seed(8)
    ),
    "drift": taken_back,
    "not": lambda world, gone: negation.negate(
        world.others(gone), negation.first_layer(world.model, prunable_names(world.model))
    ),
    "negative-gradients": lambda world, gone: negative_gradients.delta(
        world.model, world.history, gone
    ),
    "federaser": replayed(federaser.federaser),
    "fedrecover": replayed(fedrecover.fedrecover),
    "fast": lambda world, gone: fast.fast(
        world.model,
        world.history,
        gone,
        lambda model: -float(functional.cross_entropy(forward(model, world.inputs), world.targets)),
        lambda model: model,
        tolerance=0.1,
    )[0],
    "kd": distilled,
    "verifi": scaled,
    "rollback": again,
    "retrain": again,
    "natural": lambda world, gone: world.others(gone),
}
"""Every method of the catalogue as a function of a world and who is to be forgotten."""
UNTOUCHED = {
    "fedup": World.others,
    "random": World.others,
    "drift": World.others,
    "negative-gradients": lambda world, gone: world.model,
    "fast": lambda world, gone: world.model,
    "natural": World.others,
    "retrain": lambda world, gone: world.model,
    "rollback": lambda world, gone: world.model,
}
"""What is left where nobody is to be forgotten. Replays ask clients again even then, KD trains, NoT
flips signs, whoever is concerned, and VeriFi plays rounds: they are not to be run for nobody."""


@pytest.fixture(scope="module")
def world():
    return World()


def test_every_method_is_here():
    assert RUN.keys() == SERVER.keys()


@pytest.mark.parametrize("name", RUN)
def test_names_shapes_and_dtypes_are_kept_and_something_changes(name, world):
    found = RUN[name](world, GONE)
    assert list(found) == list(world.model)
    for key, tensor in world.model.items():
        assert found[key].shape == tensor.shape
        assert found[key].dtype == tensor.dtype
        assert bool(torch.isfinite(found[key].double()).all())
    assert not torch.equal(found["one.weight"], world.model["one.weight"])


@pytest.mark.parametrize("name", RUN)
def test_the_same_inputs_give_the_same_bits_and_stay_as_they_were(name, world):
    mine = copy.deepcopy(world)
    first = RUN[name](mine, GONE)
    kept = {key: tensor.clone() for key, tensor in first.items()}
    for tensor in first.values():  # what is returned shares nothing with what was given
        tensor.add_(1)
    second = RUN[name](mine, GONE)
    assert all(torch.equal(kept[key], second[key]) for key in kept)
    pairs = [(mine.model, world.model), *((mine.ledger[c], world.ledger[c]) for c in CLIENTS)]
    for number, past in world.history.past.items():
        theirs = mine.history.past[number]
        pairs += [(theirs.start, past.start)]
        pairs += [(theirs.models[c], past.models[c]) for c in CLIENTS]
    for one, other in pairs:
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert torch.equal(mine.inputs, world.inputs)


@pytest.mark.parametrize("name", UNTOUCHED)
def test_nothing_happens_where_there_is_nobody_to_forget(name, world):
    found = RUN[name](world, NOBODY)
    expected = UNTOUCHED[name](world, NOBODY)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_distillation_from_nobody_starts_from_the_model(world):
    found = distilled(world, NOBODY, epochs=0)
    assert all(torch.equal(found[key], world.model[key]) for key in found)


@pytest.mark.parametrize("name", ["fedup", "drift", "negative-gradients", "federaser", "retrain"])
def test_the_order_in_which_clients_are_listed_does_not_matter(name, world):
    turned = copy.deepcopy(world)
    turned.weights = dict(reversed(turned.weights.items()))
    turned.ledger = dict(reversed(turned.ledger.items()))
    for number, past in turned.history.past.items():
        turned.history.past[number] = Past(
            past.start, dict(reversed(past.models.items())), turned.weights
        )
    one, other = RUN[name](world, GONE), RUN[name](turned, GONE)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
