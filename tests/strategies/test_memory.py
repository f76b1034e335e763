"""What the server remembers: no more than asked for, in memory or on disk, within a limit."""

import copy

import pytest
import torch

from strategies.memory import LastRound, Memory
from unlearning.catalogue import RECORDED, Need

START = {"w.weight": torch.zeros(2, 2), "steps": torch.tensor(0)}
EVERYTHING = sorted(RECORDED)


def model(value):
    return {"w.weight": torch.full((2, 2), float(value)), "steps": torch.tensor(int(value))}


def played(number, **values):
    """A round in which each client sent a model of one value, with weights 1, 2, ..."""
    locals_ = {client: model(value) for client, value in values.items()}
    weights = {client: float(n) for n, client in enumerate(locals_, 1)}
    return LastRound(number, model(number - 1), locals_, weights)


def filled(tmp_path, where, needs=EVERYTHING, **more):
    memory = Memory(needs, folder=tmp_path / "memory" if where == "disk" else None, **more)
    memory.start(START)
    memory.remember(played(1, a=1, b=2), ["a", "b"])
    memory.remember(played(2, a=3, b=1, c=5), ["a", "b"])  # c was quarantined at once
    memory.remember(played(3, a=2, b=2, d=9), ["a", "b", "d"])
    return memory


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in other)


@pytest.fixture(params=["memory", "disk"])
def where(request):
    return request.param


def test_everything_is_there_in_memory_and_on_disk(tmp_path, where):
    memory = filled(tmp_path, where)
    assert memory.available() == RECORDED
    assert same(memory.initial, START)
    assert memory.last.number == 3
    assert sorted(memory.last.locals_) == ["a", "b", "d"]
    assert same(memory.last.locals_["d"], model(9))
    assert same(memory.last.previous, model(2))
    history = memory.history
    assert list(history.rounds) == [1, 2, 3]
    assert sorted(history.models(2)) == ["a", "b"]  # only what was averaged
    assert history.weights(3) == {"a": 1.0, "b": 2.0, "d": 3.0}
    assert same(history.start(2), model(1))
    # Round 1: mean (1 + 2 * 2) / 3 = 5/3; round 2: (3 + 2) / 3 = 5/3; round 3: (2 + 4 + 27) / 6.
    rows = {"a": (1 - 5 / 3) / 3 + (3 - 5 / 3) / 3 + (2 - 5.5) / 6,
            "b": 2 / 3 * (2 - 5 / 3) + 2 / 3 * (1 - 5 / 3) + 2 / 6 * (2 - 5.5),
            "d": 3 / 6 * (9 - 5.5)}  # fmt: skip
    assert {c: float(r["w.weight"][0, 0]) for c, r in memory.ledger.items()} == pytest.approx(rows)
    assert sum(rows.values()) == pytest.approx(0)


@pytest.mark.parametrize("need", EVERYTHING)
def test_no_more_than_is_needed(need, tmp_path, where):
    memory = filled(tmp_path, where, [need])
    assert need in memory.available()
    there = {
        Need.LAST: memory.last is not None,
        Need.LEDGER: bool(memory.ledger),
        Need.HISTORY: memory.history is not None,
        Need.INITIAL: memory.initial is not None,
    }
    expected = {
        Need.SAMPLED_HISTORY: {Need.HISTORY},
        Need.CHECKPOINTS: {Need.INITIAL},
    }.get(need, {need})
    assert {n for n, found in there.items() if found} == expected
    assert memory.bytes_held() > 0


def test_without_needs_nothing_is_held(tmp_path, where):
    memory = filled(tmp_path, where, [])
    assert memory.available() == frozenset()
    assert memory.bytes_held() == 0
    assert not (tmp_path / "memory").exists()


def test_bytes_by_need(tmp_path):
    memory = filled(tmp_path, "memory")
    size = 4 * 4 + 8
    assert memory.bytes_held([Need.LAST]) == 4 * size  # three models and the one before
    assert memory.bytes_held([Need.INITIAL]) == size
    assert memory.bytes_held([Need.LEDGER]) == 3 * 4 * 4  # rows without the counter
    # d first took part in round 3: the model before it, besides the initial one.
    assert memory.bytes_held([Need.CHECKPOINTS]) == 2 * size
    files = [p.stat().st_size for p in memory.history.folder.rglob("*.safetensors")]
    assert len(files) == 3 + 3 + 4
    assert memory.bytes_held([Need.HISTORY]) == sum(files) + size
    assert memory.bytes_held() == sum(files) + 4 * size + 3 * 16 + 2 * size


def test_some_rounds_are_enough_for_some_methods(tmp_path, where):
    memory = filled(tmp_path, where, [Need.SAMPLED_HISTORY], interval=2)
    assert list(memory.history.rounds) == [1, 3]
    assert memory.available() == {Need.SAMPLED_HISTORY}
    both = filled(tmp_path / "2", where, [Need.SAMPLED_HISTORY, Need.HISTORY], interval=2)
    assert list(both.history.rounds) == [1, 2, 3]


