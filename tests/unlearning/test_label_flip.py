"""Label flipping against its definition: methods 6.3."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning.distillation import fine_tune
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.label_flip import flipped, train_on_flipped
from unlearning.partial_updates import depth_schedule, selections, shares_by_depth
from unlearning.randomness import generator

INPUTS = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


def forward(model, inputs):
    return inputs @ model["head.weight"].T + model["head.bias"]


def drawn(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "head.weight": torch.randn(3, 4, generator=draw),
        "head.bias": torch.randn(3, generator=draw),
        "norm.num_batches_tracked": torch.tensor(2),
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flip(model, labels=LABELS, inputs=INPUTS, seed=0, **more):
    return train_on_flipped(
        model, forward, functional.cross_entropy, inputs, labels, 3,
        generator=generator(seed), batch_size=5, **more,
    )  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 100), classes=st.integers(2, 12), size=st.integers(0, 50), of=st.data())
def test_no_label_stays_and_none_leaves_the_range(seed, classes, size, of):
    dtype = of.draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    labels = torch.randint(classes, (size,), generator=generator(seed), dtype=dtype)
    before = labels.clone()
    found = flipped(labels, classes, generator(seed, "flip"))

    assert found.shape == labels.shape
    assert found.dtype == labels.dtype
    assert (found != labels).all()
    assert ((found >= 0) & (found < classes)).all()
    assert torch.equal(labels, before)
    assert torch.equal(found, flipped(labels, classes, generator(seed, "flip")))


def test_the_others_are_equally_likely():
    # 6,000 draws from 3 others: 2,000 each, with a standard deviation of 37.
    found = flipped(torch.full((6000,), 1), 4, generator(0))
    counts = torch.bincount(found, minlength=4)
    assert counts[1] == 0
    assert (counts[[0, 2, 3]] - 2000).abs().max() < 150


def test_it_is_training_on_the_flipped_labels():
    draw = generator(4)
    wrong = flipped(LABELS, 3, draw)
    expected = fine_tune(
        drawn(1), forward, functional.cross_entropy, INPUTS, wrong,
        epochs=5, learning_rate=0.01, batch_size=5, generator=draw,
    )  # fmt: skip
    assert same(flip(drawn(1), seed=4), expected)
    ones = dict.fromkeys(("head.weight", "head.bias"), 1.0)
    assert same(flip(drawn(1), seed=4, shares=ones), expected)
    assert not same(flip(drawn(1), seed=5), expected)


def test_partial_flips_leave_other_entries_alone():
    model = drawn(1)
    shares = shares_by_depth(model)
    found = flip(model, epochs=1, shares=shares)
    chosen = selections(model, shares)
    for name in shares:
        assert torch.equal(found[name][~chosen[name]], model[name][~chosen[name]])
        assert not torch.equal(found[name], model[name])
    assert same(model, drawn(1))
    assert set(shares.values()) == {depth_schedule(1, 0.8, 0.2)[0]}


def test_flipping_forgets_a_class():
    # Three clusters, well told apart; one of them is flipped.
    draw = generator(0, "clusters")
    labels = torch.arange(90) % 3
    inputs = torch.randn(90, 4, generator=draw) + 4 * torch.eye(4)[labels]
    model = {"head.weight": 4 * torch.eye(4)[:3], "head.bias": torch.full((3,), -8.0)}
    mine = labels == 0

    found = train_on_flipped(
        model, forward, functional.cross_entropy, inputs[mine], labels[mine], 3,
        generator=draw, learning_rate=0.3, epochs=50,
    )  # fmt: skip

    right = (forward(found, inputs).argmax(dim=1) == labels).float()
    assert (forward(model, inputs).argmax(dim=1) == labels).float()[mine].mean() > 0.95
    assert right[mine].mean() < 0.05


def test_without_samples_nothing_changes():
    assert same(flip(drawn(0), LABELS[:0], INPUTS[:0]), drawn(0))


@pytest.mark.parametrize(
    ("labels", "classes", "error", "message"),
    [
        (torch.tensor([0, 3]), 3, ParametersError, "0 to 2, got 0 to 3"),
        (torch.tensor([0, -1]), 3, ParametersError, "0 to 2, got -1 to 0"),
        (torch.tensor([0, 0]), 1, ParametersError, "at least 2 classes, got 1"),
        (torch.tensor([0.5, 1.0]), 3, MissingNeedError, "one integer label a sample"),
        (torch.tensor([[0, 1]]), 3, MissingNeedError, "one integer label a sample"),
        (torch.tensor([True]), 3, MissingNeedError, "one integer label a sample"),
    ],
)
def test_what_are_no_classes_is_refused(labels, classes, error, message):
    with pytest.raises(error, match=message):
        flipped(labels, classes, generator(0))
