"""Amnesiac unlearning with real clients and logs, while messages are lost and servers fail."""

from dataclasses import replace

import pytest
import torch

from client.app import build_app
from client.keeping import keeping_at
from client.rows import subset
from client.task.evaluation import state_of
from client.task.protocol import load_task
from server.federation import build_federation, initial_model
from server.settings import read_settings
from simulation.engines.inprocess import InProcessGrid
from strategies import flower, messages
from strategies.actions import Amnesiac
from strategies.loop import run_rounds
from unlearning.catalogue import Target
from unlearning.parameters import trained_names
from unlearning.routing import Request

CLIENTS = 4
ASK, CONFIRM, DROP = "train.amnesiac", "query.batches", "query.forget"


class Federation:
    """A federation whose messages may be lost.

    ``unsent`` and ``unheard`` say of a kind of message and a client whether the message, or its
    reply, is lost; ``spoilt`` whether the reply's weight is one that no screen lets through.
    """

    def __init__(self, folder, **changes):
        self.settings = read_settings({
            "task": "digits", "model": "mlp", "examples": 120, "client-dir": str(folder),
            "identity": "partition", "rounds": 3, "rate-limit": 1, "detector": "none",
            "method": "none", "ready-methods": "amnesiac", "min-clients": 2, "recovery-cap": 1,
            "batch-log": "full", "batch-log-precision": "float32", "round-deadline": 5.0, **changes,
        })  # fmt: skip
        self.folder = folder
        self.task = load_task(self.settings.task_options())
        app = build_app(self.settings.task_options().model_dump(by_alias=True))
        self.grid = InProcessGrid(app, CLIENTS)
        self._send, self.grid.send_and_receive = self.grid.send_and_receive, self._lossy
        self.unsent = self.unheard = self.spoilt = lambda kind, client: False
        self.begin()

    def begin(self):
        """Make a server that knows nothing."""
        model = initial_model(self.task, 0)
        self.server = build_federation(self.settings, model, self.task)
        self.model, self.records, self.subtracted, self.asked = state_of(model), [], [], []

    def _lossy(self, outgoing, *, timeout=None):
        outgoing, kept = list(outgoing), []

        def said(fault, message):
            client = list(self.grid.contexts).index(message.metadata.dst_node_id)
            return fault(message.metadata.message_type, client)

        sent = [message for message in outgoing if not said(self.unsent, message)]
        for message in outgoing:
            if message not in sent:
                flower.with_id(message)
        replies = list(self._send(sent, timeout=timeout))
        by_id = {message.metadata.message_id: message for message in outgoing}
        for reply in replies:
            message = by_id[reply.metadata.reply_to_message_id]
            if said(self.spoilt, message):
                reply.content[messages.METRICS]["num-examples"] = -1
            if not said(self.unheard, message):
                kept.append(reply)
        return kept

    def play(self, number):
        """Go on to a round; note what was subtracted."""

        def on_ask(ask):
            if ask.action == ASK:
                self.asked.append(ask.arrays)

        def on_round(record, model):
            self.records.append(record)
            done = record.unlearning
            if done is not None and done.refused is None and done.method == "amnesiac":
                names = trained_names(model)
                self.subtracted.append({n: self.asked[-1][n] - model[n] for n in names})
            self.model = model

        played = self.records[-1].number if self.records else 0
        run_rounds(self.server, self.grid, self.model, rounds=number, played=played,
                   train_config=self.settings.to_record(), on_round=on_round,
                   on_ask=on_ask)  # fmt: skip
        return [record.unlearning for record in self.records if record.unlearning is not None]

    def forget_class(self, number):
        self.server.request(Request(Target.CLASS, (), "privacy", label=number, method="amnesiac",
                                    guarantee="approximate"))  # fmt: skip

    def forget_rows(self, client, rows):
        examples = self.task.client_data(client, CLIENTS).train
        tokens = keeping_at(str(self.folder), client).issue(rows, examples)
        name = f"client-{client:04d}"
        self.server.request(Request(Target.SAMPLES, (name,), "privacy", tokens=tuple(tokens),
                                    method="amnesiac", guarantee="approximate"))  # fmt: skip

    def bytes_logged(self):
        return sum(path.stat().st_size for path in self.folder.glob("*/batches/1/round*"))


def once(kind, client=2):
    """A fault that happens to one message."""
    left = [True]

    def fault(found, node):
        if found == kind and node == client and left:
            left.clear()
            return True
        return False

    return fault


def alike(one, other):
    return all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)