def test_forgetting_deletes_a_client_everywhere(tmp_path, where):
    memory = filled(tmp_path, where)
    memory.forget({"a"})
    assert sorted(memory.last.locals_) == ["b", "d"]
    assert sorted(memory.ledger) == ["b", "d"]
    assert memory.recorded_clients() == {"b", "d"}
    assert memory.checkpoints == {}  # from after a first took part
    assert memory.checkpoint({"d"}) == (0, memory.initial)
    assert not list(tmp_path.rglob("a.safetensors"))
    assert not list(tmp_path.rglob("checkpoints/*.safetensors"))
    assert sorted(memory.history.weights(1)) == ["b"]


def test_checkpoints_are_from_before_a_client_joined(tmp_path, where):
    memory = filled(tmp_path, where)
    number, found = memory.checkpoint({"d"})
    assert number == 2
    assert same(found, model(2))
    assert memory.checkpoint({"d", "a"})[0] == 0
    assert memory.checkpoint({"never"})[0] == 0
    assert memory.checkpoint({"never", "d"})[0] == 2  # who never took part undoes nothing
    memory.forget({"d"})
    assert list(memory.checkpoints) == [2]  # round 2 was before d
    memory.remember(played(4, a=1, e=1), ["a", "e"])
    assert sorted(memory.checkpoints) == [2, 3]
    assert memory.checkpoint({"e"})[0] == 3  # the latest that will do
    assert memory.checkpoint({"d", "e"})[0] == 2
    memory.forget({"d"})
    assert memory.checkpoint({"e"})[0] == 2  # that of round 3 is from after d took part


