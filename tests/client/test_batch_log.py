"""The batch log on disk against amnesiac unlearning in memory (methods 6.1, 6.2, 6.6)."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from client.batch_files import BatchLogError, Way, decoded, encoded, key
from client.batch_log import INDEX, BatchLog
from client.forgetting.amnesiac import amnesiac
from client.rows import content_hashes
from client.storage import KeepingError, locked
from client.task.evaluation import numbered_batches
from client.train import Job, do
from strategies.messages import LocalTraining
from unlearning.amnesiac import LoggedUpdate, contribution, update_of
from unlearning.errors import ParametersError, RefusedRequestError
from unlearning.parameters import top_count

CPU = torch.device("cpu")
EXAMPLES = TensorDataset(
    torch.randn(22, 5, generator=torch.Generator().manual_seed(1)), torch.arange(22) % 3
)
LATE = TensorDataset(torch.ones(2, 5), torch.tensor([0, 0]))
HASHES = content_hashes(EXAMPLES)
EVERY = frozenset(HASHES)


class Task:
    """Two layers with a normalisation, whose buffers no log may touch, and dropout between."""

    def build_model(self):
        return nn.Sequential(
            nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.2), nn.Linear(7, 3)
        )

    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)


TASK = Task()
SETTINGS = LocalTraining(seed=5, local_epochs=2, batch_size=8, optimizer="adam", learning_rate=0.01)


class Streamed(Dataset):
    def __len__(self):
        return len(EXAMPLES)

    def __getitem__(self, row):
        return EXAMPLES[row]


def initial():
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in TASK.build_model().state_dict().items()}


def job(number, log=None, examples=EXAMPLES):
    return Job(TASK, examples, SETTINGS, (number, 4), CPU, log=log)


def trained(log, rounds=2, *, shares=None, examples=EXAMPLES):
    """Train one client alone; the average is its model."""
    model = initial()
    for number in range(1, rounds + 1):
        if number > 1 and shares is not None:
            log.told({number - 1: shares[number - 2]})
        model, _ = do(job(number, log, examples), model)
    if shares is not None:
        log.told({rounds: shares[rounds - 1]})
    return model


class InMemory:
    """The same log, as a list: what the specification says, without any file."""

    def __init__(self):
        self.entries = []

    def recording(self, job, model):
        import contextlib

        before = {n: t.clone() for n, t in model.state_dict().items()}

        def step(epoch, batch, rows):
            after = {n: t.clone() for n, t in model.state_dict().items()}
            held = frozenset(HASHES[row] for row in rows.tolist())
            when = (job.purpose[0], epoch, batch)
            self.entries.append(LoggedUpdate(when, held, update_of(before, after)))
            before.update(after)

        return contextlib.nullcontext(step)

    def shared(self, shares):
        return [replace(entry, share=shares[entry.when[0] - 1]) for entry in self.entries]


def full(folder, **changes):
    return BatchLog(folder, kind="full", precision="float32", **changes)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---------------------------------------------------------------- recording
@pytest.mark.parametrize("examples", [EXAMPLES, Streamed()])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_batches_are_numbered_by_the_rows_that_are_in_them(examples, seed):
    def order():
        return None if seed is None else torch.Generator().manual_seed(seed)

    sampler = None if seed is None else RandomSampler(examples, generator=order())
    expected = list(DataLoader(examples, batch_size=8, sampler=sampler))
    found = list(numbered_batches(examples, 8, order()))
    assert [len(rows) for rows, _, _ in found] == [8, 8, 6]
    for (rows, inputs, targets), (wanted, labels) in zip(found, expected, strict=True):
        assert torch.equal(inputs, EXAMPLES.tensors[0][rows])
        assert torch.equal(targets, EXAMPLES.tensors[1][rows])
        assert torch.equal(inputs, wanted)
        assert torch.equal(targets, labels)


@pytest.mark.parametrize("examples", [EXAMPLES, Streamed()])
def test_training_with_a_log_gives_the_same_model_bit_for_bit(tmp_path, examples):
    for kind in ("random", "magnitude", "global", "full"):
        plain, metrics = do(job(1, examples=examples), initial())
        logged, told = do(job(1, BatchLog(tmp_path / kind, kind=kind), examples), initial())
        assert same(plain, logged)
        assert metrics == told


@pytest.mark.parametrize("examples", [EXAMPLES, Streamed()])
def test_a_full_log_takes_back_what_amnesiac_unlearning_does_bit_for_bit(tmp_path, examples):
    shares, wanted = [0.25, 0.5], frozenset(HASHES[:2])
    log, memory = full(tmp_path), InMemory()
    model = trained(log, shares=shares, examples=examples)
    assert same(model, trained(memory, examples=examples))
    expected, removed = contribution(model, memory.shared(shares), wanted)
    found = log.take_back(model, wanted, "r")
    assert same(found.update, expected)
    assert (found.batches, found.first) == (len(removed.batches), 1)
    assert 4 <= found.batches <= 8  # two rows, each in one of three batches of every epoch


def test_nothing_dropped_is_a_full_log_bit_for_bit(tmp_path):
    wanted = frozenset(HASHES[3:5])
    updates = []
    for kind in ("full", "random", "magnitude", "global"):
        log = replace(full(tmp_path / kind), kind=kind, first=0.0, last=0.0)
        updates.append(log.take_back(trained(log, shares=[1.0, 1.0]), wanted, "r").update)
    assert all(same(updates[0], other) for other in updates[1:])


def test_everything_dropped_leaves_the_model_as_it_is(tmp_path):
    log = replace(full(tmp_path), kind="random", first=1.0, last=1.0)
    model = trained(log, shares=[1.0, 1.0])
    assert same(amnesiac(model, log, EVERY, "r").arrays, model)


def test_one_client_alone_that_forgets_all_is_back_where_it_began(tmp_path):
    for precision, tolerance in (("float32", 1e-4), ("float16", 1e-2)):
        log = replace(full(tmp_path / precision), precision=precision)
        model = trained(log, shares=[1.0, 1.0])
        outcome = amnesiac(model, log, EVERY, "r")
        start = initial()
        moved = [name for name in start if "running" not in name and "num_" not in name]
        assert any(not torch.allclose(model[n], start[n], atol=tolerance) for n in moved)
        for name in moved:
            assert torch.allclose(outcome.arrays[name], start[name], atol=tolerance, rtol=0)
        for name in model.keys() - set(moved):  # buffers are not tracked
            assert torch.equal(outcome.arrays[name], model[name])
        assert outcome.metrics == {"batches": 12, "first-round": 1}  # 2 rounds, 2 epochs, 3 batches


def test_half_a_log_in_half_precision_stores_what_its_shares_say(tmp_path):
    log = BatchLog(tmp_path, kind="random")
    trained(log, 1)
    index = json.loads((tmp_path / INDEX).read_text())["content"]
    # The first layer drops 0.8 of its entries, the normalisation 0.5, the last 0.2; of n entries
    # ceil(q n) go. 2 bytes an entry, and 4 for the place of each row of the 6 batches.
    kept = sum(n - top_count(n, q) for n, q in
               [(35, 0.8), (7, 0.8), (7, 0.5), (7, 0.5), (21, 0.2), (3, 0.2)])  # fmt: skip
    path = tmp_path / index["rounds"][0]["parts"][0]["name"]
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - 8 - header == 6 * 2 * kept + 2 * 22 * 4


@given(
    st.sampled_from(["random", "magnitude", "global", "full"]),
    st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_is_kept_of_an_update_is_unchanged_and_the_rest_is_nothing(kind, first, last, seed):
    draw = torch.Generator().manual_seed(seed)
    update = {n: torch.randn(s, generator=draw) for n, s in
              {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (), "c.weight": (0, 2)}.items()}  # fmt: skip
    way = Way(kind=kind, precision="float32", first=first, last=last, seed=seed, client=2)
    when = (3, 1, 7)
    stored = {key(when, name): tensor for name, tensor in encoded(way, update, when).items()}
    found = decoded(way, {n: list(t.shape) for n, t in update.items()}, stored, when)
    for name, tensor in update.items():
        assert found[name].shape == tensor.shape
        assert bool(((found[name] == tensor) | (found[name] == 0)).all())
    dropped = sum(int((found[n] == 0).sum()) for n in update)
    sizes = {"a.weight": 12, "a.bias": 3, "b.weight": 1, "c.weight": 0}
    middle = (first + last) / 2
    by_layer = {"a.weight": first, "a.bias": first, "b.weight": middle, "c.weight": last}
    if kind == "full":
        assert dropped == 0
    elif kind == "global":
        assert dropped == top_count(16, middle)
    else:
        assert dropped == sum(top_count(sizes[n], by_layer[n]) for n in sizes)
    if kind == "magnitude":
        for name, tensor in update.items():
            kept, gone = tensor[found[name] != 0].abs(), tensor[found[name] == 0].abs()
            assert not len(kept) or not len(gone) or kept.min() >= gone.max()


def test_a_step_too_large_for_half_precision_is_told_and_logs_nothing(tmp_path):
    log = BatchLog(tmp_path, kind="full")
    wild = replace(job(1, log), settings=SETTINGS.model_copy(update={"learning_rate": 1e6}))
    with pytest.raises(ParametersError, match="not finite"):
        do(wild, initial())
    with pytest.raises(BatchLogError, match="no batch is logged"):
        log.take_back(initial(), EVERY, "r")


# ---------------------------------------------------------------- requests
def served(log, model, samples, request="r"):
    """Take back, and be told that it was used."""
    found = log.take_back(model, samples, request)
    log.told({}, [request])
    return found


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("round*"))


def test_what_was_removed_is_refused_passed_over_and_deleted(tmp_path):
    log, memory, shares = full(tmp_path), InMemory(), [1.0, 1.0]
    model = trained(log, shares=shares)
    trained(memory)
    one, two = frozenset(HASHES[:1]), frozenset(HASHES[:2])
    first, removed = contribution(model, memory.shared(shares), one)
    assert log.check(two) == (2, 1)
    assert same(served(log, model, one, "r1").update, first)
    assert (log.check(one), log.check(two)) == ((0, 0), (1, 1))
    held = size_of(tmp_path)
    with pytest.raises(RefusedRequestError, match="already removed"):
        log.take_back(model, one, "r2")
    rest, _ = contribution(model, memory.shared(shares), two - one, removed)
    assert same(served(log, model, two, "r3").update, rest)
    with pytest.raises(RefusedRequestError, match="already removed"):
        log.take_back(model, two, "r3")
    assert size_of(tmp_path) < held


def test_until_it_is_told_that_it_was_used_a_log_says_the_same_again(tmp_path):
    log = full(tmp_path)
    model = trained(log, shares=[0.25, 0.5])
    wanted = frozenset(HASHES[:2])
    held, first = size_of(tmp_path), log.take_back(model, wanted, "r1")
    for request, others in (("r1", []), ("r2", ["r1x", "r0"]), ("r3", ["r1", "r2"])):
        log.told({}, others)  # of what was answered before, the last alone may have been used
        if "r2" in others:
            break
        assert log.check(wanted) == (2, 1)
        assert same(log.take_back(model, wanted, request).update, first.update)
        assert size_of(tmp_path) == held
    assert log.check(wanted) == (0, 0)
    assert size_of(tmp_path) < held
    log.told({}, ["r1", "r2"])  # as often as one likes
    assert log.check(EVERY) == (20, 1)


def test_who_missed_that_it_was_used_does_not_subtract_it_again(tmp_path):
    # One row, then another of the same batches: what both were in is subtracted once.
    memory, shares = InMemory(), [0.25, 0.5]
    trained(memory)
    one, both = frozenset(HASHES[:1]), EVERY
    log = full(tmp_path)
    model = trained(log, shares=shares)
    log.take_back(model, one, "r1")
    log = full(tmp_path)  # the client starts anew, and hears of r1 with the next request
    log.told({}, ["r1"])
    _, removed = contribution(model, memory.shared(shares), one)
    rest, _ = contribution(model, memory.shared(shares), both - one, removed)
    assert same(log.take_back(model, both, "r2").update, rest)


def test_what_is_trained_on_since_is_no_part_of_what_was_used(tmp_path):
    log = full(tmp_path)
    model = trained(log, shares=[1.0, 1.0])
    log.take_back(model, EVERY, "r1")
    do(job(3, log), model)
    log.told({3: 1.0}, ["r1"])
    assert log.check(EVERY) == (22, 1)
    assert log.take_back(model, EVERY, "r2").batches == 6


@pytest.mark.parametrize(("number", "left"), [(1, 6), (2, 6)])
def test_rounds_that_are_played_again_are_no_part_of_what_was_used(tmp_path, number, left):
    log = full(tmp_path)
    model = trained(log, shares=[1.0, 1.0])
    log.take_back(model, EVERY, "r1")
    do(job(number, log), initial())  # with the same number as one of those that it answered for
    log.told({number: 1.0}, ["r1"])
    assert log.take_back(model, EVERY, "r2").batches == left


def test_what_is_used_is_deleted_also_where_files_are_damaged(tmp_path, caplog):
    log = full(tmp_path)
    model = trained(log, shares=[1.0, 1.0])
    log.take_back(model, frozenset(HASHES[:1]), "r1")
    (path,) = tmp_path.glob("round-0001*")
    path.write_bytes(b"")
    log.told({}, ["r1"])
    assert "updates of round 1 are dropped" in caplog.text
    assert not list(tmp_path.glob("round-0001*"))
    with pytest.raises(BatchLogError, match="round 1 are needed"):
        log.check(EVERY)


def test_rows_trained_on_again_can_be_removed_again(tmp_path):
    log = full(tmp_path)
    model = trained(log, shares=[1.0, 1.0])
    served(log, model, EVERY, "r1")
    model, _ = do(job(3, log), model)
    log.told({3: 1.0})
    assert log.take_back(model, EVERY, "r2").batches == 6


def test_all_are_all_that_were_ever_logged(tmp_path):
    log = full(tmp_path)
    model = trained(log, shares=[1.0, 1.0])
    do(job(3, log, LATE), model)
    log.told({3: 1.0})
    assert log.check(None) == (23, 1)  # 22 rows, and two alike
    expected = log.take_back(model, EVERY | set(content_hashes(LATE)), "r1")
    found = served(log, model, None, "r2")
    assert (found.batches, same(found.update, expected.update)) == (14, True)  # 2 * 6, and 2
    assert log.check(None) == (0, 0)
    with pytest.raises(RefusedRequestError, match="already removed"):
        log.take_back(model, None, "r3")
    with pytest.raises(BatchLogError, match="no batch is logged"):
        full(tmp_path / "none").check(None)


def test_rows_of_others_take_nothing_back(tmp_path):
    log = full(tmp_path)
    model = trained(log, shares=[1.0, 1.0])
    for samples in (frozenset(), frozenset({"0" * 64})):
        outcome = amnesiac(model, log, samples, "r")
        assert same(outcome.arrays, model)
        assert outcome.metrics["batches"] == 0


def test_without_the_clients_share_a_request_is_refused_and_later_served(tmp_path):
    log = full(tmp_path)
    model = trained(log)
    for told, unknown in (({}, "rounds 1, 2"), ({3: 0.5}, "rounds 1, 2"), ({1: 1.0}, "round 2")):
        log.told(told)
        for ask in (lambda: log.check(EVERY), lambda: log.take_back(model, EVERY, "r")):
            with pytest.raises(BatchLogError, match=f"share unknown of {unknown}:"):
                ask()
    log.told({2: 1.0})
    log.told({1: 1.0, 2: 0.0})  # what was told last counts
    zero_second = log.take_back(model, EVERY, "r").update
    expected, _ = contribution(model, _memory([1.0, 0.0]), EVERY)
    assert same(zero_second, expected)


def _memory(shares):
    memory = InMemory()
    trained(memory)
    return memory.shared(shares)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_one(tmp_path, share):
    with pytest.raises(BatchLogError, match=re.escape("must lie in [0, 1]")):
        full(tmp_path).told({1: share})


def test_a_repeated_round_replaces_itself_and_all_after_it(tmp_path):
    log = full(tmp_path / "log")
    trained(log, 3, shares=[0.5, 0.5, 0.5])
    again, _ = do(job(2, log), initial())
    log.told({2: 0.25})
    fresh = full(tmp_path / "fresh")
    do(job(1, fresh), initial())
    fresh.told({1: 0.5})
    do(job(2, fresh), initial())
    fresh.told({2: 0.25})
    assert same(log.take_back(again, EVERY, "r").update, fresh.take_back(again, EVERY, "r").update)


def test_runs_in_one_folder_know_nothing_of_one_another(tmp_path):
    one, other = (full(tmp_path, run=run) for run in ("1", "2"))
    model = trained(one, 2, shares=[1.0, 1.0])
    apart = full(tmp_path / "apart")
    expected = apart.take_back(trained(apart, 2, shares=[1.0, 1.0]), EVERY, "r")
    with pytest.raises(BatchLogError, match="no batch is logged"):
        other.check(EVERY)
    # The other trains in between, in rounds of the same numbers, and takes all of it back.
    trained(other, 1, shares=[0.25])
    assert other.take_back(model, EVERY, "r").batches == 6
    found = one.take_back(model, EVERY, "r")
    assert same(found.update, expected.update)
    assert (found.batches, found.first) == (12, 1)


def test_ending_a_log_ends_that_of_its_run(tmp_path):
    one, other = (full(tmp_path, run=run) for run in ("1", "2"))
    for log in (one, other):
        trained(log, 1, shares=[1.0])
    one.end()
    with pytest.raises(BatchLogError, match="round 1 are needed"):
        one.check(EVERY)
    assert other.check(EVERY) == (22, 1)


def test_the_logs_of_other_runs_are_given_up_oldest_first_to_stay_within_the_limit(
    tmp_path, caplog
):
    size = files_size(tmp_path / "one", full(tmp_path / "one"))
    limit = int(3.5 * size)
    logs = [full(tmp_path / "log", run=run, limit=limit) for run in ("a", "b", "c", "d")]
    for place, log in enumerate(logs[:3]):
        trained(log, 1, shares=[1.0])
        os.utime(log.home / INDEX, ns=(place, place))
    assert "dropped" not in caplog.text  # three fit
    with locked(logs[0].home):  # in use: the next one goes
        trained(logs[3], 1, shares=[1.0])
    assert "the log of run b is dropped" in caplog.text
    assert [(log.home / INDEX).exists() for log in logs] == [True, False, True, True]
    assert sum(path.stat().st_size for path in tmp_path.glob("log/*/*.safetensors")) <= limit
    with pytest.raises(BatchLogError, match="no batch is logged"):
        logs[1].check(EVERY)
    # Its own rounds go only where there is nothing else.
    for number in (2, 3):
        do(job(number, logs[3]), initial())
    assert [(log.home / INDEX).exists() for log in logs] == [False, False, False, True]
    assert "updates of round" not in caplog.text


def files_size(folder, log):
    trained(log, 1)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# ---------------------------------------------------------------- limits and faults
def test_a_full_log_drops_its_oldest_rounds_and_says_which_are_missed(tmp_path, caplog):
    size = _size_of_a_round(tmp_path / "one")
    log = full(tmp_path / "log", limit=int(2.5 * size))
    model = trained(log, 3, shares=[1.0, 1.0, 1.0])
    assert "updates of round 1 are dropped" in caplog.text
    with pytest.raises(BatchLogError, match="batches of round 1 are needed"):
        log.take_back(model, frozenset(HASHES[:1]), "r")
    do(job(4, log, LATE), model)  # was in none of the rounds dropped, here and now also 2
    log.told({4: 1.0})
    assert log.take_back(model, frozenset(content_hashes(LATE)), "r").batches == 2
    held = sum(path.stat().st_size for path in (tmp_path / "log").glob("round*"))
    assert held <= 2.5 * size


def _size_of_a_round(folder):
    trained(full(folder), 1)
    return sum(path.stat().st_size for path in folder.glob("round*"))


def test_a_round_that_does_not_fit_is_trained_and_missed(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("client.batch_log.PART_BYTES", 1)  # a part for every batch
    log = full(tmp_path, limit=1)
    model, _ = do(job(1, log), initial())
    assert same(model, do(job(1), initial())[0])
    assert "too small for round 1" in caplog.text
    assert not list(tmp_path.glob("round*"))
    log.told({1: 1.0})
    with pytest.raises(BatchLogError, match="round 1 are needed"):
        log.take_back(model, EVERY, "r")


def test_parts_make_no_difference(tmp_path, monkeypatch):
    shares, wanted = [0.5, 1.0], frozenset(HASHES[:1])
    whole = full(tmp_path / "whole")
    model = trained(whole, shares=shares)
    monkeypatch.setattr("client.batch_log.PART_BYTES", 1)
    parts = full(tmp_path / "parts")
    trained(parts, shares=shares)
    assert len(list((tmp_path / "parts").glob("round*"))) == 12
    assert same(
        whole.take_back(model, wanted, "r").update, parts.take_back(model, wanted, "r").update
    )
    parts.told({}, ["r"])
    assert len(list((tmp_path / "parts").glob("round*"))) == 8  # one batch of each epoch is gone


@pytest.mark.parametrize("what", ["round-0001", "rows"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_told_and_nothing_is_removed(tmp_path, what, how):
    log = full(tmp_path)
    model = trained(log, shares=[1.0, 1.0])
    (path,) = tmp_path.glob(f"{what}*")
    content, index = path.read_bytes(), (tmp_path / INDEX).read_bytes()
    if how == "gone":
        path.unlink()
    else:
        half = len(content) // 2
        path.write_bytes(content[:half] if how == "cut" else
                         content[:-1] + bytes([content[-1] ^ 1]))  # fmt: skip
    for ask in (lambda: log.check(EVERY), lambda: log.take_back(model, EVERY, "r")):
        with pytest.raises(BatchLogError, match=re.escape(str(path))):
            ask()
    assert (tmp_path / INDEX).read_bytes() == index
    path.write_bytes(content)
    assert log.take_back(model, EVERY, "r").batches == 12


def test_a_damaged_index_stops_training_and_requests(tmp_path):
    log = full(tmp_path)
    model = trained(log, shares=[1.0, 1.0])
    (tmp_path / INDEX).write_text("{}")
    for act in (lambda: log.take_back(model, EVERY, "r"), lambda: do(job(3, log), model)):
        with pytest.raises(KeepingError, match="is damaged"):
            act()


def test_a_round_that_breaks_off_is_not_there_and_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr("client.batch_log.PART_BYTES", 1)
    log = full(tmp_path)
    model = trained(log, 1, shares=[1.0])
    files = sorted(tmp_path.glob("*.safetensors"))

    class Breaking(Task):
        calls = 0

        def loss(self, outputs, targets):
            self.calls += 1
            if self.calls == 3:
                raise ValueError("no more")
            return super().loss(outputs, targets)

    with pytest.raises(ValueError, match="no more"):
        do(replace(job(2, log), task=Breaking()), model)
    assert sorted(tmp_path.glob("*.safetensors")) != files
    log.take_back(model, frozenset(HASHES[:1]), "r")
    assert sorted(tmp_path.glob("*.safetensors")) == files