@pytest.fixture(scope="module")
def faultless(tmp_path_factory):
    """Two requests, one after the other, without any fault."""
    made = Federation(tmp_path_factory.mktemp("faultless"))
    made.play(3)
    made.forget_class(3)
    first = made.play(4)[0]
    made.forget_class(4)
    made.play(6)
    assert len(made.subtracted) == 2
    assert first.settings["holders"] == CLIENTS
    return made, first


@pytest.mark.parametrize("fault", ["unsent", "unheard", "spoilt"])
def test_an_answer_that_is_not_used_costs_nothing_but_time(fault, faultless, tmp_path):
    expected, done = faultless
    made = Federation(tmp_path)
    made.play(3)
    logged = made.bytes_logged()
    setattr(made, fault, once(ASK))
    made.forget_class(3)
    refused, served = made.play(6)[:2]
    assert "train.amnesiac needs an answer of everybody asked: client-0002" in refused.refused
    assert (served.refused, served.settings) == (None, done.settings)
    assert alike(made.subtracted[0], expected.subtracted[0])
    assert made.bytes_logged() > 0.5 * logged
    assert not made.server.forgetting.pending


@pytest.mark.parametrize("fault", ["unsent", "unheard"])
def test_who_misses_that_it_was_taken_back_subtracts_nothing_twice(fault, faultless, tmp_path):
    expected, _ = faultless
    made = Federation(tmp_path)
    made.play(3)
    confirmed = []

    def lost(kind, client):  # the second message of this kind is the confirmation
        if kind == CONFIRM and client == 2:
            confirmed.append(client)
        return kind == CONFIRM and client == 2 and len(confirmed) == 2

    setattr(made, fault, lost)
    made.forget_class(3)
    first = made.play(4)[0]
    assert first.refused is None
    (warning,) = [text for text in first.warnings if text.startswith("unheard")]
    assert "query.batches is without client-0002" in warning
    made.forget_class(4)
    made.play(6)
    assert len(made.subtracted) == 2
    for found, wanted in zip(made.subtracted, expected.subtracted, strict=True):
        assert alike(found, wanted)
    # Whatever it missed, it was told with the messages since.
    assert made.bytes_logged() == expected.bytes_logged()


def test_a_server_that_starts_over_finds_no_batches_of_a_course_that_is_gone(tmp_path):
    made = Federation(tmp_path)
    made.play(3)
    made.forget_class(3)
    asked = []

    def stops(kind, client):
        if kind == ASK:
            asked.append(client)
        if kind == CONFIRM and asked:  # its answers are there, and nobody is told
            raise KeyboardInterrupt
        return False

    made.unsent = stops
    with pytest.raises(KeyboardInterrupt):
        made.play(4)
    assert sorted(asked) == list(range(CLIENTS))
    made.unsent = lambda kind, client: False
    made.begin()
    made.play(3)
    held = made.bytes_logged()
    made.forget_class(3)  # which is dropped since, and in no round of this course
    done = made.play(4)[0]
    assert (done.refused, done.settings["batches"]) == (None, 0)
    assert float(sum(t.abs().sum() for t in made.subtracted[0].values())) == 0
    assert made.bytes_logged() >= held


def test_the_same_rows_are_the_same_request_only_while_its_plan_runs(tmp_path):
    made = Federation(tmp_path)
    made.play(2)
    made.forget_rows(1, [0, 1])
    made.play(3)
    made.forget_rows(1, [0, 1, 2])
    made.play(5)
    (first, second) = made.server.memory.taken_back
    assert first.partition("-")[0] == "3"
    assert first != second
    assert Amnesiac(forget="all", request=first).config()["request"] == first


# ---------------------------------------------------------------- rounds that are played again
def leave(made, client, method="rollback"):
    name = f"client-{client:04d}"
    made.server.request(Request(Target.CLIENT, (name,), "privacy", method=method, guarantee=(
        "exact" if method == "rollback" else "approximate")))  # fmt: skip


@pytest.mark.parametrize("before", [1, 3])
def test_after_a_replay_logs_tell_what_they_would_if_the_leaver_had_never_been(before, tmp_path):
    made = Federation(tmp_path / "replayed", **{"ready-methods": "amnesiac,rollback"})
    made.play(before)
    leave(made, 3)
    made.play(before + 3)
    made.forget_rows(1, [0, 1, 2])
    made.play(before + 4)
    expected = Federation(tmp_path / "never")
    expected.unheard = lambda kind, client: client == 3 and kind == "train"
    expected.play(before + 3)
    expected.forget_rows(1, [0, 1, 2])
    done = expected.play(before + 4)[-1]
    found = made.play(before + 4)[-1]
    assert (found.refused, found.method, found.settings) == (None, "amnesiac", done.settings)
    assert alike(made.subtracted[0], expected.subtracted[0])


