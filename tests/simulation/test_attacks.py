"""Attacks: exactly what they change, and nothing else (methods 7.1)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from client.keeping import Keeping
from client.task.protocol import TaskOptions
from simulation.attacks.client import load_poisoned
from simulation.attacks.poison import AttackError, backdoor, boost, label_flip, stamp
from simulation.attacks.settings import Attack
from strategies.actions import Selection


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=40, size=8):
    return torch.rand(count, 1, size, size, generator=draw(1)) * 0.9


def labels(count=40, classes=4):
    return torch.arange(count) % classes


def test_the_trigger_changes_its_corner_only():
    before = images()
    after = stamp(before)
    assert bool((after[:, :, -3:, -3:] == 1).all())
    changed = after != before
    changed[:, :, -3:, -3:] = False
    assert not bool(changed.any())
    assert bool((stamp(before, (0, 0))[:, :, :3, :3] == 1).all())


@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 5))
def test_a_backdoor_poisons_exactly_its_share_of_other_classes(share, seed):
    x, y = images(), labels()
    copies = x.clone(), y.clone()
    poisoned = backdoor(x, y, share=share, target=2, generator=draw(seed))
    # 30 of the 40 examples are of other classes.
    assert int(poisoned.rows.sum()) == min(30, int(share * 40 + 1e-9))
    assert bool((poisoned.targets[poisoned.rows] == 2).all())
    assert bool((y[poisoned.rows] != 2).all())
    assert torch.equal(poisoned.targets[~poisoned.rows], y[~poisoned.rows])
    assert torch.equal(poisoned.inputs[~poisoned.rows], x[~poisoned.rows])
    assert torch.equal(poisoned.inputs[poisoned.rows], stamp(x[poisoned.rows]))
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])


def test_label_flip_takes_the_next_pair_when_one_has_too_few():
    # Ten examples of each class: 15 flips fit into the first pair's 20, 25 need the second.
    flipped, rows = label_flip(labels(), share=15 / 40, pairs=[(0, 1), (2, 3)], generator=draw())
    assert int(rows.sum()) == 15
    assert set(labels()[rows].tolist()) <= {0, 1}
    flipped, rows = label_flip(labels(), share=25 / 40, pairs=[(0, 1), (2, 3)], generator=draw())
    assert int(rows.sum()) == 25
    assert int((rows & (labels() < 2)).sum()) == 20
    assert bool((flipped[rows] + labels()[rows]).eq(torch.where(labels()[rows] < 2, 1, 5)).all())
    assert torch.equal(flipped[~rows], labels()[~rows])


def test_label_flip_never_flips_an_example_twice():
    flipped, rows = label_flip(labels(), share=1.0, pairs=[(0, 1), (1, 2)], generator=draw())
    assert int(rows.sum()) == 30
    assert bool((flipped[rows] != labels()[rows]).all())


def test_boost_scales_the_update_and_one_is_the_identity():
    start = {"w": torch.ones(2), "n": torch.tensor(1)}
    model = {"w": torch.tensor([2.0, 0.0]), "n": torch.tensor(5)}
    assert boost(model, start, 10)["w"].tolist() == [11.0, -9.0]  # 1 + 10 * (1, -1)
    assert int(boost(model, start, 10)["n"]) == 5
    assert all(torch.equal(boost(model, start, 1)[k], model[k]) for k in model)


def test_attacks_that_do_not_fit_are_refused():
    with pytest.raises(AttackError, match=r"needs images of at least 3 x 3 pixels"):
        stamp(torch.rand(4, 30))
    with pytest.raises(ValidationError, match="group and stagger go together"):
        Attack(kind="backdoor", share=0.1, group=2)


def test_colluders_attack_the_stated_class_whatever_classes_they_hold():
    options = TaskOptions(partition="dirichlet", alpha=0.1)
    attack = Attack(kind="backdoor", share=0.5, target=9)
    task = load_poisoned(options, attack, (0, 1, 2))
    for partition in (0, 1, 2):
        part = task.poisoned(partition, 10)
        assert set(part.targets[part.rows].tolist()) == {9}


def test_schedule():
    attack = Attack(kind="backdoor", share=0.1, start=4, every=3)
    assert [n for n in range(1, 14) if attack.active(0, n)] == [4, 7, 10, 13]
    staggered = Attack(kind="backdoor", share=0.1, group=2, stagger=5)
    first = [next(n for n in range(1, 99) if staggered.active(a, n)) for a in range(5)]
    assert first == [1, 1, 6, 6, 11]


def poisoned_digits(**more):
    attack = Attack(kind="backdoor", share=0.5, **more)
    return load_poisoned(TaskOptions(), attack, (2, 5, 7))


def test_poisoning_leaves_the_benign_examples_and_the_task_as_they_were():
    data = poisoned_digits()
    clean = data.task.client_data(2, 10)
    before = clean.train.tensors[0].clone()
    inputs, _ = data.examples(2, 10).tensors
    rows = data.poisoned(2, 10).rows
    assert int(rows.sum()) == int(0.5 * len(rows))
    assert torch.equal(inputs[~rows], before[~rows])
    assert torch.equal(data.task.client_data(2, 10).train.tensors[0], before)


def test_colluders_share_trigger_and_target_and_others_do_not():
    def targets(colluding):
        task = poisoned_digits(colluding=colluding)
        parts = [task.poisoned(partition, 10) for partition in (2, 5, 7)]
        corners = [part.inputs[part.rows][:, :, -3:, -3:].eq(1).all() for part in parts]
        return [int(part.targets[part.rows][0]) for part in parts], [bool(c) for c in corners]

    assert targets(True) == ([0, 0, 0], [True, True, True])
    assert targets(False) == ([0, 1, 2], [True, False, False])


# ---------------------------------------------------------------- requests to attackers
def test_attackers_leave_out_the_rows_that_they_forgot_whatever_poisoning_calls_them(tmp_path):
    """Half of each class 3 and 5 is labelled as the other: rows go by the owner's labels."""
    attack = Attack(kind="label-flip", share=0.1, pairs=((3, 5),))
    data, keeping = load_poisoned(TaskOptions(), attack, (2,)), Keeping(tmp_path)
    own = data.task.client_data(2, 10).train
    whole = data.examples(2, 10)

    def now():
        return data.allowed(2, 10, keeping.without_forgotten(own), keeping)

    assert now() is whole
    assert data.allowed(2, 10, own, None) is whole
    keeping.forget(Selection(forget="class", forget_class=3), own, 1)
    stays = own.tensors[1] != 3
    flipped = whole.tensors[1] == 3
    assert (stays & flipped).any()  # fives that are called threes stay
    left = now()
    for found, poisoned in zip(left.tensors, whole.tensors, strict=True):
        assert torch.equal(found, poisoned[stays])
    assert now() is left  # engines that train clients together look at the identity
    assert data.examples(2, 10) is whole


def test_attackers_forget_again_when_more_is_forgotten(tmp_path):
    attack = Attack(kind="backdoor", share=0.5)
    data, keeping = load_poisoned(TaskOptions(), attack, (4,)), Keeping(tmp_path)
    own = data.task.client_data(4, 10).train
    for label in (1, 2):
        keeping.forget(Selection(forget="class", forget_class=label), own, label)
        honest = keeping.without_forgotten(own)
        left = data.allowed(4, 10, honest, keeping)
        stays = ~torch.isin(own.tensors[1], torch.tensor(range(1, label + 1)))
        assert torch.equal(left.tensors[0], data.examples(4, 10).tensors[0][stays])
