"""What every detector of the catalogue must do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.detectors.catalogue import DETECTORS
from strategies.detectors.interface import most_flaggable

ROUNDS = 12  # enough for the one with a history to speak; the others need a single round
SHAPES = {"hidden.weight": (12, 6), "fc.weight": (4, 12), "fc.bias": (4,)}
PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())

every = pytest.mark.parametrize("name", DETECTORS)


def names(count):
    return [f"client-{index:02d}" for index in range(count)]


def model():
    return {
        **{name: torch.zeros(shape) for name, shape in SHAPES.items()},
        "bn.num_batches_tracked": torch.tensor(5),
    }


def update_of(row):
    parts = row.split([math.prod(shape) for shape in SHAPES.values()])
    return {
        name: part.reshape(shape).clone()
        for part, (name, shape) in zip(parts, SHAPES.items(), strict=True)
    }


def rounds_of(clients=10, *, seed=0, boost=(), cohort=()):
    """A common direction and noise; some clients boost, some share one more direction."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(PARAMETERS, generator=random)
    push = 3 * torch.randn(PARAMETERS, generator=random)
    history = []
    for _ in range(ROUNDS):
        rows = common + 0.5 * torch.randn(clients, PARAMETERS, generator=random)
        rows[list(cohort)] += push
        rows[list(boost)] *= 10
        history.append({c: update_of(r) for c, r in zip(names(clients), rows, strict=True)})
    return history


def watch(name, history, *, threshold=None, seed=0):
    detector = DETECTORS[name].make(threshold)
    start = model()
    rounds = list(enumerate(history, 1))
    if name != "fldetector":
        rounds = rounds[-2:]
    return [detector.inspect(n, updates, start, seed=seed) for n, updates in rounds]


def same_updates(clients, scale=1.0):
    row = scale * torch.linspace(-1, 2, PARAMETERS)
    return [{c: update_of(row) for c in names(clients)} for _ in range(ROUNDS)]


@every
def test_an_entry_makes_the_detector_of_its_name(name):
    entry = DETECTORS[name]

    assert entry.make(None).name == name
    assert entry.make(None) is not entry.make(None)
    for text in (entry.summary, entry.catches, entry.limits, entry.source):
        assert text.endswith(".")
        assert "\n" not in text


def test_the_catalogue():
    assert list(DETECTORS) == ["cohort", "lfighter", "fldetector"]


@every
def test_a_given_threshold_is_the_one_that_decides(name):
    attack = {"boost": [1, 2]} if name == "fldetector" else {"cohort": [1, 2, 3]}
    history = rounds_of(**attack)
    caught = watch(name, history)[-1]
    expected = set(names(10)[1:3]) if name == "fldetector" else set(names(10)[1:4])
    number = caught.evidence[caught.decided_by]

    assert caught.flagged == expected
    assert number >= caught.threshold
    assert watch(name, history, threshold=number)[-1].flagged == expected
    higher = watch(name, history, threshold=number + 1e-6)[-1]
    assert higher.flagged == frozenset()
    assert higher.threshold == number + 1e-6
    assert higher.evidence == caught.evidence
    assert higher.note


@every
@pytest.mark.parametrize("clients", [1, 2, 5, 10])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_equal_updates_lose_nobody(name, clients, scale):
    for finding in watch(name, same_updates(clients, scale)):
        assert not finding.flagged
        assert finding.note


@every
def test_attack_free_rounds_lose_nobody(name):
    assert not any(finding.flagged for finding in watch(name, rounds_of()))


@every
def test_one_client_that_sends_ten_times_as_much(name):
    last = watch(name, rounds_of(boost=[6]))[-1]

    # It has no cohort; only its own history gives it away.
    assert last.flagged == ({names(10)[6]} if name == "fldetector" else frozenset())


@every
def test_neither_the_order_of_clients_nor_of_tensors_matters(name):
    history = rounds_of(boost=[2], cohort=[4, 5, 6])
    mixed = [
        {
            client: dict(reversed(updates[client].items()))
            for client in sorted(updates, key=lambda c: c[::-1], reverse=True)
        }
        for updates in history
    ]

    assert watch(name, mixed) == watch(name, history)


@every
def test_flags_follow_the_clients_when_they_are_renamed(name):
    history = rounds_of(boost=[2], cohort=[4, 5, 6])
    new = dict(zip(names(10), reversed(names(10)), strict=True))
    renamed = [{new[client]: update for client, update in updates.items()} for updates in history]

    for plain, other in zip(watch(name, history), watch(name, renamed), strict=True):
        assert other.flagged == {new[client] for client in plain.flagged}
        assert other.scores == pytest.approx({new[c]: s for c, s in plain.scores.items()}, abs=1e-5)


@every
def test_the_unit_of_the_weights_does_not_matter(name):
    history = rounds_of(boost=[2], cohort=[4, 5, 6])
    scaled = [
        {c: {n: 1024 * t for n, t in update.items()} for c, update in updates.items()}
        for updates in history
    ]

    for plain, other in zip(watch(name, history), watch(name, scaled), strict=True):
        assert other.flagged == plain.flagged


@every
def test_the_same_seed_gives_the_same_findings(name):
    history = rounds_of(cohort=[4, 5, 6])

    assert watch(name, history, seed=7) == watch(name, history, seed=7)


@every
def test_the_global_generator_is_neither_read_nor_moved(name):
    history = rounds_of(cohort=[4, 5, 6])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = watch(name, history)

    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert watch(name, history) == first


@every
def test_inputs_are_left_untouched(name):
    history = rounds_of(boost=[2], cohort=[4, 5, 6])
    watch(name, history)

    for updates, fresh in zip(history, rounds_of(boost=[2], cohort=[4, 5, 6]), strict=True):
        assert list(updates) == list(fresh)
        for client, update in fresh.items():
            assert all(torch.equal(updates[client][n], tensor) for n, tensor in update.items())


@every
def test_forgetting_strangers_does_no_harm(name):
    detector = DETECTORS[name].make(None)
    detector.forget(frozenset())
    detector.forget(frozenset({"never seen"}))

    history = rounds_of(boost=[2])
    found = [detector.inspect(n, u, model(), seed=0) for n, u in enumerate(history, 1)]

    assert found[-2:] == watch(name, history)[-2:]


@every
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=11),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=12, deadline=None)
def test_never_half_or_more_and_never_nan(name, rows, seed):
    # Few distinct rows, repeated and noised differently in every round: many ties.
    random = torch.Generator().manual_seed(seed)
    tiled = torch.tensor(rows).float().repeat(1, PARAMETERS // 5 + 1)[:, :PARAMETERS]
    history = [
        {
            client: update_of(row * float(torch.randint(0, 3, (1,), generator=random)))
            for client, row in zip(names(len(rows)), tiled, strict=True)
        }
        for _ in range(ROUNDS)
    ]

    for finding in watch(name, history, threshold=1.01, seed=seed)[-2:]:
        assert len(finding.flagged) <= most_flaggable(len(rows))
        assert finding.flagged <= set(names(len(rows)))
        assert all(map(math.isfinite, [*finding.scores.values(), *finding.evidence.values()]))
        assert bool(finding.flagged) != bool(finding.note)
        if finding.decided_by:
            assert finding.decided_by in finding.evidence
            assert finding.threshold == 1.01