def test_who_was_away_in_a_replay_has_no_batches_in_the_rounds_that_it_undid(tmp_path):
    made = Federation(tmp_path, **{"ready-methods": "amnesiac,rollback"})
    made.play(3)
    leave(made, 3)
    number = made.server.record.number
    made.unsent = lambda kind, client: (  # of round 4 and its replay, the replay alone is lost
        kind == "train" and client == 1 and bool(made.server.record.participants)
    )
    assert made.play(number + 1)[0].refused is None
    made.unsent = lambda kind, client: False
    made.forget_rows(1, [0, 1, 2])
    made.play(number + 2)
    # Its log of rounds 1 to 4 is whole, and the model is made of none of it. Before round 5 it had
    # dropped the rows: nothing is left to take back.
    done = made.records[number + 2].unlearning
    assert (done.refused, done.settings["batches"]) == (None, 0)
    assert not any(bool(tensor.any()) for sent in made.subtracted for tensor in sent.values())


@pytest.mark.parametrize("method", ["federaser", "verifi"])
def test_after_training_of_another_kind_nothing_is_taken_back(method, tmp_path):
    made = Federation(tmp_path, **{"ready-methods": f"amnesiac,{method}"})
    made.play(3)
    leave(made, 3, method)
    assert made.play(4)[0].refused is None
    made.play(5)
    made.forget_rows(1, [0, 1, 2])
    first = {"federaser": 1, "verifi": 5}[method]
    refused = made.play(6)[-1].refused
    assert f"the batch log of client-0001 is of no use from round {first} on" in refused


def test_a_replay_that_does_not_count_leaves_logs_that_nothing_is_taken_back_from(tmp_path):
    made = Federation(tmp_path, **{"ready-methods": "amnesiac,rollback"})
    made.play(3)
    leave(made, 3)
    asked = []

    def deaf(kind, client):  # from the second round that is played again
        asked.append(kind == "train" and bool(made.server.record.participants))
        return asked[-1] and sum(asked) > 3

    made.unsent = deaf
    assert "made no model" in made.play(4)[0].refused
    made.unsent = lambda kind, client: False
    made.server.forgetting.withdraw(made.server.forgetting.pending)
    made.play(6)
    made.forget_rows(1, [0, 1, 2])
    refused = made.play(7)[-1].refused
    assert "client-0001" in refused
    assert made.subtracted == []


# ---------------------------------------------------------------- rows that are away
def only_one_row_left(monkeypatch, client):
    """The owner takes all rows but one out of its folder; its holding is another object then."""
    kind = type(load_task(read_settings({"task": "digits"}).task_options()))
    whole = kind.client_data

    def less(task, partition, partitions):
        found = whole(task, partition, partitions)
        return replace(found, train=subset(found.train, [0])) if partition == client else found

    monkeypatch.setattr(kind, "client_data", less)


def test_of_who_leaves_all_is_taken_back_that_it_ever_trained_on(tmp_path, monkeypatch):
    taken = []
    for here in (True, False):
        made = Federation(tmp_path / str(here), **{"batch-size": 4})
        made.play(3)
        if not here:
            only_one_row_left(monkeypatch, 1)
        made.server.request(Request(Target.CLIENT, ("client-0001",), "privacy", method="amnesiac",
                                    guarantee="approximate", target_cooperates=True))  # fmt: skip
        done = made.play(4)[0]
        assert done.refused is None
        taken.append((done.settings, made.subtracted[0]))
    assert taken[0][0] == taken[1][0]
    assert taken[0][0]["batches"] > 3  # more than one of every round
    assert alike(taken[0][1], taken[1][1])


def test_rows_that_are_away_are_taken_back_by_their_tokens(tmp_path, monkeypatch):
    made = Federation(tmp_path, **{"batch-size": 4})
    made.play(3)
    examples = made.task.client_data(1, CLIENTS).train
    tokens = keeping_at(str(tmp_path), 1).issue([1, 2], examples)
    only_one_row_left(monkeypatch, 1)
    made.server.request(Request(Target.SAMPLES, ("client-0001",), "privacy", tokens=tuple(tokens),
                                method="amnesiac", guarantee="approximate"))  # fmt: skip
    done = made.play(4)[0]
    assert done.refused is None
    assert 3 <= done.settings["batches"] <= 6  # in rounds 1 to 3, one or two in each