def test_a_limit_gives_the_history_up_and_says_so(tmp_path, where, caplog):
    needs = [Need.HISTORY, Need.LAST]
    whole = filled(tmp_path / "whole", where, needs).bytes_held()
    memory = filled(tmp_path / "small", where, needs, limit=whole // 2)
    assert "the history of rounds is given up: round " in caplog.text
    assert "raise memory-limit" in memory.given_up
    assert memory.available() == {Need.LAST}
    assert memory.history is None
    assert memory.bytes_held() == 4 * 24 if where == "memory" else True
    assert not list(tmp_path.glob("small/memory/history/round-*"))
    assert sum("given up" in r.getMessage() for r in caplog.records) == 1
    assert filled(tmp_path / "all", where, needs, limit=2 * whole + 9000).history is not None


def test_rounds_that_were_undone_are_dropped(tmp_path, where, caplog):
    memory = filled(tmp_path, where)
    memory.rewind(1)
    assert list(memory.history.rounds) == [1]
    assert memory.first_rounds == {"a": 1, "b": 1}
    assert memory.checkpoints == {}  # that of round 2 is from after round 1
    assert not list(tmp_path.rglob("checkpoints/*.safetensors"))
    assert not list(tmp_path.rglob("ledger/*.safetensors"))
    assert "the ledger is given up: rounds after 1 were undone" in caplog.text
    assert memory.available() == {*EVERYTHING} - {Need.LAST, Need.LEDGER}
    memory.remember(played(2, b=1, d=2), ["b", "d"])
    assert list(memory.history.rounds) == [1, 2]
    assert Need.LAST in memory.available()
    assert Need.LEDGER not in memory.available()
    memory.rewind(0)  # from here on everything is written anew
    memory.remember(played(1, b=1, d=2), ["b", "d"])
    assert memory.available() == {*EVERYTHING}


def test_what_is_told_of_the_last_round_that_stays_is_kept(tmp_path, where):
    memory = filled(tmp_path, where)
    memory.remember(played(4, b=3, d=1), ["b", "d"])
    # a took part in round 3 for the last time, b and d in round 4; e joins in round 5.
    memory.remember(played(5, b=1, e=1), ["b", "e"])
    assert memory.last_rounds == {"a": 3, "b": 5, "d": 4, "e": 5}
    shares = dict(memory.shares)
    expected = {"a": (3, 1 / 6), "b": (5, 1 / 3), "d": (4, 2 / 3), "e": (5, 2 / 3)}
    assert shares == {client: (n, pytest.approx(s)) for client, (n, s) in expected.items()}
    # Shares of different rounds do not add up: the newest of them counts.
    for clients, share in (("a", 1 / 6), ("ad", 2 / 3), ("bde", 1.0), ("ab", 1 / 3), ("x", 0)):
        assert memory.share_of([*clients]) == pytest.approx(share)
    memory.rewind(4)
    assert memory.last_rounds == {"a": 3, "d": 4}
    assert memory.first_rounds == {"a": 1, "b": 1, "d": 3}
    assert memory.shares == {"a": shares["a"], "d": shares["d"]}
    assert list(memory.history.rounds) == [1, 2, 3, 4]
    assert list(memory.checkpoints) == [2, 4]  # that of round 4 is from before e
    assert same(memory.checkpoints[4], model(4))


def test_a_history_begins_with_the_first_round_that_made_a_model(where, tmp_path):
    folder = tmp_path / "memory" if where == "disk" else None
    memory = Memory([Need.HISTORY], folder=folder)
    for number in (2, 3):  # round 1 made none, so that round 2 started from w^0
        memory.remember(played(number, a=1, b=2), ["a", "b"])
    assert list(memory.history.rounds) == [1, 3]
    assert same(memory.history.start(1), model(1))
    late = Memory([Need.HISTORY])
    late.joined(1, START, ["a"])  # a model was made, and its updates were not recorded
    late.remember(played(2, a=1), ["a"])
    assert late.history is None


def test_a_copy_of_a_large_memory_outlives_it(monkeypatch):
    monkeypatch.setattr("strategies.memory.IN_MEMORY", 0)
    memory = Memory(EVERYTHING)
    memory.start(START)
    memory.remember(played(1, a=1, b=2), ["a", "b"])
    memory.remember(played(2, a=1, c=2), ["a", "c"])
    twin = copy.deepcopy(memory)
    del memory
    assert same(twin.initial, START)
    assert same(twin.checkpoint({"c"})[1], model(1))
    assert same(twin.last.locals_["c"], model(2))
    assert same(twin.history.models(1)["b"], model(2))


def test_what_is_large_is_kept_on_disk(monkeypatch):
    small, memory = Memory(EVERYTHING), Memory(EVERYTHING)
    for one, limit in ((small, 10**9), (memory, 100)):
        monkeypatch.setattr("strategies.memory.IN_MEMORY", limit)
        one.start(model(0))
        one.remember(played(1, a=1, b=2), ["a", "b"])  # 48 bytes of updates, 72 with the start
        one.remember(played(2, a=3, b=4, c=5, d=6, e=7), ["a", "b", "c", "d", "e"])
        one.remember(played(3, a=1, f=3), ["a", "f"])
    root = memory.history.folder.parent
    assert {p.name for p in root.iterdir()} == {"history", "last", "ledger"}
    assert {p.name for p in small.history.folder.parent.iterdir()} == {"history"}
    twin = copy.deepcopy(memory)
    for one in (memory, twin):
        assert one.ledger.keys() == small.ledger.keys()
        assert all(same(one.ledger[c], row) for c, row in small.ledger.items())
        assert all(same(one.last.locals_[c], m) for c, m in small.last.locals_.items())
        assert one.bytes_held() == small.bytes_held()
    twin.forget({"a"})
    assert "a" not in twin.ledger
    assert "a" in memory.ledger
    assert same(memory.last.locals_["a"], model(1))
    memory.forget({"a"})
    assert not list(root.rglob("a.safetensors"))


def test_a_limit_leaves_checkpoints_out_and_exact_forgetting_goes_further_back(caplog):
    size = 16 + 8
    memory = Memory([Need.CHECKPOINTS], limit=1024 + 2 * size)
    memory.start(model(0))
    for number, client in enumerate("abcd", start=1):
        memory.remember(played(number, **{client: 1}), [client])
    # A file is taken for 1024 bytes more than its tensors: one checkpoint fits besides model 0.
    assert list(memory.checkpoints) == [1]
    assert "no checkpoint of round 2" in caplog.text
    assert memory.checkpoint({"d"})[0] == 1


def test_a_copy_is_independent_and_shares_no_file_that_changes(tmp_path):
    memory = filled(tmp_path, "memory")
    twin = copy.deepcopy(memory)
    twin.forget({"a"})
    twin.remember(played(4, b=1), ["b"])
    assert list(memory.history.rounds) == [1, 2, 3]
    assert list(twin.history.rounds) == [1, 2, 3, 4]
    assert "a" in memory.recorded_clients()
    assert "a" not in twin.recorded_clients()
    assert "a" in memory.ledger
    assert memory.checkpoint({"d"})[0] == 2
    assert memory.bytes_held([Need.LAST]) == 4 * 24


def test_a_history_that_was_given_up_at_once_can_be_copied():
    memory = Memory([Need.HISTORY], limit=1)
    memory.remember(played(1, a=1), ["a"])
    twin = copy.deepcopy(memory)
    assert twin.history is None
    assert "raise memory-limit" in twin.given_up


def test_what_is_in_memory_is_not_what_was_handed_in():
    memory = Memory([Need.INITIAL])
    start = model(1)
    memory.start(start)
    start["w.weight"].add_(1)
    assert same(memory.initial, model(1))


def test_a_temporary_history_goes_with_its_memory(tmp_path):
    memory = filled(tmp_path, "memory", [Need.HISTORY])
    folder = memory.history.folder
    assert folder.exists()
    del memory
    assert not folder.exists()
