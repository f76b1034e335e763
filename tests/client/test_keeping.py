"""What a client never trains on again: by content, for ever, and never by mistake forgotten."""

import hashlib
import json
import multiprocessing
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from client import rows
from client.keeping import FORGOTTEN, TOKENS, Keeping, own_options
from client.storage import KeepingError, locked
from client.task.protocol import TaskOptions
from strategies import flower
from strategies.actions import Selection

LABELS = [0, 1, 2, 0, 1, 2, 0, 1]


def data(order=range(8), labels=LABELS):
    """Rows whose inputs are all different; a new object every time."""
    inputs = torch.arange(24, dtype=torch.float32).reshape(8, 3)
    places = torch.tensor(list(order))
    return TensorDataset(inputs[places], torch.tensor(labels)[places])


class Streamed(Dataset):
    """The same rows, read one by one."""

    def __init__(self, of):
        self.of = of

    def __len__(self):
        return len(self.of)

    def __getitem__(self, row):
        return self.of[row]


def a_class(number):
    return Selection(forget="class", forget_class=number)


def samples(*tokens):
    return Selection(forget="samples", forget_tokens=",".join(tokens))


EVERYTHING = Selection(forget="all")


def firsts(examples):
    """The first entry of each row's input tells the rows of ``data`` apart: 0, 3, 6, ..."""
    return [int(examples[row][0][0]) // 3 for row in range(len(examples))]


def test_a_hash_is_that_of_dtype_shape_and_bytes_of_input_and_target():
    example = TensorDataset(torch.tensor([[1.0, 2.0]]), torch.tensor([3]))
    expected = hashlib.sha256(
        b"torch.float32(2,)torch.int64()"
        + b"\x1f" + torch.tensor([1.0, 2.0]).numpy().tobytes()
        + b"\x1f" + torch.tensor(3).numpy().tobytes()
    ).hexdigest()  # fmt: skip
    assert rows.content_hashes(example) == (expected,)


@pytest.mark.parametrize(
    "other",
    [
        TensorDataset(torch.tensor([[1.0, 2.5]]), torch.tensor([3])),
        TensorDataset(torch.tensor([[1.0, 2.0]]), torch.tensor([4])),
        TensorDataset(torch.tensor([[1.0], [2.0]]).reshape(1, 2, 1), torch.tensor([3])),
        TensorDataset(torch.tensor([[1.0, 2.0]]).double(), torch.tensor([3])),
        TensorDataset(torch.tensor([[1.0, 2.0]]), torch.tensor([3], dtype=torch.int32)),
    ],
)
def test_rows_of_other_content_have_other_hashes(other):
    example = TensorDataset(torch.tensor([[1.0, 2.0]]), torch.tensor([3]))
    assert rows.content_hashes(example) != rows.content_hashes(other)


@given(st.permutations(range(8)))
@settings(max_examples=25, deadline=None)
def test_hashes_follow_the_rows_wherever_they_are_and_however_they_are_read(order):
    expected = [rows.content_hashes(data())[row] for row in order]
    assert list(rows.content_hashes(data(order))) == expected
    assert list(rows.content_hashes(Streamed(data(order)))) == expected
    known = data()
    rows.content_hashes(known)
    for examples in (Streamed(data()), data(), known):
        some = rows.subset(examples, order[:3])
        assert list(rows.content_hashes(some)) == expected[:3]


def test_rows_that_change_from_reading_to_reading_cannot_be_known():
    class Augmented(Streamed):
        def __getitem__(self, row):
            inputs, target = self.of[row]
            return inputs + torch.rand(3), target

    with pytest.raises(KeepingError, match="differ from one reading to the next"):
        rows.content_hashes(Augmented(data()))


def test_hashing_is_done_once_per_data_set_and_not_at_all_where_nothing_is_forgotten(
    tmp_path, monkeypatch
):
    calls = []
    hashing = rows._hashes
    monkeypatch.setattr(rows, "_hashes", lambda *args: calls.append(1) or hashing(*args))
    keeping, examples = Keeping(tmp_path), data()
    assert keeping.without_forgotten(examples) is examples
    assert not calls
    assert not list(tmp_path.iterdir())
    (token,) = keeping.issue([2], examples)
    assert keeping.without_forgotten(examples) is examples
    keeping.forget(samples(token), examples, 1)
    found = keeping.without_forgotten(examples)
    assert keeping.without_forgotten(examples) is found
    rows.content_hashes(found)
    assert len(calls) == 1


@pytest.mark.parametrize("form", [lambda examples: examples, Streamed])
def test_what_is_forgotten_is_left_out_also_of_a_new_import_in_another_order(tmp_path, form):
    keeping, examples = Keeping(tmp_path), form(data())
    one, other = keeping.issue([2, 5], examples)
    assert keeping.forget(samples(one, other), examples, 4, "r-1") == 2
    assert firsts(keeping.without_forgotten(examples)) == [0, 1, 3, 4, 6, 7]
    restarted = Keeping(tmp_path)
    order = [7, 5, 3, 1, 2, 0, 6, 4]
    assert firsts(restarted.without_forgotten(form(data(order)))) == [7, 3, 1, 0, 6, 4]
    kept = json.loads((tmp_path / FORGOTTEN).read_text())["content"]
    assert list(kept["rows"].values()) == [{"round": 4, "request": "r-1"}] * 2


def test_duplicates_of_a_row_go_with_it_also_those_that_come_later(tmp_path):
    keeping, twice = Keeping(tmp_path), data([0, 1, 2, 1])
    (token,) = keeping.issue([1], twice)
    assert keeping.issue([3], twice) == [token]
    assert keeping.select(samples(token), twice) == [1, 3]
    assert keeping.forget(samples(token), twice, 1) == 2
    assert firsts(keeping.without_forgotten(twice)) == [0, 2]
    assert firsts(keeping.without_forgotten(data([1, 1, 4]))) == [4]


def test_a_class_is_forgotten_with_rows_that_come_later_and_all_only_what_is_there(tmp_path):
    keeping = Keeping(tmp_path / "class")
    assert keeping.forget(a_class(2), data([0, 1, 2]), 1) == 1
    assert firsts(keeping.without_forgotten(data())) == [0, 1, 3, 4, 6, 7]
    keeping = Keeping(tmp_path / "all")
    assert keeping.forget(EVERYTHING, data([0, 1, 2]), 1) == 3
    assert firsts(keeping.without_forgotten(data())) == [3, 4, 5, 6, 7]


def test_a_row_that_is_away_is_forgotten_before_it_comes_back(tmp_path):
    keeping = Keeping(tmp_path)
    tokens = keeping.issue([4, 1, 6], data())
    # It counts, for it may have been trained on: two that are away, and one that is there twice.
    twice = data([0, 1, 1])
    assert keeping.forget(samples(*tokens), twice, 1) == 4
    assert keeping.forget(samples(tokens[0]), data([0, 1]), 1) == 1
    assert firsts(keeping.without_forgotten(data([4, 5]))) == [5]


def test_tokens_are_opaque_stay_with_their_rows_and_strangers_are_passed_over(tmp_path):
    keeping, examples = Keeping(tmp_path), data()
    first = keeping.issue([0, 1], examples)
    assert all(re.fullmatch("[0-9a-f]{32}", token) for token in first)
    assert Keeping(tmp_path).issue([1, 2], data())[0] == first[1]
    assert Keeping(tmp_path / "other").issue([0], examples) != first[:1]
    strange = "0" * 32
    assert keeping.select(samples(strange, first[1]), examples) == [1]
    assert keeping.forget(samples(strange), examples, 1) == 0
    assert keeping.without_forgotten(examples) is examples


def test_simulated_tokens_repeat_with_the_seed_and_differ_between_clients(tmp_path):
    def issued(name, seed):
        return Keeping(tmp_path / name / "3").issue([0, 1], data(), seed=seed)

    assert issued("a", 7) == issued("b", 7) != issued("c", 8)
    assert Keeping(tmp_path / "a/4").issue([0, 1], data(), seed=7) != issued("a", 7)


def test_the_parts_of_a_selection_leave_out_what_was_forgotten_before(tmp_path):
    keeping, examples = Keeping(tmp_path), data([0, 1, 2, 3, 4, 0])
    (token,) = keeping.issue([0], examples)
    keeping.forget(a_class(2), examples, 1)
    forget, remain = keeping.parts(samples(token), examples)
    assert (firsts(forget), firsts(remain)) == ([0, 0], [1, 3, 4])
    forget, remain = keeping.parts(a_class(1), examples)
    assert (firsts(forget), firsts(remain)) == ([1, 4], [0, 3, 0])


@given(
    st.lists(
        st.one_of(
            st.integers(0, 2).map(a_class),
            st.just(EVERYTHING),
            st.lists(st.integers(0, 7), min_size=1, max_size=3),
        ),
        max_size=4,
    )
)
@settings(max_examples=25, deadline=None)
def test_forgetting_only_ever_adds(tmp_path_factory, requests):
    folder = tmp_path_factory.mktemp("keeping")
    expected, examples = set(range(8)), data()
    for number, request in enumerate(requests):
        keeping = Keeping(folder)
        if isinstance(request, list):
            selection, gone = samples(*keeping.issue(request, examples)), set(request)
        else:
            selection = request
            gone = {
                r for r in range(8) if request.forget == "all" or LABELS[r] == request.forget_class
            }
        keeping.forget(selection, examples, number)
        expected -= gone
        assert set(firsts(Keeping(folder).without_forgotten(examples))) == expected


def test_forgetting_again_keeps_when_it_was_first(tmp_path):
    for number in (3, 9):
        for selection in (a_class(1), EVERYTHING):
            Keeping(tmp_path).forget(selection, data(), number, f"r-{number}")
    forgotten = Keeping(tmp_path).forgotten()
    for when in (*forgotten.classes.values(), *forgotten.rows.values()):
        assert (when.round, when.request) == (3, "r-3")


def test_it_is_on_the_disk_when_forgetting_returns_and_another_object_sees_it(tmp_path):
    one, other, examples = Keeping(tmp_path), Keeping(tmp_path), data()
    one.forget(a_class(0), examples, 1)
    assert firsts(one.without_forgotten(examples)) == [1, 2, 4, 5, 7]
    assert firsts(other.without_forgotten(examples)) == [1, 2, 4, 5, 7]
    other.forget(a_class(1), examples, 2)
    assert firsts(one.without_forgotten(examples)) == [2, 5]


def damaged(text):
    flipped = json.loads(text)
    entry = next(iter(flipped["content"]["rows"]))
    flipped["content"]["rows"]["0" * 64] = flipped["content"]["rows"].pop(entry)
    newer = json.dumps({**json.loads(text), "version": 2})
    return {
        "empty": "", "cut": text[: len(text) // 2], "other": "[]", "flipped": json.dumps(flipped),
        "newer": newer, "no content": '{"version": 1, "sha256": "", "content": {}}',
    }  # fmt: skip


@pytest.mark.parametrize("how", ["empty", "cut", "other", "flipped", "newer", "no content"])
@pytest.mark.parametrize("restarted", [True, False])
def test_a_damaged_list_stops_training_and_forgetting_and_is_left_alone(tmp_path, how, restarted):
    keeping, examples = Keeping(tmp_path), data()
    (token,) = keeping.issue([1], examples)
    keeping.forget(samples(token), examples, 1)
    keeping.without_forgotten(examples)
    path = tmp_path / FORGOTTEN
    text = damaged(path.read_text())[how]
    path.write_text(text)
    keeping = Keeping(tmp_path) if restarted else keeping
    for act in (
        lambda: keeping.without_forgotten(examples),
        lambda: keeping.forget(a_class(0), examples, 2),
        lambda: keeping.issue([2], examples),
    ):
        with pytest.raises(KeepingError, match=re.escape(str(path))):
            act()
    assert path.read_text() == text


@pytest.mark.parametrize("restarted", [True, False])
def test_a_list_that_is_gone_is_noticed(tmp_path, restarted):
    keeping, examples = Keeping(tmp_path), data()
    (token,) = keeping.issue([1], examples)
    keeping.forget(samples(token), examples, 1)
    keeping.without_forgotten(examples)
    (tmp_path / FORGOTTEN).unlink()
    with pytest.raises(KeepingError, match="is gone"):
        (Keeping(tmp_path) if restarted else keeping).without_forgotten(examples)


def test_an_older_list_in_its_place_is_noticed_by_who_saw_the_newer(tmp_path):
    keeping, examples = Keeping(tmp_path), data()
    keeping.forget(a_class(0), examples, 1)
    older = (tmp_path / FORGOTTEN).read_bytes()
    keeping.forget(a_class(1), examples, 2)
    keeping.without_forgotten(examples)
    (tmp_path / FORGOTTEN).write_bytes(older)
    with pytest.raises(KeepingError, match="lacks what was in it before"):
        keeping.without_forgotten(examples)


def test_damaged_tokens_are_no_strangers_tokens(tmp_path):
    keeping, examples = Keeping(tmp_path), data()
    (token,) = keeping.issue([1], examples)
    (tmp_path / TOKENS).write_text("{}")
    with pytest.raises(KeepingError, match=re.escape(TOKENS)):
        keeping.forget(samples(token), examples, 1)
    assert keeping.without_forgotten(examples) is examples


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeepingError, match="cannot be used"):
        Keeping(tmp_path / "file/folder").forget(a_class(0), data(), 1)


def test_classes_need_targets_that_are_some(tmp_path):
    measured = TensorDataset(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(KeepingError, match="no numbers of classes"):
        Keeping(tmp_path).select(a_class(0), measured)


@pytest.mark.parametrize("before", [True, False])
def test_a_class_of_targets_that_are_none_is_refused_before_it_is_written(tmp_path, before):
    measured = TensorDataset(torch.zeros(2, 3), torch.zeros(2))
    keeping = Keeping(tmp_path)
    if before:  # a row of it was forgotten earlier
        keeping.forget(EVERYTHING, data(), 1)
    held = (tmp_path / FORGOTTEN).read_bytes() if before else None
    with pytest.raises(KeepingError, match="no numbers of classes"):
        keeping.forget(a_class(0), measured, 2)
    assert (tmp_path / FORGOTTEN).exists() == before
    assert not before or (tmp_path / FORGOTTEN).read_bytes() == held
    for client in (keeping, Keeping(tmp_path)):  # training goes on, after a restart, too
        assert client.without_forgotten(measured) is measured


def test_a_class_that_is_not_there_yet_is_forgotten_before_it_comes(tmp_path):
    keeping = Keeping(tmp_path)
    assert keeping.forget(a_class(2), data(range(2)), 1) == 0
    assert firsts(keeping.without_forgotten(data())) == [0, 1, 3, 4, 6, 7]


def test_rows_that_are_not_there_get_no_token(tmp_path):
    with pytest.raises(KeepingError, match="from 0 to 7, got 8"):
        Keeping(tmp_path).issue([0, 8], data())
    assert not (tmp_path / TOKENS).exists()


def _forget_each(folder, numbers):
    examples = data()
    for number in numbers:
        Keeping(folder).issue([number], examples)
        keeping = Keeping(folder)
        keeping.forget(samples(*keeping.issue([number], examples)), examples, number)


def test_two_processes_lose_nothing_of_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    parts = ([0, 2, 4, 6], [1, 3, 5, 7])
    running = [context.Process(target=_forget_each, args=(tmp_path, part)) for part in parts]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    assert len(Keeping(tmp_path).forgotten().rows) == 8
    assert len(Keeping(tmp_path).without_forgotten(data())) == 0


def test_a_folder_in_use_is_waited_for_and_then_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("client.storage.PATIENCE_S", 0)
    keeping = Keeping(tmp_path)
    with locked(tmp_path):
        for act in (
            lambda: keeping.forget(a_class(0), data(), 1),
            lambda: keeping.issue([0], data()),
        ):
            with pytest.raises(KeepingError, match="in use by another process"):
                act()
        assert keeping.without_forgotten(data())  # reading waits for nobody
    assert keeping.forget(a_class(0), data(), 1) == 3


# ---------------------------------------------------------------- settings
def test_the_node_config_wins_over_the_run():
    context = flower.client_context(1, 1001, 3, 10)
    options = TaskOptions(client_dir="/run", refuse="class")
    assert own_options(options, context) is options
    context.node_config |= {"client-dir": "/own", "refuse": "all", "task": "mnist"}
    own = own_options(options, context)
    assert (own.client_dir, own.refuse, own.task) == ("/own", "all", "digits")
    context.node_config["batch-log-limit"] = -1
    with pytest.raises(KeepingError, match="node-config: batch-log-limit"):
        own_options(options, context)


def test_only_what_can_be_asked_can_be_refused():
    assert TaskOptions(refuse="class, samples,ascend,forget,all")
    with pytest.raises(ValueError, match="there is no clas to refuse"):
        TaskOptions(refuse="clas,ascend")
