"""VeriFi's marks and check against their definition: methods 2.10."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from unlearning import verifi_marks as verifi
from unlearning.distillation import fine_tune
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.gradients import row_losses
from unlearning.randomness import generator

# ---------------------------------------------------------------- markers


def test_erroneous_memory_by_hand():
    #         highest six of ten: rows 0, 1, 2, 4, 5, 7
    losses = torch.tensor([9.0, 8, 7, 1, 6, 5, 1, 4, 1, 1])
    labels = torch.tensor([0, 0, 1, 0, 2, 1, 0, 1, 2, 0])
    predicted = torch.tensor([2, 1, 2, 2, 2, 0, 2, 2, 0, 1])
    # Row 4 is right. Wrong are 0, 2, 7 as class 2, 1 as class 1 and 5 as class 0.
    found = verifi.erroneous_memory(losses, predicted, labels, 0.6)
    assert found.rows.tolist() == [0, 2, 7]
    assert found.labels.tolist() == [2, 2, 2]
    assert verifi.relabelled(labels, found).tolist() == [2, 0, 2, 0, 2, 1, 0, 2, 2, 0]
    assert labels.tolist() == [0, 0, 1, 0, 2, 1, 0, 1, 2, 0]
    # The default: ceil(.1 * 10) = 1 row.
    assert verifi.erroneous_memory(losses, predicted, labels).rows.tolist() == [0]


def test_of_equally_frequent_errors_the_lowest_class_is_marked():
    losses, labels = torch.tensor([4.0, 3, 2, 1]), torch.tensor([0, 0, 0, 0])
    found = verifi.erroneous_memory(losses, torch.tensor([2, 1, 2, 1]), labels, 1.0)
    assert found.rows.tolist() == [1, 3]


def test_forgettable_memory_by_hand():
    # Variances over three rounds: 0, 8/3, 2/3, 0; ceil(.4 * 4) = 2 rows.
    losses = torch.tensor([[5.0, 0, 1, 9], [5, 2, 2, 9], [5, 4, 3, 9]])
    labels = torch.tensor([3, 1, 0, 2])
    found = verifi.forgettable_memory(losses, labels, 0.4)
    assert found.rows.tolist() == [1, 2]
    assert found.labels.tolist() == [1, 0]
    assert torch.equal(verifi.relabelled(labels, found), labels)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), rows=st.integers(1, 40), share=st.floats(0.01, 1))
def test_markers_are_own_rows(seed, rows, share):
    draw = generator(seed)
    losses = torch.rand(rows, generator=draw)
    labels = torch.randint(4, (rows,), generator=draw)
    predicted = (labels + torch.randint(1, 4, (rows,), generator=draw)) % 4
    most = math.ceil(share * rows - 1e-9)
    found = verifi.erroneous_memory(losses, predicted, labels, share)
    assert 1 <= len(found.rows) <= most
    assert set(found.rows.tolist()) <= set(range(rows))
    assert (found.labels != labels[found.rows]).all()
    assert losses[found.rows].min() >= losses.sort(descending=True).values[most - 1]
    over = verifi.forgettable_memory(torch.rand(3, rows, generator=draw), labels, share)
    assert len(over.rows) == most == len(over.rows.unique())
    assert set(over.rows.tolist()) <= set(range(rows))
    assert torch.equal(over.labels, labels[over.rows])


def test_what_cannot_be_marked_is_refused():
    losses, labels = torch.tensor([1.0, 2.0]), torch.tensor([0, 1])
    with pytest.raises(MissingNeedError, match="forgettable memory"):
        verifi.erroneous_memory(losses, labels, labels, 1.0)
    with pytest.raises(MissingNeedError, match="forgettable memory"):
        # Row 0 is wrong, but its loss is not among the highest.
        verifi.erroneous_memory(losses, torch.tensor([1, 1]), labels, 0.5)
    with pytest.raises(ParametersError, match="of the same rows"):
        verifi.erroneous_memory(losses, labels[:1], labels)
    with pytest.raises(ParametersError, match="not finite"):
        verifi.erroneous_memory(torch.tensor([math.nan, 1]), 1 - labels, labels)
    with pytest.raises(MissingNeedError, match="2 rounds, got 1"):
        verifi.forgettable_memory(losses.reshape(1, 2), labels)
    with pytest.raises(MissingNeedError, match="there are none"):
        verifi.forgettable_memory(torch.zeros(2, 0), labels[:0])
    with pytest.raises(ParametersError, match="not of 2 rows"):
        verifi.forgettable_memory(torch.zeros(2, 3), labels)
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ParametersError, match=r"lie in \(0, 1\]"):
            verifi.forgettable_memory(torch.zeros(2, 2), labels, share)


# ---------------------------------------------------------------- check


@pytest.mark.parametrize(
    ("following", "result", "rise"),
    # Marking won 3 - 1 = 2: a rise of 1 passes.
    [
        ([1.5, 2.0, 1.0], "pass", 1.0),
        ([2.5], "pass", 1.5),
        ([1.9, 1.9, 1.9], "fail", 0.9),
        ([1.9, 1.9, 1.9, 9.0], "fail", 0.9),
        ([1.9, 1.9], "inconclusive", 0.9),
        ([], "inconclusive", 0.0),
        ([0.5, 0.5, 0.5], "fail", -0.5),
    ],
)
def test_a_check_by_hand(following, result, rise):
    found = verifi.check(3.0, 1.0, following)
    assert found == verifi.Check(result, pytest.approx(rise), pytest.approx(1.0))


def test_marks_that_did_not_take_say_nothing():
    assert verifi.check(1.0, 1.0, [9.0, 9.0, 9.0]).result == "inconclusive"
    assert verifi.check(1.0, 2.0, [9.0, 9.0, 9.0]).result == "inconclusive"


def test_a_check_that_makes_no_sense_is_refused():
    for losses in ((math.nan, 1.0, [1.0]), (2.0, math.inf, []), (2.0, 1.0, [math.nan])):
        with pytest.raises(ParametersError, match="finite losses"):
            verifi.check(*losses)
    with pytest.raises(ParametersError, match="a window"):
        verifi.check(2.0, 1.0, [1.0], window=0)
    with pytest.raises(ParametersError, match="a window"):
        verifi.check(2.0, 1.0, [1.0], share=0.0)


# ---------------------------------------------------------------- a federation


def forward(model, inputs):
    return inputs @ model["head.weight"].T + model["head.bias"]


def rows_of(seed, size, corners, labels):
    """Rows around a corner each, with more features than rows: all of them can be memorised."""
    noise = torch.randn(size, 300, generator=generator(seed)) / 3
    return torch.eye(10, 300)[torch.tensor(corners)] + noise, torch.tensor(labels)


def fitted(model, rows, labels, epochs):
    return fine_tune(
        model, forward, functional.cross_entropy, rows, labels,
        epochs=epochs, learning_rate=0.1, batch_size=10, generator=generator(9),
    )  # fmt: skip


START = {"head.weight": torch.zeros(3, 300), "head.bias": torch.zeros(3)}
CLASSES = [n % 3 for n in range(150)]
OTHERS = rows_of(0, 150, CLASSES, CLASSES)
# Nobody else has rows at corner 9. Most are of class 1, and the few of class 0 are mistaken for it.
ALONE = rows_of(1, 60, [9] * 60, [int(n % 6 > 0) for n in range(60)])
# Rows of the others' kind, a few of class 1 labelled 0: nobody's model believes that.
ALIKE = rows_of(1, 60, CLASSES[:60], [0 if n % 12 == 1 else n % 3 for n in range(60)])


def checked(kind, own, labels):
    """Return the check where nothing is unlearned, and where the others retrain alone."""
    everyone, before_marks = torch.cat([OTHERS[0], own]), torch.cat([OTHERS[1], labels])
    models = [fitted(START, everyone, before_marks, epochs) for epochs in (1, 2, 3)]
    losses = torch.stack(
        [row_losses(m, forward, functional.cross_entropy, own, labels) for m in models]
    )
    if kind == "erroneous":
        predicted = forward(models[-1], own).argmax(dim=1)
        marks = verifi.erroneous_memory(losses[-1], predicted, labels)
    else:
        marks = verifi.forgettable_memory(losses, labels)
    relabelled = verifi.relabelled(labels, marks)

    def loss(model):
        found = forward(model, own[marks.rows])
        return float(functional.cross_entropy(found, marks.labels))

    # Marking is two epochs on all own rows, the markers among them under their new labels.
    marked = fitted(models[-1], own, relabelled, 2)
    before, after = loss(models[-1]), loss(marked)
    with_marks = torch.cat([OTHERS[1], relabelled])
    kept = [loss(fitted(marked, everyone, with_marks, rounds)) for rounds in (1, 2, 3)]
    retrained = [loss(fitted(START, *OTHERS, epochs)) for epochs in (4, 5, 6)]
    return verifi.check(before, after, kept), verifi.check(before, after, retrained)


@pytest.mark.parametrize("own", [ALONE, ALIKE])
@pytest.mark.parametrize("kind", ["erroneous", "forgettable"])
def test_unlearning_nothing_fails_and_retraining_passes(kind, own):
    kept, retrained = checked(kind, *own)
    assert kept.result == "fail"
    assert retrained.needed == kept.needed > 0
    # Errors that are not the client's own stay, whoever is forgotten: see the module's text.
    foreign = kind == "erroneous" and own is ALIKE
    assert retrained.result == ("fail" if foreign else "pass")
